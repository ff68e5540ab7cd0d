"""Principal distortions: the extremes of two models' pencil, stationary for more, whatever their order and scale."""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, dense_jacobian
from strategies import pair, spd, spectrum_operator

import fisherop as fo
from fisherop.principal import _log_volume


def cosines(one, other):
    a, b = (np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in (one, other))
    return abs(a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def contrast(values):
    """Return the variance of log sensitivity ratios that the extreme ratios of squared sensitivities give."""
    return (np.log(values[0] / values[-1]) / 4) ** 2


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=4)
def test_two_models_give_the_extreme_generalized_eigenvectors(seed, dtype):
    A, B = spd(20, seed), spd(20, seed + 1)
    values, vectors = scipy.linalg.eigh(A, B)
    p = fo.principal_distortions([A.astype(dtype), B.astype(dtype)], restarts=1)
    close = 1e-7 if dtype == np.float64 else 1e-3
    np.testing.assert_allclose(p.objective, contrast(values), rtol=close)
    assert (cosines(p.distortions, vectors.T[[0, -1]]).max(axis=1) > 1 - 100 * close).all()


@pytest.mark.parametrize("name", ["attention", "linear m>n"])
def test_two_networks_give_the_extremes_of_their_pencil(name):
    models, image, ops = pair(name)
    dense_A, dense_B = (J.T @ J for J in (dense_jacobian(m, image).numpy() for m in models))
    tops = [np.linalg.eigvalsh(d)[-1] for d in (dense_A, dense_B)]
    lifted = [d + 1e-3 * top * np.eye(len(d)) for d, top in zip((dense_A, dense_B), tops, strict=True)]
    p = fo.principal_distortions(ops, delta=1e-3, restarts=0)
    values = scipy.linalg.eigh(*lifted, eigvals_only=True)
    assert p.converged
    assert p.distortions.shape == (2, *(image.shape[1:] if image.shape[0] == 1 else image.shape))
    np.testing.assert_allclose(p.objective, contrast(values), rtol=1e-3)
    np.testing.assert_allclose(p.sensitivities, [fo.discriminability(op, p.distortions) for op in ops], rtol=1e-6)


@pytest.mark.parametrize(("n_models", "k"), [(3, 2), (4, 3)])
def test_neither_the_order_nor_the_scale_of_models_matters(n_models, k):
    ops = [spd(15, seed=i) for i in range(n_models)]
    scaled = [10.0 ** (2 * i - 3) * op for i, op in enumerate(ops)]
    one, *others = (fo.principal_distortions(models, k, restarts=1) for models in (ops, ops[::-1], scaled))
    for other in others:
        np.testing.assert_allclose(other.objective, one.objective, rtol=1e-6)
        np.testing.assert_allclose(cosines(one.distortions, other.distortions).diagonal(), 1, atol=1e-4)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_objective_is_the_generalized_variance_of_log_ratios(k):
    p = fo.principal_distortions([spd(15, seed=i) for i in range(4)], k, restarts=1)
    logs = np.log(p.sensitivities)
    for reference in range(k):
        ratios = np.delete(logs, reference, axis=1) - logs[:, [reference]]
        covariance = np.cov(ratios.T, bias=True).reshape(k - 1, k - 1)
        np.testing.assert_allclose(np.linalg.det(covariance), p.objective, rtol=1e-6)


def test_no_small_step_improves_what_is_stationary():
    ops = [spd(15, seed=i) for i in range(3)]
    p = fo.principal_distortions(ops, 2, restarts=0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        d = p.distortions + 1e-3 * rng.standard_normal(p.distortions.shape)
        logs = np.log([np.sqrt(np.einsum("ij,jk,ik->i", d, op, d)) for op in ops])
        assert np.var(logs[:, 0] - logs[:, 1]) <= p.objective


@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_the_gradient_of_the_objective_is_its_slope(seed, k):
    rng = np.random.default_rng(seed)
    logs, step = rng.standard_normal((5, k)), rng.standard_normal((5, k))
    slope = (_log_volume(logs + 1e-6 * step)[0] - _log_volume(logs - 1e-6 * step)[0]) / 2e-6
    np.testing.assert_allclose((_log_volume(logs)[1] * step).sum(), slope, rtol=1e-4, atol=1e-4)


def test_products_of_a_comparison_are_counted():
    calls = []

    def product(x, matrix):
        calls.append(x.reshape(30, -1).shape[1])
        return matrix @ x

    ops = [
        sp.linalg.LinearOperator((30, 30), lambda x, m=m: product(x, m), matmat=lambda x, m=m: product(x, m))
        for m in (spd(30), spd(30, seed=1))
    ]
    calls.clear()  # of what SciPy multiplied to learn the dtype
    p = fo.principal_distortions(ops, restarts=1)
    assert p.n_matvec == sum(calls) - 2 * len(ops)  # less those of the test for symmetry


def test_a_null_space_has_a_floor_put_under_it():
    image = build("linear m<n")[1]
    ops = [fo.FisherOperator(build("linear m<n", seed=seed)[0], image) for seed in (0, 1)]
    p = fo.principal_distortions(ops, restarts=1)
    assert "floor delta = 0.001" in p.message
    assert np.isfinite(p.objective)
    assert p.converged


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_null_space_that_nobody_knew_of_is_found_out(dtype):
    ops = [
        spd(20).astype(dtype),
        spectrum_operator(np.r_[np.linspace(1, 0.5, 17), 0, 0, 0], 1)[0].numpy().astype(dtype),
    ]
    with pytest.warns(fo.ConvergenceWarning, match="no variance is largest: pass delta=1e-3"):
        p = fo.principal_distortions(ops, restarts=1, maxiter=40)
    assert not p.converged
    assert fo.principal_distortions(ops, restarts=1, delta=1e-3).converged


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_a_model_does_not_differ_from_itself_at_another_scale(dtype, seed, scale):
    F = spd(10, seed)
    p = fo.principal_distortions([F.astype(dtype), (scale * F).astype(dtype)], restarts=0)
    assert p.converged
    assert "the models do not differ" in p.message


def test_too_few_steps_give_the_best_distortions_and_a_warning():
    ops = [spd(60, seed=i, low=1e-3) for i in range(3)]
    with pytest.warns(fo.ConvergenceWarning, match="raise maxiter"):
        p = fo.principal_distortions(ops, maxiter=2, tol=1e-8)
    assert not p.converged
    assert len(p) == 2
