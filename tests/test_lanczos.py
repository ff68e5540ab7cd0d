"""Both ends from one space: what is found against dense truth, what it costs in products, and what it never claims."""

import numpy as np
import pytest
import torch
from models import MODELS, build, dense_jacobian
from strategies import spectrum_operator

import fisherop as fo
from fisherop import testing
from fisherop.certificate import certify
from fisherop.rows import RowOperator
from fisherop.solvers import Control, Request, lanczos

N = 300
LINEAR = np.linspace(1, 0.1, N)
SPECTRA = {
    kind: testing.spectrum(kind, N) for kind in ("power", "exponential", "null space", "flat with a gap", "isolated")
}
HARD = {
    "zero": np.zeros(N),
    "identity": np.ones(N),
    "rank one": np.eye(1, N)[0],
    "fifty at the top": np.concatenate([np.ones(50), np.linspace(0.9, 0.1, N - 50)]),
    "fifty at the bottom": np.concatenate([np.linspace(1, 0.1, N - 50), np.full(50, 0.05)]),
    "fifty below the top": np.concatenate([[1, 0.98], np.full(50, 0.95), np.linspace(0.9, 0.1, N - 52)]),
    "pairs": np.concatenate([[1, 1, 0.97, 0.97, 0.95], np.linspace(0.9, 0, N - 5)]),
    "large": 1e12 * LINEAR,
    "small": 1e-12 * LINEAR,
}
ENDS = [(1, 0), (4, 0), (0, 1), (0, 4), (1, 1), (3, 2)]


def run(op, largest, smallest, tol=1e-6, seed=0, maxiter=2000, v0=None, callback=None, **options):
    """Return the certified result and the products that the solver itself used."""
    op = RowOperator(op)
    request = Request(largest, smallest, tol, np.random.default_rng(seed), v0)
    found = lanczos.solve(op, request, Control(op, maxiter, callback), **options)
    used = op.n_matvec
    return certify(op, request, found, "lanczos"), used


def error(result, values):
    """Return the largest error of an eigenvalue, relative to the largest one."""
    return np.abs(result.eigenvalues - np.sort(values)[::-1][result.index]).max() / max(values.max(), 1e-300)


def matrix(values, seed=0, dtype=torch.float64):
    return spectrum_operator(values, seed, dtype)[0]


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", [*SPECTRA, *HARD])
def test_every_pair_is_the_right_one(name, dtype, tol):
    values = (SPECTRA | HARD)[name]
    op = matrix(values, dtype=dtype)
    for largest, smallest in ENDS:
        result, _ = run(op, largest, smallest, tol)
        assert result.converged.all()
        assert error(result, values) <= 2 * tol


@pytest.mark.parametrize("name", ["pairs", "fifty at the top", "fifty below the top"])
@pytest.mark.parametrize("options", [{}, {"block": 2}, {"basis": 30}])
def test_no_seed_claims_a_wrong_set(name, options):
    op = matrix(HARD[name])
    for seed in range(4):
        for largest, smallest in ((4, 0), (0, 3)):
            result, _ = run(op, largest, smallest, seed=seed, **options)
            assert not result.converged.all() or error(result, HARD[name]) <= 2e-6


@pytest.mark.parametrize(
    ("name", "largest", "smallest", "budget"),
    [
        ("flat with a gap", 1, 0, 55),
        ("flat with a gap", 4, 0, 180),
        ("power", 1, 0, 8),
        ("power", 4, 0, 20),
        ("null space", 0, 1, 65),
        ("null space", 0, 4, 130),
        ("isolated", 0, 1, 50),
        ("exponential", 0, 1, 300),
    ],
)
def test_products_stay_within_what_was_measured(name, largest, smallest, budget):
    assert run(matrix(SPECTRA[name]), largest, smallest)[1] <= budget


def test_one_space_serves_both_ends():
    op = matrix(SPECTRA["null space"])
    top, bottom, both = (run(op, *ends)[1] for ends in ((1, 0), (0, 1), (1, 1)))
    assert both <= bottom + 2 < bottom + top


def test_a_wider_block_takes_fewer_steps():
    steps = []
    for block in (1, 8):
        op = matrix(SPECTRA["flat with a gap"])
        steps.append([])
        run(op, 1, 0, block=block, callback=lambda progress, steps=steps: steps[-1].append(progress.iteration))
    assert 1.5 * len(steps[1]) <= len(steps[0])


@pytest.mark.parametrize("basis", [20, 60])
def test_restarts_cost_products_but_no_digits(basis):
    for name, ends in (("flat with a gap", (1, 1)), ("isolated", (0, 2)), ("null space", (0, 3))):
        result, _ = run(matrix(SPECTRA[name]), *ends, basis=basis)
        assert result.converged.all()
        assert error(result, SPECTRA[name]) <= 2e-6


@pytest.mark.parametrize("n", [1, 2, 7])
def test_all_pairs_of_a_small_matrix(n):
    values = np.linspace(2, 1, n)
    for largest in range(n + 1):
        result, used = run(matrix(values), largest, n - largest)
        assert result.converged.all()
        assert error(result, values) <= 1e-12
        assert used <= n


