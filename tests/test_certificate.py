"""The judge: a wrong set is found out, bounds hold, and words say what is known."""

import numpy as np
import pytest
import torch
from models import build
from strategies import spectrum_operator

import fisherop as fo
from fisherop.certificate import certify, fresh_pairs, probe_rest
from fisherop.rows import RowOperator
from fisherop.solvers.contract import Found, Request


def request(largest, smallest, tol=1e-6, seed=0):
    return Request(largest, smallest, tol, np.random.default_rng(seed))


def judged(values, index, largest, smallest, **kwargs):
    """Certify chosen eigenvectors of a matrix with these eigenvalues, as if a solver had returned them."""
    matrix, vectors = spectrum_operator(values)
    found = Found(torch.from_numpy(vectors[:, index].T.copy()), float(max(values)))
    return certify(RowOperator(matrix), request(largest, smallest), found, "test", **kwargs)


SPECTRUM = np.r_[1.0, 0.8, 0.7, np.linspace(0.5, 0.1, 200), 1e-3, 0, 0]


def test_eigenvectors_of_the_wrong_end_pass_the_residuals_but_not_the_probe():
    wrong = [0, 2]
    assert judged(SPECTRUM, wrong, 2, 0).converged.all()
    result = judged(SPECTRUM, wrong, 2, 0, probe=True)
    assert "the probe found better pairs than the solver's" in result.message
    assert not result.converged.all() or np.allclose(result.eigenvalues, [1, 0.8])
    result = judged(SPECTRUM, [0, 202], 1, 1, probe=True)
    assert not result.converged.all() or np.allclose(result.eigenvalues, [1, 0])


def test_the_right_ones_pass_both():
    result = judged(SPECTRUM, [0, 1, 204, 205], 2, 2, probe=True)
    assert result.converged.all()
    assert (
        "with probability 0.999, no larger eigenvalue was missed and no smaller eigenvalue was missed" in result.message
    )


def test_a_probe_bounds_the_rest_of_the_spectrum_for_every_seed():
    matrix, vectors = spectrum_operator(SPECTRUM)
    op = RowOperator(matrix)
    found = Found(torch.from_numpy(vectors[:, :2].T.copy()), 1.0)
    for seed in range(40):
        asked = request(2, 0, seed=seed)
        rest = probe_rest(op, fresh_pairs(op, found.vectors, asked), asked)
        assert rest.low <= 1e-12
        assert 0.7 <= rest.high <= 0.75
        assert abs(rest.null_dimension - 2) <= 5 * rest.null_deviation


def test_a_null_space_is_estimated_with_its_uncertainty():
    matrix, _ = spectrum_operator(np.r_[np.linspace(1, 0.3, 150), np.zeros(100)])
    message = fo.eigendistortions(matrix, 2, "LM", "arpack", certify="probe", rng=0).message
    estimate, deviation = (float(word) for word in message.split("about ")[1].split(";")[0].split(" ± "))
    assert abs(estimate - 100) <= 2 * deviation


@pytest.mark.parametrize("k", [1, 4, 30])
def test_the_null_space_in_the_pairs_counts_to_that_beside_them(k):
    matrix, _ = spectrum_operator(np.r_[np.linspace(1, 0.3, 240), np.zeros(60)])
    A = torch.randn(80, 200, generator=torch.Generator().manual_seed(0)).double()
    factored = fo.FisherOperator(lambda x: A @ x, torch.zeros(200).double())
    for op, method, truth, n in ((matrix, "arpack", 60, 300), (factored, "lanczos", 120, 200)):
        inside = 0
        for seed in range(5):
            message = fo.eigendistortions(op, k, "SM", method, certify="probe", rng=seed).message
            estimate, deviation = (float(word) for word in message.split("about ")[1].split(";")[0].split(" ± "))
            assert estimate <= n
            inside += abs(estimate - truth) <= deviation
        assert inside >= 3


@pytest.mark.parametrize("n", range(3, 30))
def test_a_rest_that_is_all_null_space_is_probed(n):
    result = fo.eigendistortions(spectrum_operator(np.eye(1, n)[0])[0], 1, "LM", rng=0, certify="probe")
    assert "no larger eigenvalue was missed" in result.message


def test_the_default_certificate_costs_k_products():
    calls = []

    def product(x):
        calls.append(x.shape)
        return x * torch.linspace(1, 2, 50, dtype=torch.float64)

    F = fo.FisherOperator(product, torch.zeros(50, dtype=torch.float64))
    op = RowOperator(F)
    found = Found(torch.eye(50, dtype=torch.float64)[-3:], 4.0)
    certify(op, request(3, 0), found, "test")
    assert op.n_matvec == 3


