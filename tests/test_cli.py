import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ttame_jax import startup
from ttame_jax.cli import main
from ttame_jax.errors import one_line_errors
from ttame_jax.experiments.resumable import _column
from ttame_jax.files import locked


def test_help_names_every_command():
    result = subprocess.run(
        [sys.executable, "train.py", "--help"], capture_output=True, text=True, check=True
    )
    for flag in ("--backbone", "--weights", "--data-dir", "--loss.recipe", "--seed", "--output"):
        assert flag in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        *["explain", "serve", "export", "train", "lr-find", "evaluate", "compare", "curves"],
        *["ablate", "sanity", "figures", "report", "prepare", "demo"],
    ],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code in (0, None)
    assert "usage: ttame" in capsys.readouterr().out


def test_an_error_among_several_processes_is_one_line_too(monkeypatch, tmp_path, capsys):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(startup, "_initialize", lambda processes: True)
    monkeypatch.setattr(startup.os, "_exit", leave)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--run", str(tmp_path), "--output", str(tmp_path / "a.json")])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "is not a run" in said and "Traceback" not in said


def test_the_version_is_looked_up_when_it_is_asked_for(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("ttame-jax ")
    monkeypatch.setattr("importlib.metadata.version", None)  # as in a checkout
    with pytest.raises(SystemExit):
        main(["curves", "--help"])


def test_a_backbones_preset_gives_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--backbone", "digits_vit", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", "").split())  # however it is wrapped
    assert "default: digits" in said and "default: runs/digits_vit" in said


def test_explain_writes_a_picture_and_the_maps(run, pictures, tmp_path, capsys):
    image = next((pictures / "validation").iterdir())
    main(["explain", str(image), "--run", str(run), "--output", str(tmp_path)])
    main(
        [
            "explain",
            str(image),
            "--run",
            str(run),
            "--classes",
            "4,0",
            "--output",
            str(tmp_path / "two"),
        ]
    )
    main(
        [
            "explain",
            str(image),
            "--run",
            str(run),
            "--classes",
            "top3",
            "--output",
            str(tmp_path / "three"),
        ]
    )
    with Image.open(tmp_path / f"{image.stem}.png") as picture:
        assert picture.width > 200
    assert np.load(tmp_path / f"{image.stem}.npz")["maps"].shape == (1, 4, 4)
    two = np.load(tmp_path / "two" / f"{image.stem}.npz")
    assert two["classes"].tolist() == [4, 0]
    three = np.load(tmp_path / "three" / f"{image.stem}.npz")
    assert three["maps"].shape == (3, 4, 4)
    assert (np.diff(three["probabilities"]) <= 0).all()
    assert f"{image.stem}.png: class" in capsys.readouterr().out


def test_explain_writes_over_no_image_and_no_other_result(run, pictures, tmp_path, capsys):
    photograph = next((pictures / "validation").iterdir()).read_bytes()
    images = [tmp_path / name for name in ("cat.png", "p/q/a.png", "p_q/a.png", "dog.PNG")]
    for path in images:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph)
    command = ["explain", *map(str, images), "--run", str(run), "--output", str(tmp_path)]
    for _ in range(2):  # the second time over the results of the first
        main(command)
        assert all(path.read_bytes() == photograph for path in images)
    assert len(list(tmp_path.glob("*.npz"))) == len(images)
    said = capsys.readouterr().out
    assert f"{images[0]}: the name cat is taken, writing {tmp_path}/cat_2.png and" in said
    assert f"writing {tmp_path}/dog_2.png" in said  # where names differ in case only, too


def test_explain_takes_another_method(run, pictures, tmp_path, refusal):
    image = next((pictures / "validation").iterdir())
    words = ["explain", str(image), "--run", str(run), "--classes", "top2", "--output"]
    main([*words, str(tmp_path / "own")])
    main([*words, str(tmp_path / "gradcam"), "--method", "gradcam"])
    own, gradcam = (np.load(tmp_path / n / f"{image.stem}.npz") for n in ("own", "gradcam"))
    np.testing.assert_array_equal(own["classes"], gradcam["classes"])
    assert gradcam["maps"].shape == (2, 4, 4)
    assert not np.allclose(own["maps"], gradcam["maps"])
    status, said = refusal([*words, tmp_path / "lime", "--method", "lime"])
    assert status == 2 and "unknown method 'lime'" in said


def test_images_of_the_same_name_do_not_overwrite_each_other(run, pictures, tmp_path):
    twins = [pictures / split / "000.png" for split in ("train", "validation")]
    main(["explain", *map(str, twins), "--run", str(run), "--output", str(tmp_path)])
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_evaluate_writes_the_figures_and_prints_a_table(run, tmp_path, capsys):
    output = tmp_path / "figures.json"
    main(
        [
            "evaluate",
            "--run",
            str(run),
            "--limit",
            "9",
            "--masking",
            "pixel",
            "--batch-size",
            "8",
            "--output",
            str(output),
        ]
    )
    figures = json.loads(output.read_text())
    assert {
        "images": 9,
        "method": "ttame",
        "backbone": "vit",
        "masking": "pixel",
        "forward_passes": 1,
    }.items() <= figures.items()
    assert set(figures["AD"]) == {"100", "50", "15"}
    assert figures["seconds_per_image"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "figures.npz"]
    said = capsys.readouterr().out
    assert "ttame on vit, pixel masking, 9 images" in said
    assert f"100: {figures['AD']['100']:.1f} [" in said


