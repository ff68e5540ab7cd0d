"""F v = lambda M v against SciPy's dense answer: every kind of M, what it costs, and what is refused."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, dense_jacobian
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from strategies import spectrum_operator

import fisherop as fo
from fisherop.metric import Metric, generalized
from fisherop.rows import RowOperator
from fisherop.solvers import Control, Request, davidson

TOL = {torch.float64: 2e-6, torch.float32: 3e-5}


def spd(n, seed=0, low=0.1):
    return spectrum_operator(np.linspace(1, low, n), seed)[0].numpy()


def counted(matrix):
    """Return a matrix as an operator that only multiplies, and the list of widths of its products."""
    widths = []

    def product(x):
        widths.append(x.reshape(len(matrix), -1).shape[1])
        return matrix @ x

    return LinearOperator(matrix.shape, matvec=product, matmat=product, dtype=matrix.dtype), widths


def metrics(n, image):
    """Return every kind of M as given and as a matrix."""
    entries = np.linspace(0.3, 2, n)
    matrix = spd(n, seed=7)
    near = torch.tensor(entries).to(image)
    return {
        "number": (2.5, 2.5 * np.eye(n)),
        "array": (entries, np.diag(entries)),
        "image": (near.reshape(image.shape), np.diag(near.double().numpy())),
        "sparse diagonal": (sp.diags_array(entries), np.diag(entries)),
        "sparse": (sp.csr_array(matrix), matrix),
        "dense": (matrix, matrix),
        "tensor": (torch.tensor(matrix).to(image), matrix),
        "operator": (aslinearoperator(matrix), matrix),
    }


def assert_solves(result, F, M, tol):
    """Compare with the dense pencil: values, bounds, residuals, orthogonality and norms."""
    values = scipy.linalg.eigh(F, M, eigvals_only=True)[::-1]
    top = values[0]
    v = np.asarray(result.eigendistortions, dtype=np.float64).reshape(len(result), -1)
    assert result.converged.all()
    np.testing.assert_allclose(result.eigenvalues, values[result.index], atol=tol * top, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)
    for low, high in result.eigenvalue_bounds:
        assert ((values >= low - tol * top / 10) & (values <= high + tol * top / 10)).any()
    x = v / np.sqrt(np.einsum("ij,jk,ik->i", v, M, v))[:, None]
    np.testing.assert_allclose(x @ M @ x.T, np.eye(len(x)), atol=1e-4)
    rest = x @ F - result.eigenvalues[:, None] * (x @ M)
    dual = np.sqrt(np.einsum("ij,ij->i", rest, np.linalg.solve(M, rest.T).T)) / top
    assert (dual <= result.residuals + tol / 2).all()
    assert "generalized problem" in result.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["linear m<n", "attention", "linear m>n"])
def test_every_kind_of_metric_gives_the_dense_answer(name, dtype):
    model, image = build(name, dtype)
    J = dense_jacobian(model, image).double().numpy()
    F, n = fo.FisherOperator(model, image), J.shape[1]
    for given_M, M in metrics(n, image).values():
        for which in ("LM", "SM"):
            for k in (1, 4):
                assert_solves(fo.eigendistortions(F, k, which, M=given_M, rng=0), J.T @ J, M, TOL[dtype])


@pytest.mark.parametrize("method", ["davidson", "lobpcg"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_products_with_the_metric_are_enough(method, dtype):
    F, M = spd(150, low=0.01), spd(150, seed=1)
    op = torch.tensor(F, dtype=dtype)
    for which, k in [("LM", 1), ("LM", 4), ("SM", 1), ("SM", 4), ("BE", 2)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fo.ConvergenceWarning)
            result = fo.eigendistortions(op, k, which, method, M=aslinearoperator(M), rng=0)
        if method == "lobpcg" and dtype == torch.float32 and not result.converged.all():
            continue  # SciPy's method may lose its way at the level of rounding, and then says so
        assert_solves(result, F, M, TOL[dtype])
        assert "M known by its products" in result.message


def test_a_fisher_matrix_serves_as_metric_with_a_multiple_of_the_identity():
    model, image = build("attention")
    other, _ = build("attention", seed=3)
    A, B = fo.FisherOperator(model, image), fo.FisherOperator(other, image)
    n = A.shape[0]
    M = B + 0.1 * aslinearoperator(np.eye(n))
    dense_A, dense_B = (J.T @ J for J in (dense_jacobian(m, image).numpy() for m in (model, other)))
    for method in ("auto", "davidson"):
        assert_solves(fo.eigendistortions(A, 4, M=M, method=method, rng=0), dense_A, dense_B + 0.1 * np.eye(n), 2e-6)


@pytest.mark.parametrize("n", [100, 300])
def test_a_space_that_one_value_exhausts_takes_no_rounding_for_directions(n):
    turned = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    for matrix in (np.eye(n), turned @ turned.T):
        for seed in range(4):
            v0 = np.random.default_rng(seed).standard_normal(n)
            result = fo.eigendistortions(matrix.astype(np.float32), 2, method="davidson", v0=v0, rng=seed)
            assert result.lambda_max == pytest.approx(1, abs=1e-5)
            assert result.nullity == 0
            assert result.n_matvec <= 40


@pytest.mark.parametrize("method", ["lanczos", "arpack", "power", "nullspace", "exact"])
def test_a_factorized_metric_serves_every_method(method):
    F, M = spectrum_operator(np.r_[np.linspace(1, 0.3, 30), 0.01, 0.0])[0], spd(32, seed=1, low=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ConvergenceWarning)
        result = fo.eigendistortions(F, 2, "LM", method, M=M, rng=0, maxiter=500)
    assert_solves(result, F.numpy(), M, 2e-6)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.sampled_from(["auto", "davidson"]))
def test_a_multiple_of_the_identity_divides_the_values(seed, c, method):
    F = spd(30, seed)
    for M in (c, c * np.ones(30), aslinearoperator(c * np.eye(30))):
        result = fo.eigendistortions(F, 3, M=M, method=method, rng=0)
        np.testing.assert_allclose(c * result.eigenvalues, fo.eigendistortions(F, 3).eigenvalues, atol=2e-6)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_change_of_coordinates_changes_no_value_and_carries_the_vectors_along(seed, products_only):
    F, M = spd(24, seed), spd(24, seed + 1)
    B = np.eye(24) + 0.3 * spectrum_operator(np.linspace(-1, 1, 24), seed + 2)[0].numpy()
    wrap = aslinearoperator if products_only else np.asarray
    one = fo.eigendistortions(F, 4, method="davidson", M=wrap(M), tol=1e-9, rng=0)
    other = fo.eigendistortions(B.T @ F @ B, 4, method="davidson", M=wrap(B.T @ M @ B), tol=1e-9, rng=0)
    np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, rtol=1e-7)
    carried = np.linalg.solve(B, one.eigendistortions.T).T
    cosine = (carried * other.eigendistortions).sum(1) / np.linalg.norm(carried, axis=1)
    np.testing.assert_allclose(abs(cosine), 1, atol=1e-6)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 10), st.sampled_from(["auto", "davidson"]))
def test_a_matrix_relative_to_itself_and_a_floor(seed, delta, method):
    F = spd(30, seed)
    values = np.linalg.eigvalsh(F)[::-1]
    M = F + delta * np.eye(30)
    result = fo.eigendistortions(F, 4, M=aslinearoperator(M), method=method, rng=0)
    np.testing.assert_allclose(result.eigenvalues, (values / (values + delta))[result.index], atol=2e-6)


def test_a_search_takes_one_product_with_the_metric_for_each_with_the_operator():
    F, M = spd(200, low=0.01), spd(200, seed=1)
    for largest, smallest in ((1, 0), (0, 3), (2, 2)):
        op = generalized(RowOperator(torch.tensor(F)), aslinearoperator(M))
        before = op.metric.n_matvec
        request = Request(largest, smallest, 1e-6, np.random.default_rng(0))
        op.metric.dual_norms = lambda rows, enough=0.0: rows.norm(dim=1)  # the proof is counted below
        davidson.solve(op, request, Control(op, 500))
        assert op.metric.n_matvec - before == op.n_matvec


@pytest.mark.parametrize("k", [1, 4])
def test_all_that_a_metric_costs_stays_near_one_product_for_each(k):
    F, M = torch.tensor(spd(400, low=0.01)), spd(400, seed=1, low=0.03)
    op, widths = counted(M)
    result = fo.eigendistortions(F, k, "LM", "davidson", M=op, rng=0)
    assert result.converged.all()
    assert sum(widths) <= 1.25 * result.n_matvec + 40
    assert f"{sum(widths) - 2} products with M" in result.message  # less the two of the test for symmetry


@pytest.mark.parametrize(
    ("which", "k", "budget"), [("LM", 1, 110), ("LM", 4, 260), ("SM", 1, 120), ("SM", 4, 260), ("BE", 2, 220)]
)
def test_products_stay_within_what_was_measured_and_below_those_of_lobpcg(which, k, budget):
    F, M = torch.tensor(spd(400, low=0.01)), aslinearoperator(spd(400, seed=1, low=0.03))
    davidson, lobpcg = (fo.eigendistortions(F, k, which, m, M=M, rng=0) for m in ("davidson", "lobpcg"))
    assert davidson.converged.all()
    assert davidson.n_matvec <= budget
    assert davidson.n_matvec < lobpcg.n_matvec


@pytest.mark.parametrize("basis", [20, 40])
def test_restarts_cost_products_but_no_digits(basis):
    F, M = spd(200, low=0.01), spd(200, seed=1)
    values = scipy.linalg.eigh(F, M, eigvals_only=True)[::-1]
    for largest, smallest in ((2, 0), (0, 2), (1, 1)):
        op = generalized(RowOperator(torch.tensor(F)), aslinearoperator(M))
        request = Request(largest, smallest, 1e-6, np.random.default_rng(0))
        found = davidson.solve(op, request, Control(op, 2000), basis=basis)
        x = found.vectors.numpy()
        theta = np.einsum("ij,jk,ik->i", x, F, x) / np.einsum("ij,jk,ik->i", x, M, x)
        wanted = np.r_[values[:largest], values[200 - smallest :]]
        np.testing.assert_allclose(theta, wanted, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "n", "k", "entries"),
    [
        ("exact", 60, 1, True),
        ("exact", 600, 1, True),
        ("auto", 512, 1, True),
        ("auto", 513, 1, False),
        ("lobpcg", 32, 4, True),
        ("lobpcg", 60, 1, False),
        ("davidson", 60, 1, False),
    ],
)
def test_a_small_metric_is_known_by_its_entries(method, n, k, entries):
    M = aslinearoperator(np.diag(np.linspace(1, 2, n)))
    result = fo.eigendistortions(np.diag(np.linspace(1, 0.1, n)), k, "LM", method, M=M, rng=0)
    assert ("M factorized" in result.message) == entries
    assert ("M known by its products" in result.message) != entries


def test_copies_of_a_multiple_value_and_a_null_space_are_found():
    F, _ = spectrum_operator(np.r_[np.ones(5), np.linspace(0.5, 0.1, 140), np.zeros(5)])
    for which in ("LM", "SM"):
        result = fo.eigendistortions(F, 4, which, "davidson", M=aslinearoperator(2 * np.eye(150)), rng=0)
        np.testing.assert_allclose(result.eigenvalues, 0.5 if which == "LM" else 0, atol=1e-6)


@pytest.mark.parametrize("enough", [0.0, 10.0])
def test_a_dual_norm_is_bounded_from_above(enough):
    M = spd(80, low=0.003)
    metric = Metric(RowOperator(torch.eye(80, dtype=torch.float64)), aslinearoperator(M))
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 80)))
    exact = np.sqrt(np.einsum("ij,ij->i", rows, np.linalg.solve(M, rows.T.numpy()).T))
    bound = metric.dual_norms(rows, enough).numpy()
    assert (bound >= exact * (1 - 1e-12)).all()
    assert (bound <= np.maximum(1.1 * exact, enough)).all()


def test_a_result_resumes_its_own_work_in_every_metric():
    F = torch.tensor(spd(100, low=0.01))
    for M in (spd(100, seed=1), aslinearoperator(spd(100, seed=1))):
        first = fo.eigendistortions(F, 2, "LM", "davidson", M=M, rng=0)
        again = fo.eigendistortions(F, 2, "LM", "davidson", M=M, rng=0, v0=first.eigendistortions)
        assert again.n_matvec <= first.n_matvec / 3


def test_a_saved_generalized_result_comes_back(tmp_path):
    result = fo.eigendistortions(np.diag([4.0, 3.0, 1.0]), 2, M=np.array([4.0, 1.0, 1.0]))
    result.save(tmp_path / "r.npz")
    assert fo.Eigendistortions.load(tmp_path / "r.npz").message == result.message


N = 20
SINGULAR = np.diag(np.r_[np.ones(N - 1), 0.0])
INDEFINITE = np.diag(np.r_[np.ones(N - 1), -0.5])
REFUSED = {
    "negative number": (-1.0, ValueError, "M is not positive definite: an entry of its diagonal is -1"),
    "zero in a diagonal": (np.diag(SINGULAR), ValueError, "not positive definite: an entry of its diagonal is 0"),
    "singular": (SINGULAR + 1e-18, ValueError, "its smallest eigenvalue is"),
    "indefinite": (INDEFINITE, ValueError, "its smallest eigenvalue is -0.5"),
    "not symmetric": (np.eye(N) + np.eye(N, k=1), ValueError, r"not symmetric: pass its symmetric part"),
    "NaN": (np.full(N, np.nan), ValueError, "M holds NaN or infinity"),
    "wrong size": (np.eye(N - 1), ValueError, r"M of shape \(19, 19\) fits no operator of order n = 20"),
    "wrong length": (np.ones(N + 1), ValueError, r"M of shape \(21,\) fits no operator"),
    "wrong sparse size": (sp.eye_array(N + 1), ValueError, r"M of shape \(21, 21\) fits"),
    "wrong operator size": (aslinearoperator(np.eye(N + 1)), ValueError, r"M of shape \(21, 21\) fits"),
    "text": ("F", TypeError, "M must be a number, a vector, a matrix or an operator"),
    "complex": (1j * np.eye(N), TypeError, "M is complex"),
    "dtype": (torch.ones(N), ValueError, "M is torch.float32 but the operator torch.float64: convert one"),
    "device": (torch.ones(N, device="meta").double(), ValueError, "M lies on meta but the operator on cpu: move"),
    "singular operator": (aslinearoperator(SINGULAR), ValueError, "M is singular to the precision"),
    "indefinite operator": (aslinearoperator(INDEFINITE), ValueError, "M is not positive definite: v'Mv is negative"),
    "asymmetric operator": (aslinearoperator(np.eye(N) + np.eye(N, k=1)), ValueError, "M is no metric.*not symmetric"),
    "float32 operator": (aslinearoperator(np.eye(N, dtype=np.float32)), ValueError, "M gives float32 products"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_metric_is_refused_in_one_sentence(case):
    M, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as caught:
        fo.eigendistortions(spd(N), M=M)
    assert "\n" not in str(caught.value)


def test_a_metric_of_pixels_does_not_fit_a_restriction_and_is_told_why():
    F = fo.FisherOperator(torch.nn.Conv2d(1, 1, 3), torch.rand(1, 1, 4, 4), within=[1, 2, 5])
    with pytest.raises(ValueError, match=r"n = 3 \(coordinates within its restriction\)"):
        fo.eigendistortions(F, M=torch.ones(1, 1, 4, 4))


def test_a_metric_with_a_null_space_or_another_image_is_refused():
    F = fo.FisherOperator(*build("linear m<n"))
    with pytest.raises(ValueError, match="M is singular, for its model has 10 responses to 25 pixels"):
        fo.eigendistortions(F, M=F)
    model, image = build("attention")
    with pytest.raises(ValueError, match="the operator and M are taken at different images"):
        fo.eigendistortions(fo.FisherOperator(model, image), M=fo.FisherOperator(model, image + 0.1))


@pytest.mark.parametrize("method", ["lanczos", "arpack", "power", "nullspace", "randomized_svd"])
def test_methods_that_need_entries_say_so(method):
    with pytest.raises(ValueError, match="needs the entries of M: pass M as a matrix, or use 'davidson', 'lobpcg'"):
        fo.eigendistortions(spd(N), 2, "LM", method, M=aslinearoperator(np.eye(N)))
    with pytest.raises(ValueError, match="certify='probe' needs the entries of M"):
        fo.eigendistortions(spd(N), 2, "LM", "davidson", M=aslinearoperator(np.eye(N)), certify="probe")


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    F, M = torch.tensor(spd(200)), torch.tensor(spd(200, seed=1))
    host = fo.eigendistortions(F, 4, M=M, rng=0)
    for metric in (M.cuda(), aslinearoperator(M.numpy())):
        device = fo.eigendistortions(F.cuda(), 4, method="davidson", M=metric, rng=0)
        assert device.eigendistortions.is_cuda
        np.testing.assert_allclose(device.eigenvalues, host.eigenvalues, atol=2e-6)
