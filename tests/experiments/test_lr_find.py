import csv
import dataclasses
import json
import os
import shutil
import signal

import pytest
from PIL import Image
from tiny import TINY, training

from ttame_jax.cli import main
from ttame_jax.experiments import lr_find as module
from ttame_jax.experiments import sweep
from ttame_jax.experiments.lr_find import Grid, Point, draw, lr_find, markdown
from ttame_jax.metrics import Evaluator
from ttame_jax.runs import build_attention, build_backbone, load_attention, load_config

RATES = (0.01, 10.0)
FILES = {f"lr_find.{end}" for end in ("md", "csv", "png", "svg")}


def settings(pictures, output):
    return training(f"folder:{pictures}", output, epochs=2, batch_size=32, validation_images=16)


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """The configuration of a finished search, and its best point."""
    config = settings(pictures, tmp_path_factory.mktemp("lr_find"))
    return config, lr_find(config, Grid(RATES))


@pytest.fixture
def trained(monkeypatch):
    """The runs that a search trains; they are not trained really, nor is a plot drawn."""
    runs = []
    monkeypatch.setattr(sweep, "train", runs.append)
    monkeypatch.setattr(module, "save_figure", lambda figure, path: None)
    return runs


def measured(run):
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    return [line for line in lines if line["epoch"]]


def test_table_and_plot_show_every_rate_and_epoch(finished):
    config, best = finished
    assert {path.name for path in config.output.iterdir()} == FILES | {"rate_0.01", "rate_10.0"}
    rows = list(csv.DictReader((config.output / "lr_find.csv").open()))
    lines = [(rate, line) for rate in RATES for line in measured(config.output / f"rate_{rate}")]
    assert [(float(row["learning_rate"]), int(row["epochs"])) for row in rows] == [
        (0.01, 1),
        (0.01, 2),
        (10, 1),
        (10, 2),
    ]
    for row, (_, line) in zip(rows, lines, strict=True):
        assert float(row["AD_15"]) == pytest.approx(line["AD_15"], abs=1e-3)
        assert float(row["IC_15"]) == pytest.approx(line["IC_15"], abs=1e-3)
    table = (config.output / "lr_find.md").read_text()
    assert table.count("**") == 2
    assert "**{AD_15:.1f}/{IC_15:.1f}**".format(**best.figures) in table
    with Image.open(config.output / "lr_find.png") as picture:
        assert picture.width > 600


def test_the_best_point_is_the_checkpoint_that_its_run_explains_with(finished):
    config, best = finished
    scores = {
        (rate, line["epoch"]): line["IC_15"] - line["AD_15"]
        for rate in RATES
        for line in measured(config.output / f"rate_{rate}")
    }
    assert (best.run.learning_rate, best.epochs) == max(scores, key=scores.get)
    attention = build_attention(best.run, build_backbone(best.run))
    assert load_attention(best.run.output, attention) == best.figures["step"]


def test_the_command_of_the_best_setting_is_printed(finished, trained, capsys):
    config, best = finished
    lr_find(config, Grid(RATES))
    said = capsys.readouterr().out.splitlines()
    assert f"best: rate {best.run.learning_rate:g}, after {best.epochs}" in said[-2]
    words = said[-1]
    assert words.startswith("ttame train --backbone vit --weights None")
    assert f"--learning-rate {best.run.learning_rate}" in words and "--output" not in words


def test_finished_runs_are_skipped_and_others_trained(finished, trained):
    config, best = finished
    assert lr_find(config, Grid(RATES)) == best
    assert trained == []
    assert lr_find(config, Grid((*RATES, 0.5))) is None  # as the run is not trained really
    assert [run.learning_rate for run in trained] == [0.5]


def test_a_run_that_was_measured_but_not_saved_is_not_finished(finished, tmp_path, trained):
    config, _ = finished
    shutil.copytree(config.output, tmp_path / "copy")
    config = dataclasses.replace(config, output=tmp_path / "copy")
    shutil.rmtree(config.output / "rate_10.0" / "checkpoints" / "4")
    lr_find(config, Grid(RATES))
    assert [run.learning_rate for run in trained] == [10]


