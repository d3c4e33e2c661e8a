"""`python -m convert` in a checkout: the same as `ttame convert`."""

import sys

from ttame_jax.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
