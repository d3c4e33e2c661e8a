import jax
import numpy as np
import pytest

from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.metrics import imputation
from ttame_jax.metrics.imputation import RESIDUAL, noisy_linear_imputation, relative_residual

SHAPE = (97, 64)  # odd and even, not square
impute = jax.jit(noisy_linear_imputation)


def picture(shape, seed=0):
    """A standardised image: broad shapes and fine texture, [H, W, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]][..., None] / 20
    phase = rng.uniform(0, 6, (2, 3))
    image = np.sin(rows + phase[0]) + np.cos(1.7 * columns + phase[1])
    return (image + rng.normal(0, 0.3, image.shape)).astype(np.float32)


def scattered(percent, shape=SHAPE):
    return np.random.default_rng(percent).random(shape) < percent / 100


def block(percent, corner, shape=SHAPE):
    """One rectangle of `percent` of the pixels, in a corner or in the middle."""
    sides = [int(n * (percent / 100) ** 0.5) for n in shape]
    starts = [
        {"start": 0, "end": n - s, "middle": (n - s) // 2}[corner] for n, s in zip(shape, sides)
    ]
    removed = np.zeros(shape, bool)
    removed[starts[0] : starts[0] + sides[0], starts[1] : starts[1] + sides[1]] = True
    return removed


def masks():
    result = {f"scattered {p} %": scattered(p) for p in (1, 50, 90, 99)}
    result |= {
        f"{c} block {p} %": block(p, c) for p in (1, 50, 99) for c in ("start", "middle", "end")
    }
    result["all but two corners"] = np.ones(SHAPE, bool)
    result["all but two corners"][[0, -1], [0, -1]] = False
    result["one column"] = np.zeros(SHAPE, bool)
    result["one column"][:, -1] = True
    return result


def package_imputer():
    pytest.importorskip("torch")
    import_torchvision()
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    import torch

    def run(image, removed):
        known = torch.from_numpy((~removed).astype(np.float32))
        image = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return road.NoisyLinearImputer(noise=0)(image, known).numpy().transpose(1, 2, 0)

    return run


def equations(image, removed):
    """Residual and right-hand side of the paper's equations, in float64 (weights times 12)."""
    padded = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    hole = np.pad(removed, 1)[..., None]
    inside = np.pad(np.ones((*removed.shape, 1)), ((1, 1), (1, 1), (0, 0)))
    residual, right = np.zeros(image.shape), np.zeros(image.shape)
    for i, j in np.ndindex(3, 3):
        here = np.s_[i : i + image.shape[0], j : j + image.shape[1]]
        weight = (1, 2, 0)[(i == 1) + (j == 1)]
        residual += weight * (padded[here] - inside[here] * image)
        right += weight * np.where(hole[here], 0, padded[here])
    return residual[removed], right[removed]


def true_residual(image, removed):
    residual, right = equations(image, removed)
    return (np.linalg.norm(residual, axis=0) / np.linalg.norm(right, axis=0)).max()


