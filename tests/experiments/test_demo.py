import dataclasses

import pytest

from ttame_jax.config import preset
from ttame_jax.experiments import demo
from ttame_jax.weights import load_backbone, save_backbone


@pytest.mark.slow
def test_the_demo_writes_its_report_and_pictures(tmp_path, monkeypatch, capsys):
    """With few images, an untrained classifier and one step of training: the page, not the
    figures."""
    few = {"train_split": "train[:16]", "validation_images": 8, "batch_size": 16}
    short = dataclasses.replace(preset("digits_vit"), epochs=1, workers=0, **few)
    monkeypatch.setattr(demo, "preset", lambda name: short)
    monkeypatch.setattr(demo, "TEST", "test[:32]")
    save_backbone(load_backbone("digits_vit"), tmp_path / "digits_vit.safetensors")
    demo.run_demo(tmp_path)
    said = capsys.readouterr().out
    assert "classifier" in said and f"{tmp_path / 'index.html'}" in said
    page = (tmp_path / "index.html").read_text()
    assert "T-TAME on digits_vit" in page and "handwritten digits" in page
    assert len(list((tmp_path / "pictures").glob("??_image.png"))) == demo.SAVED
