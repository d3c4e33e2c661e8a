"""What a command line shows of errors and warnings."""

import contextlib
import os
import sys

import absl.logging


@contextlib.contextmanager
def one_line_errors(program: str):
    """Ends the program with one line for a mistake of its user, and exit status 1.

    With ``TTAME_TRACEBACK`` set the error is shown as Python does. Orbax's warnings, of opening
    checkpoints only to read, are not shown.
    """
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TTAME_TRACEBACK"):
            raise
        sys.exit(f"{program}: {error} (TTAME_TRACEBACK=1 shows where)")
