import csv
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import TINY

from ttame_jax import save_backbone
from ttame_jax.cli import main
from ttame_jax.data.sources import FolderSource
from ttame_jax.experiments.compare import _different
from ttame_jax.experiments.evaluate import read_rows
from ttame_jax.files import locked
from ttame_jax.losses import LossConfig
from ttame_jax.metrics import summarise
from ttame_jax.metrics.evaluation import Evaluator
from ttame_jax.plots import explanation_grid
from ttame_jax.runs import load_config, load_inputs, load_run, save_attention

METHODS = ["gradcam", "rise", "ttame"]


def compare(run, output, *words):
    options = ["--limit", "12", "--batch-size", "8", "--method-config", "rise.masks", "16"]
    main(["compare", "--run", str(run), *options, "--output", str(output), *words])


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("compare")
    compare(run, output, "--methods", ",".join(METHODS), "--limits", "rise", "8", "--pictures", "2")
    return output


def test_tables_curves_and_a_picture_are_written(finished):
    written = {path.name for path in finished.iterdir()}
    tables = {f"table_{kind}.{end}" for kind in ("ad_ic", "road") for end in ("md", "csv", "tex")}
    curves = {"road.png", "road.svg", "road.csv"}
    methods = {f"{name}.{end}" for name in METHODS for end in ("json", "npz")}
    differences = {"differences.md", "differences.csv"}
    assert written == tables | differences | curves | {"maps.png"} | methods
    head = (finished / "table_ad_ic.md").read_text().splitlines()[0]
    assert head == "| measure | Grad-CAM | RISE (8 images) | T-TAME |"
    with Image.open(finished / "maps.png") as picture:
        assert picture.height > 1.5 * picture.width  # two images beside, four rows below


def test_differences_from_the_run_are_those_on_the_images_of_both(finished):
    head, _, *lines = (finished / "differences.md").read_text().splitlines()
    assert head.startswith("| minus T-TAME | AD↓(100%) |")
    assert [line.split(" | ")[0] for line in lines] == ["| Grad-CAM", "| RISE (8 images)"]
    table = list(csv.DictReader((finished / "differences.csv").open()))
    assert len(table) == 2 * 8
    rows = {name: read_rows(finished / f"{name}.json") for name in ("rise", "ttame")}
    common = np.isin(rows["ttame"]["index"], rows["rise"]["index"])
    assert common.sum() == 8
    rows["ttame"] = {name: values[common] for name, values in rows["ttame"].items()}
    drops = {name: summarise(of, ("ad",))["AD"]["50"] for name, of in rows.items()}
    (found,) = (
        row for row in table if row["method"] == "RISE (8 images)" and row["measure"] == "AD↓(50%)"
    )
    assert float(found["difference"]) == pytest.approx(drops["rise"] - drops["ttame"], abs=1e-3)
    assert float(found["low"]) < float(found["difference"]) < float(found["high"])


def test_a_method_gives_the_figures_that_evaluate_gives(finished, run, tmp_path):
    output = tmp_path / "gradcam.json"
    options = ["--limit", "12", "--batch-size", "8", "--measures", "ad,ic,road"]
    main(["evaluate", "--run", str(run), "--method", "gradcam", *options, "--output", str(output)])
    alone, compared = (json.loads(path.read_text()) for path in (output, finished / "gradcam.json"))
    for measure in ("images", "AD", "IC", "ROAD"):
        assert alone[measure] == compared[measure]


@pytest.mark.slow
def test_quick_leaves_out_what_needs_many_forward_passes(run, tmp_path, capsys):
    words = ["--methods", "gradcam,rise", "--pictures", "0", "--measures", "ad", "--limit", "8"]
    main(
        [
            *["compare", "--run", str(run), "--output", str(tmp_path), "--batch-size", "8"],
            *[*words, "--method-config", "rise.masks", "128", "--quick"],
        ]
    )
    assert [path.name for path in tmp_path.glob("*.json")] == ["gradcam.json"]
    compare(run, tmp_path, *words, "--methods", "rise", "--method-config", "rise.masks", "128")
    assert "RISE: 128 forward passes for each image, about 00:" in capsys.readouterr().out


def test_what_is_measured_is_not_measured_again(finished, run, monkeypatch):
    measured = []
    batches = Evaluator.batches

    def counted(self, indices=None, state=None):
        measured.append((self.method.name, len(indices)))
        return batches(self, indices, state)

    monkeypatch.setattr(Evaluator, "batches", counted)
    words = ["--methods", "gradcam,rise,ttame", "--pictures", "0", "--limits", "rise", "8"]
    compare(run, finished, *words, "--seed", "0")
    assert measured == []
    compare(run, finished, "--methods", "rise", "--pictures", "0", "--limits", "rise", "10")
    assert measured == [("rise", 10)]