def test_equals_the_package_on_scattered_and_solid_masks():
    package = package_imputer()
    removed = np.stack(list(masks().values()))
    images = np.stack([picture(SHAPE, seed) for seed in range(len(removed))])
    got = np.asarray(impute(images, removed))
    for name, *case in zip(masks(), images, removed, got):
        image, hole, imputed = case
        np.testing.assert_allclose(imputed, package(image, hole), atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_equals_the_package_at_full_size_with_99_percent_removed():
    package, image = package_imputer(), picture((224, 224))
    removed = block(99, "end", image.shape[:2])
    got = np.asarray(impute(image[None], removed[None]))[0]
    np.testing.assert_allclose(got, package(image, removed), atol=1e-3)


@pytest.mark.slow
def test_few_iterations_reach_the_stated_residual(monkeypatch):
    monkeypatch.setattr(imputation, "MAX_ITERATIONS", 8)
    removed = np.stack(list(masks().values()))
    images = np.stack([picture(SHAPE, seed) for seed in range(len(removed))])
    # The stated residual is that of an optimised program, which rounds less.
    optimised = {"xla_backend_optimization_level": 3}
    solve = jax.jit(lambda *batch: noisy_linear_imputation(*batch), compiler_options=optimised)
    got = np.asarray(solve(images, removed))
    true = [true_residual(*case) for case in zip(got, removed)]
    assert max(true) <= RESIDUAL
    stated = jax.jit(relative_residual, compiler_options=optimised)
    np.testing.assert_allclose(stated(got, removed), true, rtol=0.2, atol=4e-6)
    assert np.all(stated(images, removed) > 1e-2)


def test_coarse_grids_are_galerkin_projections():
    rng = np.random.default_rng(0)
    free = rng.random((1, 1, *SHAPE)) < 0.8

    @jax.jit
    def both(free, coarse):
        fine, first, second = imputation._hierarchy(free)[:3]
        prolonged = free * prolong(coarse["first"], SHAPE)
        projected = restrict(fine.apply(prolonged))
        again = restrict(first.apply(prolong(coarse["second"], coarse["first"].shape[2:])))
        return (first.apply(coarse["first"]), second.apply(coarse["second"])), (projected, again)

    def prolong(x, shape):
        return imputation._prolong(imputation._prolong(x, 2, shape[0]), 3, shape[1])

    def restrict(x):
        return imputation._restrict(imputation._restrict(x, 2), 3)

    coarse = {"first": rng.normal(size=(1, 2, 49, 33)), "second": rng.normal(size=(1, 2, 25, 17))}
    coarse = jax.tree.map(np.float32, coarse)
    for stencil, projection in zip(*both(free.astype(np.float32), coarse)):
        np.testing.assert_allclose(stencil, projection, atol=1e-4)
    fine = rng.normal(size=(1, 2, *SHAPE)).astype(np.float32)
    adjoint = [
        np.vdot(prolong(coarse["first"], SHAPE), fine),
        np.vdot(coarse["first"], restrict(fine)),
    ]
    np.testing.assert_allclose(*adjoint, rtol=1e-4)


def test_single_pixels_by_hand():
    image = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1) ** 2
    removed = np.zeros((1, 3, 4), bool)
    removed[0, 0, 0] = removed[0, 1, 2] = True
    got = np.asarray(impute(image, removed))[0, :, :, 0]
    a = image[0, :, :, 0]
    corner = (2 * a[0, 1] + 2 * a[1, 0] + a[1, 1]) / 5
    inner = (
        2 * (a[0, 2] + a[1, 1] + a[1, 3] + a[2, 2]) + a[0, 1] + a[0, 3] + a[2, 1] + a[2, 3]
    ) / 12
    np.testing.assert_allclose([got[0, 0], got[1, 2]], [corner, inner], rtol=1e-5)
    np.testing.assert_array_equal(got[~removed[0]], a[~removed[0]])


def test_an_image_does_not_depend_on_its_batch():
    removed = np.stack([block(99, "start"), scattered(1), block(50, "middle")])
    images = np.stack([picture(SHAPE, seed) for seed in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)
    together = impute(images, removed, keys)
    for i in range(3):
        alone = impute(images[i : i + 1], removed[i : i + 1], keys[i : i + 1])[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-6)


def test_values_of_removed_pixels_are_not_read():
    removed = block(50, "start")[None]
    image = picture(SHAPE)[None]
    hidden = np.where(removed[..., None], np.nan, image)
    np.testing.assert_array_equal(impute(hidden, removed), impute(image, removed))


def test_nothing_and_everything_removed():
    image = picture(SHAPE)[None]
    np.testing.assert_array_equal(impute(image, np.zeros((1, *SHAPE), bool)), image)
    np.testing.assert_array_equal(impute(image, np.ones((1, *SHAPE), bool)), np.zeros_like(image))


def test_one_known_colour_fills_the_image():
    image = np.full((1, *SHAPE, 3), (2.5, -1.75, 0.1), np.float32)
    removed = np.ones((1, *SHAPE), bool)
    removed[0, 40, 7] = False
    np.testing.assert_allclose(impute(image, removed), image, atol=1e-6)


def test_tiny_images():
    for shape in ((1, 1), (2, 1), (4, 3)):
        image = picture(shape)
        removed = np.zeros(shape, bool)
        removed[-1] = True
        got = np.asarray(impute(image[None], removed[None]))[0]
        assert np.isfinite(got).all()
        if not removed.all():
            assert true_residual(got, removed) <= RESIDUAL


def test_noise_lies_on_removed_pixels_with_the_stated_deviation():
    removed = np.stack([scattered(90)] * 2)
    images = np.stack([picture(SHAPE)] * 2)
    clean = np.asarray(impute(images, removed))
    noise = np.asarray(impute(images, removed, jax.random.key(3))) - clean
    assert np.all(noise[~removed] == 0)
    np.testing.assert_allclose(noise[removed].std(), 0.01, rtol=0.05)
    np.testing.assert_allclose(noise[removed].mean(), 0, atol=5e-4)
    assert np.abs(noise[0] - noise[1]).max() > 0.01  # one key, yet images have their own noise
    again = np.asarray(impute(images, removed, jax.random.key(3))) - clean
    np.testing.assert_array_equal(noise, again)


def test_wrong_masks_are_refused():
    image = picture(SHAPE)[None]
    for removed in (np.ones((1, *SHAPE), np.float32), np.ones(SHAPE, bool)):
        with pytest.raises(ValueError, match="removed must be bool"):
            noisy_linear_imputation(image, removed)
