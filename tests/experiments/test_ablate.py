import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import TINY

from ttame_jax.attention import VARIANTS
from ttame_jax.cli import main
from ttame_jax.config import TrainConfig, preset
from ttame_jax.errors import Failure
from ttame_jax.experiments import ablate as module
from ttame_jax.experiments import sweep
from ttame_jax.experiments.ablate import (
    Ablation,
    Result,
    _axes,
    comma_separated,
    differences,
    draw,
    latex,
    markdown,
)
from ttame_jax.losses import LossConfig
from ttame_jax.metrics import intervals, summarise
from ttame_jax.metrics.evaluation import Evaluator
from ttame_jax.training.loop import Diverged

FILES = {f"ablation.{end}" for end in ("md", "csv", "tex", "json", "png", "svg")}


def ablate(pictures, output, *words):
    options = ["--backbone", "vit", "--weights", "None", "--dataset", f"folder:{pictures}"]
    options += ["--backbone-config", *(str(word) for pair in TINY.items() for word in pair)]
    options += ["--epochs", "1", "--workers", "0", "--validation-images", "0"]
    main(["ablate", *options, "--output", str(output), "--evaluation-images", "16", *words])


MASKINGS = ["--over", "masking"]


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """The folder of a finished comparison of maskings (Table VII)."""
    output = tmp_path_factory.mktemp("ablate")
    ablate(pictures, output, *MASKINGS)
    return output


def read(folder):
    return json.loads((folder / "ablation.json").read_text())


def test_maskings_of_training_and_evaluation_are_combined_and_trained_once(finished):
    maskings = ("pixel", "standardised")
    folders = {f"masking_{masking}" for masking in maskings}
    assert {path.name for path in finished.iterdir()} == FILES | folders
    settings = [tuple(one["settings"].values()) for one in read(finished)]
    assert settings == [(one, other) for one in maskings for other in maskings]
    for one in read(finished):
        assert [run["seed"] for run in one["runs"]] == [0] and one["diverged"] == []
        assert {run["masking"] for run in one["runs"]} == {one["settings"]["evaluation_masking"]}
    of_run = {path.name for path in (finished / "masking_pixel" / "seed_0").glob("*.json")}
    assert of_run == {"config.json", "evaluation_pixel.json", "evaluation_standardised.json"}


def test_tables_and_a_plot_show_every_run(finished):
    results = read(finished)
    lines = (finished / "ablation.md").read_text().splitlines()
    head = "| masking | evaluation masking | runs | AD↓(100%) | IC↑(100%) | AD↓(50%) "
    assert lines[0].startswith(head) and lines[2 + len(results)] == ""
    value = results[0]["runs"][0]["AD"]["100"]
    assert lines[2].startswith("| pixel | pixel | 1 | ") and f"{value:.2f}" in lines[2]
    rows = list(csv.DictReader((finished / "ablation.csv").open()))
    assert [row["seed"] for row in rows] == ["0"] * 4
    assert float(rows[0]["AD↓(100%)"]) == pytest.approx(value, abs=1e-3)
    assert r"AD$\downarrow$(100\%)" in (finished / "ablation.tex").read_text()
    with Image.open(finished / "ablation.png") as picture:
        assert picture.width > picture.height