def test_vectors_that_share_an_eigenvalue_are_reported_as_a_subspace():
    values = np.r_[1.0, 1.0, 1.0, np.linspace(0.6, 0.1, 60), 0, 0]
    result = fo.eigendistortions(spectrum_operator(values)[0], 6)
    assert result.clusters.tolist() == [3, 3, 3, 1, 2, 2]
    assert "index 0-2, 63-64: only a subspace, of dimension 2 and 3 or more, is determined" in result.message


@pytest.mark.parametrize("method", ["lanczos", "nullspace"])
def test_a_small_eigenvalue_is_not_called_a_null_space_where_a_factor_tells_them_apart(method):
    gains = torch.cat([torch.linspace(1, 0.5, 599), torch.tensor([1e-5])])
    result = fo.eigendistortions(fo.FisherOperator(lambda x: gains * x, torch.zeros(600)), 1, "SM", method, rng=0)
    assert result.converged.all()
    assert result.eigenvalues[0] >= 0.9e-10
    assert result.nullity == 0
    assert "zero to within tol" in result.message


def test_a_null_vector_belongs_to_the_whole_null_space():
    result = fo.eigendistortions(fo.FisherOperator(*build("linear m<n")), 2)
    assert result.clusters.tolist() == [1, 15]


def test_too_few_or_dependent_vectors_are_filled_up_and_not_called_converged():
    matrix, vectors = spectrum_operator(SPECTRUM)
    twice = torch.from_numpy(np.stack([vectors[:, 0], vectors[:, 0]]))
    result = certify(RowOperator(matrix), request(2, 0), Found(twice, 1.0), "test")
    assert result.eigendistortions.shape == (2, 206)
    assert result.converged.tolist() == [True, False]


def test_an_unknown_certificate_is_refused():
    with pytest.raises(ValueError, match="certify must be one of residuals, probe, not 'prove'"):
        fo.eigendistortions(np.eye(3), certify="prove")


def test_a_value_below_the_tolerance_is_said_to_be_zero_to_within_it():
    for smallest, said in ((1e-8, True), (1e-3, False)):
        matrix = spectrum_operator(np.r_[np.linspace(1, 0.1, 60), smallest])[0]
        assert ("1 of the smallest is zero to within tol" in fo.eigendistortions(matrix, 2).message) is said


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("ends", [(2, 0), (1, 1), (0, 2)])
def test_what_a_solver_claims_of_the_largest_eigenvalue_changes_no_residual(ends, factored):
    values = np.r_[2.0, 1.5, np.linspace(1, 0.2, 58)]
    matrix, vectors = spectrum_operator(np.sqrt(values) if factored else values)
    F = fo.FisherOperator(lambda x: matrix @ x, torch.zeros(60, dtype=torch.float64)) if factored else matrix
    wanted = [*range(ends[0]), *range(60 - ends[1], 60)]
    near = torch.from_numpy(vectors.T.copy()) + 1e-4 * torch.eye(60, dtype=torch.float64)
    for claim in (0.0, 2.0, 1e6):
        op = RowOperator(F)
        result = certify(op, request(*ends), Found(near[wanted], claim, top=near[:1]), "test")
        assert result.lambda_max == pytest.approx(2, abs=1e-5)
        assert result.residuals.max() > 1e-5
        assert not result.converged.all()
        half = ends[0] == 0  # a vector of the large end, where none is among the pairs
        assert op.n_matvec == 2 + half


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_null_space_is_reported_beside_an_eigenvalue_that_proves_there_is_none(k):
    for seed in range(20):
        matrix = spectrum_operator(np.array([1, 1e-6, 1e-12]), seed)[0]
        result = fo.eigendistortions(matrix, k, "SA", "lanczos", rng=seed)
        assert result.nullity <= (result.eigenvalues <= 1e-14).sum()


def test_a_null_space_that_a_solver_claims_is_held_against_fresh_values():
    values = np.r_[np.linspace(1, 0.1, 20), 1e-10, 0, 0]
    matrix, vectors = spectrum_operator(values)
    for smallest in range(6):
        found = Found(torch.from_numpy(vectors[:, [0, *range(23 - smallest, 23)]].T.copy()), 1.0, nullity=4)
        result = certify(RowOperator(matrix), request(1, smallest), found, "test")
        assert result.nullity == (4 if smallest <= 2 else 2)
