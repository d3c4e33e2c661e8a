import signal

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import TINY
from tqdm import tqdm

from ttame_jax.data import load_source
from ttame_jax.files import read_safetensors
from ttame_jax.training import classifier
from ttame_jax.training.classifier import accuracy, train_classifier
from ttame_jax.weights import load_backbone


@pytest.mark.slow
def test_a_classifier_learns_digits():
    """A few pictures, learnt by heart; 95 % on unseen ones takes `make demo`."""
    backbone = load_backbone("vit", **TINY | {"num_classes": 10})
    source = load_source("digits", "train[:60]")
    assert accuracy(backbone, source) < 0.4
    before = np.asarray(backbone.head.kernel[...]).copy()
    train_classifier(backbone, source, epochs=20, batch_size=20, shift=0, learning_rate=5e-3)
    assert accuracy(backbone, source) > 0.8
    assert not np.array_equal(before, backbone.head.kernel[...])


def test_an_interrupted_training_resumes_bit_for_bit(tmp_path, capfd):
    source, path = load_source("digits", "train[:60]"), tmp_path / "classifier.checkpoint"

    def trained(source, **options):
        backbone = load_backbone("vit", **TINY | {"num_classes": 10})
        options = {"epochs": 2, "batch_size": 20, **options}
        finished = train_classifier(backbone, source, checkpoint=path, **options)
        return finished, jax.tree.leaves(nnx.state(backbone))

    finished, whole = trained(source)
    assert finished and not path.exists()
    for stop in (signal.SIGTERM, signal.SIGINT):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classifier, "tqdm", interrupting(stop, step=4))
            if stop == signal.SIGTERM:
                assert trained(source)[0] is False
            else:
                with pytest.raises(KeyboardInterrupt):
                    trained(source)
        assert read_safetensors(path)[1]["step"] == "4"
        with pytest.raises(ValueError, match="epochs=2.* not epochs=3.*: delete it"):
            trained(source, epochs=3)
        finished, resumed = trained(source)
        assert finished
        for a, b in zip(resumed, whole, strict=True):
            np.testing.assert_array_equal(a, b)
    path.write_bytes(b"damaged")
    finished, anew = trained(source)
    assert finished and "training starts anew" in capfd.readouterr().err
    np.testing.assert_array_equal(anew[0], whole[0])


def interrupting(number, step):
    """A progress bar that raises a signal after a step."""

    class Bar(tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == step:
                signal.raise_signal(number)

    return Bar
