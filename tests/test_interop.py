"""The operators in other people's hands: SciPy's solvers, PRIMME, PyLops, scikit-learn, NumPy, torch, and picklers.

Every answer is compared with dense truth. `checks` names the package and what of it is tried, for the table that
tests/matrix.py prints.
"""

import io
import pickle

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import build
from scipy.linalg import subspace_angles
from scipy.optimize import least_squares
from scipy.sparse.linalg import (
    LinearOperator,
    aslinearoperator,
    cg,
    eigsh,
    expm_multiply,
    gmres,
    lobpcg,
    lsmr,
    lsqr,
    minres,
    onenormest,
    svds,
)
from strategies import block

import fisherop as fo

M, N, K = 80, 60, 3
SINGULAR = np.linspace(1, 0.05, N)
TORCH = {np.float32: torch.float32, np.float64: torch.float64}
checks = pytest.mark.checks


@pytest.fixture(autouse=True)
def _record(request, record_property):
    for mark in request.node.iter_markers("checks"):
        record_property("checks", " ".join(mark.args))


@pytest.fixture(scope="module", params=[np.float32, np.float64], ids=["float32", "float64"])
def case(request):
    """Return a model whose Jacobian at zero is known, in one precision."""
    return Case(request.param)


class Case:
    def __init__(self, dtype):
        left, right = (np.linalg.qr(block(seed, size, N))[0] for seed, size in ((0, M), (1, N)))
        matrix = torch.tensor((left * SINGULAR) @ right.T, dtype=TORCH[dtype])
        zero = torch.zeros(N, dtype=TORCH[dtype])
        self.dtype = dtype
        self.J, self.F = (kind(Sine(matrix), zero) for kind in (fo.JacobianOperator, fo.FisherOperator))
        self.jacobian = matrix.double().numpy()
        self.fisher = self.jacobian.T @ self.jacobian
        self.values, self.vectors = np.linalg.eigh(self.fisher)
        self.accuracy = 100 * np.finfo(dtype).eps

    def block(self, *shape):
        return block(2, *shape, dtype=self.dtype)

    def shifted(self, shift):
        """F + shift * I."""
        return self.F + aslinearoperator(shift * sp.eye_array(N, dtype=self.dtype))

    def assert_eigenpairs(self, values, vectors, wanted, accuracy=None):
        """Compare with the eigenpairs at these places of the ascending spectrum, in any order."""
        order = np.argsort(values)
        accuracy = accuracy or self.accuracy
        np.testing.assert_allclose(values[order], self.values[wanted], atol=accuracy, rtol=0)
        gap = np.diff(self.values).min()
        assert np.sin(subspace_angles(self.vectors[:, wanted], vectors)[0]) <= 10 * accuracy / gap