@pytest.mark.parametrize("words", [["ad,ic,deletion"], ["ad", "ic", "deletion"]])
def test_evaluate_measures_another_method_of_the_runs_backbone(words, run, tmp_path):
    output = tmp_path / "figures.json"
    options = ["--limit", "8", "--batch-size", "8", "--method-config", "layer", "blocks.1.norm1"]
    main(
        ["evaluate", "--run", str(run), "--method", "gradcam", "--measures", *words]
        + [*options, "--output", str(output)]
    )
    figures = json.loads(output.read_text())
    assert figures["method"] == "gradcam"
    assert {"AD", "IC", "deletion"} <= figures.keys()


def test_rows_of_a_file_have_nan_where_it_has_null():
    column = _column([[0.5, None], [None, 1.0]])
    np.testing.assert_array_equal(column, [[0.5, np.nan], [np.nan, 1.0]])
    assert _column([3, 4]).dtype.kind == "i"


def test_an_interrupted_evaluation_resumes(run, tmp_path, monkeypatch):
    from ttame_jax.metrics.evaluation import Evaluator

    words = ["evaluate", "--run", str(run), "--batch-size", "8", "--output"]
    main([*words, str(tmp_path / "whole.json")])
    measured = []
    batches = Evaluator.batches

    def interrupted(self, indices, state=None):
        for i, rows in enumerate(batches(self, indices, state)):
            if not measured and i == 2:
                measured.append(len(indices))
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(Evaluator, "batches", interrupted)
    output = tmp_path / "figures.json"
    with pytest.raises(SystemExit) as stop:
        main([*words, str(output)])
    assert stop.value.code == 130
    partial = output.with_name("figures.json.partial")
    _, *rows = partial.read_text().splitlines(keepends=True)
    damaged = rows[3].replace('"confidence"', '"confidance"')
    with partial.open("a") as file:
        file.write(rows[0])  # as a second process would have left it
        file.write('{"index": 1')  # as a kill in the middle of a line leaves it
    partial.write_text(partial.read_text().replace(rows[3], damaged))
    calls = []
    monkeypatch.setattr(
        Evaluator,
        "batches",
        lambda self, indices, state=None: (
            calls.append(list(indices)) or batches(self, indices, state)
        ),
    )
    main([*words, str(output)])
    assert calls == [[3, 16, 17, 18, 19]]
    figures, whole = (
        json.loads((tmp_path / name).read_text()) for name in ("figures.json", "whole.json")
    )
    for name in ("images", "AD", "IC"):
        assert figures[name] == whole[name]
    assert set(figures["settings"]["inputs"]) == {"weights", "images", "attention"}
    assert figures["settings"]["inputs"] == whole["settings"]["inputs"]


@pytest.mark.parametrize(("masks", "images"), [(4000, 8), (2000, 16)])
def test_an_interrupted_slow_method_loses_one_image_per_device(
    masks, images, run, tmp_path, monkeypatch
):
    """Or 4000 forward passes, if an image needs fewer. The tests have 8 devices."""
    from ttame_jax.metrics.evaluation import Evaluator

    batches = Evaluator.batches

    def interrupted(self, indices, state=None):
        yield next(batches(self, indices, state))
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "batches", interrupted)
    words = ["evaluate", "--run", str(run), "--method", "rise", "--batch-size", "16"]
    output = tmp_path / "rise.json"
    with pytest.raises(SystemExit):
        main([*words, "--method-config", "masks", str(masks), "--output", str(output)])
    _, *rows = output.with_name("rise.json.partial").read_text().splitlines()
    assert len(rows) == images


def test_a_list_chooses_images_by_name(run, tmp_path, capsys, refusal):
    names = tmp_path / "list.txt"
    names.write_text("003.png 7\n011.png 1\nabsent.png 0\n")
    output = tmp_path / "figures.json"
    words = ["evaluate", "--run", str(run), "--batch-size", "8", "--list", str(names)]
    main([*words, "--output", str(output)])
    assert "2 of the 3 images" in capsys.readouterr().out
    assert json.loads(output.read_text())["images"] == 2
    names.write_text("absent.png 0\n")
    status, said = refusal([*words, "--output", output])
    assert status == 2 and "no image of" in said and "choose another split" in said


def test_two_evaluations_do_not_share_an_output(run, tmp_path, refusal):
    output = tmp_path / "figures.json"
    with locked(output, folder=False):
        status, said = refusal(["evaluate", "--run", run, "--output", output])
    assert status == 1 and f"another process is writing to {output}: wait" in said


def test_a_platform_without_devices_is_named(monkeypatch, capsys):
    def missing():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr("jax.devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(SystemExit) as stop, one_line_errors("ttame"):
        raise AssertionError  # which is all that JAX says
    assert stop.value.code == 1
    assert "JAX finds no device of JAX_PLATFORMS=tpu" in capsys.readouterr().err


def test_messages_of_many_lines_become_one(capsys):
    with pytest.raises(SystemExit), one_line_errors("ttame"):
        raise ValueError("first\n  second\n\nthird")
    assert capsys.readouterr().err.startswith("ttame: first second third (TTAME_TRACEBACK=1")
