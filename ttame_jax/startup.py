"""What a command does before JAX starts: set up the compilation cache and the other processes."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Iterator

import jax

from ttame_jax.files import cache_dir

CACHE_BYTES = 4 * 2**30
"""Size of the cache of compiled programs, beyond which the least recently used are deleted."""


def use_compilation_cache() -> None:
    """Caches compiled programs in the user's cache folder, up to `CACHE_BYTES`.

    The folder is ``programs`` in `ttame_jax.files.cache_dir()`. JAX's own environment variables
    ``JAX_COMPILATION_CACHE_DIR``, ``JAX_COMPILATION_CACHE_MAX_SIZE`` and
    ``JAX_ENABLE_COMPILATION_CACHE`` take precedence.
    """
    # pyrefly: ignore[missing-attribute]  # JAX's stubs do not list its options
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "programs"))
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
        # JAX caches programs that take a second to compile. Many take a little less at startup.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of one run find each other.

    On Cloud TPUs and under Slurm and Open MPI everything is detected.
    """

    coordinator_address: str | None = None
    """HOST:PORT of process 0, with a free port of its machine."""
    num_processes: int | None = None
    """Number of processes; 1 disables the detection of a cluster."""
    process_id: int | None = None
    """Index of this process, from 0."""
    heartbeat_timeout: int = 100
    """Seconds without a heartbeat from one process after which the others exit."""


@contextlib.contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """Runs its body together with the other processes of the run, if there are any.

    If a process fails, it exits at once. The others cannot continue and exit after the heartbeat
    timeout at the latest.

    Raises:
      ValueError: the processes are described only in part, or wrongly.
    """
    _check_address(processes.coordinator_address)
    with contextlib.ExitStack() as stack:
        if _initialize(processes):
            stack.push(_end)
        yield


def _check_address(address: str | None) -> None:
    host, _, port = (address or "HOST:1").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator-address must be HOST:PORT, not {address!r}")


def _end(kind: type[BaseException] | None, error: BaseException | None, _) -> None:
    if isinstance(error, SystemExit):
        os._exit(int(error.code or 0))  # an orderly exit would wait for the others
    if error is not None:
        print(_last_words(error), file=sys.stderr, flush=True)
        os._exit(1)
    jax.distributed.shutdown()


def _initialize(processes: Processes) -> bool:
    """Whether there are other processes."""
    given = (processes.coordinator_address, processes.num_processes, processes.process_id)
    if processes.num_processes == 1:
        return False
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=processes.heartbeat_timeout)
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(
            f"cannot connect to the other processes of the run: {error}"
        ) from error
    except (ValueError, RuntimeError) as error:
        if given == (None, None, None):
            # No cluster is detected, or JAX is initialised already (a program that calls `main`).
            return False
        raise ValueError(
            "without a detected cluster, several processes need --coordinator-address HOST:PORT, "
            f"--num-processes and --process-id ({error})"
        ) from error
    print(
        f"process {jax.process_index()} of {jax.process_count()}: if one fails, the others exit "
        f"within {processes.heartbeat_timeout} s; the same commands resume a run",
        file=sys.stderr,
    )
    return True


def _last_words(error: BaseException) -> str:
    if not isinstance(error, jax.errors.JaxRuntimeError) or os.environ.get("TTAME_TRACEBACK"):
        return "".join(traceback.format_exception(error))
    return (
        f"ttame: process {jax.process_index()} of {jax.process_count()} failed, or lost another "
        f"({str(error).splitlines()[0]}): restart all of them to resume the run from its last "
        "checkpoint"
    )
