"""Grain's worker processes: how many there are, their shared memory, and what if one dies."""

import multiprocessing
import multiprocessing.util
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from multiprocessing import resource_tracker
from typing import Any

import grain
from absl import flags

from ttame_jax.errors import Failure

_PREFETCH = 2  # batches made ahead, by each worker process or in-process by threads
_CHECK_SECONDS = 1  # between checks that all workers live
_SHARED_MEMORY = "/dev/shm"
_DEAD = (
    "an input worker has died, as happens when memory runs out: the same command resumes the run; "
    "fewer --workers need less memory, and 0 uses threads instead"
)

_waiting = []  # Grain's iterators that wait for a dead worker, as their ends would, too


def bounded(workers: int) -> int:
    """No more workers than cores, or two."""
    cores = max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 2)
    if workers > cores:
        print(f"{workers} workers on {cores} cores: {cores} are started", file=sys.stderr)
    return min(workers, cores)


def end_if_waiting() -> None:
    """Ends the process at once, at its exit, if one of Grain's iterators waits for a dead worker.

    Grain's own end would wait, too.
    """
    if _waiting:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class Prefetched:
    """Iterator over the batches of a Grain data set, made ahead by threads or worker processes.

    A worker that is killed while it writes leaves Grain waiting for the rest of its batch. Here,
    that is an error.
    """

    def __init__(self, iterator: grain.DatasetIterator, watched: bool):
        self._iterator, self._watched = iterator, watched
        self._others = set(multiprocessing.active_children())
        self._workers = set()
        self._dead = False
        self._iterator.start_prefetch()

    def __next__(self) -> Any:
        """Returns the next batch.

        Raises:
          Failure: a worker has died.
        """
        if not self._watched:
            return next(self._iterator)
        results: queue.Queue[Any] = queue.Queue(1)

        def take():
            try:
                results.put(next(self._iterator))
            except BaseException as error:  # noqa: BLE001  raised below, in the caller's thread
                results.put(error)

        threading.Thread(target=take, daemon=True).start()
        while True:
            self._workers |= set(multiprocessing.active_children()) - self._others
            try:
                result = results.get(timeout=_CHECK_SECONDS)
            except queue.Empty:
                if any(worker.exitcode for worker in self._workers):
                    self._abandon()
                    raise Failure(_DEAD) from None
                continue
            if isinstance(result, RuntimeError) and "Worker process was" in str(result):
                raise Failure(_DEAD) from result
            if isinstance(result, BaseException):
                raise result
            return result

    def _abandon(self) -> None:
        self._dead = True
        _waiting.append(self._iterator)
        for worker in self._workers:
            worker.kill()

    def close(self) -> None:
        """Stops the workers."""
        if not self._dead:
            self._iterator.close()


def prefetched(dataset: grain.MapDataset, workers: int, size: int) -> Prefetched:
    """Starts to make the batches of a data set.

    Args:
      dataset: the batches.
      workers: number of worker processes; 0 uses threads of this process.
      size: of a batch, in bytes.
    """
    if not flags.FLAGS.is_parsed():  # grain 0.2.18 reads a flag even if none are parsed (#1355)
        flags.FLAGS.mark_as_parsed()
    threads = 1 if workers else _PREFETCH
    batches = dataset.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=_PREFETCH))
    if workers:
        _start_resource_tracker()
    # Only images are worth their own block of shared memory. grain 0.2.18 has these options only
    # in its experimental module.
    fits = not workers or _fits_in_shared_memory((_PREFETCH + 2) * workers * size)
    options = grain.experimental.DatasetOptions(min_shm_size=2**16 if fits else sys.maxsize)
    batches = grain.experimental.WithOptionsIterDataset(batches, options)
    batches = batches.mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=_PREFETCH),
        worker_init_fn=_start_worker,
    )
    return Prefetched(iter(batches), watched=workers > 0)


def _fits_in_shared_memory(needed: int) -> bool:
    """Whether batches can be passed through shared memory. A worker that exceeds it is killed."""
    if not os.path.isdir(_SHARED_MEMORY):
        return True
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        print(
            f"{_SHARED_MEMORY} has {free / 2**20:.0f} MiB left and batches need "
            f"{needed / 2**20:.0f} MiB: they go through pipes, which is slower (in Docker, raise "
            "--shm-size, or use --workers 0)",
            file=sys.stderr,
        )
    return needed <= free


def _start_resource_tracker() -> None:
    """Starts the process that unlinks leaked shared memory in a session of its own.

    `multiprocessing` starts it in the process group of its parent, where whoever kills the group
    kills it, too, and the shared memory stays.
    """

    def spawn(path, args, passfds):
        return subprocess.Popen(
            args,
            executable=path,
            pass_fds=passfds,
            start_new_session=True,
            stderr=subprocess.DEVNULL,  # it warns of what a killed process has left
        ).pid

    usual = multiprocessing.util.spawnv_passfds
    # pyrefly: ignore[bad-assignment]
    multiprocessing.util.spawnv_passfds = spawn
    try:
        resource_tracker.ensure_running()
    finally:
        multiprocessing.util.spawnv_passfds = usual


def _start_worker(worker_index: int, worker_count: int):
    """Ends this worker with its parent and not before.

    Grain's workers would wait forever for a parent that SIGKILL has ended. Signals to the whole
    process group, such as Ctrl-C, are the parent's to answer: it stops its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch():
        # pyrefly: ignore[missing-attribute]  # a worker has a parent
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
