"""Estimates agree with dense truth as often as they say, bounds always, and every product is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS, build
from scipy.sparse import diags
from scipy.sparse.linalg import LinearOperator
from strategies import fishers, seeds, spectrum_operator

import fisherop as fo
from fisherop import spectrum
from fisherop.rows import RowOperator
from fisherop.spectrum import moments, quadrature
from fisherop.spectrum.estimate import between, critical

N = 600
SPECTRA = {
    "decaying": 1 / np.arange(1.0, N + 1),
    "fast": 10 ** np.linspace(0, -30, N),
    "flat": np.linspace(1, 0.5, N),
    "null": np.where(np.arange(N) < 400, np.linspace(2, 0.2, N), 0.0),
}
MU = 0.05
TRUTH = {
    "trace": np.sum,
    "frobenius_norm": np.linalg.norm,
    "participation_ratio": lambda v: v.sum() ** 2 / (v @ v),
    "logdet": lambda v: np.log(v + MU).sum(),
    "effective_dimension": lambda v: (v / (v + MU)).sum(),
    "count": lambda v: (v <= MU).sum(),
}
CALLS = {
    "trace": lambda op, **kw: fo.trace(op, 32, **kw),
    "frobenius_norm": lambda op, **kw: spectrum.frobenius_norm(op, 32, **kw),
    "participation_ratio": lambda op, **kw: spectrum.participation_ratio(op, 32, **kw),
    "logdet": lambda op, **kw: fo.logdet(op, MU, 8, steps=60, **kw),
    "effective_dimension": lambda op, **kw: fo.effective_dimension(op, MU, 8, steps=60, **kw),
    "count": lambda op, **kw: fo.count(op, MU, 8, steps=60, **kw),
}


def hidden(values):
    """Return an operator of which nothing but products is known; probes do not care in what basis it is diagonal."""
    return diags(values).tocsr()


class Counted(LinearOperator):
    """An operator that counts its products."""

    def __init__(self, values):
        super().__init__(np.dtype(float), (len(values),) * 2)
        self.values, self.count = np.asarray(values), 0

    def _matmat(self, x):
        self.count += x.shape[1]
        return self.values[:, None] * x

    def _matvec(self, x):
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _adjoint(self):
        return self


# ------------------------------------------------------------------------------------------------------------ coverage


@pytest.mark.parametrize("name", ["trace", "frobenius_norm", "participation_ratio", "logdet", "effective_dimension"])
def test_interval_holds_the_truth_in_about_95_of_100_runs(name, monkeypatch):
    monkeypatch.setattr("fisherop.spectrum.functions.exact_products", lambda _: math.inf)
    op, truth = hidden(SPECTRA["decaying"]), TRUTH[name](SPECTRA["decaying"])
    found = [CALLS[name](op, rng=seed) for seed in range(100)]
    inside = sum(e.low <= truth <= e.high for e in found)
    assert 88 <= inside <= 100  # fewer in one of 1000 sets of runs
    spread, said = np.std([e.value for e in found]), np.mean([e.standard_error for e in found])
    assert 0.7 * spread < said < 1.4 * spread
    assert abs(np.mean([e.value for e in found]) - truth) < 4 * spread / 10


@pytest.mark.parametrize(("name", "n_probes"), [("trace", 4), ("frobenius_norm", 4), ("frobenius_norm", 16)])
def test_interval_of_few_skew_samples_holds_the_truth_as_often(name, n_probes):
    values = 1 / np.arange(1.0, 301) ** 2
    op, truth, estimate = torch.diag(torch.from_numpy(values)), TRUTH[name](values), getattr(spectrum, name)
    found = [estimate(op, n_probes, rng=seed) for seed in range(400)]
    low, high = (np.mean(side) for side in zip(*((truth < e.low, truth > e.high) for e in found), strict=True))
    assert low <= 0.03
    assert high <= 0.06  # Student's interval lies below the truth in 7 to 12 of 100 runs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["trace", "frobenius_norm", "participation_ratio"])
def test_interval_without_spread_is_as_wide_as_rounding(name, dtype):
    values = np.full(5000, 0.7, dtype)
    truth, eps = TRUTH[name](values.astype(float)), float(np.finfo(dtype).eps)
    for seed in range(20):
        found = getattr(spectrum, name)(hidden(values), 8, rng=seed)
        assert found.low <= truth <= found.high
        assert found.high - found.low <= 200 * eps * truth


def test_interval_holds_the_truth_where_rtol_stops_the_work():
    values = SPECTRA["decaying"]
    found = [fo.trace(hidden(values), rtol=0.02, rng=seed) for seed in range(100)]
    assert all(e.converged and 0 < e.n_probes < 512 and e.high - e.low <= 0.04 * e.value * (1 + 1e-12) for e in found)
    assert sum(e.low <= values.sum() <= e.high for e in found) >= 87


@pytest.mark.parametrize("spectrum_name", SPECTRA)
@pytest.mark.parametrize("name", TRUTH)
def test_estimate_lies_near_the_truth(name, spectrum_name, monkeypatch):
    monkeypatch.setattr("fisherop.spectrum.functions.exact_products", lambda _: math.inf)
    values = SPECTRA[spectrum_name]
    found, truth = CALLS[name](hidden(values), rng=0), TRUTH[name](values)
    width = (found.high - found.low) / 2
    assert abs(found.value - truth) <= 2.5 * width + 1e-9 * abs(truth)
    assert found.low <= found.value <= found.high


# -------------------------------------------------------------------------------------------------------------- bounds


@given(seeds, st.integers(3, 25), st.sampled_from([1e-3, 0.1, 1.0]))
def test_quadratures_bound_the_integral_of_the_measure(seed, steps, mu):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.random(60) ** 4)
    values[: rng.integers(0, 20)] = 0
    op = RowOperator(np.diag(values))
    starts = moments.sphere(op, 3, rng)
    alpha, beta = quadrature.lanczos(op, starts, steps, lambda *_: False)
    shares = (starts.double().square() / 60).numpy()
    for f in (quadrature.Smooth(lambda x: np.log(x + mu)), quadrature.Smooth(lambda x: x / (x + mu)),
              quadrature.AtMost(float(rng.random() ** 2))):  # fmt: skip
        low, high = f.bounds(alpha, beta, 1e-14)
        truth = shares @ f.of(values)
        slack = 1e-8 * (1 + abs(truth))
        assert (low <= truth + slack).all()
        assert (truth <= high + slack).all()


@given(seeds, st.integers(2, 12))
def test_ends_are_bracketed(seed, steps):
    rng = np.random.default_rng(seed)
    values = rng.random(80) ** 3 + (1e-3 if seed % 2 else 0)
    op = np.diag(values)
    high, low = spectrum.lambda_max(op, steps=steps, rng=seed), spectrum.lambda_min(op, steps=steps, rng=seed)
    assert high.low <= values.max() <= high.high
    assert low.low <= values.min() <= low.high
    ratio = spectrum.condition(op, steps=steps, rng=seed)
    assert ratio.low <= values.max() / values.min() <= ratio.high
    assert math.isnan(high.standard_error)


@given(seeds, st.sampled_from([np.float32, np.float64]), st.integers(2, 12))
def test_ends_are_bracketed_where_rounding_is_all_that_is_in_doubt(seed, dtype, steps):
    level = dtype(1 + np.random.default_rng(seed).random())
    op = hidden(np.full(100 * steps, level, dtype))
    for found in (spectrum.lambda_max(op, steps=steps, rng=seed), spectrum.lambda_min(op, steps=steps, rng=seed)):
        assert found.low <= level <= found.high
        assert found.high - found.low <= 200 * np.finfo(dtype).eps
    ratio = spectrum.condition(op, steps=steps, rng=seed)
    assert ratio.low <= 1 <= ratio.high


def test_critical_value_is_students_without_a_gap_and_one_sided_with_a_wide_one():
    assert critical(0.0, 10**6) == pytest.approx(1.95996, abs=1e-4)
    assert critical(1e9, 10**6) == pytest.approx(1.64485, abs=1e-4)
    assert critical(0.0, 7) == pytest.approx(2.36462, abs=1e-4)
    found = between(np.zeros(8), np.ones(8), 0.0)
    assert (found.low, found.high) == (pytest.approx(0), pytest.approx(1))


def test_count_says_what_it_cannot_resolve(monkeypatch):
    monkeypatch.setattr("fisherop.spectrum.functions.exact_products", lambda _: math.inf)
    values = np.where(np.arange(N) < 400, 10 ** np.linspace(0, -14, N), 0)  # a null space with no gap before it
    found = spectrum.nullity(hidden(values), 8, steps=40, rng=0)
    assert found.low <= 200 <= found.high
    clear = spectrum.nullity(hidden(SPECTRA["null"]), 8, steps=60, rng=0)
    assert clear.low <= 200 <= clear.high
    assert clear.high - clear.low < 0.5 * (found.high - found.low)
    ranks = spectrum.rank(hidden(SPECTRA["null"]), 8, steps=60, rng=0)
    assert (ranks.low, ranks.high) == (pytest.approx(N - clear.high), pytest.approx(N - clear.low))


@given(seeds, st.sampled_from([np.float32, np.float64]), st.integers(1, 4))
def test_an_eigenvalue_at_the_threshold_counts_whatever_rounding_makes_of_it(seed, dtype, distinct):
    rng = np.random.default_rng(seed)
    levels = np.cumsum(0.1 + rng.random(distinct)).astype(dtype)
    levels[0] *= seed % 2  # half of all have a null space
    values = np.repeat(levels, rng.integers(5, 99, distinct))
    op = RowOperator(hidden(values))
    starts = moments.sphere(op, 3, rng)
    alpha, beta = quadrature.lanczos(op, starts, 9, lambda *_: False)
    floor = quadrature.rounding(op, float(levels[-1]))
    shares, slack = (starts.double().square() / len(values)).numpy(), 30 * float(np.finfo(dtype).eps)
    for level in levels.astype(float):
        for off in (-2, -0.1, 0, 0.1):
            threshold = max(0.0, level + off * floor)
            low, high = quadrature.at_most(threshold, floor).bounds(alpha, beta, floor)
            truth = shares @ (values <= threshold + floor)
            assert (truth - slack <= low).all()
            assert (low <= high).all()
            assert (high <= truth + slack).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rest", [0.0, 0.5, 1.0])
def test_all_eigenvalues_are_no_larger_than_the_largest(dtype, rest, monkeypatch):
    monkeypatch.setattr("fisherop.spectrum.functions.exact_products", lambda _: math.inf)
    op = hidden(np.where(np.arange(N) < 20, 1, rest).astype(dtype))
    density = fo.spectral_density(op, 4, steps=9, rng=0)
    for found in (fo.count(op, 1.0, 4, rng=0), density.count(1.0)):
        assert (found.low, found.high) == (pytest.approx(N, rel=10 * float(np.finfo(dtype).eps)), N)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_count_whose_pairs_are_all_known_is_right_to_rounding(dtype):
    op = hidden(np.append(np.linspace(0.5, 1, 10), np.zeros(4990)).astype(dtype))
    for seed in range(12):
        found = spectrum.nullity(op, 4, rng=seed)
        assert found.low <= 4990 <= found.high
        assert found.high - found.low <= 3e5 * np.finfo(dtype).eps


@given(seeds, st.integers(2, 40))
def test_the_dense_problem_counts_an_eigenvalue_at_the_threshold(seed, n):
    matrix, _ = spectrum_operator(np.repeat([2.0, 1.0, 0.0], n), seed)
    assert [fo.count(matrix, t).value for t in (0.0, 1.0, 2.0)] == [n, 2 * n, 3 * n]
    density = fo.spectral_density(matrix)
    assert [density.count(t).value for t in (0.0, 1.0, 2.0)] == [n, 2 * n, 3 * n]


# --------------------------------------------------------------------------------------------------------------- exact


@given(fishers())
def test_small_problems_are_exact(op):
    dense = (op @ torch.eye(op.shape[0], dtype=op.torch_dtype)).double()
    values = torch.linalg.eigvalsh((dense + dense.T) / 2).clamp(min=0).numpy()
    rtol = 1e-4 if op.torch_dtype == torch.float32 else 1e-9
    for name in ("trace", "frobenius_norm", "participation_ratio"):
        found = getattr(fo, name, None) or getattr(spectrum, name)
        found = found(op, 300)
        assert found.standard_error == 0
        assert found.n_probes == 0
        np.testing.assert_allclose(found.value, TRUTH[name](values), rtol=rtol)
        assert found.n_matvec <= math.ceil(op.shape[0])
    mu = 0.1 * float(values.max()) + 1e-3
    np.testing.assert_allclose(fo.logdet(op, mu).value, np.log(values + mu).sum(), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(
        fo.effective_dimension(op, mu).value, (values / (values + mu)).sum(), rtol=rtol, atol=rtol
    )


@given(fishers())
def test_map_of_a_small_problem_is_the_dense_diagonal_in_image_shape(op):
    identity = torch.eye(op.shape[0], dtype=op.torch_dtype)
    basis = op.to_image(identity).reshape(op.shape[0], -1).double()
    dense = basis.T @ (op @ identity).double() @ basis
    found = fo.sensitivity_map(op)
    assert found.value.shape == op.image.shape
    assert (found.value >= 0).all()
    scale = float(dense.abs().max())
    tol = (1e-5 if op.torch_dtype == torch.float32 else 1e-12) * scale
    torch.testing.assert_close(found.value.flatten(), dense.diagonal(), rtol=0, atol=tol)
    assert torch.equal(found.image, op.image)


# ---------------------------------------------------------------------------------------------------------------- maps


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 5, padding=2), torch.nn.Softplus(), torch.nn.Conv2d(6, 6, 5, stride=2, padding=2)
    )
    return model.double(), torch.rand(1, 1, 24, 24, dtype=torch.float64)


@pytest.fixture(scope="module")
def diagonal(network):
    F = fo.FisherOperator(*network)
    return (F @ torch.eye(576, dtype=torch.float64)).diagonal().reshape(1, 1, 24, 24)


def test_map_is_never_negative_and_its_intervals_hold_95_percent_of_the_pixels(network, diagonal):
    F = fo.FisherOperator(*network)
    found = [fo.sensitivity_map(F, 16, rng=seed) for seed in range(40)]
    assert all((e.value >= 0).all() for e in found)
    inside = torch.stack([(e.low <= diagonal) & (diagonal <= e.high) for e in found]).double().mean()
    assert 0.93 < inside < 0.97
    errors = torch.stack([(e.value - diagonal) / e.standard_error for e in found])
    assert 0.85 < errors.std() < 1.15


def test_median_error_of_a_map_at_64_probes_is_below_9_percent(network, diagonal):
    F = fo.FisherOperator(*network)
    errors = [(fo.sensitivity_map(F, 64, rng=seed).value / diagonal - 1).abs().median() for seed in range(4)]
    assert sum(errors) / 4 < 0.09
    F = fo.FisherOperator(*network)
    assert fo.sensitivity_map(F, 64, rng=0).n_matvec == 64 == F.n_matvec


def test_map_of_a_mask_is_zero_outside_and_right_inside(network, diagonal):
    mask = torch.zeros(1, 1, 24, 24, dtype=torch.bool)
    mask[..., 4:20, 4:20] = True
    found = fo.sensitivity_map(fo.FisherOperator(*network, within=mask), 32, rng=0)
    assert found.n_probes == 32
    assert not found.value[~mask].any()
    assert not found.high[~mask].any()
    inside = (found.low <= diagonal) & (diagonal <= found.high)
    assert inside[mask].double().mean() > 0.85


def test_known_pairs_make_a_map_better(network, diagonal):
    F = fo.FisherOperator(lambda x: network[0](x) @ torch.ones(12, 1, dtype=torch.float64), network[1])
    truth = (F @ torch.eye(576, dtype=torch.float64)).diagonal().reshape(1, 1, 24, 24)
    known = fo.eigendistortions(F, k=30, which="LM", method="exact")
    plain = fo.sensitivity_map(F, 8, rng=0)
    assert F.response.numel() / 2 > 8  # else all would be exact
    better = fo.sensitivity_map(F, 8, rng=0, deflate=known)
    inside = truth > 1e-6 * truth.max()
    errors = [float(((e.value - truth).abs() / truth)[inside].median()) for e in (plain, better)]
    assert errors[1] < 0.5 * errors[0]
    assert ((better.low <= truth + 1e-12) & (truth <= better.high + 1e-12))[inside].double().mean() > 0.85


def test_map_of_an_operator_without_factor_takes_whole_products():
    values = np.linspace(1, 3, 200)
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 200)))[0]
    matrix = (q * values**4) @ q.T
    truth = matrix.diagonal()
    plain = fo.sensitivity_map(matrix, 64, rng=0)
    assert isinstance(plain.value, np.ndarray)
    assert plain.n_matvec == 64
    assert (plain.value >= 0).all()
    assert 0.88 < np.mean((plain.low <= truth) & (truth <= plain.high)) < 0.99
    known = fo.eigendistortions(matrix, k=60, which="LM")
    better = fo.sensitivity_map(matrix, 64, rng=0, deflate=known)
    assert np.abs(better.value - truth).mean() < np.abs(plain.value - truth).mean()
    assert better.n_matvec == 124


def test_what_is_dearer_than_the_dense_problem_is_computed_exactly():
    op = Counted(SPECTRA["decaying"])
    found = fo.trace(op, rtol=1e-9, rng=0)
    assert found.standard_error == 0
    assert found.value == pytest.approx(SPECTRA["decaying"].sum())
    assert op.count <= 3 * N


def test_map_stops_at_rtol(network):
    F = fo.FisherOperator(*network)
    found = fo.sensitivity_map(F, rtol=0.5, rng=0)
    assert found.converged
    assert 8 <= found.n_probes <= 32
    few = fo.sensitivity_map(F, 8, rtol=0.1, rng=0)
    assert not few.converged
    assert "was not reached" in few.message


# ------------------------------------------------------------------------------------------------------------- density


def test_density_counts_what_count_counts_without_products():
    op = Counted(SPECTRA["decaying"])
    density = fo.spectral_density(op, 6, steps=30, rng=0)
    used = op.count
    assert density.n_matvec == used - 2  # the two of the check at the door are not counted
    values = SPECTRA["decaying"]
    grid = np.geomspace(1e-3, 2, 20)
    value, low, high = density.cumulative(grid)
    truth = (values <= grid[:, None]).sum(1)
    assert ((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean() >= 0.9
    assert (np.diff(value) >= 0).all()
    assert density.count(3.0).value == pytest.approx(N)
    edges = np.geomspace(1e-4, 10, 30)
    counted = density.density(edges) * np.diff(np.log10(edges))
    assert counted.sum() == pytest.approx(N, rel=1e-9)
    assert 0 < density.resolution(0.01) < density.resolution(0.5)
    assert density.lambda_max <= 1 + 1e-12
    assert density.logdet(MU).low <= TRUTH["logdet"](values) <= density.logdet(MU).high
    dimension = density.effective_dimension(MU)
    assert dimension.low <= TRUTH["effective_dimension"](values) <= dimension.high
    assert op.count == used


def test_density_of_a_small_problem_is_its_eigenvalues():
    matrix, _ = spectrum_operator([3.0, 2.0, 1.0, 0.0])
    density = fo.spectral_density(matrix)
    np.testing.assert_allclose(density.eigenvalues, [0, 1, 2, 3], atol=1e-12)
    assert density.count(0.0).value == 1
    assert density.resolution(1.0) == 0
    assert density.density([0.5, 5.0])[0] == pytest.approx(3)
    assert density.cumulative([1.5, 2.5])[0].tolist() == [2, 3]


# ------------------------------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize("name", sorted(MODELS))
def test_left_vectors_are_singular_vectors_in_the_structure_of_the_response(name):
    model, image = build(name)
    F = fo.FisherOperator(model, image, noise=fo.noise.Gaussian(0.25))
    result = fo.eigendistortions(F, k=3, which="LM")
    left = spectrum.left_vectors(F, result)

    def same(a, b):
        if isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and a.shape[1:] == b.shape[(1 if b.ndim > 1 and b.shape[0] == 1 else 0) :]
        if b is None:
            return a is None
        pairs = zip(a.values(), b.values(), strict=True) if isinstance(b, dict) else zip(a, b, strict=True)
        return type(a) is type(b) and all(same(x, y) for x, y in pairs)

    assert same(left, model(image))
    flat = torch.cat(list(_flat(left)), dim=1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-5)
    J = fo.JacobianOperator(model, image)
    expected = 2 * (J @ result.eigendistortions.reshape(3, -1).T).T / torch.tensor(result.eigenvalues**0.5)[:, None]
    torch.testing.assert_close(flat, expected, rtol=1e-5, atol=1e-6)


def _flat(left):
    if isinstance(left, torch.Tensor):
        left = torch.view_as_real(left) if left.is_complex() else left
        yield left.reshape(len(left), -1)
    elif left is not None:
        for part in left.values() if isinstance(left, dict) else left:
            yield from _flat(part)


def test_left_vector_of_a_null_direction_is_zero():
    F = fo.FisherOperator(torch.nn.AvgPool2d(2), torch.rand(1, 1, 4, 4))
    left = spectrum.left_vectors(F, fo.eigendistortions(F, k=2))
    assert left.shape == (2, 1, 2, 2)
    assert left[0].norm() == pytest.approx(1)
    assert not left[1].any()
    both = fo.sum_fisher([F, F])
    assert spectrum.left_vectors(both, fo.eigendistortions(both, k=2)).shape == (2, 8)


@given(seeds)
def test_angles_between_a_subspace_and_a_turned_one_are_the_turn(seed):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((9, 4)))[0]
    turned = np.stack([q[:, 0], np.cos(0.3) * q[:, 1] + np.sin(0.3) * q[:, 2], q[:, 3]])
    angles = spectrum.subspace_angles(q[:, [1, 0]].T.reshape(2, 3, 3), turned.reshape(3, 3, 3))
    np.testing.assert_allclose(angles, [0.3, 0.0], atol=1e-7)
    matrix, vectors = spectrum_operator([5.0, 4.0, 1.0, 0.5], seed)
    result = fo.eigendistortions(matrix, k=2, which="LM")
    np.testing.assert_allclose(spectrum.subspace_angles(result, vectors[:, :2].T), 0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- conduct


@pytest.mark.parametrize("name", CALLS)
def test_products_are_counted_and_seeds_decide(name, monkeypatch):
    monkeypatch.setattr("fisherop.spectrum.functions.exact_products", lambda _: math.inf)
    op = Counted(SPECTRA["decaying"])
    first = CALLS[name](op, rng=3)
    assert first.n_matvec == op.count - 2  # the two of the check at the door are not counted
    again, other = CALLS[name](op, rng=3), CALLS[name](op, rng=4)
    assert first.value == again.value != other.value
    assert first.standard_error == again.standard_error


@pytest.mark.parametrize("name", ["trace", "frobenius_norm", "participation_ratio"])
def test_a_krylov_space_is_built_where_it_pays_and_not_on_a_flat_spectrum(name):
    for values, dimensions, n_probes in ((SPECTRA["flat"], 4, 60), (SPECTRA["decaying"], 32, 32)):
        estimate = CALLS[name](hidden(values), rng=0)
        assert estimate.message == f"{n_probes} probes orthogonal to a Krylov space of {dimensions} dimensions."
        assert (estimate.n_probes, estimate.n_matvec) == (n_probes, 64)


def test_half_products_are_used_where_the_factor_is_known():
    F = fo.FisherOperator(torch.nn.Conv2d(3, 8, 5), torch.rand(1, 3, 24, 24))
    found = fo.trace(F, 32, rng=0)
    assert found.n_matvec == F.n_matvec == 32  # 16 for the Krylov space, 32 halves
    dense = (F @ torch.eye(F.shape[0])).diagonal().double().sum().item()
    assert abs(found.value - dense) < 4 * found.standard_error


@pytest.mark.parametrize("name", CALLS)
def test_callback_is_told_and_stops_the_work(name, monkeypatch):
    monkeypatch.setattr("fisherop.spectrum.functions.exact_products", lambda _: math.inf)
    seen = []

    def callback(progress):
        seen.append(progress)
        return True

    few = {"trace": lambda op, **kw: fo.trace(op, 64, **kw)}.get(name, CALLS[name])
    found = few(hidden(SPECTRA["flat"]), rng=0, callback=callback)
    assert len(seen) == 1
    assert found.n_matvec == seen[0].n_matvec
    if name in ("trace", "frobenius_norm", "participation_ratio"):
        assert found.n_probes == 16
        assert "stopped by the callback" in found.message


def test_zero_operator_has_zero_everything():
    zero = np.zeros((3, 3))
    assert fo.trace(zero).value == fo.effective_dimension(zero).value == 0
    assert fo.spectral_density(zero).count(0.0).value == 3
    big = hidden(np.zeros(N))
    assert fo.trace(big, 8, rng=0).value == 0
    assert spectrum.participation_ratio(big, 8, rng=0).value == 0
    assert spectrum.lambda_max(big, rng=0).high == 0


def test_all_eigenvalues_of_the_zero_operator_are_zero_without_doubt(monkeypatch):
    monkeypatch.setattr("fisherop.spectrum.functions.exact_products", lambda _: math.inf)
    big = hidden(np.zeros(N))
    everything = (spectrum.nullity(big, 4, rng=0), fo.count(big, 0.0, 4, rng=0), fo.count(big, 1.0, 4, rng=0))
    for found in (*everything, fo.spectral_density(big, 4, steps=3, rng=0).count(0.0)):
        assert found.low == pytest.approx(N)
        assert found.high == pytest.approx(N)
    assert spectrum.rank(big, 4, rng=0).high == pytest.approx(0, abs=1e-9)


def test_a_factor_without_rows_has_zero_everything():
    nothing = fo.noise.Custom(torch.zeros(1, 1), root=torch.zeros(0, 1))
    F = fo.FisherOperator(lambda x: x.sum(), torch.ones(4, 10), nothing)
    assert fo.trace(F).value == spectrum.frobenius_norm(F).value == spectrum.rank(F).value == 0
    assert torch.equal(fo.sensitivity_map(F).value, torch.zeros(4, 10).double())


@pytest.mark.parametrize("scale", [np.float64(1e-170), np.float64(1e170), np.float32(1e-35)])
def test_what_has_no_squares_is_refused_and_the_dense_problem_still_solved(scale):
    n = 5000
    for name in ("trace", "frobenius_norm", "participation_ratio", "nullity", "rank", "lambda_max", "lambda_min",
                 "condition", "spectral_density", "sensitivity_map"):  # fmt: skip
        with pytest.raises(ValueError, match=r"is outside float.* rescale the model's response"):
            getattr(spectrum, name)(hidden(np.linspace(1, 2, n).astype(scale.dtype) * scale), rng=0)
    few = np.linspace(1, 2, 9).astype(scale.dtype) * scale
    for name in ("trace", "frobenius_norm", "participation_ratio"):
        truth = TRUTH[name](few.astype(float) / scale) * (1 if name.startswith("part") else float(scale))
        np.testing.assert_allclose(getattr(spectrum, name)(hidden(few)).value, truth, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fo.trace(np.eye(3), 2), ValueError, "at least 4"),
        (lambda: fo.trace(np.eye(3), 4.5), TypeError, "whole number"),
        (lambda: fo.trace(np.eye(3), rtol=2), ValueError, "rtol"),
        (lambda: fo.trace(np.eye(3), rng="x"), TypeError, "rng"),
        (lambda: fo.trace(np.ones((2, 3))), TypeError, "square"),
        (lambda: fo.logdet(np.eye(3), 0.0), ValueError, "positive"),
        (lambda: fo.logdet(np.eye(3), 1e-16), ValueError, "rounding"),
        (lambda: fo.effective_dimension(np.eye(3), steps=4), ValueError, "mu"),
        (lambda: fo.count(np.eye(3), math.nan), ValueError, "finite"),
        (lambda: fo.count(np.eye(3), 1.0, steps=1), ValueError, "steps"),
        (lambda: fo.sensitivity_map(np.eye(3), deflate=np.eye(3)), TypeError, "deflate"),
        (
            lambda: fo.sensitivity_map(np.eye(3), deflate=fo.eigendistortions(np.eye(4), k=1)),
            ValueError,
            "do not fit",
        ),
        (lambda: spectrum.left_vectors(np.eye(3), fo.eigendistortions(np.eye(3), k=1)), TypeError, "FisherOperator"),
        (lambda: spectrum.subspace_angles(np.eye(3), np.eye(4)), ValueError, "no angle"),
        (lambda: fo.spectral_density(np.eye(3)).density([1.0]), ValueError, "edges"),
        (lambda: fo.spectral_density(np.eye(3)).density("a"), TypeError, "edges must be made of numbers"),
        (lambda: fo.spectral_density(np.eye(3)).cumulative(2.0), ValueError, "one dimension"),
        (lambda: fo.spectral_density(np.eye(3)).cumulative([math.nan]), ValueError, "finite"),
        (lambda: fo.spectral_density(np.eye(3)).count(math.nan), ValueError, "finite"),
        (lambda: fo.spectral_density(np.eye(3)).resolution("a"), TypeError, "made of numbers"),
        (lambda: fo.spectral_density(np.eye(3)).logdet(None), TypeError, "mu must be made of numbers"),
        (lambda: fo.logdet(np.eye(3), None), TypeError, "mu must be made of numbers"),
        (lambda: fo.logdet(np.eye(3), "a"), TypeError, "mu must be made of numbers"),
        (lambda: fo.effective_dimension(np.eye(3), np.ones(2)), TypeError, "mu must be one number"),
        (lambda: fo.count(np.eye(3), None), TypeError, "threshold must be made of numbers"),
        (lambda: fo.count(np.eye(3), np.ones(2)), TypeError, "threshold must be one number"),
        (lambda: fo.trace(np.eye(3), rtol="x"), TypeError, "rtol must be made of numbers"),
        (
            lambda: spectrum.left_vectors(fo.FisherOperator(torch.nn.Identity(), torch.ones(1, 3)), np.eye(3)),
            TypeError,
            "what eigendistortions returned",
        ),
        (lambda: spectrum.subspace_angles("a", np.eye(3)), TypeError, "vectors must be made of numbers"),
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("of", [float, np.float32, torch.tensor, lambda x: np.array([x])])
def test_a_level_is_read_whatever_holds_it(of):
    op, values = hidden(SPECTRA["null"]), np.array([3.0, 2.0, 1.0])
    assert fo.logdet(np.diag(values), of(1.0)).value == pytest.approx(np.log(values + 1).sum())
    assert fo.effective_dimension(np.diag(values), of(1.0)).value == pytest.approx((values / (values + 1)).sum())
    assert fo.count(np.diag(values), of(2.0)).value == 2
    assert fo.trace(op, 32, rtol=of(0.5), rng=0).value == fo.trace(op, 32, rtol=0.5, rng=0).value
    density = fo.spectral_density(op, 4, steps=9, rng=0)
    assert density.count(of(1.0)).value == density.count(1.0).value
    assert density.cumulative(torch.tensor([2.0, 1.0]))[0].tolist() == density.cumulative([2.0, 1.0])[0].tolist()


def test_no_eigenvalue_is_negative():
    for op in (np.diag([1.0, 0.0]), hidden(SPECTRA["null"])):
        density = fo.spectral_density(op, 4, steps=9, rng=0)
        for found in (fo.count(op, -1.0, 4, steps=9, rng=0), density.count(-1.0)):
            assert (found.value, found.low, found.high) == (0, 0, 0)
        assert density.cumulative([-1.0])[2] == 0


# ------------------------------------------------------------------------------------------------------------- figures


def test_a_drawn_map_is_the_root_of_the_diagonal_over_the_photograph(network, diagonal):
    pytest.importorskip("matplotlib").use("Agg")
    F = fo.FisherOperator(*network)
    found = fo.sensitivity_map(F, 300)
    assert found.standard_error.abs().max() == 0
    fig = fo.plot.sensitivity_map({"first": found, "second": found})
    assert [ax.get_label() for ax in fig.axes] == ["image", "sensitivity first", "sensitivity second"]
    values, seen = fig.axes[1].images
    np.testing.assert_allclose(np.asarray(values.get_array()) ** 2, diagonal[0, 0].numpy(), rtol=1e-9)
    assert "exact" in fig.axes[1].get_xlabel()
    dark = fo.plot.sensitivity_map(found, image=torch.zeros(1, 1, 24, 24)).axes[1].images[1].get_array()
    assert (np.asarray(seen.get_array()) >= np.asarray(dark) - 1e-12).all()
    with pytest.raises(ValueError, match="does not fit"):
        fo.plot.sensitivity_map(found, image=torch.zeros(1, 1, 9, 9))
    with pytest.raises(ValueError, match="image="):
        fo.plot.sensitivity_map(fo.sensitivity_map(np.eye(4)))


def test_a_drawn_spectrum_counts_downwards_and_marks_the_known_pairs():
    pytest.importorskip("matplotlib").use("Agg")
    op = hidden(SPECTRA["decaying"])
    result = fo.eigendistortions(op, k=3, which="LM")
    count, density = fo.plot.density(fo.spectral_density(op, 6, steps=30, rng=0), result).axes
    line, marks = count.get_lines()
    assert (np.diff(line.get_ydata()[np.isfinite(line.get_ydata())]) <= 0).all()
    np.testing.assert_allclose(marks.get_xdata(), [1, 1 / 2, 1 / 3], rtol=1e-6)
    assert marks.get_ydata().tolist() == [0.5, 1.5, 2.5]
    assert density.get_xscale() == density.get_yscale() == "log"
    with pytest.raises(ValueError, match="same names"):
        fo.plot.density(fo.spectral_density(op, 6, steps=9, rng=0), {"other": result})
