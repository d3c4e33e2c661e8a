import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tpu_table
from tpu_program import Program

PROGRAM = """\
HloModule jit_step

%products (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%scaled (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} multiply(%p, %p)
}

%body (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  %fusion.1 = bf16[8,4]{1,0} fusion(%x, %y), kind=kOutput, calls=%products, backend_config={"window_config":{"estimated_cycles":"100"}}
  %copy.1 = bf16[8,4]{0,1} copy(%fusion.1), backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %tuple = (s32[], bf16[8,4]{1,0}) tuple(%i, %copy.1)
}

%condition (state.1: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %while = (s32[], bf16[8,4]{1,0}) while(%init), condition=%condition, body=%body
  %fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%scaled, metadata={op_name="jit(step)/jit(attention_weights)/exp"}, backend_config={"window_config":{"estimated_cycles":"20"}}
  %fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%scaled, backend_config={"window_config":{"estimated_cycles":"5"}}
  %all-reduce-start = (f32[8,4]{1,0}, bf16[3]{0:T(256)}, f32[]) all-reduce-start(%p, %q, %r), to_apply=%scaled
  ROOT %out = f32[8]{0} all-reduce-done(%all-reduce-start)
}
"""


def test_cycles_are_added_by_kind_and_those_of_a_loop_at_every_turn():
    expected = {"matrix_products": 300, "copies": 21, "softmax": 20, "rest": 5}
    assert Program(PROGRAM).cycles == expected


def test_operations_without_an_estimate_are_counted_apart():
    text = PROGRAM.replace('"estimated_cycles":"7"', f'"estimated_cycles":"{2**63 - 1}"')
    assert Program(text).cycles == {"matrix_products": 300, "copies": 0, "softmax": 20, "rest": 5}
    assert (Program(text).unknown, Program(PROGRAM).unknown) == (3, 0)


def test_a_loop_without_a_limit_is_an_error():
    with pytest.raises(ValueError, match="cannot tell how often a loop runs: %while"):
        list(Program(PROGRAM.replace("constant(3)", "parameter(0)")).executed())


def test_collectives_are_counted_with_the_bytes_of_their_results():
    expected = {"all-reduce": {"count": 1, "bytes": 8 * 4 * 4 + 3 * 2 + 4}}
    assert Program(PROGRAM).collectives == expected


def test_the_table_has_a_row_for_each_program():
    result = {
        "setting": {
            "backbone": "vit_b16",
            "topology": "v5e:2x4",
            "program": "train",
        },
        "batch_size": 1024,
        "device_count": 8,
        "estimated_cycles": 200_000_000,
        "estimated_seconds": 0.1,
        "share_of_peak": 0.5,
        "memory_bytes_per_chip": 2 * 2**30,
        "collectives": {"all-reduce": {"count": 1, "bytes": 17_000_000}},
    }
    expected = "| v5e:2x4 | vit_b16 | train | 1024 | 200 | 100 | 10,240 | 50 % | 2.0 | 1 (17 MB) |"
    assert tpu_table.table([result]).splitlines()[-1] == expected


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: [tpu-compile]")
@pytest.mark.parametrize("program,reduced", [("train", 1), ("explain", 0)])
def test_a_small_model_is_compiled_for_a_tpu(program, reduced):
    words = ["--backbone", "digits_vit", "--image-size", "64", "--batch-size", "64"]
    script = [sys.executable, "benchmarks/tpu_compile.py", "--topology", "v5e:2x2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    said = subprocess.run(
        [*script, *words, "--program", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    result = json.loads(said.stdout)
    assert result["device"] == "TPU v5 lite" and result["device_count"] == 4
    assert result["estimated_cycles"] == sum(result["cycles_by_kind"].values()) > 10_000
    assert 0 < result["share_of_peak"] < 1
    assert sum(found["count"] for found in result["collectives"].values()) == reduced
    assert result["memory_bytes_per_chip"] > 16 * 64 * 64 * 3
