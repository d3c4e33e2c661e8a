import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttame_jax.mesh import data_mesh
from ttame_jax.training import feed as feed_module
from ttame_jax.training.feed import Feed

pytestmark = pytest.mark.quick


class Numbered:
    """Batches 0, 1, 2, ... that count themselves, made only while `ready` allows it."""

    def __init__(self, last=100):
        self.taken, self.last = 0, last
        self.ready = threading.Semaphore(1000)

    def __next__(self):
        self.ready.acquire()
        self.work()
        if self.taken > self.last:
            raise ValueError("no more")
        self.taken += 1
        return {"image": np.full((8, 2, 2, 3), self.taken - 1, np.uint8)}

    def work(self):
        """What making a batch takes."""

    def get_state(self):
        return {"batches": self.taken}


def test_batches_come_in_order_spread_over_the_devices_with_the_state_after_them():
    batches = Numbered()
    with Feed(batches, data_mesh()) as feed:
        assert feed.state == {"batches": 0}
        for number in range(5):
            images = feed.take(running=None)
            assert (np.asarray(images) == number).all()
            assert len(images.sharding.device_set) == 8
            assert feed.state == {"batches": number + 1}


def test_the_next_batch_is_made_before_it_is_asked_for():
    batches = Numbered()
    with Feed(batches, data_mesh()) as feed:
        feed.take(running=None)
        deadline = time.monotonic() + 20
        while batches.taken < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_waiting_counts_only_while_no_step_runs(monkeypatch):
    now = 0.0

    class Slow(Numbered):
        def work(self):
            nonlocal now
            now += 3

    batches = Slow()
    batches.ready = threading.Semaphore(1)

    def step():
        nonlocal now
        batches.ready.release()
        while batches.taken < 2:  # the batch comes while this step runs, which takes longer
            time.sleep(0.01)
        now += 10
        return np.zeros((), np.float32)

    def began_to_wait():
        began = now
        batches.ready.release()
        return began

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(feed_module, "time", clock)
    with Feed(batches, data_mesh()) as feed:
        while batches.taken < 1:
            time.sleep(0.01)
        feed.take(running=None)
        before = feed.waited
        running = jax.jit(lambda: jax.pure_callback(step, jax.ShapeDtypeStruct((), jnp.float32)))()
        feed.take(running)
        assert feed.waited == before
        clock.perf_counter = began_to_wait
        feed.take(running=None)
        assert feed.waited == before + 3
        batches.ready.release()


def test_what_goes_wrong_in_the_background_is_raised_where_the_batch_is_taken():
    with Feed(Numbered(last=0), data_mesh()) as feed:
        feed.take(running=None)
        with pytest.raises(ValueError, match="no more"):
            feed.take(running=None)
