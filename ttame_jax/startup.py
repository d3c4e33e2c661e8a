"""What a command does before JAX starts: it finds its compilation cache and its fellow processes."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX has been told of another.

    That is ``$XDG_CACHE_HOME/ttame_jax`` (``~/.cache/ttame_jax``); JAX's own environment
    variables ``JAX_COMPILATION_CACHE_DIR`` and ``JAX_ENABLE_COMPILATION_CACHE`` have their way.
    """
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "ttame_jax"))
        # JAX keeps what took a second to compile; much that starting needs takes a little less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of one run, each on its machine, find each other.

    On Cloud TPUs and under Slurm and Open MPI all of it is known without being given.
    """

    coordinator_address: str | None = None
    """HOST:PORT of process 0, a free port of its machine."""
    num_processes: int | None = None
    """How many there are; 1 runs this one alone, cluster or not."""
    process_id: int | None = None
    """Which of them this is, from 0 on."""
    heartbeat_timeout: int = 100
    """Seconds without a sign of life from one of them after which the others end."""


@contextlib.contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """Runs its body together with the run's other processes, if there are any.

    Where a process fails the others cannot go on: it ends at once, and they end as they miss it,
    after the heartbeat timeout at the latest.

    Raises:
      ValueError: if the processes are described only in part.
    """
    with contextlib.ExitStack() as stack:
        if _initialize(processes):
            stack.push(_end)
        yield


def _end(kind: type[BaseException] | None, error: BaseException | None, _) -> None:
    if error is not None:
        print(_last_words(error), file=sys.stderr, flush=True)
        os._exit(1)  # an orderly end would wait for the others
    jax.distributed.shutdown()


def _initialize(processes: Processes) -> bool:
    """Whether there are others."""
    given = (processes.coordinator_address, processes.num_processes, processes.process_id)
    if processes.num_processes == 1:
        return False
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=processes.heartbeat_timeout)
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(f"cannot join the run's other processes: {error}") from error
    except (ValueError, RuntimeError) as error:
        if given == (None, None, None):
            # No cluster is detected, or JAX has started already: in a program that calls `main`.
            return False
        raise ValueError(
            "processes that no cluster describes need --coordinator-address HOST:PORT, "
            f"--num-processes and --process-id ({error})"
        ) from error
    print(
        f"process {jax.process_index()} of {jax.process_count()}: if one fails the others end "
        f"within {processes.heartbeat_timeout} s; the same commands resume a run",
        file=sys.stderr,
    )
    return True


def _last_words(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return str(error.code)
    if not isinstance(error, jax.errors.JaxRuntimeError) or os.environ.get("TTAME_TRACEBACK"):
        return "".join(traceback.format_exception(error))
    return (
        f"ttame: process {jax.process_index()} of {jax.process_count()} failed, or lost another "
        f"({str(error).splitlines()[0]}): start all of them again, and the run resumes from its "
        "last checkpoint"
    )