def test_differences_are_those_of_the_same_images_and_evaluation(finished):
    text = (finished / "ablation.md").read_text().split("Differences from the first setting:")[1]
    lines = [line.split(" | ") for line in text.strip().splitlines()]
    assert [line[:2] for line in lines[2:]] == [
        ["| standardised", "pixel"],
        ["| standardised", "standardised"],
    ]
    own, first = (one["runs"][0] for one in (read(finished)[3], read(finished)[1]))
    assert lines[3][2].strip("*").startswith(f"{own['AD']['100'] - first['AD']['100']:+.1f} [")
    # The interval of the difference on each resampling, not of two independent ones.
    rows = [
        dict(np.load(finished / f"masking_{name}" / "seed_0" / "evaluation_pixel.npz"))
        for name in ("pixel", "standardised")
    ]
    drops = [100 * np.maximum(0, 1 - x["masked"][:, 0] / x["confidence"]) for x in rows]
    rng, means = np.random.default_rng(0), []
    for _ in range(1000):
        chosen = rng.integers(16, size=16)
        means.append((drops[1] - drops[0])[chosen].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    assert f"[{low:.1f}, {high:.1f}]" in lines[2][2]


def test_what_is_finished_is_neither_trained_nor_evaluated_again(finished, pictures, monkeypatch):
    before = read(finished)
    for target, name in ((sweep, "train"), (Evaluator, "batches")):
        monkeypatch.setattr(target, name, lambda *_, **__: pytest.fail("computed again"))
    ablate(pictures, finished, *MASKINGS)
    assert read(finished) == before


def test_a_run_gives_the_figures_that_evaluate_gives(finished, pictures, tmp_path):
    run = finished / "masking_pixel" / "seed_0"
    words = ["--run", str(run), "--limit", "16", "--masking", "pixel"]
    main(["evaluate", *words, "--output", str(tmp_path / "figures.json")])
    alone, (one, *_) = json.loads((tmp_path / "figures.json").read_text()), read(finished)
    assert alone["AD"] == one["runs"][0]["AD"] and alone["IC"] == one["runs"][0]["IC"]


def test_other_images_are_evaluated_without_training(finished, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "train", lambda run: pytest.fail("trained again"))
    before = read(finished)
    ablate(pictures, finished, *MASKINGS, "--evaluation-images", "8")
    after = read(finished)
    assert {run["images"] for one in after for run in one["runs"]} == {8}
    assert after[0]["runs"][0]["AD"] != before[0]["runs"][0]["AD"]


def names(config, *over):
    axes, maskings = _axes(config, Ablation(over=over))
    return {axis.name: [setting.label for setting in axis.settings] for axis in axes}, maskings


def test_variants_are_compared_for_both_sets_of_features_of_vgg(tmp_path):
    vgg, vit = preset("vgg16"), preset("vit_b16")
    axes, maskings = names(vgg, ("variant",))
    assert axes == {
        "backbone_config.features": ["pool", "conv"],
        "variant": [*VARIANTS],
        "seed": ["0"],
    }
    assert maskings == [None]
    assert names(vit, ("variant",))[0] == {"variant": [*VARIANTS], "seed": ["0"]}
    assert [*names(vgg, ("variant", "ttame", "lcam"))[0]] == ["variant", "seed"]


def test_recipes_and_weights_of_the_loss_are_changed_one_at_a_time():
    config = preset("vit_b16")
    (axis, _), _ = _axes(config, Ablation(over=(("loss",),)))
    assert [dict(setting.values) for setting in axis.settings] == [
        {"loss.recipe": "paper"},
        {"loss.recipe": "reference"},
        {"loss.recipe": "scaled"},
        {"loss.recipe": "complement"},
        {"loss.recipe": "relevance"},
        {"loss.cross_entropy_weight": 0.75},
        {"loss.cross_entropy_weight": 3.0},
        {"loss.regulariser_weight": 1.0},
        {"loss.regulariser_weight": 4.0},
        {"loss.variation_weight": 0.0025},
        {"loss.variation_weight": 0.01},
        {"loss.area_exponent": 0.15},
        {"loss.area_exponent": 0.6},
    ]
    assert axis.settings[5].label == "cross_entropy_weight 0.75"
    config = dataclasses.replace(config, loss=LossConfig("complement"))
    (axis, _), _ = _axes(config, Ablation(over=(("loss",),)))
    assert axis.settings[0].label == "recipe complement"
    assert dict(axis.settings[-1].values) == {"loss.complement_weight": 1.0}
    config = dataclasses.replace(config, loss=LossConfig(variation_weight=0, complement_weight=0.2))
    (axis, _), _ = _axes(config, Ablation(over=(("loss",),)))
    labels = [setting.label for setting in axis.settings]
    assert labels[-1] == "complement_weight 0.4" and not any("variation" in x for x in labels)


def result(rate, drops, **known):
    """A setting with an AD(100%) by seed, each of 9 images."""
    result = Result(metrics=("ad", "ic"), labels={"learning_rate": rate}, **known)
    for seed, drop in drops.items():
        masked = np.full((9, 3), 0.5)
        masked[:, 0] = 1 - drop / 100
        rows = {"index": np.arange(9), "confidence": np.ones(9), "masked": masked}
        summary = summarise(rows, ("ad", "ic"))
        figures = {"method": "ttame", "backbone": "vit_b16", "images": 9, "forward_passes": 1}
        figures |= summary | {"intervals": intervals(rows, ("ad", "ic"), 3)}
        figures |= {"settings": {"inputs": {"images": "9 images"}}}
        result.add(seed, figures, rows)
    return result


def test_runs_that_diverged_are_named_below_the_table():
    results = [
        result("1", {0: 30.0}, diverged=[1]),
        result("2", {0: 20.0, 1: 24.0}),
        result("3", {}, diverged=[0, 1]),
    ]
    lines = markdown(results).splitlines()
    assert lines[2].startswith("| 1 | 1 | <u>30.00</u> | **0.00** |")
    assert lines[3].startswith("| 2 | 2 | **22.00 ± 2.83** |")
    assert lines[4:] == [
        line for x in ("1 (seed 1)", "3 (seed 0)", "3 (seed 1)") for line in ("", f"diverged: {x}")
    ]
    assert r"\textbf{22.00 $\pm$ 2.83}" in latex(results[:2])
    assert comma_separated(results[:2]).splitlines()[2].startswith("2,0,20.000,0.000,")
    draw(results[:2])


def test_differences_are_those_from_the_first_setting():
    results = [result("1", {0: 30.0, 1: 20.0}), result("2", {0: 33.0, 1: 25.0})]
    lines = differences(results).splitlines()
    assert lines[0].startswith("| learning rate | AD↓(100%) | IC↑(100%) | AD↓(50%) |")
    # Those of the two seeds are 3 and 5.
    assert lines[2].startswith("| 2 | **+4.0 [3.0, 5.0]** | +0.0 [0.0, 0.0] |")
    assert len(lines) == 3 and differences(results[:1]) == ""


def test_boxes_are_read_for_metrics_of_localisation():
    boxes = Path("boxes.csv")
    options = Ablation(measures=("energy",), evaluation_boxes=boxes).options()
    assert options.boxes == boxes and options.measures == ("energy",)


def test_one_run_that_diverges_does_not_stop_the_others(pictures, tmp_path, monkeypatch, finished):
    train, seen = sweep.train, []

    def diverging(run):
        seen.append(run.learning_rate)
        if run.learning_rate == 1:
            raise Diverged("training diverged: at step 1")
        return train(run)

    monkeypatch.setattr(sweep, "train", diverging)
    ablate(pictures, tmp_path / "out", "--over", "learning-rate", "1", "1e-3")
    assert seen == [1, 1e-3]
    assert [(one["diverged"], len(one["runs"])) for one in read(tmp_path / "out")] == [
        ([0], 0),
        ([], 1),
    ]
    assert "diverged: 1 (seed 0)" in (tmp_path / "out" / "ablation.md").read_text()


def test_all_settings_are_trained_once_before_any_with_another_seed(config, monkeypatch):
    seen = []

    def diverging(run):
        seen.append((run.seed, run.learning_rate))
        raise Diverged("training diverged")

    monkeypatch.setattr(sweep, "train", diverging)
    with pytest.raises(Failure, match="every run diverged"):
        module.ablate(config, Ablation(over=(("learning-rate", "1", "2"),), seeds=2))
    assert seen == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [one["diverged"] for one in read(config.output)] == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("over", "options", "message"),
    [
        ((), {}, "nothing to compare: ttame ablate --over variant"),
        (((),), {}, "nothing to compare"),
        ((("variant",), ("variant", "ttame")), {}, "--over variant is given twice"),
        ((("seed", "1", "2"),), {"seeds": 2}, "give either --seeds or --over seed"),
        ((("variant",),), {"seeds": 0}, "--seeds must be at least 1"),
        ((("variant",),), {"evaluation_images": 0}, "--evaluation-images must be at least 1"),
        ((("variant",),), {"measures": ("none",)}, "unknown metric 'none'"),
        ((("learning-rate", "1e-3", "0"),), {}, "learning_rate must be positive"),
        ((("start",), ("variant",)), {}, "--start head needs"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(
    over, options, message, config, monkeypatch
):
    monkeypatch.setattr(sweep, "train", lambda run: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        module.ablate(config, Ablation(over=over, **options))
    assert not list(config.output.rglob("*"))


def test_the_command_ends_with_one_line(tmp_path, refusal):
    words = ["--backbone", "vit", "--output", tmp_path / "out", "--over", "loss.recipe", "papers"]
    status, said = refusal(["ablate", *words])
    assert status == 2 and not (tmp_path / "out").exists()
    assert said.startswith("ttame: --over loss.recipe cannot be 'papers'; it can be paper")


def test_explicit_maskings_of_the_evaluation_do_not_depend_on_the_order():
    config = TrainConfig(backbone="vit", output=Path("out"))
    for over in (
        (("masking",), ("evaluation-masking", "pixel")),
        (("evaluation-masking", "pixel"), ("masking",)),
    ):
        ablation = Ablation(over=over)
        assert _axes(config, ablation)[1] == ["pixel"]


def test_settings_on_other_images_are_not_subtracted():
    results = []
    for name, images in (("a", "4 images"), ("b", "4 images"), ("c", "5 images")):
        rows = {"index": np.arange(4), "confidence": np.ones(4), "masked": np.full((4, 3), 0.5)}
        result = Result(metrics=("ad",), labels={"dataset": name})
        figures = {"images": 4, **summarise(rows, ("ad",)), "intervals": intervals(rows, ("ad",))}
        result.add(0, figures | {"settings": {"inputs": {"images": images}}}, rows)
        results.append(result)
    (*_, line) = differences(results).strip().splitlines()
    assert line.startswith("| b ")
