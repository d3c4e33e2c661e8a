"""How the command line reports errors."""

import contextlib
import os
import signal
import sys

import absl.logging


@contextlib.contextmanager
def one_line_errors(program: str):
    """Exits with a one-line message and status 1 if the body raises a user error, 130 on Ctrl-C.

    If ``TTAME_TRACEBACK`` is set, the traceback is shown instead. Orbax's warnings about read-only
    checkpoints are suppressed.
    """
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TTAME_TRACEBACK"):
            raise
        sys.exit(f"{program}: {error} (TTAME_TRACEBACK=1 shows where)")
    except KeyboardInterrupt:
        if os.environ.get("TTAME_TRACEBACK"):
            raise
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
