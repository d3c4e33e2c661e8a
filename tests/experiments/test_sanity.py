import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ttame_jax.cli import main
from ttame_jax.experiments import sanity as module
from ttame_jax.experiments.sanity import (
    MEASURES,
    cascade,
    cascade_maps,
    permuted,
    similarities,
)
from ttame_jax.methods import load_method
from ttame_jax.runs import load_run

LAYERS = ["head", "blocks.2", "blocks.1", "blocks.0", "embed"]


@pytest.fixture(scope="module")
def methods(run):
    loaded = load_run(run)
    return {
        name: load_method(name, loaded.backbone, loaded.attention if name == "ttame" else None)
        for name in ("ttame", "gradcam")
    }


@pytest.fixture(scope="module")
def images(pictures):
    files = sorted((pictures / "train").iterdir())[:48]
    crops = [Image.open(file).crop((0, 0, 32, 32)) for file in files]
    return np.stack([np.asarray(crop, np.float32) / 255 for crop in crops])


def check(run, output, *words):
    options = ["--run", str(run), "--output", str(output), "--limit", "3", "--pictures", "1"]
    main(["sanity", *options, *words])


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the drawing, which takes seconds."""
    monkeypatch.setattr(module, "save", lambda figure, path: None)
    monkeypatch.setattr(module, "draw", lambda figures: None)


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("sanity")
    check(run, output)
    return output


def test_figures_curves_and_strips_are_written(finished):
    data = {"ttame_backbone.json", "gradcam_backbone.json", "ttame_attention.json", "sanity.csv"}
    drawn = {f"{name}.{end}" for name in ("sanity", "maps_backbone") for end in ("png", "svg")}
    drawn |= {f"maps_attention.{end}" for end in ("png", "svg")}
    assert {path.name for path in finished.iterdir()} == data | drawn
    figures = json.loads((finished / "ttame_backbone.json").read_text())
    assert figures["steps"] == LAYERS and figures["images"] == 3
    rows = list(csv.DictReader((finished / "sanity.csv").open()))
    assert len(rows) == (2 * len(LAYERS) + 4) * len(MEASURES)
    last = next(row for row in rows if row["step"] == "embed" and row["measure"] == "ssim")
    assert float(last["mean"]) == pytest.approx(figures["mean"]["ssim"][-1], abs=1e-4)
    assert float(last["low"]) <= float(last["mean"]) <= float(last["high"])
    with Image.open(finished / "maps_backbone.png") as picture:
        assert picture.width > 2 * picture.height  # seven columns, two rows


def test_the_attention_mechanism_is_randomised_from_the_fusion_to_the_earliest_branch(finished):
    figures = json.loads((finished / "ttame_attention.json").read_text())
    assert figures["steps"] == ["fusion", "branches.2", "branches.1", "branches.0"]
    assert figures["mean"]["spearman"][0] < 1


def test_the_head_does_not_matter_to_ttame_unless_another_class_is_predicted(
    finished, run, tmp_path, undrawn
):
    def first(folder, method):
        return json.loads((folder / f"{method}_backbone.json").read_text())["mean"]["spearman"][0]

    assert first(finished, "ttame") == 1 > first(finished, "gradcam")
    words = ["--explain", "predicted", "--methods", "ttame", "--pictures", "0", "--limit", "6"]
    check(run, tmp_path, *words)
    assert first(tmp_path, "ttame") < 1
    assert not list(tmp_path.glob("maps_*"))


def test_what_is_finished_is_not_computed_again_and_what_is_not_resumes(
    finished, run, tmp_path, monkeypatch, undrawn
):
    compute, seen = module.cascade_maps, []

    def counted(cascade, image, explain, seeds):
        seen.append(seeds[1])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return compute(cascade, image, explain, seeds)

    monkeypatch.setattr(module, "cascade_maps", counted)
    check(run, finished, "--pictures", "0")
    assert seen == []
    words = ["--methods", "gradcam", "--pictures", "0"]
    with pytest.raises(SystemExit):
        check(run, tmp_path, *words)
    check(run, tmp_path, *words)
    assert len(seen) == 2 + 2 and seen[1] == seen[2]
    whole, resumed = (
        json.loads((folder / "gradcam_backbone.json").read_text())
        for folder in (finished, tmp_path)
    )
    assert whole["mean"] == resumed["mean"]


@pytest.mark.parametrize("constant", [1, 3])
def test_images_with_a_constant_original_map_are_left_out(
    constant, run, tmp_path, monkeypatch, undrawn, refusal
):
    seen = []

    def maps(cascade, image, explain, seeds):
        seen.append(seeds)
        drawn = np.linspace(0, 1, 6 * 16, dtype=np.float32).reshape(6, 4, 4) ** len(seen)
        return np.concatenate([drawn[:1] * (len(seen) > constant), drawn[1:]])

    monkeypatch.setattr(module, "cascade_maps", maps)
    words = ["sanity", "--run", run, "--limit", "3", "--methods", "gradcam", "--pictures", "0"]
    if constant == 3:
        status, said = refusal([*words, "--output", tmp_path])
        assert status == 1 and "all maps of gradcam are constant" in said
        return
    main([*map(str, words), "--output", str(tmp_path)])
    figures = json.loads((tmp_path / "gradcam_backbone.json").read_text())
    assert figures["images"] == 2 and figures["mean"]["spearman"] == pytest.approx([1] * 5)


@pytest.mark.parametrize("name", ["ttame", "gradcam"])
def test_a_cascade_that_changes_nothing_gives_exactly_1(name, methods, images, monkeypatch):
    monkeypatch.setattr(module, "permuted", lambda tensor, path, seeds: tensor)
    checked = cascade(methods[name], "backbone", most=12)
    explained = 0
    for image in images[:8]:
        original, *after = cascade_maps(checked, image, "original", [0])
        assert len(after) == len(LAYERS)
        explained += np.ptp(original) > 0
        for one in after:
            assert similarities(original, one, (32, 32)) == dict.fromkeys(MEASURES, 1)
    assert explained


@pytest.mark.parametrize(
    ("name", "part"), [("ttame", "backbone"), ("ttame", "attention"), ("gradcam", "backbone")]
)
def test_maps_of_random_networks_are_unrelated_to_the_original_ones(
    name, part, methods, images, monkeypatch
):
    """In the mean over images and classes, each with a random network of its own."""
    checked, correlations = cascade(methods[name], part, most=1), []
    for i, image in enumerate(images):
        monkeypatch.setattr(module, "_predict", lambda *_, i=i: jnp.array(i % 5))
        original, random = cascade_maps(checked, image, "original", [0, i])
        if np.ptp(original) > 0:
            correlations.append(similarities(original, random, (32, 32))["spearman"])
    assert len(correlations) > 16 and np.std(correlations) > 0.2
    assert abs(np.mean(correlations)) < 0.1


def test_a_cascade_of_fewer_steps_ends_with_everything_random(methods):
    every = cascade(methods["ttame"], "backbone", most=12)
    assert [*every.steps] == LAYERS
    fewer = cascade(methods["ttame"], "backbone", most=2)
    assert [*fewer.steps] == ["head", "embed"] or [*fewer.steps][-1] == "embed"
    assert sorted(fewer.steps["embed"]) == sorted(every.steps["embed"])
    assert [*cascade(methods["ttame"], "backbone", most=1).steps] == ["embed"]


def test_each_step_randomises_its_layer_and_keeps_the_others(methods):
    checked = cascade(methods["gradcam"], "backbone", most=12)
    original, head, last, *_, whole = (
        {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(state)}
        for state in checked.states([0])
    )

    def changed(one, other):
        return {path for path in one if not np.array_equal(one[path], other[path])}

    assert {path.split(".")[1] for path in changed(original, head)} == {"head"}
    assert all(path.startswith("backbone.blocks.2.") for path in changed(head, last))
    for path in changed(original, whole):
        assert np.array_equal(np.sort(original[path], axis=None), np.sort(whole[path], axis=None))
    kernels = {path for path in original if path.endswith("kernel")}
    assert kernels <= changed(original, whole)


def test_tensors_are_permuted_differently_by_name_and_seed_and_always_alike():
    tensor = jnp.arange(60.0).reshape(3, 20)
    once = permuted(tensor, "a", [0, 1])
    assert once.shape == (3, 20) and sorted(once.ravel()) == sorted(tensor.ravel())
    assert jnp.array_equal(once, permuted(tensor, "a", [0, 1]))
    for other in (permuted(tensor, "b", [0, 1]), permuted(tensor, "a", [0, 2])):
        assert not jnp.array_equal(once, other)


def test_similarities_of_known_maps():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert similarities(ramp, ramp.copy(), (32, 32)) == dict.fromkeys(MEASURES, 1)
    power = similarities(ramp, ramp**3, (32, 32))
    assert power["spearman"] == pytest.approx(1) and power["ssim"] < 1
    opposite = similarities(ramp, 1 - ramp, (32, 32))
    assert opposite["spearman"] == pytest.approx(-1) and opposite["ssim"] < 0
    constant = similarities(ramp, np.zeros_like(ramp), (32, 32))
    assert constant["spearman"] == constant["hog"] == 0
    noise = np.asarray(jax.random.uniform(jax.random.key(0), (2, 64, 64)))
    assert all(abs(value) < 0.2 for value in similarities(*noise, (64, 64)).values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods", "no method given"),
        ("--methods unknown", "unknown method 'unknown'"),
        ("--methods lcam", "needs an attention mechanism of that variant"),
        ("--steps 0", "--steps must be at least 1"),
        ("--limit 0", "--limit must be at least 1"),
        ("--pictures -1", "--pictures must be at least 0"),
        ("--seed -1", "--seed must be at least 0"),
    ],
)
def test_mistakes_end_with_one_line(words, message, run, tmp_path, refusal):
    output = tmp_path / "out"
    status, said = refusal(["sanity", "--run", run, "--output", output, *words.split()])
    assert status == 2 and message in said and not output.exists()
