import dataclasses

import pytest
from tiny import TINY

from ttame_jax.attention import VARIANTS
from ttame_jax.config import preset
from ttame_jax.experiments import sweep
from ttame_jax.experiments.sweep import Axis, Setting, field_axis, grid, train_each
from ttame_jax.losses import RECIPES
from ttame_jax.training.loop import Diverged


@pytest.fixture
def trained(monkeypatch):
    """The runs that are trained; they are not trained really."""
    runs = []

    def train(run):
        runs.append(run)
        run.save()
        return True

    monkeypatch.setattr(sweep, "train", train)
    return runs


def values(axis):
    return [setting.values for setting in axis.settings]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("learning-rate 1e-3 2", [1e-3, 2]),
        ("batch-size 16 auto", [16, "auto"]),
        ("loss.area-exponent 0.2", [0.2]),
        ("backbone-config.depth 2 3", [2, 3]),
        ("masking None pixel", [None, "pixel"]),
        ("flip False True", [False, True]),
        ("validation-list None", [None]),
        ("epochs 2 2", [2]),
    ],
)
def test_values_have_the_types_of_their_fields(words, expected):
    name, *given = words.split()
    field = name.replace("-", "_")
    assert values(field_axis(name, given)) == [{field: value} for value in expected]
    assert [type(x) for one in values(field_axis(name, given)) for x in one.values()] == [
        type(value) for value in expected
    ]


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("variant", [*VARIANTS]),
        ("masking", ["pixel", "standardised"]),
        ("loss.recipe", [*RECIPES]),
        ("flip", [True, False]),
    ],
)
def test_a_field_without_values_takes_all_its_choices(name, choices):
    assert [*values(field_axis(name, []))] == [{name: choice} for choice in choices]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("learning-rates 1", "no such field; similar ones are learning-rate"),
        ("loss.area 1", "similar ones are .*loss.area-exponent"),
        ("backbone-config 1", "no such field"),
        ("learning-rate fast", "--over learning-rate cannot be 'fast': it is of type float"),
        ("epochs 1.5", "--over epochs cannot be '1.5'"),
        ("variant ttame lrp", "--over variant cannot be 'lrp'; it can be ttame, no_skip"),
        ("learning-rate", "--over learning-rate needs values"),
        ("workers 1 2", "the results of a run do not depend on it"),
    ],
)
def test_mistakes_are_refused_in_one_line(words, message):
    name, *given = words.split()
    with pytest.raises(ValueError, match=message):
        field_axis(name, given)


def test_a_grid_has_a_run_in_its_own_folder_for_every_combination(config):
    axes = [field_axis("loss.recipe", []), field_axis("backbone-config.depth", ["1", "2"])]
    trials = grid(config, axes)
    assert [(x.run.loss.recipe, x.run.backbone_config["depth"]) for x in trials] == [
        (recipe, depth) for recipe in RECIPES for depth in (1, 2)
    ]
    assert trials[1].labels == {"loss.recipe": "paper", "backbone_config.depth": "2"}
    folder = config.output / "loss.recipe_paper" / "backbone_config.depth_2"
    assert trials[1].run == dataclasses.replace(
        config, output=folder, backbone_config=TINY | {"depth": 2}
    )


def test_two_settings_never_share_a_folder(config):
    one, other = (Setting(label, {"weights": label}) for label in ("a/b", "a b"))
    with pytest.raises(ValueError, match="two settings would be trained in .*weights_a_b"):
        grid(config, [Axis("weights", (one, other))])


def test_another_backbone_comes_with_its_preset():
    config = dataclasses.replace(preset("vgg16"), batch_size=8)
    trials = grid(config, [field_axis("backbone", ["vgg16", "squeezenet1_0"])])
    own = preset("squeezenet1_0")
    assert trials[1].run.start == own.start == "head" != trials[0].run.start
    assert trials[1].run.epochs == own.epochs and trials[1].run.batch_size == 8
    assert trials[1].run.output == config.output / "backbone_squeezenet1_0"


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("start random head", ValueError, "--start head needs a classifier that"),
        ("backbone-config.num_heads 2 3", ValueError, "num_heads divides"),
        ("backbone-config.size 2", ValueError, "vit has no option size"),
        ("batch-size 32 80", ValueError, "has 64 images, less than one batch"),
        ("batch-size 32 3", ValueError, "does not divide over"),
        ("weights None none.safetensors", FileNotFoundError, "no weights file none.safetensors"),
        ("train-split train other", ValueError, "has no split 'other'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_training(
    words, error, message, config, trained
):
    name, *given = words.split()
    with pytest.raises(error, match=message):
        [*train_each(grid(config, [field_axis(name, given)]))]
    assert trained == []


def test_a_run_that_diverges_is_reported_and_the_others_continue(
    config, trained, monkeypatch, capfd
):
    train = sweep.train

    def diverging(run):
        if run.learning_rate == 2:
            raise Diverged("training diverged: at step 3")
        return train(run)

    monkeypatch.setattr(sweep, "train", diverging)
    trials = grid(config, [field_axis("learning-rate", ["1", "2", "3"])])
    outcomes = [(trial.run.learning_rate, outcome) for trial, outcome in train_each(trials)]
    assert outcomes == [(1, "finished"), (2, "diverged"), (3, "finished")]
    said = capfd.readouterr().err
    assert "run 2 of 3: --learning-rate 2" in said and "diverged: at step 3" in said


def test_all_runs_have_the_automatic_batch_size_of_the_first(config, trained, monkeypatch):
    train = sweep.train
    monkeypatch.setattr(
        sweep,
        "train",
        lambda run: train(
            dataclasses.replace(run, batch_size=16) if run.batch_size == "auto" else run
        ),
    )
    automatic = dataclasses.replace(config, batch_size="auto")
    trials = grid(automatic, [field_axis("learning-rate", ["1", "2"])])
    assert [trial.run.batch_size for trial, _ in train_each(trials)] == [16, 16]
    assert [run.batch_size for run in trained] == [16, 16]
