"""Downloads that fail within seconds where there is no network."""

import contextlib
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

SECONDS = 5
"""How long a server may stay silent."""


@contextlib.contextmanager
def download(url: str) -> Iterator[None]:
    """Checks that a server answers, and bounds how long its sockets wait in the body.

    Libraries retry for a long time, or wait forever, if it does not.

    Raises:
      OSError: the server does not answer.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # which is an answer, too
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD")).close()
        yield
    finally:
        socket.setdefaulttimeout(before)
