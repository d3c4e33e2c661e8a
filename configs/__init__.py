"""Presets of `ttame train`, one backbone a file: each says what differs from the defaults."""
