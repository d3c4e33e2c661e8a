"""Whole studies: each trains or measures, and writes tables and pictures."""
