import json
import os
import subprocess
import sys

import common
import explain
import imports
import input_pipeline
import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import report
import torch
import torch_reference
import train_step
from flax import nnx
from jax.sharding import Mesh
from safetensors.torch import save_file

from ttame_jax import AttentionMechanism, load_backbone
from ttame_jax.losses import LossConfig
from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd
from ttame_jax.training.step import initial_state, make_train_step
from ttame_jax.weights import abstract_backbone

SETTING = {"backbone": "resnet18", "batch_size": 8, "image_size": 64, "rounds": 1}


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr(common, "TURN", 0)


def printed(capsys, run, options):
    common.main(run, options)
    result = json.loads(capsys.readouterr().out)
    assert result["setting"]["rounds"] == 1
    assert result["machine"]["cpu_cores"] >= 1
    return result


@pytest.mark.slow
def test_train_step_compares_with_pytorch_and_another_recipe(capsys):
    options = train_step.Options(**SETTING, compare=True, recipe="relevance")
    result = printed(capsys, train_step.run, options)
    rates = result["images_per_second"], result["torch_images_per_second"]
    assert result["ratio"] == pytest.approx(rates[0] / rates[1])
    assert [result["recipe_ratio"]] == pytest.approx(result["recipe_ratios"])
    assert result["program_memory_bytes"] > 8 * 64 * 64 * 3
    # The compiler leaves out products with padding: a good part of such small maps.
    assert 0.7 < result["gflops_per_image_compiled"] / result["gflops_per_image"] < 1
    assert result["share_of_peak"] is None  # of a CPU


@pytest.mark.slow
def test_explain_gives_the_overhead_over_the_bare_classifier(capsys):
    setting = common.Setting(**SETTING | {"backbone": "digits_cnn"})
    result = printed(capsys, explain.run, setting)
    seconds = result["seconds"]
    bare = min(seconds["logits"], seconds["logits_and_features"])
    assert result["overhead"]["one_class"] == pytest.approx(seconds["one_class"] / bare)
    assert 1 < result["flops_overhead"]["one_class"] < result["flops_overhead"]["all_classes"]


@pytest.mark.slow
def test_input_pipeline_adds_up_its_stages(capsys):
    result = printed(capsys, input_pipeline.run, input_pipeline.Options(**SETTING, limit=4))
    total = sum(1 / rate for rate in result["by_stage"].values())
    assert result["images_per_second_per_core"] == pytest.approx(1 / total)
    assert 80_000 < result["mean_bytes"] < 140_000  # as ImageNet's


@pytest.mark.slow
def test_torch_reference_trains_alone(capsys):
    result = printed(capsys, torch_reference.run, torch_reference.Options(**SETTING))
    assert result["images_per_second"] == pytest.approx(8 / result["seconds_per_step"])


@pytest.mark.slow
def test_the_pytorch_reference_has_our_loss(tmp_path):
    reference = torch_reference.Reference(torch_reference.Options(**SETTING))
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.loss(images.float() / 255).item()

    weights = {name.removeprefix("body."): x for name, x in reference.backbone.state_dict().items()}
    save_file(weights, tmp_path / "resnet18.safetensors")
    backbone = load_backbone("resnet18", tmp_path / "resnet18.safetensors", image_size=64)
    attention = AttentionMechanism([128, 256, 512], 1000, rngs=nnx.Rngs(0))
    theirs = reference.attention
    ours = zip(attention.branches, theirs.convolutions)
    for layer, conv in [*((b.conv, conv) for b, conv in ours), (attention.fusion, theirs.fusion)]:
        layer.kernel[...] = jnp.asarray(conv.weight.detach().numpy()[:, :, 0, 0].T)
        layer.bias[...] = jnp.asarray(conv.bias.detach().numpy())
    optimizer, mesh = one_cycle_sgd(OneCycle(1e-3, 10)), Mesh(np.array(jax.devices()[:1]), "data")
    step = make_train_step(backbone, attention, optimizer, mesh, "pixel", LossConfig())
    batch = jnp.asarray(images.permute(0, 2, 3, 1).numpy(), jnp.uint8)
    with jax.default_matmul_precision("highest"):
        _, metrics = step(initial_state(attention, optimizer), nnx.state(backbone), batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_flops_are_counted_from_shapes():
    def function(x, kernel, weights):
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.jit(jnp.matmul)(x.sum(axis=(1, 2)), weights)

    arrays = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), jnp.ones((5, 7))
    convolution, product = 2 * (2 * 4 * 4 * 5) * 27, 2 * 2 * 5 * 7
    assert ours.layer_flops(function, *arrays) == convolution + product


def test_vit_b16_needs_three_passes_of_35_gflop():
    backbone = abstract_backbone("vit_b16")
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    graph, state = nnx.split(backbone)
    flops = ours.layer_flops(lambda state, x: nnx.merge(graph, state)(x), state, image)
    assert flops == pytest.approx(35.1e9, rel=0.01)


def test_the_report_has_a_row_for_each_result_and_each_failure(tmp_path, monkeypatch, capsys):
    def benchmark(name, *flags):
        if "vgg16" in flags:
            return {"error": "out of memory"}
        return {"setting": {"batch_size": 8}, "machine": {"jax": "1"}, "ratio": 1.5}

    monkeypatch.setattr(report, "benchmark", benchmark)
    output = tmp_path / "benchmarks.md"
    report.main(report.Options(output=output))
    assert json.loads(capsys.readouterr().out)["train_step"]["resnet50"]["ratio"] == 1.5
    text = output.read_text()
    assert "| resnet50 | 8 |  |  |  | 1.5 |" in text
    assert text.count("| vgg16 | out of memory |") == 2
    assert "- jax: 1" in text and "{" not in text


def test_batch_sizes_that_do_not_fit_are_passed_over(monkeypatch):
    rates = {"8": {"images_per_second": 5.0}, "16": {"images_per_second": 7.0}, "32": {"error": ""}}
    monkeypatch.setattr(report, "benchmark", lambda name, *flags: rates[flags[-1]])
    assert report.fastest([], (8, 16, 32)) == 16


def test_flops_of_a_loop_count_at_every_turn():
    def products(x):
        return jax.lax.map(lambda row: row @ jnp.ones((3, 4)), x)

    assert ours.layer_flops(products, jnp.ones((5, 2, 3))) == 5 * 2 * 2 * 3 * 4


@pytest.mark.slow
@pytest.mark.parametrize("kills", [{"train": 1}, {"train": 2, "evaluate": 1}])
def test_killed_commands_end_with_the_same_files(kills):
    """At moments in the middle of the commands: a third to a half of their time."""
    count = str(sum(kills.values()))
    words = [sys.executable, "benchmarks/crash.py", "--kills", count, "--seed", "16", "--commands"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    said = subprocess.run(
        [*words, ",".join(kills)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    result = json.loads(said.stdout)
    assert result["different"] == 0, result
    assert {name: found["kills"] for name, found in result["commands"].items()} == kills


@pytest.mark.slow
def test_the_survey_of_imports_has_a_row_for_every_model():
    results = [imports.survey("timm:test_vit"), imports.survey("timm:no_such_model")]
    assert results[0]["logits"] < 1e-5 and results[0]["gradient_is_finite"]
    page = imports.table(results)
    assert "| timm:test_vit | 0.4 | 160 | `blocks.3` 10x10x64, " in page
    assert "## Refused: 1" in page and "has no model 'no_such_model'" in page
