import numpy as np

from ttame_jax.data import load_source
from ttame_jax.training.classifier import accuracy, train_classifier
from ttame_jax.weights import load_backbone


def test_a_classifier_learns_digits():
    """200 pictures, learnt by heart; 95 % on unseen ones takes `make demo`."""
    backbone = load_backbone("digits_cnn")
    source = load_source("digits", "train[:200]")
    assert accuracy(backbone, source) < 0.3
    before = np.asarray(backbone.fc.kernel[...]).copy()
    train_classifier(backbone, source, epochs=12, batch_size=20, shift=0, learning_rate=5e-3)
    assert accuracy(backbone, source) > 0.8
    assert not np.array_equal(before, backbone.fc.kernel[...])
