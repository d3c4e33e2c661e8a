import numpy as np

from ttame_jax.experiments import resumable
from ttame_jax.experiments.resumable import ResumableRows


def measured(sizes):
    """Yields rows in batches of two, and says how many images it was asked for."""

    def batches(indices, done):
        sizes.append((len(indices), done))
        for start in range(0, len(indices), 2):
            index = indices[start : start + 2]
            yield {"index": index, "score": index / 2}

    return batches


def interrupted(batches):
    def first(indices, done):
        yield next(iter(batches(indices, done)))
        raise KeyboardInterrupt

    return first


def test_an_evaluation_goes_on_with_the_images_that_are_left(tmp_path):
    sizes = []
    rows = ResumableRows(tmp_path / "figures.json", {"seed": 0})
    try:
        rows.collect(interrupted(measured(sizes)), np.arange(5))
    except KeyboardInterrupt:
        pass
    found, _ = ResumableRows(tmp_path / "figures.json", {"seed": 0}).collect(
        measured(sizes), np.arange(5)
    )
    assert sizes == [(5, 0), (3, 2)]
    np.testing.assert_array_equal(found["score"], np.arange(5) / 2)
    rows.remove()
    assert not list(tmp_path.iterdir())


def test_other_settings_begin_anew(tmp_path):
    sizes = []
    for seed in (0, 1):
        ResumableRows(tmp_path / "figures.json", {"seed": seed}).collect(
            measured(sizes), np.arange(3)
        )
    assert sizes == [(3, 0), (3, 0)]


def test_a_process_without_rows_has_none_to_return(tmp_path, monkeypatch):
    """The first process has read all of them, and tells the others that none is left."""
    monkeypatch.setattr(resumable.jax, "process_index", lambda: 1)
    monkeypatch.setattr(resumable.multihost_utils, "broadcast_one_to_all", np.ones_like)
    rows = ResumableRows(tmp_path / "figures.json", {})
    assert rows.collect(measured([]), np.arange(3)) == ({}, 0.0)
