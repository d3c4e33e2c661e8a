"""Trains T-TAME: `python train.py --backbone vit_b16` is `ttame train --backbone vit_b16`."""

import sys

from ttame_jax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
