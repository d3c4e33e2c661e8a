from ttame_jax.config import preset
from ttame_jax.experiments import demo
from ttame_jax.weights import load_backbone, save_backbone


def test_the_demo_writes_its_page_and_pictures(tmp_path, monkeypatch, capsys):
    """With an untrained classifier and the shortest training: the page, not the figures."""
    import dataclasses

    short = dataclasses.replace(preset("digits_vit"), epochs=1, batch_size=1000, workers=0)
    monkeypatch.setattr(demo, "preset", lambda name: short)
    save_backbone(load_backbone("digits_vit"), tmp_path / "digits_vit.safetensors")
    demo.run_demo(tmp_path)
    said = capsys.readouterr().out
    assert "classifier" in said and f"pictures: {tmp_path / 'index.html'}" in said
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") == 4 * demo.SHOWN
    for i in range(demo.SHOWN):
        for name in ("image", "map", "overlay", "runner_up"):
            assert f"pictures/{i:02}_{name}.png" in page
            assert (tmp_path / "pictures" / f"{i:02}_{name}.png").is_file()