@pytest.mark.parametrize("name", ["fifty at the top", "rank one", "large"])
def test_noise_in_the_products_gives_right_pairs_or_none(name):
    values, rng = HARD[name], np.random.default_rng(0)
    op = RowOperator(matrix(values))
    exact = op._product
    noise = 1e-6 * values.max() / np.sqrt(N)
    op._product = lambda block: exact(block) + noise * torch.from_numpy(rng.standard_normal(block.shape))
    for tol in (1e-6, 1e-5):
        for largest, smallest in ((1, 0), (3, 0), (0, 3)):
            request = Request(largest, smallest, tol, np.random.default_rng(0))
            result = certify(op, request, lanczos.solve(op, request, Control(op, 400)), "lanczos")
            assert not result.converged.all() or error(result, values) <= 2 * tol


def test_a_wrong_eigenvector_to_start_from_does_not_deceive():
    op, vectors = spectrum_operator(LINEAR)[:2]
    wrong = torch.as_tensor(np.asarray(vectors)[:, 100:101].T.copy())
    for largest, smallest in ((1, 0), (0, 1), (2, 0)):
        result, _ = run(op, largest, smallest, v0=wrong)
        assert error(result, LINEAR) <= 2e-6


def test_a_result_resumes_its_own_work():
    op = matrix(SPECTRA["null space"])
    first, used = run(op, 0, 3)
    resumed, again = run(op, 0, 3, v0=torch.as_tensor(first.eigendistortions))
    assert resumed.converged.all()
    assert again <= used / 2


def test_the_budget_and_the_callback_stop_it_with_the_best_pairs():
    op = matrix(LINEAR)
    stopped, _ = run(op, 2, 2, callback=lambda progress: progress.iteration == 30)
    budget, _ = run(op, 2, 2, maxiter=30)
    assert not stopped.converged.all()
    assert len(stopped) == len(budget) == 4
    np.testing.assert_allclose(stopped.eigenvalues, budget.eigenvalues)
    assert error(stopped, LINEAR) <= 0.02


def test_a_search_cut_short_is_said():
    seen = []
    run(matrix(LINEAR), 4, 0, callback=lambda progress: seen.append(progress.residuals.max()))
    maxiter = 2 + seen.index(seen[-1])  # one step of the search, in which the pairs stay as they are
    result, _ = run(matrix(LINEAR), 4, 0, maxiter=maxiter)
    assert "multiple eigenvalue" in result.message
    with pytest.warns(fo.ConvergenceWarning, match="multiple eigenvalue was missed: raise maxiter"):
        fo.eigendistortions(matrix(LINEAR), 4, "LM", "lanczos", tol=1e-6, rng=0, maxiter=maxiter)


def test_the_nullity_is_known_once_the_whole_space_is():
    result, used = run(matrix(HARD["rank one"][:20]), 10, 10)
    assert result.nullity == 19
    assert used <= 20


@pytest.mark.parametrize("name", MODELS)
def test_models_agree_with_the_dense_matrix(name):
    for dtype, tol in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model, image = build(name, dtype)
        J = dense_jacobian(model, image).double().numpy()
        values = np.linalg.eigvalsh(J.T @ J)
        result, _ = run(fo.FisherOperator(model, image), 2, 2, tol)
        assert result.converged.all()
        assert error(result, values) <= 3 * tol


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    values = SPECTRA["isolated"]
    for ends in ((1, 0), (3, 0), (2, 2)):
        host, _ = run(matrix(values), *ends)
        device, _ = run(matrix(values).cuda(), *ends)
        np.testing.assert_allclose(device.eigenvalues, host.eigenvalues, atol=2e-6)


@pytest.mark.parametrize(("end", "gap"), [("smallest", 4e-5), ("largest", 2e-5)])
def test_a_crowd_is_seldom_taken_for_the_one_beyond_it(end, gap):
    """The crowd's Ritz vector has a residual of a twentieth of the gap, or less if the start has little of the one."""
    below, above = np.r_[np.full(400, 0.01 + gap), 0.01], np.r_[1 + gap, np.ones(400)]
    values = np.r_[np.linspace(1, 0.2, 199), below] if end == "smallest" else np.r_[above, np.linspace(0.9, 0.1, 199)]
    op, wanted = np.diag(values), (0, 1) if end == "smallest" else (1, 0)
    wrong = sum(error(run(op, *wanted, seed=seed)[0], values) > 1e-6 for seed in range(20))
    assert wrong <= 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_null_vectors_do_not_stand_for_the_least_of_a_low_rank(dtype):
    values = np.r_[1, 0.3, 0.1, 3e-5 if dtype == torch.float64 else 3e-4, np.zeros(796)]
    op, tol = torch.diag(torch.from_numpy(values).to(dtype)), 1e-6 if dtype == torch.float64 else 1.2e-5
    for seed in range(20):
        result, used = run(op, 4, 0, tol, seed=seed)
        assert error(result, values) <= tol
        assert used <= 15
