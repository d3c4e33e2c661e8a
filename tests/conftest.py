import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# XLA ends the process if it does not know a flag.
KNOWS_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12)

# Before JAX starts: eight simulated devices, so that every compiled step is really parallel, and
# programs that compile in half the time, since most of them run only once.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if KNOWS_EMITTERS else "",
    ]
)

# Compiled programs are kept for these tests and the processes that they start, the workers among
# them, and not longer.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="ttame-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.01"

import gc

import hypothesis
import jax
import numpy as np
import pytest
from PIL import Image

# Fixtures that are shared by all examples must only be read.
COMMON = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("default", max_examples=200, derandomize=True, **COMMON)
hypothesis.settings.register_profile("nightly", max_examples=10_000, **COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Traced programs are many small objects that stay: collecting them often takes minutes in all.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees the memory of a file's programs: hardly any is used by the next file."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real images and weights, which are not part of the project."""
    path = Path(os.environ.get("TTAME_SHARED", Path(__file__).parents[1] / ".." / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared images and weights; set TTAME_SHARED (no {path})")
    return path.resolve()


@pytest.fixture(scope="session")
def random_backbone():
    """`load_backbone` with random weights, in no time."""

    from random_weights import randomised

    from ttame_jax.weights import abstract_backbone

    def load(name, seed=0, **config):
        return randomised(abstract_backbone(name, **config), seed)

    return load


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with a train and a validation split of small pictures: blobs on a gradient."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :36] / 36
    for split, count in (("train", 64), ("validation", 20)):
        (folder / split).mkdir()
        for i in range(count):
            cy, cx = rng.uniform(0.2, 0.8, 2)
            blob = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 0.02)[..., None]
            shade = np.stack([x, y, 1 - x], axis=-1) * rng.uniform(0, 0.7, 3)
            picture = shade * (1 - blob) + blob * rng.uniform(0.3, 1, 3)
            name = folder / split / f"{i:03}.png"
            Image.fromarray((255 * picture).astype(np.uint8)).save(name)
    return folder


@pytest.fixture
def config(pictures, tmp_path):
    """The training of the smallest ViT on the pictures."""
    from tiny import training

    return training(f"folder:{pictures}", tmp_path / "run")


@pytest.fixture
def refusal(capsys):
    """Runs a command that must fail: its exit status, and the line that it printed last."""
    from ttame_jax.cli import main

    def run(words):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return stop.value.code, capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.fixture(scope="session")
def run(pictures, tmp_path_factory) -> Path:
    """A finished run of `ttame train` on the pictures, its backbone the smallest ViT."""
    from tiny import TINY

    from ttame_jax.cli import main

    output = tmp_path_factory.mktemp("runs") / "run"
    words = ["--backbone", "vit", "--weights", "None", "--dataset", f"folder:{pictures}"]
    words += ["--output", str(output), "--epochs", "1", "--batch-size", "16", "--workers", "0"]
    sizes = [str(word) for pair in TINY.items() for word in pair]
    main(["train", *words, "--validation-images", "0", "--backbone-config", *sizes])
    return output


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory, worker_id) -> Path:
    """Data folder with the data set digits, generated once for all workers, without TensorFlow."""
    from filelock import FileLock
    from running import HIDE_TENSORFLOW, run_python

    folder = tmp_path_factory.getbasetemp()
    data_dir = (folder if worker_id == "master" else folder.parent) / "digits"
    with FileLock(f"{data_dir}.lock"):
        if not data_dir.exists():
            data_dir.mkdir()
            run_python(
                HIDE_TENSORFLOW
                + "import sys; from ttame_jax.data import load_source; "
                + "load_source('digits', 'train', sys.argv[1])",
                data_dir,
            )
    return data_dir
