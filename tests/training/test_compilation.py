"""Programs are compiled once a run, and found again by the next."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from launch import train_command

from ttame_jax.experiments.train import train
from ttame_jax.startup import use_compilation_cache


@pytest.fixture
def compiled():
    """The names of the programs compiled, and what `when()` gave for each."""
    compiled = SimpleNamespace(names=[], times=[], when=None)

    def listen(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.names.append(fun_name)
            compiled.times.append(compiled.when())

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_a_second_time(config, compiled):
    """12 steps, six checkpoints, and four validations of 20 images in batches of 16."""
    fields = {"validation_images": 20, "log_every": 1, "checkpoint_every": 2}
    config = dataclasses.replace(config, epochs=3, batch_size=16, **fields)
    log = config.output / "metrics.jsonl"
    compiled.when = lambda: len(log.read_text().splitlines()) if log.exists() else 0
    train(config)
    assert len((config.output / "validation.jsonl").read_text().splitlines()) == 4
    # The validation, which comes before the first step, and the training step.
    assert [name for name in compiled.names if "step" in name] == ["jit(step)", "jit(local_step)"]
    # Before the first line, and in the first checkpoint, which Orbax cuts up.
    assert set(compiled.times) <= {0, 2}


def test_programs_are_kept_in_the_users_cache_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    command = train_command(f"folder:{pictures}", tmp_path / "run", epochs=1, batch_size=32)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    kept = [path.name for path in (tmp_path / "cache" / "ttame_jax" / "programs").iterdir()]
    assert any(name.startswith("jit_local_step") for name in kept)


def test_jaxs_own_choice_of_a_cache_comes_first(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    assert before is not None  # from the environment
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
