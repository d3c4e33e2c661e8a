import multiprocessing
from contextlib import nullcontext

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data_helpers import Pictures

from ttame_jax.data import evaluation_batches
from ttame_jax.data.evaluation import MOST_BOXES
from ttame_jax.data.loader import train_batches
from ttame_jax.data.transforms import evaluation_image
from ttame_jax.errors import Damaged, Failure
from ttame_jax.preprocessing import Preprocessing

SMALL = Preprocessing(image_size=8, resize_size=10)


def take(batches, count: int) -> list[dict]:
    return [next(batches) for _ in range(count)]


def indices(batches) -> list[int]:
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def train(size=23, batch_size=5, **options):
    options = {"seed": 0, "workers": 0} | options
    return train_batches(Pictures(size), SMALL, batch_size, **options)


def test_batches_are_arrays_of_the_promised_types():
    batch = next(train())
    expected = {
        "image": ((5, 8, 8, 3), np.uint8),
        "label": ((5,), np.int32),
        "index": ((5,), np.int32),
        "valid": ((5,), np.bool_),
    }
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == expected
    assert all(type(value) is np.ndarray for value in batch.values())
    np.testing.assert_array_equal(batch["label"], batch["index"] % 10)
    assert batch["valid"].all()


def test_training_follows_from_the_seed():
    assert_same(take(train(), 8), take(train(), 8))
    assert indices(take(train(), 4)) != indices(take(train(seed=1), 4))


def test_worker_processes_change_nothing_and_end_with_the_iterator():
    batches = train(workers=2)
    taken = take(batches, 7)
    assert_same(taken, take(train(), 7))
    assert len(multiprocessing.active_children()) == 2
    assert all(type(value) is np.ndarray for value in taken[0].values())
    del batches
    assert not multiprocessing.active_children()