class Sine(torch.nn.Module):
    """sin(A x), whose Jacobian at zero is A."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x):
        return torch.sin(self.matrix @ x)


PLACES = {
    "LM": slice(-K, None),
    "LA": slice(-K, None),
    "SM": slice(0, K),
    "SA": slice(0, K),
    "BE": [0, N - 2, N - 1],
}


@checks("SciPy", "`eigsh`")
@pytest.mark.parametrize("which", PLACES)
def test_eigsh_finds_what_which_asks_for(case, which):
    values, vectors = eigsh(case.F, K, which=which, v0=np.ones(N))
    assert vectors.dtype == case.dtype
    case.assert_eigenpairs(values, vectors, PLACES[which])


@checks("SciPy", "`eigsh(sigma=, OPinv=)`")
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_eigsh_finds_what_is_nearest_to_sigma_with_an_inverse_of_ours(case, sigma):
    shifted = case.shifted(-sigma)
    rtol = 1e-6 if case.dtype == np.float32 else 1e-13
    inverse = LinearOperator(case.F.shape, lambda b: minres(shifted, b, rtol=rtol)[0], dtype=case.dtype)
    values, vectors = eigsh(case.F, 2, sigma=sigma, OPinv=inverse, v0=np.ones(N))
    nearest = np.sort(np.argsort(abs(case.values - sigma))[:2])
    case.assert_eigenpairs(values, vectors, nearest)


@checks("SciPy", "`lobpcg`")
@pytest.mark.parametrize("largest", [True, False])
def test_lobpcg_finds_either_end(case, largest):
    tol = 1e-5 if case.dtype == np.float32 else 1e-9
    values, vectors = lobpcg(case.F, case.block(N, K), tol=tol, maxiter=200, largest=largest)
    case.assert_eigenpairs(values, vectors, PLACES["LA" if largest else "SA"], tol)


@checks("SciPy", "`lobpcg`, dense below 5 k")
@pytest.mark.filterwarnings("ignore:The problem size:UserWarning")
def test_lobpcg_is_given_the_product_with_an_integer_identity_that_it_asks_for(case):
    values, vectors = lobpcg(case.F, case.block(N, N // 5 + 1))
    case.assert_eigenpairs(values, vectors, slice(-(N // 5 + 1), None))


SVDS = [("arpack", "LM", None), ("arpack", "SM", None), ("lobpcg", "LM", 200), ("propack", "LM", N)]


@checks("SciPy", "`svds`")
@pytest.mark.parametrize(("solver", "which", "maxiter"), SVDS, ids=[" ".join(way[:2]) for way in SVDS])
def test_svds_finds_singular_values_of_the_jacobian(case, solver, which, maxiter):
    left, values, right = svds(case.J, K, which=which, solver=solver, maxiter=maxiter, rng=np.random.default_rng(0))
    wanted = SINGULAR[:K] if which == "LM" else SINGULAR[-K:]
    np.testing.assert_allclose(np.sort(values)[::-1], wanted, atol=case.accuracy)
    np.testing.assert_allclose(case.jacobian @ right.T, left * values, atol=case.accuracy)


@checks("SciPy", "`lsqr`, `lsmr`")
@pytest.mark.parametrize("solver", [lsqr, lsmr])
@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_least_squares_with_the_jacobian(case, solver, damp):
    b = case.block(M)
    eps = float(np.finfo(case.dtype).eps)
    steps = {"iter_lim" if solver is lsqr else "maxiter": 4 * N}
    with np.errstate(over="ignore"):  # lsmr starts a minimum at 1e100, which float32 does not hold
        x = solver(case.J, b, damp, atol=eps, btol=eps, **steps)[0]
    truth = np.linalg.solve(case.fisher + damp**2 * np.eye(N), case.jacobian.T @ b)
    np.testing.assert_allclose(x, truth, atol=case.accuracy * np.linalg.norm(truth) / SINGULAR[-1] ** 2)


@checks("SciPy", "`cg`, `minres`, `gmres`")
@pytest.mark.parametrize("solver", [cg, minres, gmres])
def test_linear_systems_with_the_shifted_fisher_matrix(case, solver):
    b, shift = case.block(N), 0.1
    x, failed = solver(case.shifted(shift), b, rtol=case.accuracy)
    assert failed == 0
    truth = np.linalg.solve(case.fisher + shift * np.eye(N), b)
    np.testing.assert_allclose(x, truth, atol=10 * case.accuracy * np.linalg.norm(truth) / shift)


@checks("SciPy", "`expm_multiply`")
def test_the_exponential_of_the_fisher_matrix(case):
    X = case.block(N, 2)
    trace = float(case.values.sum())
    truth = scipy.linalg.expm(-case.fisher) @ X
    np.testing.assert_allclose(expm_multiply(-case.F, X, traceA=-trace), truth, atol=case.accuracy)
    np.testing.assert_allclose(
        expm_multiply(-case.F, X, 0, 1, 3, endpoint=True, traceA=-trace)[-1], truth, atol=case.accuracy
    )


@checks("SciPy", "`onenormest`")
@pytest.mark.parametrize("name", ["F", "J.T @ J", "F @ F"])
def test_the_one_norm_estimate_is_a_bound_from_below_and_near(case, name):
    op = {"F": case.F, "J.T @ J": case.J.T @ case.J, "F @ F": case.F @ case.F}[name]
    truth = np.linalg.norm(case.fisher @ case.fisher if name == "F @ F" else case.fisher, 1)
    assert truth / 3 <= onenormest(op) <= truth * (1 + case.accuracy)


@checks("SciPy", "`optimize.least_squares(jac=)`")
def test_least_squares_takes_the_jacobian_of_a_model_where_it_goes(case):
    model = Sine(torch.tensor(case.jacobian))
    goal = model(torch.full((N,), 0.1, dtype=torch.float64)).numpy()
    fitted = least_squares(
        lambda x: model(torch.tensor(x)).numpy() - goal,
        np.zeros(N),
        jac=lambda x: fo.JacobianOperator(model, torch.tensor(x)),
    )
    np.testing.assert_allclose(fitted.x, 0.1, atol=1e-5)


NUMBERS = [2, -1.5, True, np.float32(2), np.float64(-1.5), np.int64(3), np.array(2.0), torch.tensor(2.0)]


@checks("SciPy", "algebra: `+ - * / @ ** .T .H`")
def test_the_algebra_of_operators_is_that_of_matrices(case):
    F, J, dense, jacobian = case.F, case.J, case.fisher, case.jacobian
    expected = {
        "sum": (F + F, 2 * dense),
        "difference": (F - 3 * F, -2 * dense),
        "negative": (-F, -dense),
        "product": (J @ F, jacobian @ dense),
        "star": (J * F, jacobian @ dense),
        "power": (F**3, dense @ dense @ dense),
        "power 0": (F**0, np.eye(N)),
        "quotient": (F / 4, dense / 4),
        "normal": (J.T @ J, dense),
        "transpose": ((2 * J @ F).T, 2 * dense @ jacobian.T),
        "adjoint": ((J + J).H, 2 * jacobian.T),
        "nested": ((F @ F - F / 2) ** 2, np.linalg.matrix_power(dense @ dense - dense / 2, 2)),
        "identity": (case.shifted(0.5), dense + 0.5 * np.eye(N)),
        "SciPy's left": (aslinearoperator(jacobian.astype(case.dtype)) @ F, jacobian @ dense),
        "SciPy's right": (J @ aslinearoperator(dense.astype(case.dtype)), jacobian @ dense),
    }
    for name, (op, truth) in expected.items():
        assert op.shape == truth.shape, name
        assert op.dtype == case.dtype, name
        for arrays, matrix in ((op, truth), (op.T, truth.T), (op.H, truth.T)):
            x = case.block(matrix.shape[1], 2)
            found = arrays @ x
            assert found.dtype == case.dtype, name
            np.testing.assert_allclose(found, matrix @ x, atol=10 * case.accuracy, err_msg=name)
            np.testing.assert_allclose(arrays @ x[:, 0], matrix @ x[:, 0], atol=10 * case.accuracy, err_msg=name)


@checks("SciPy", "algebra: numbers keep float32")
@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: f"{type(x).__name__} {x}")
def test_no_number_changes_the_precision(case, number):
    for op in (number * case.F, case.F * number, number * case.J.T, case.F / number, number * (case.F @ case.F)):
        assert op.dtype == case.dtype
        assert (op @ case.block(op.shape[1])).dtype == case.dtype
    truth = float(number) * (case.fisher @ np.ones(N))
    np.testing.assert_allclose((number * case.F) @ np.ones(N), truth, atol=10 * case.accuracy)


@checks("SciPy", "algebra: complex numbers")
def test_a_complex_number_makes_a_complex_operator_of_the_same_precision(case):
    op = case.F - 1j * case.F
    assert op.dtype == np.result_type(case.dtype, np.complex64)
    found = op @ case.block(N)
    assert found.dtype == op.dtype
    np.testing.assert_allclose(found, (1 - 1j) * (case.fisher @ case.block(N)), atol=10 * case.accuracy)


@checks("torch", "tensors through sums, products, multiples")
def test_operators_made_by_algebra_take_tensors(case):
    F, J, x = case.F, case.J, torch.from_numpy(case.block(N, 2))
    for op in (F + F, F - F / 2, -F, J @ F, (J @ F).T, F**2, 2 * J):
        image = x if op.shape[1] == N else J @ x
        found = op @ image
        assert isinstance(found, torch.Tensor)
        assert found.dtype == image.dtype
        np.testing.assert_allclose(found, op @ image.numpy(), atol=case.accuracy)
        assert np.array_equal(pickle.loads(pickle.dumps(op)) @ image.numpy(), found)


@checks("fisherop", "`eigendistortions` of `J.T @ J` and of sums")
@pytest.mark.parametrize("method", ["lanczos", "arpack", "lobpcg", "exact"])
def test_eigendistortions_of_operators_made_by_algebra(case, method):
    for op in (case.J.T @ case.J, (case.F + case.F) / 2):
        found = fo.eigendistortions(op, K, "SM", method, rng=0)
        assert found.converged.all()
        case.assert_eigenpairs(found.eigenvalues, found.eigendistortions.T, PLACES["SM"], 2 * found.tol)


@checks("SciPy", "algebra: shapes that do not fit")
def test_operators_that_do_not_fit_are_refused(case):
    with pytest.raises(ValueError, match=r"have one shape, and these have \(60, 60\) and \(80, 60\)"):
        case.F + case.J
    with pytest.raises(ValueError, match="inner sizes differ"):
        case.F @ case.J


@checks("SciPy", "algebra: another dtype")
def test_operators_of_two_precisions_make_one_of_the_higher():
    single, double = Case(np.float32), Case(np.float64)
    for op in (single.F + double.F, single.F @ double.F):
        assert op.dtype == np.float64
    np.testing.assert_allclose((single.F + double.F) @ np.ones(N), 2 * double.fisher @ np.ones(N), atol=1e-5)


@checks("NumPy", "`asarray` refused")
@pytest.mark.parametrize("make", [np.asarray, np.array, np.linalg.norm, np.linalg.eigvalsh, np.diag, np.trace])
def test_numpy_makes_no_array_of_an_operator(case, make):
    before = case.F.n_matvec
    with pytest.raises(TypeError, match=r"knows its products, not its entries: .* op @ numpy.eye\(60\)"):
        make(case.F)
    assert case.F.n_matvec == before


@checks("NumPy", "ufuncs refused")
@pytest.mark.parametrize("function", [np.add, np.multiply, np.matmul, np.subtract, np.equal])
def test_ufuncs_are_refused_without_a_product(case, function):
    before = case.F.n_matvec
    for arguments in ((case.F, np.ones(N)), (np.ones(N), case.F), (case.F, case.F), (case.F, 2.0)):
        with pytest.raises(TypeError, match="does not support ufuncs"):
            function(*arguments)
    assert case.F.n_matvec == before


OTHERS = [np.ones(N), np.ones((N, N)), torch.ones(N), torch.ones(N, N), sp.eye_array(N), 2, 2.0, np.float64(2)]


@checks("NumPy, torch", "adding what is no operator refused")
@pytest.mark.parametrize("other", OTHERS, ids=lambda x: f"{type(x).__name__}{list(getattr(x, 'shape', ()))}")
def test_adding_an_array_or_a_number_says_how_to_add_an_operator(case, other):
    for add in (lambda a, b: a + b, lambda a, b: a - b):
        for pair in ((case.F, other), (other, case.F)):
            with pytest.raises(TypeError, match=r"added to an operator: wrap a matrix by .*aslinearoperator"):
                add(*pair)


@checks("NumPy, SciPy, torch", "`array @ op`")
def test_arrays_and_tensors_are_multiplied_from_the_left(case):
    u = case.block(M, 2).T
    for rows in (u, u[0]):
        np.testing.assert_allclose(rows @ case.J, rows @ case.jacobian, atol=case.accuracy)
        tensor = torch.from_numpy(rows) @ case.J
        assert isinstance(tensor, torch.Tensor)
        assert tensor.shape == (*rows.shape[:-1], N)
        np.testing.assert_allclose(tensor, rows @ case.J, atol=case.accuracy)
    with pytest.raises(ValueError, match=r"takes a tensor of shape \(80,\) or \(80, b\), not \(60,\)"):
        torch.ones(N) @ case.J


@checks("torch", "functions refused")
def test_functions_of_torch_that_need_entries_are_refused(case):
    for function in (torch.matmul, torch.mv, torch.add):
        with pytest.raises(TypeError, match=f"must be Tensor, not {type(case.F).__name__}"):
            function(case.F, torch.ones(N))
    for function in (torch.as_tensor, torch.tensor):
        with pytest.raises((TypeError, RuntimeError), match=r"FisherOperator|knows its products"):
            function(case.F)


@checks("SciPy", "sparse matrices")
def test_sparse_matrices_multiply_and_are_multiplied_once_wrapped(case):
    matrix = sp.random_array((N, N), density=0.1, rng=np.random.default_rng(0), format="csr", dtype=case.dtype)
    np.testing.assert_allclose(case.F @ matrix, case.fisher @ matrix.toarray(), atol=case.accuracy)
    wrapped = aslinearoperator(matrix) @ case.F
    np.testing.assert_allclose(wrapped @ np.ones(N), matrix @ (case.fisher @ np.ones(N)), atol=10 * case.accuracy)
    with pytest.raises(TypeError, match=r"wrap a sparse matrix, aslinearoperator\(matrix\) @ op"):
        matrix @ case.F


@checks("SciPy", "blocks in every form, by Hypothesis")
@given(st.integers(0, 2**32 - 1), st.sampled_from(["C", "F"]), st.integers(0, 4), st.booleans())
def test_whatever_the_layout_of_a_block_its_product_is_the_dense_one(case, seed, order, width, backward):
    x = np.asarray(block(seed, N, width), order=order, dtype=case.dtype)[:, :: -1 if backward else 1]
    for found in (case.F @ x, case.F.matmat(x), case.F.rmatmat(x), (case.J.T @ case.J) @ x):
        assert found.shape == x.shape
        np.testing.assert_allclose(found, case.fisher @ x, atol=case.accuracy * (1 + np.linalg.norm(x)))


@checks("PRIMME", "`eigsh`")
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_primme_finds_either_end(case, which):
    primme = pytest.importorskip("primme")
    tol = 1e-5 if case.dtype == np.float32 else 1e-10
    values, vectors = primme.eigsh(case.F, K, which=which, tol=tol, v0=case.block(N, K))
    case.assert_eigenpairs(values, vectors, PLACES[which], 10 * tol)


@checks("PRIMME", "`svds`")
def test_primme_finds_singular_values_of_the_jacobian(case):
    primme = pytest.importorskip("primme")
    left, values, right = primme.svds(case.J, K, tol=1e-5 if case.dtype == np.float32 else 1e-10)
    np.testing.assert_allclose(values, SINGULAR[:K], atol=1e-4)
    np.testing.assert_allclose(case.jacobian @ right.T, left * values, atol=1e-4)


@checks("PRIMME", "as our backend")
@pytest.mark.parametrize("which", PLACES)
def test_primme_as_a_backend_is_certified(case, which):
    pytest.importorskip("primme")
    found = fo.eigendistortions(case.F, K, which, "primme", rng=0)
    assert found.converged.all()
    places = PLACES[which] if which != "BE" else [0, N - 2, N - 1]
    case.assert_eigenpairs(found.eigenvalues, found.eigendistortions.T.numpy(), places, 2 * found.tol)


@checks("PyLops", "`aslinearoperator`, `dottest`, `cgls`, `VStack`")
def test_pylops_takes_the_jacobian_for_its_own(case):
    pylops = pytest.importorskip("pylops")
    P, x, u = pylops.aslinearoperator(case.J), case.block(N), case.block(M)
    assert P.dtype == case.dtype
    np.testing.assert_allclose(P @ x, case.jacobian @ x, atol=case.accuracy)
    np.testing.assert_allclose(P.H @ u, case.jacobian.T @ u, atol=case.accuracy)
    assert pylops.utils.dottest(P, M, N, rtol=case.accuracy, atol=M * case.accuracy)
    damped = pylops.VStack([P, 0.1 * pylops.Identity(N, dtype=case.dtype)])
    goal = np.concatenate([u, np.zeros(N, case.dtype)])
    tol = 1e-10 if case.dtype == np.float32 else 1e-26
    found = pylops.optimization.basic.cgls(damped, goal, np.zeros(N, case.dtype), niter=200, tol=tol)[0]
    truth = np.linalg.solve(case.fisher + 0.01 * np.eye(N), case.jacobian.T @ u)
    np.testing.assert_allclose(found, truth, atol=100 * case.accuracy)


@checks("PyLops", "algebra with its operators")
def test_pylops_operators_and_ours_make_operators_of_either_side(case):
    pylops = pytest.importorskip("pylops")
    slope, identity = pylops.FirstDerivative(N, dtype=case.dtype), pylops.Identity(N, dtype=case.dtype)
    matrix, x = slope.todense(), case.block(N)
    for op, truth in (
        (case.J @ slope, case.jacobian @ matrix),
        (slope @ case.F, matrix @ case.fisher),
        (case.F + identity, case.fisher + np.eye(N)),
        (identity + case.F, case.fisher + np.eye(N)),
        (case.F - identity, case.fisher - np.eye(N)),
    ):
        found = op @ x
        assert found.dtype == case.dtype
        np.testing.assert_allclose(found, truth @ x, atol=10 * case.accuracy)


@checks("scikit-learn", "`randomized_svd` beside ours")
def test_scikit_learn_is_refused_the_entries_and_our_method_of_that_name_gives_its_answer(case):
    extmath = pytest.importorskip("sklearn.utils.extmath")
    with pytest.raises(TypeError, match="knows its products, not its entries"):
        extmath.randomized_svd(case.J, K, random_state=0)
    theirs = extmath.randomized_svd(case.jacobian, K, n_iter=30, random_state=0)[1]
    ours = fo.eigendistortions(case.F, K, "LM", "randomized_svd", rng=0)
    assert ours.converged.all()
    np.testing.assert_allclose(np.sqrt(ours.eigenvalues), theirs, atol=10 * ours.tol)


@checks("joblib", "`dump`, `load`")
@pytest.mark.parametrize("kind", [fo.JacobianOperator, fo.FisherOperator])
def test_joblib_stores_an_operator(kind):
    joblib = pytest.importorskip("joblib")
    op = kind(*build("conv relu pool", torch.float32))
    file = io.BytesIO()
    joblib.dump(op, file)
    file.seek(0)
    x = block(0, op.shape[1])
    assert np.array_equal(joblib.load(file) @ x, op @ x)


@checks("joblib", "`Parallel` in processes")
def test_joblib_sends_operators_to_processes_and_results_back():
    joblib = pytest.importorskip("joblib")
    model, image = build("conv relu pool", torch.float32)
    op = fo.FisherOperator(model, image)
    with joblib.parallel_config("loky", n_jobs=1, inner_max_num_threads=1):
        (there,) = joblib.Parallel(n_jobs=2)([joblib.delayed(fo.eigendistortions)(op, 2, rng=0)])
    here = fo.eigendistortions(op, 2, rng=0)
    assert there.converged.all()
    np.testing.assert_allclose(there.eigenvalues, here.eigenvalues, rtol=1e-5)


@checks("cloudpickle", "operators on lambdas")
@pytest.mark.parametrize("kind", [fo.JacobianOperator, fo.FisherOperator])
def test_cloudpickle_carries_a_model_that_is_a_lambda(kind):
    cloudpickle = pytest.importorskip("cloudpickle")
    model, image = build("complex")
    op = kind(model, image)
    x = block(0, op.shape[1])
    for operator in (op, op.T, 2 * op, op.T @ op):
        x = block(0, operator.shape[1])
        assert np.array_equal(pickle.loads(cloudpickle.dumps(operator)) @ x, operator @ x)
