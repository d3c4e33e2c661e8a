"""Presets of `ttame train`, one file per backbone. Each lists the differences from the defaults."""