def test_each_epoch_has_every_image_once_in_an_order_and_with_crops_of_its_own():
    batches = train(batch_size=23)
    first, second, third = take(batches, 3)
    orders = [batch["index"].tolist() for batch in (first, second, third)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    by_index = [batch["image"][np.argsort(batch["index"])] for batch in (first, second)]
    assert (by_index[0] != by_index[1]).any((1, 2, 3)).sum() > 15
    neighbour = take(train(batch_size=23, seed=1), 2)
    assert orders[1] not in [batch["index"].tolist() for batch in neighbour]


def test_processes_read_the_parts_of_the_same_global_batches():
    whole = take(train(batch_size=6), 8)
    parts = [take(train(batch_size=2, process_index=i, process_count=3), 8) for i in range(3)]
    for batch, *shared in zip(whole, *parts, strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(values, np.concatenate([part[name] for part in shared]))


def test_a_state_saved_by_two_processes_continues_in_one():
    halves = [train(batch_size=3, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        take(half, 7)
    whole = train(batch_size=6)
    whole.set_state(halves[1].get_state())
    expected = [indices(take(half, 1)) for half in halves]
    assert next(whole)["index"].tolist() == expected[0] + expected[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restored_state_continues_within_an_epoch(workers):
    batches = train()
    take(batches, 7)
    state = batches.get_state()
    expected = take(batches, 6)
    resumed = train(workers=workers)
    take(resumed, 2 if workers else 0)
    resumed.set_state(state)
    assert_same(take(resumed, 6), expected)


def test_the_state_is_saved_and_restored_by_orbax(tmp_path):
    batches = train()
    take(batches, 7)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(batches=grain.checkpoint.CheckpointSave(batches)))
        expected = take(batches, 3)
        manager.wait_until_finished()
    resumed = train()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.restore(
            7, args=ocp.args.Composite(batches=grain.checkpoint.CheckpointRestore(resumed))
        )
    assert_same(take(resumed, 3), expected)


def test_evaluation_gives_each_image_once_in_order_and_pads_the_last_batch():
    source = Pictures(23)
    batches = list(evaluation_batches(source, SMALL, 5))
    assert len(batches) == len(evaluation_batches(source, SMALL, 5)) == 5
    assert indices(batches) == [*range(23), -1, -1]
    last = batches[-1]
    assert last["valid"].tolist() == [True] * 3 + [False] * 2
    assert last["label"].tolist() == [0, 1, 2, -1, -1]
    assert not last["image"][3:].any()
    np.testing.assert_array_equal(last["image"][2], evaluation_image(source[22]["image"], SMALL))


def test_evaluation_of_chosen_images():
    batches = evaluation_batches(Pictures(23), SMALL, 2, indices=[20, 3, 3])
    assert indices(batches) == [20, 3, 3, -1]


def test_evaluation_by_processes_reads_the_parts_of_the_same_batches():
    shards = [
        list(evaluation_batches(Pictures(23), SMALL, 4, process_index=i, process_count=3))
        for i in range(3)
    ]
    together = [indices(batches) for batches in zip(*shards, strict=True)]
    assert together == [[*range(12)], [*range(12, 23), -1]]


class BoxedPictures(Pictures):
    """Image i has i boxes, the first on the left half; `damaged` ones cannot be read."""

    has_boxes = True

    def __getitem__(self, index):
        boxes = np.array([[0, 0, 1, 0.5], [0, 0.5, 1, 1]][:index], np.float32).reshape(-1, 4)
        return super().__getitem__(index) | {"boxes": boxes}


@pytest.mark.filterwarnings("ignore:skipping")
def test_evaluation_has_the_boxes_of_the_crops():
    source = BoxedPictures(101, damaged=(3,))
    batches = evaluation_batches(source, SMALL, 51, boxes=True)
    first, last = (batch["boxes"] for batch in batches)
    assert first.shape == (51, MOST_BOXES, 4) and first.dtype == np.float32
    counts = np.isfinite(np.concatenate([first, last])).all(axis=2).sum(axis=1).tolist()
    assert counts == [0, 1, 2, 0] + 97 * [2] + [0]  # 3 cannot be read, the last one is padding
    (crop,) = {tuple(boxes[0]) for boxes in first[1:] if np.isfinite(boxes[0]).all()}
    assert crop[1] < crop[3] and crop[0] < crop[2]


def test_an_image_with_too_many_boxes_is_named():
    class Crowded(BoxedPictures):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"boxes": np.ones((65, 4), np.float32)}

    with pytest.raises(Failure, match="000.jpg has 65 boxes, more than 64"):
        next(iter(evaluation_batches(Crowded(2), SMALL, 2, boxes=True)))


def test_boxes_of_a_source_without_are_refused():
    with pytest.raises(ValueError, match="has no boxes"):
        evaluation_batches(Pictures(3), SMALL, 2, boxes=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_replaces_an_unreadable_image_and_names_it_once(workers):
    source = Pictures(120, damaged=(17,))
    batches = train_batches(source, SMALL, 10, seed=0, workers=workers)
    with pytest.warns(UserWarning, match="unreadable") as warned:
        epochs = indices(take(batches, 24))
    assert [str(warning.message) for warning in warned] == ["skipping an unreadable image: 017.jpg"]
    assert sorted(epochs) == sorted(2 * [18 if i == 17 else i for i in range(120)])


def test_evaluation_marks_an_unreadable_image_and_names_it_once():
    source = Pictures(120, damaged=(17,))
    with pytest.warns(UserWarning) as warned:
        batches = list(evaluation_batches(source, SMALL, 10))
    assert len(warned) == 1 and "017.jpg" in str(warned[0].message)
    assert indices(batches) == list(range(120))
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert np.flatnonzero(~valid).tolist() == [17]


@pytest.mark.parametrize(
    ("before", "raises"), [((300, 0), False), ((100, 0), True), ((300, 2), True), ((0, 0), True)]
)
def test_images_that_an_interrupted_evaluation_has_read_count(before, raises):
    batches = evaluation_batches(Pictures(5, (1, 2)), SMALL, 5, before=before)
    with pytest.warns(UserWarning), pytest.raises(Damaged) if raises else nullcontext():
        list(batches)


@pytest.mark.filterwarnings("ignore:skipping")
@pytest.mark.parametrize(
    "size, damaged, message, images_seen",
    [
        (1200, range(0, 990, 90), "11 of 1000 images", 1000),
        (1200, (*range(0, 1000, 100), 1050, 1051), "12 of 1060 images", 1060),
        (40, (1, 2), "2 of 40 images", 40),
    ],
)
def test_more_than_one_per_cent_unreadable_is_an_error(size, damaged, message, images_seen):
    batches = evaluation_batches(Pictures(size, damaged), SMALL, 20)
    seen = 0
    with pytest.raises(ValueError, match=message):
        for batch in batches:
            seen += len(batch["index"])
    assert seen == images_seen - 20


@pytest.mark.filterwarnings("ignore:skipping")
def test_one_per_cent_unreadable_is_no_error_however_often_they_are_seen():
    batches = train_batches(Pictures(200, damaged=(0, 1)), SMALL, 10, seed=0, workers=0)
    assert len(take(batches, 60)) == 60


@pytest.mark.filterwarnings("ignore:skipping")
def test_a_process_of_several_sees_all_unreadable_images_in_time():
    source = Pictures(200, damaged=(0, 1))
    batches = train_batches(source, SMALL, 10, seed=0, workers=0, process_index=0, process_count=4)
    assert len(take(batches, 100)) == 100


def test_a_source_of_unreadable_images_only_is_an_error():
    with pytest.raises(ValueError, match="are all unreadable"):
        next(train_batches(Pictures(5, damaged=range(5)), SMALL, 2, seed=0, workers=0))


class TouchingDevices(Pictures):
    """Labels tell whether the process that loads them has started JAX's devices."""

    def __getitem__(self, index):
        from jax._src import xla_bridge

        return super().__getitem__(index) | {"label": int(xla_bridge.backends_are_initialized())}


def test_workers_leave_the_devices_alone():
    batches = train_batches(TouchingDevices(8), SMALL, 4, seed=0, workers=1)
    assert next(batches)["label"].tolist() == [0, 0, 0, 0]