def test_a_finished_run_of_other_settings_is_refused(finished, trained):
    config, _ = finished
    with pytest.raises(ValueError, match="rate_0.01 holds a run with other settings .--seed was 0"):
        lr_find(dataclasses.replace(config, seed=1), Grid(RATES))


def test_an_automatic_batch_is_that_of_the_runs_before(finished, trained):
    config, best = finished
    automatic = dataclasses.replace(config, batch_size="auto")
    assert lr_find(automatic, Grid(RATES)) == best
    lr_find(automatic, Grid((0.5, *RATES)))
    assert [run.batch_size for run in trained] == [32]


def test_sigterm_stops_the_search_and_the_same_command_resumes_it(
    pictures, tmp_path, finished, monkeypatch, capfd
):
    whole, _ = finished
    config = settings(pictures, tmp_path)
    figures = Evaluator.figures

    def preempted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return figures(*arguments)

    monkeypatch.setattr(Evaluator, "figures", preempted)
    assert lr_find(config, Grid(RATES)) is None
    said = capfd.readouterr().err
    assert "run 1 of 2: --learning-rate 0.01" in said and "run 2 of 2" not in said
    assert "stopped: the same command resumes the search" in said
    monkeypatch.setattr(Evaluator, "figures", figures)
    monkeypatch.setattr(module, "save_figure", lambda figure, path: None)
    lr_find(config, Grid(RATES[:1]))
    assert "resuming after step" in capfd.readouterr().err
    again, once = (measured(output / "rate_0.01") for output in (tmp_path, whole.output))
    assert again == once


@pytest.mark.slow
def test_numbers_of_epochs_are_cycles_of_their_own(pictures, tmp_path):
    """From the command line; each has its own folder and counts as it is at its end."""
    words = ["--backbone", "vit", "--weights", "None", "--dataset", f"folder:{pictures}"]
    words += ["--output", str(tmp_path), "--validation-images", "16", "--workers", "0"]
    words += ["--backbone-config", *(str(word) for pair in TINY.items() for word in pair)]
    main(["lr-find", *words, "--rates", "0.1", "--epochs-grid", "1,2"])
    folders = [tmp_path / "rate_0.1" / f"epochs_{epochs}" for epochs in (1, 2)]
    assert [load_config(folder).epochs for folder in folders] == [1, 2]
    rows = list(csv.DictReader((tmp_path / "lr_find.csv").open()))
    assert [int(row["epochs"]) for row in rows] == [1, 2]
    for row, folder in zip(rows, folders, strict=True):
        assert float(row["AD_15"]) == pytest.approx(measured(folder)[-1]["AD_15"], abs=1e-3)


def test_rates_that_diverged_are_never_the_best(pictures, tmp_path):
    run = settings(pictures, tmp_path)
    points = [
        Point(dataclasses.replace(run, learning_rate=rate), 1, {"AD_15": drop, "IC_15": 0.0})
        for rate, drop in ((1.0, float("nan")), (0.1, 99.0))
    ]
    assert max(points, key=lambda point: point.score) is points[1]
    assert markdown(points).splitlines()[2:] == ["| 0.1 | **99.0/0.0** |", "| 1 | nan/0.0 |"]
    draw(points)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rates"], "no rate given"),
        (["--rates", "1e-3,0"], "learning_rate must be positive, not 0.0"),
        (["--rates", "nan"], "learning_rate must be positive, not nan"),
        (["--epochs-grid", "4", "0"], "epochs must be at least 1, not 0"),
        (["--validation-images", "0"], "--validation-images must be at least 1"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_is_trained(words, message, tmp_path, refusal):
    output = tmp_path / "out"
    status, said = refusal(["lr-find", "--backbone", "vit", "--output", output, *words])
    assert status == 2 and said.startswith("ttame: ") and message in said
    assert not output.exists()