def test_figures_of_another_checkpoint_or_of_other_images_are_measured_again(
    run, pictures, tmp_path, monkeypatch
):
    measured = []
    batches = Evaluator.batches

    def counted(self, indices=None, state=None):
        measured.append(self.method.name)
        return batches(self, indices, state)

    monkeypatch.setattr(Evaluator, "batches", counted)
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(pictures, tmp_path / "pictures")
    dataset = f"folder:{tmp_path / 'pictures'}"
    words = ["--methods", "gradcam,ttame", "--pictures", "0", "--measures", "ad,ic"]
    words += ["--dataset", dataset]
    for _ in range(2):
        compare(tmp_path / "run", tmp_path / "out", *words)
    assert measured == ["gradcam", "ttame"]
    config, attention = load_config(run), load_run(run).attention
    attention.fusion.bias[...] += 1
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    save_attention(tmp_path / "run", attention, 5, config)
    compare(tmp_path / "run", tmp_path / "out", *words)
    assert measured[2:] == ["ttame"]
    first, *_ = sorted((tmp_path / "pictures" / "validation").iterdir())
    first.rename(first.with_name("renamed.png"))
    compare(tmp_path / "run", tmp_path / "out", *words)
    assert measured[3:] == ["gradcam", "ttame"]


def test_the_rows_of_a_method_are_those_of_its_figures(finished):
    rows = read_rows(finished / "gradcam.json")
    figures = json.loads((finished / "gradcam.json").read_text())
    assert len(rows["index"]) == 12
    assert summarise(rows, ("ad", "ic"))["AD"] == pytest.approx(figures["AD"])


def test_damaged_figures_are_measured_again(run, tmp_path):
    words = ["--methods", "gradcam", "--pictures", "0", "--measures", "ad,ic"]
    compare(run, tmp_path, *words)
    path = tmp_path / "gradcam.json"
    whole = json.loads(path.read_text())
    text = path.read_text()
    changed = text.replace('"images": 12', '"images": 13')
    for damaged in (text[:100], changed, "[]", ""):
        path.write_text(damaged)
        compare(run, tmp_path, *words)
        assert json.loads(path.read_text())["AD"] == whole["AD"]
    rows = path.with_suffix(".npz")
    for damage in (lambda: rows.write_bytes(rows.read_bytes()[:-40]), rows.unlink):
        damage()
        compare(run, tmp_path, *words)
        assert len(read_rows(path)["index"]) == 12


def test_a_method_that_fails_is_reported_and_the_rest_goes_on(run, tmp_path, capsys):
    words = ["--methods", "gradcam,lcam,ttame", "--pictures", "0", "--measures", "ad,ic"]
    config = ["--method-config", "gradcam.layer", "nowhere"]
    compare(run, tmp_path, *words, *config)
    said = capsys.readouterr().out
    assert "left out: gradcam (vit has no layer 'nowhere'" in said
    assert "left out: lcam (the method 'lcam' needs an attention mechanism" in said
    assert json.loads((tmp_path / "ttame.json").read_text())["images"] == 12


def test_an_unknown_method_is_refused_before_anything_is_measured(run, tmp_path, refusal):
    words = ["compare", "--run", run, "--output", tmp_path, "--methods", "gradcam,lime"]
    status, said = refusal(words)
    assert status == 2 and "unknown method lime; there are gradcam," in said
    assert list(tmp_path.iterdir()) == []


def test_two_comparisons_do_not_share_an_output(run, tmp_path, refusal):
    with locked(tmp_path):
        status, said = refusal(["compare", "--run", run, "--output", tmp_path])
    assert status == 1 and "another process is writing to" in said


def copied(run, folder, factor=1.0, **settings):
    """A copy of a run with other settings, the fusion of which is multiplied by a factor."""
    config = dataclasses.replace(load_config(run), output=folder, **settings)
    attention = load_run(run).attention
    attention.fusion.kernel[...] *= factor
    folder.mkdir(parents=True)
    config.save(inputs=load_inputs(run))
    save_attention(folder, attention, 5, config)
    return folder


def test_runs_that_differ_in_the_seed_share_a_column(run, tmp_path, capsys):
    paper = [copied(run, tmp_path / f"paper_{i}", 1 + i, seed=i) for i in range(2)]
    loss = LossConfig(recipe="scaled")
    scaled = [copied(run, tmp_path / f"scaled_{i}", -1 - i, seed=i, loss=loss) for i in range(2)]
    words = ["--limit", "8", "--methods", "gradcam,ttame", "--measures", "ad"]
    words += ["--pictures", "2", "--run", *map(str, paper)]
    compare(run, tmp_path / "out", *words, *map(str, scaled))
    drawn = re.findall("^(.+): maps of 2 images", capsys.readouterr().out, re.MULTILINE)
    assert drawn == ["gradcam", "ttame-paper_0", "ttame-scaled_0"]
    head, _, line, *_ = (tmp_path / "out" / "table_ad_ic.md").read_text().splitlines()
    assert head == "| measure | Grad-CAM | T-TAME, paper (2 seeds) | T-TAME, scaled (2 seeds) |"
    names = [f"ttame-{recipe}_{i}" for recipe in ("paper", "scaled") for i in range(2)]
    drops = [
        json.loads((tmp_path / "out" / f"{name}.json").read_text())["AD"]["100"] for name in names
    ]
    assert f"{np.mean(drops[:2]):.2f} ± {np.std(drops[:2], ddof=1):.2f}" in line
    change = (tmp_path / "out" / "differences.md").read_text().splitlines()[3]
    assert change.startswith("| T-TAME, scaled (2 seeds) | ")
    assert f"{np.mean(drops[2:]) - np.mean(drops[:2]):+.1f} [" in change
    compare(run, tmp_path / "alone", *words, "--methods", "ttame")
    head = (tmp_path / "alone" / "table_ad_ic.md").read_text().splitlines()[0]
    assert head == "| measure | T-TAME (2 seeds) |"


