"""Known faults of other people's solvers: that they are there, and that no answer of ours has them.

Where a new version of a package has mended one, its test here fails: then drop what it pins, and what our backend does
against it if nothing else needs that.
"""

import runpy
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import (
    ArpackError,
    ArpackNoConvergence,
    LinearOperator,
    aslinearoperator,
    eigsh,
    lobpcg,
    lsmr,
    minres,
    svds,
)
from strategies import block

import fisherop as fo

N = 300
DECAY = np.arange(1, N + 1) ** -2.0
HALF_NULL = np.r_[1 / np.arange(1, N // 2 + 1), np.zeros(N // 2)]
MANY_NULL = np.r_[np.zeros(80), np.linspace(1e-3, 1, N - 80)]
UPSTREAM = Path(__file__).parents[1] / "docs" / "upstream"


class Counted:
    """A matrix with these eigenvalues, and how many vectors it was multiplied with."""

    def __init__(self, values, dtype=np.float64):
        q = np.linalg.qr(block(0, len(values), len(values)))[0]
        self.matrix = ((q * values) @ q.T).astype(dtype)
        self.count = 0
        self.op = LinearOperator(self.matrix.shape, matvec=self.multiply, matmat=self.multiply, dtype=dtype)

    def multiply(self, x):
        self.count += x.size // len(x)
        return self.matrix @ x


def test_eigsh_gives_nothing_at_the_small_end_where_our_arpack_converges():
    problem = Counted(DECAY)
    with pytest.raises(ArpackNoConvergence) as failure:
        eigsh(problem.op, 1, which="SA", tol=1e-6, maxiter=100, v0=np.ones(N))
    assert len(failure.value.eigenvalues) == 0
    assert problem.count > 1000
    for method in ("arpack", "lanczos"):
        found = fo.eigendistortions(problem.matrix, 1, "SM", method, rng=0)
        assert found.converged.all()
        np.testing.assert_allclose(found.eigenvalues, DECAY[-1], atol=found.tol)


def test_eigsh_accepts_at_a_loose_tolerance_what_is_no_null_vector_and_we_mean_lambda_max():
    problem, tol = Counted(HALF_NULL), 1e-3
    accepted = eigsh(problem.op, 1, which="SA", tol=0.1, v0=np.ones(N))[0]
    assert accepted[0] > 5e-3
    found = fo.eigendistortions(problem.matrix, 1, "SM", "arpack", tol=tol, rng=0)
    assert found.converged.all()
    assert abs(found.eigenvalues[0]) <= tol


def test_eigsh_out_of_steps_throws_its_work_away_and_we_return_the_best_pairs():
    problem = Counted(np.linspace(0.5, 1, N))
    with pytest.raises(ArpackNoConvergence) as failure:
        eigsh(problem.op, 4, maxiter=1, tol=1e-12, v0=np.ones(N))
    assert len(failure.value.eigenvalues) < 4
    with pytest.warns(fo.ConvergenceWarning, match="did not reach"):
        found = fo.eigendistortions(problem.matrix, 4, "LM", "arpack", tol=1e-12, maxiter=40, rng=0)
    assert len(found) == 4
    assert (found.eigenvalues > 0.9).all()


def test_eigsh_misses_copies_of_a_multiple_eigenvalue_and_our_arpack_looks_for_them():
    problem = Counted(1 - MANY_NULL)
    values = 1 - eigsh(problem.op, 8, which="LA", ncv=64, tol=1e-6, v0=np.ones(N))[0]
    assert (values > 1e-4).sum() >= 4
    for method in ("arpack", "lanczos", "lobpcg", "nullspace"):
        found = fo.eigendistortions(Counted(MANY_NULL).matrix, 8, "SM", method, rng=0)
        assert found.converged.all()
        assert (abs(found.eigenvalues) <= found.tol).all(), method


def test_eigsh_with_sigma_solves_by_gmres_what_an_inverse_of_the_callers_solves_for_less():
    values = np.linspace(0.05, 1, 60) ** 2
    by_gmres, by_minres = Counted(values), Counted(values)
    eigsh(by_gmres.op, 2, sigma=0.5, v0=np.ones(60))
    shifted = by_minres.op - aslinearoperator(0.5 * np.eye(60))
    inverse = LinearOperator(shifted.shape, lambda b: minres(shifted, b, rtol=1e-13)[0], dtype=np.float64)
    eigsh(by_minres.op, 2, sigma=0.5, OPinv=inverse, v0=np.ones(60))
    assert by_gmres.count > 10 * by_minres.count


def test_eigsh_starts_anew_in_every_call_and_ours_as_the_seed_says():
    matrix = Counted(np.linspace(0.1, 1, N)).matrix
    first, second = (eigsh(matrix, 2)[1] for _ in range(2))
    assert not np.array_equal(abs(first), abs(second))
    one, two = (fo.eigendistortions(matrix, 2, "LM", "arpack", rng=0) for _ in range(2))
    assert torch.equal(torch.as_tensor(one.eigendistortions), torch.as_tensor(two.eigendistortions))


ODD = {
    "F = 0": (np.zeros((60, 60)), 2, "LM"),
    "one pair of both ends": (np.diag(np.arange(60.0)), 1, "BE"),
    "all pairs": (np.diag(np.arange(60.0)), 60, "LM"),
}


@pytest.mark.parametrize("name", ODD)
def test_eigsh_raises_where_we_answer(name):
    matrix, k, which = ODD[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "F = 0", UserWarning)
        warnings.filterwarnings("ignore", "k >= N", RuntimeWarning)
        with pytest.raises((ArpackError, TypeError)):
            eigsh(aslinearoperator(matrix), k, which=which)
        found = fo.eigendistortions(matrix, k, which, "arpack", rng=0)
    assert found.converged.all()
    top = np.diag(matrix).max()
    np.testing.assert_allclose(found.eigenvalues, np.sort(np.diag(matrix))[::-1][:k], atol=found.tol * max(top, 1))


def test_eigsh_answers_nan_with_an_error_of_arpacks_and_we_say_what_it_is(capfd):
    matrix = np.full((60, 60), np.nan)
    with pytest.raises(ArpackError, match="-9999"):
        eigsh(aslinearoperator(matrix), 2, v0=np.ones(60))
    capfd.readouterr()  # LAPACK prints
    with pytest.raises(ValueError, match="NaN or infinity"):
        fo.eigendistortions(matrix, 2, method="arpack")
    assert capfd.readouterr().out == ""


def test_lobpcg_by_default_calls_half_of_lambda_max_converged_and_ours_does_not():
    values = np.linspace(1e-3, 1, 2000).astype(np.float32)
    matrix = sp.diags_array(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not even a warning
        claimed = lobpcg(matrix, block(0, 2000, 1, dtype=np.float32))[0]
    assert claimed[0] < 0.6
    found = fo.eigendistortions(matrix, 1, "LM", "lobpcg", rng=0)
    assert found.converged.all()
    np.testing.assert_allclose(found.eigenvalues, 1, atol=found.tol)


def test_lobpcg_writes_on_its_start_and_ours_does_not():
    matrix, start = Counted(np.linspace(0.1, 1, 100)).matrix, block(0, 100, 2)
    kept = start.copy()
    found = fo.eigendistortions(matrix, 2, "LM", "lobpcg", v0=start, rng=0)
    assert found.converged.all()
    assert np.array_equal(start, kept)
    with pytest.warns(UserWarning, match="Exited"):
        lobpcg(matrix, start, tol=1e-12, maxiter=2)
    assert not np.array_equal(start, kept)


def test_svds_of_a_wide_jacobian_knows_no_null_space_and_we_do():
    wide = torch.from_numpy(block(0, 30, 60))
    smallest = svds(fo.JacobianOperator(lambda x: wide @ x, torch.zeros(60, dtype=torch.float64)), 2, which="SM")[1]
    np.testing.assert_allclose(np.sort(smallest)[::-1], np.linalg.svd(wide, compute_uv=False)[-2:])
    assert smallest.min() > 1
    F = fo.FisherOperator(lambda x: wide @ x, torch.zeros(60, dtype=torch.float64))
    found = fo.eigendistortions(F, 2, "SM")
    assert found.nullity == 30
    assert torch.linalg.norm(wide @ found.eigendistortions.T) <= 1e-5 * np.sqrt(found.lambda_max)


def test_propack_returns_zeros_at_the_small_end_and_no_backend_of_ours_is_it(capsys):
    with pytest.raises(SystemExit) as fault:
        runpy.run_path(str(UPSTREAM / "scipy_svds_propack_sm.py"))
    assert fault.value.code == 1
    assert "svds says:                    [0. 0.]" in capsys.readouterr().out
    assert "propack" not in fo.eigen.BACKENDS


def test_propack_short_of_its_default_steps_discards_all_triplets():
    with pytest.raises(np.linalg.LinAlgError, match="did not converge within kmax=20"):
        svds(block(0, 400, 300), 2, solver="propack", rng=np.random.default_rng(0))


def test_lsmr_in_float32_starts_from_a_number_that_float32_does_not_hold():
    J = fo.JacobianOperator(torch.nn.Linear(6, 4), torch.zeros(6))
    with pytest.warns(RuntimeWarning, match="overflow encountered in cast"):
        x = lsmr(J, np.ones(4, np.float32), atol=1e-6, btol=1e-6)[0]
    np.testing.assert_allclose(J @ x, np.ones(4), atol=1e-4)


def test_the_solvers_of_torch_take_no_operator_and_ours_take_tensors():
    F = fo.FisherOperator(torch.nn.Linear(6, 6), torch.zeros(6))
    for solver in (torch.lobpcg, torch.svd_lowrank):
        with pytest.raises(AttributeError, match="FisherOperator"):
            solver(F, 1)
    with pytest.raises(ValueError, match="smaller than 3 x the number"):
        torch.lobpcg(torch.eye(60), 25)
    assert fo.eigendistortions(torch.eye(60), 25, "LM").converged.all()


def test_primme_loses_an_exception_and_ours_comes_through():
    primme = pytest.importorskip("primme")

    def broken(x):
        raise OSError("the disk is gone")

    op = LinearOperator((100, 100), matvec=broken, matmat=broken, dtype=np.float64)
    with pytest.raises(primme.PrimmeError, match="-41"):
        primme.eigsh(op, 1)
    with pytest.raises(OSError, match="the disk is gone"):
        fo.eigendistortions(op, 1, "LM", "primme")


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("method", ["primme", "lobpcg", "arpack", "lanczos"])
def test_what_a_callback_raises_comes_through_every_solver(method, error):
    if method == "primme":
        pytest.importorskip("primme")

    def interrupt(progress):
        if progress.iteration == 3:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        fo.eigendistortions(np.diag(np.linspace(1, 0.1, 200)), 2, method=method, callback=interrupt)


def test_primme_misses_copies_of_a_multiple_eigenvalue_and_ours_does_not():
    primme = pytest.importorskip("primme")
    problem = Counted(MANY_NULL)
    values = primme.eigsh(problem.op, 8, which="SA", tol=1e-6, v0=np.ones((N, 1)))[0]
    assert (values > 1e-4).any()
    found = fo.eigendistortions(problem.matrix, 8, "SM", "primme", rng=0)
    assert found.converged.all()
    assert (abs(found.eigenvalues) <= found.tol).all()


def test_primme_in_float32_is_content_with_a_thousandth_and_ours_is_not():
    primme = pytest.importorskip("primme")
    problem = Counted(np.linspace(1e-3, 1, N), np.float32)
    values, vectors = primme.eigsh(problem.op, 2, which="LA", v0=block(0, N, 2, dtype=np.float32))
    assert np.linalg.norm(problem.matrix @ vectors - vectors * values, axis=0).max() > 1e-4
    found = fo.eigendistortions(problem.matrix, 2, "LM", "primme", rng=0)
    assert found.residuals.max() <= found.tol < 2e-5


def test_power_iteration_stopped_by_its_values_is_no_eigenvector_and_a_residual_says_so():
    """Of plenoptic, which stops where an eigenvalue changes by 1e-7 or less, whatever its scale."""
    plenoptic = pytest.importorskip("plenoptic")
    values = 1e-6 * np.linspace(1e-3, 1, 64)
    root = torch.from_numpy(Counted(np.sqrt(values)).matrix).float()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64, bias=False)).eval()
    model[1].weight = torch.nn.Parameter(root, requires_grad=False)
    image = torch.zeros(1, 1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = plenoptic.Eigendistortion(image, model)
        theirs.synthesize(k=1, method="power", max_iter=1000)
    assert float(theirs.eigenvalues[0]) < 0.95 * values[-1]
    F = fo.FisherOperator(model, image)
    for method in ("lanczos", "arpack", "lobpcg"):
        found = fo.eigendistortions(F, 1, "LM", method, rng=0)
        assert found.converged.all()
        np.testing.assert_allclose(found.eigenvalues, values[-1], rtol=1e-3)