def test_equal_runs_of_one_seed_have_columns_of_their_own(run, tmp_path):
    words = ["--pictures", "0", "--measures", "ad", "--methods", "ttame"]
    runs = [copied(run, tmp_path / name) for name in ("first", "second")]
    compare(run, tmp_path / "out", *words, "--run", *map(str, runs))
    head = (tmp_path / "out" / "table_ad_ic.md").read_text().splitlines()[0]
    assert head == "| measure | T-TAME, first | T-TAME, second |"


def test_tables_and_curves_of_an_earlier_comparison_are_removed(finished, run, tmp_path):
    output = shutil.copytree(finished, tmp_path / "out")
    (output / "table_of_mine.md").touch()
    words = ["--methods", "ttame", "--measures", "ad", "--pictures", "0", "--limit", "4"]
    compare(run, output, *words)
    written = {path.name for path in output.iterdir() if path.suffix not in (".json", ".npz")}
    tables = {f"table_ad_ic.{end}" for end in ("md", "csv", "tex")}
    assert written == tables | {"table_of_mine.md", "maps.png"}


def test_runs_of_the_same_variant_are_told_apart(run, tmp_path, refusal):
    first = copied(run, tmp_path / "paper" / "seed_0")
    second = copied(run, tmp_path / "scaled" / "seed_0", factor=-1)
    words = ["--pictures", "2", "--measures", "ad,ic", "--methods", "gradcam,ttame"]
    compare(run, tmp_path / "out", *words, "--run", str(first), str(second))
    head = (tmp_path / "out" / "table_ad_ic.md").read_text().splitlines()[0]
    assert head == "| measure | Grad-CAM | T-TAME, paper_seed_0 | T-TAME, scaled_seed_0 |"
    names = ("ttame-paper_seed_0", "ttame-scaled_seed_0")
    drops = [json.loads((tmp_path / "out" / f"{name}.json").read_text())["AD"] for name in names]
    assert drops[0] != drops[1]
    compare(run, tmp_path / "alone", *words, "--methods", "ttame")
    assert json.loads((tmp_path / "alone" / "ttame.json").read_text())["AD"] == drops[0]
    words = ["--run", str(run), str(run), "--output", str(tmp_path / "same")]
    status, said = refusal(["compare", *words])
    assert status == 2 and f"two runs would be named ttame-{run.name}: give each run once" in said


def test_runs_of_other_classifiers_are_refused(run, tmp_path, refusal):
    config = load_config(run)
    backbone = load_run(run).backbone
    backbone.head.kernel[...] *= 2
    save_backbone(backbone, tmp_path / "changed.safetensors")
    changed = copied(run, tmp_path / "changed", weights=str(tmp_path / "changed.safetensors"))
    words = ["--run", str(run), str(changed), "--output", str(tmp_path / "out")]
    status, said = refusal(["compare", *words])
    assert (
        status == 2 and f"explain different backbones: {config.backbone} with other weights" in said
    )
    assert not list((tmp_path / "out").glob("*.json"))


def test_pictures_are_of_images_that_can_be_read(run, tmp_path, monkeypatch):
    read = FolderSource.__getitem__

    def damaged(self, index):
        return read(self, index) | ({"image": b"none"} if index == 0 else {})

    monkeypatch.setattr(FolderSource, "__getitem__", damaged)
    drawn = []

    def grid(pictures, *rest):
        drawn.extend(pictures)
        return explanation_grid(pictures, *rest)

    monkeypatch.setattr("ttame_jax.experiments.compare.explanation_grid", grid)
    words = ["--methods", "rise,ttame", "--measures", "ad", "--pictures", "3", "--limit", "8"]
    with pytest.warns(UserWarning, match="skipping an unreadable image"):
        compare(run, tmp_path / "out", *words, "--limits", "rise", "2")
    assert len(drawn) == 3 and all(picture.any() for picture in drawn)


def test_imported_classifiers_are_compared_by_their_contents(random_backbone):
    one = random_backbone("vit", **TINY)
    other = nnx.clone(one)
    one.name, other.name = "models/mine.safetensors", "/elsewhere/mine.safetensors"
    assert _different(one, other) is None
    other.head.kernel[...] *= 2
    assert _different(one, other) == "models/mine.safetensors with other weights"
    other.name = "models/yours.safetensors"
    assert _different(one, other) == "models/mine.safetensors and models/yours.safetensors"
