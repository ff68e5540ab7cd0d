"""The laws of `fisherop.testing`: every good operator keeps them, and every broken one is caught, for every seed."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh
from scipy.sparse.linalg._interface import IdentityOperator

import fisherop as fo
from fisherop import testing
from fisherop.algebra import TensorOperator
from fisherop.testing import strategies

SEEDS = range(20)
RECTANGULAR = (testing.assert_linear, testing.assert_adjoint, testing.assert_matmat_consistent)
SQUARE = (testing.assert_symmetric, testing.assert_psd)
A = np.random.default_rng(0).standard_normal((20, 30))
S = A @ A.T


def products(matvec, rmatvec=None, *, shape=A.shape, dtype=np.float64, **others):
    """Return an operator of one's own, as a user writes it."""
    return LinearOperator(shape, matvec=matvec, rmatvec=rmatvec, dtype=dtype, **others)


def square(matvec, matrix=S):
    return products(matvec, shape=matrix.shape, dtype=matrix.dtype)


def hermitian(n=12, dtype=np.complex128):
    B = np.random.default_rng(1).standard_normal((2, n, n))
    B = B[0] + 1j * B[1]
    return (B @ B.conj().T).astype(dtype)


class Reused:
    """A product that writes into one buffer again and again."""

    def __init__(self, matrix):
        self.matrix, self.buffer = matrix, np.empty(len(matrix))

    def __call__(self, x):
        return np.matmul(self.matrix, x.ravel(), out=self.buffer)


class Kept:
    """A product that remembers its last answer."""

    def __init__(self, matrix):
        self.matrix, self.known = matrix, {}

    def __call__(self, x):
        return self.known.setdefault(x.tobytes(), self.matrix @ x)


class Drifting:
    """A product that grows with every call."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        return S @ x * (1 + 1e-6 * self.calls)


def overwritten(x):
    x *= 2
    return S @ x


# --------------------------------------------------------------------------------------------------- good ones pass

GOOD = {
    "dense": lambda dtype: A.astype(dtype),
    "sparse": lambda dtype: sp.csr_array(A.astype(dtype)),
    "tensor": lambda dtype: torch.from_numpy(A.astype(dtype)),
    "operator": lambda dtype: aslinearoperator(A.astype(dtype)),
    "own": lambda dtype: products(lambda x: A.astype(dtype) @ x, lambda x: A.T.astype(dtype) @ x, dtype=dtype),
    "complex": lambda dtype: aslinearoperator((A + 1j * A[::-1]).astype(np.result_type(dtype, np.complex64))),
    "zero": lambda dtype: np.zeros((3, 5), dtype),
    "one by one": lambda dtype: np.full((1, 1), 3, dtype),
    "large": lambda dtype: sp.random_array((3000, 9000), density=1e-3, rng=0, dtype=np.float64).astype(dtype),
    "tiny values": lambda dtype: 1e-30 * A.astype(dtype),
    "rank one": lambda dtype: np.outer(A[:, 0], A[0]).astype(dtype),
    "integers": lambda dtype: np.arange(12).reshape(3, 4),
    "jacobian": lambda dtype: fo.JacobianOperator(
        torch.nn.Linear(4, 6).to(_torch(dtype)), torch.ones(4, dtype=_torch(dtype))
    ),
}


def _torch(dtype):
    return torch.float32 if dtype == np.float32 else torch.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", GOOD)
def test_good_operators_keep_every_law(kind, dtype):
    op = GOOD[kind](dtype)
    for seed in (0,) if kind == "large" else SEEDS:
        for law in (*RECTANGULAR, testing.assert_no_aliasing):
            law(op, rng=seed)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_good_square_operators_keep_the_laws_of_squares(dtype):
    matrix = hermitian(dtype=dtype) if np.dtype(dtype).kind == "c" else S.astype(dtype)
    for seed in SEEDS:
        for law in SQUARE:
            law(matrix, rng=seed)
            law(0 * matrix, rng=seed)


def test_large_operators_are_judged_by_few_products():
    count = []
    op = square(lambda x: count.append(1) or x * np.linspace(0, 1, 20_000), sp.eye_array(20_000))
    testing.assert_psd(op)
    assert len(count) < 80


def test_a_known_fault_of_scipy_is_found():
    with pytest.raises(AssertionError, match="returns a view of its input"):
        testing.assert_no_aliasing(IdentityOperator((3, 3), dtype=float))


# ------------------------------------------------------------------------------------------------ broken ones do not


def one_entry(matrix, factor):
    changed = matrix.copy()
    i, j = np.unravel_index(np.argmin(abs(abs(matrix) - np.median(abs(matrix)))), matrix.shape)
    changed[i, j] *= factor
    return changed


T = one_entry(A, 1.01)
NEAR = S + 1e-9 * np.triu(S, 1)
INDEFINITE = testing.SpectralOperator([*np.linspace(1, 0.1, 30), -1e-9]).matrix
CROWD = np.r_[np.linspace(1, 0.1, 599), -1e-3]
C, Q = hermitian(), A[:, :20]

BROKEN = {
    "adjoint is missing": (testing.assert_adjoint, products(lambda x: A @ x), "has no adjoint"),
    "adjoint wrong in one entry": (testing.assert_adjoint, products(lambda x: A @ x, lambda x: T.T @ x), "<u, A v> ="),
    "adjoint wrong in scale": (
        testing.assert_adjoint,
        products(lambda x: A @ x, lambda x: 1.01 * A.T @ x),
        "rmatvec lacks the factor 0.990099",
    ),
    "adjoint is the operator": (
        testing.assert_adjoint,
        products(lambda x: Q @ x, lambda x: Q @ x, shape=Q.shape),
        "rmatvec multiplies by A",
    ),
    "adjoint is not conjugated": (
        testing.assert_adjoint,
        products(lambda x: (C * A[0, :12]) @ x, lambda x: (C * A[0, :12]).T @ x, shape=C.shape, dtype=complex),
        "without its conjugate",
    ),
    "adjoint is zero": (
        testing.assert_adjoint,
        products(lambda x: A @ x, lambda x: 0 * x[:1] + np.zeros(30)),
        "<u, A v>",
    ),
    "only the adjoint is nonzero": (
        testing.assert_adjoint,
        products(lambda x: np.zeros(20), lambda x: A.T @ x),
        "tolerance is 0",
    ),
    "adjoint holds NaN": (
        testing.assert_adjoint,
        products(lambda x: A @ x, lambda x: A.T @ x * np.nan),
        "rmatvec .* NaN",
    ),
    "affine": (testing.assert_linear, products(lambda x: A @ x + 1e-9), r"A\(0\) is not zero"),
    "absolute value": (testing.assert_linear, products(lambda x: A @ abs(x)), "not linear"),
    "weak square": (testing.assert_linear, products(lambda x: A @ (x + 1e-9 * x**2)), "not linear"),
    "clipped far out": (testing.assert_linear, products(lambda x: A @ np.clip(x, -50, 50)), "s = 1024"),
    "dead zone": (testing.assert_linear, products(lambda x: A @ np.where(abs(x) < 1e-2, 0, x)), "not linear"),
    "normalized": (testing.assert_linear, products(lambda x: A @ x / (np.linalg.norm(x) + 1e-300)), "not linear"),
    "real part only": (
        testing.assert_linear,
        products(lambda x: C @ x.real, shape=C.shape, dtype=complex),
        "not linear",
    ),
    "float32 within": (
        testing.assert_linear,
        products(lambda x: (A @ x).astype(np.float32).astype(float)),
        "not linear",
    ),
    "grows with every call": (testing.assert_linear, square(Drifting()), "not linear"),
    "NaN": (testing.assert_linear, products(lambda x: A @ x * np.inf), "NaN or infinity"),
    "asymmetric": (testing.assert_symmetric, square(lambda x: NEAR @ x), "<A u, v> ="),
    "asymmetric and semidefinite": (testing.assert_psd, square(lambda x: NEAR @ x), "not symmetric"),
    "rectangular": (testing.assert_symmetric, aslinearoperator(A), "not square"),
    "symmetric and not Hermitian": (testing.assert_symmetric, C + C.T + 1j * np.eye(12), "not symmetric"),
    "indefinite": (testing.assert_psd, INDEFINITE, "<v, A v> = -1.00000.*e-09"),
    "indefinite and large": (testing.assert_psd, sp.diags_array(CROWD), "not positive semidefinite"),
    "negative": (testing.assert_psd, -np.eye(1), "<v, A v> = -1"),
    "matmat is another": (
        testing.assert_matmat_consistent,
        products(lambda x: A @ x, matmat=lambda X: T @ X),
        r"matmat\(X\) and matvec of its columns in entry",
    ),
    "matmat mixes its columns": (
        testing.assert_matmat_consistent,
        products(lambda x: A @ x, matmat=lambda X: A @ X[:, ::-1]),
        r"matmat\(X\) and matvec",
    ),
    "matmat of one row": (
        testing.assert_matmat_consistent,
        products(lambda x: A @ x, matmat=lambda X: (A @ X)[:1]),
        r"has shape \(1, 3\), not \(20, 3\)",
    ),
    "rmatmat is another": (
        testing.assert_matmat_consistent,
        products(lambda x: A @ x, lambda x: A.T @ x, rmatmat=lambda X: T.T @ X),
        r"rmatmat\(X\) and rmatvec",
    ),
    "memory read as if contiguous": (
        testing.assert_matmat_consistent,
        products(lambda x: A @ x, matmat=lambda X: A @ X.ravel("K").reshape(X.shape)),
        "in Fortran order",
    ),
    "cannot read strides": (
        testing.assert_matmat_consistent,
        products(
            lambda x: A @ x, matmat=lambda X: torch.from_numpy(A).matmul(torch.from_numpy(X).to(torch.float64)).numpy()
        ),
        "raises",
    ),
    "integers are rounded": (
        testing.assert_matmat_consistent,
        products(lambda x: (A @ x).astype(x.dtype), matmat=lambda X: A @ X),
        r"matvec\(x\) in int64",
    ),
    "wrong dtype": (
        testing.assert_matmat_consistent,
        products(lambda x: (A @ x).astype(np.float32)),
        "of dtype float32",
    ),
    "declared too coarse": (
        testing.assert_matmat_consistent,
        products(lambda x: A @ x, dtype=np.float32),
        "of dtype float64 for float32",
    ),
    "differs when asked again": (testing.assert_matmat_consistent, square(Drifting()), r"matvec\(x\), again"),
    "writes its input": (testing.assert_no_aliasing, square(overwritten), "changes its input: matvec"),
    "writes its input, linear": (testing.assert_linear, square(overwritten), "changes its input: matvec"),
    "random": (testing.assert_no_aliasing, square(Drifting()), "gives another matvec of the same vector"),
    "identity": (testing.assert_no_aliasing, square(lambda x: x), "returns a view of its input"),
    "slice": (
        testing.assert_no_aliasing,
        products(lambda x: x[:3], lambda u: np.r_[u, 0.0], shape=(3, 4)),
        "matvec returns a view of its input",
    ),
    "reused buffer": (testing.assert_no_aliasing, square(Reused(S)), "the next matvec writes over"),
    "reused buffer of the adjoint": (
        testing.assert_no_aliasing,
        products(lambda x: A @ x, Reused(A.T)),
        "the next rmatvec writes over",
    ),
    "kept answers": (testing.assert_no_aliasing, square(Kept(S)), "changes its next product"),
    "read-only": (
        testing.assert_no_aliasing,
        square(lambda x: np.broadcast_to(x.sum(), 20)),
        "read-only array from matvec",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_operator_is_caught_for_every_seed(case):
    law, op, words = BROKEN[case]
    for seed in SEEDS:
        with pytest.raises(AssertionError, match=words):
            law(op, rng=seed)


def test_float32_operators_are_caught_too():
    A32, T32 = A.astype(np.float32), one_entry(A, 1.05).T.astype(np.float32)
    cases = [
        (testing.assert_adjoint, products(lambda x: A32 @ x, lambda x: T32 @ x, dtype=np.float32)),
        (
            testing.assert_adjoint,
            products(lambda x: A32 @ x, lambda x: np.float32(1.01) * (A32.T @ x), dtype=np.float32),
        ),
        (testing.assert_symmetric, (S + 1e-3 * np.triu(S, 1)).astype(np.float32)),
        (testing.assert_psd, np.diag(np.linspace(1, -1e-3, 40)).astype(np.float32)),
        (testing.assert_linear, products(lambda x: A32 @ x + np.float32(1e-2), dtype=np.float32)),
    ]
    for law, op in cases:
        for seed in SEEDS:
            with pytest.raises(AssertionError):
                law(op, rng=seed)


def test_a_product_of_the_wrong_shape_is_said():
    class Short(LinearOperator):
        def _matvec(self, x):
            return np.ones(2)

        matvec = _matvec

    with pytest.raises(AssertionError, match=r"matvec of a vector returns shape \(2,\), not \(3,\)"):
        testing.assert_linear(Short(np.float64, (3, 3)))
    short = LinearOperator((3, 3), lambda x: np.ones(2), lambda x: np.ones(2), dtype=float)
    for law in (testing.assert_linear, testing.assert_symmetric, testing.assert_matmat_consistent):
        with pytest.raises(AssertionError, match="matvec of a vector returns another number of entries than 3"):
            law(short)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e290])
def test_the_laws_hold_and_fail_at_any_scale(scale):
    for law in (testing.assert_linear, testing.assert_adjoint, testing.assert_psd, testing.assert_matmat_consistent):
        law(scale * (S @ S))
    for law, op in (
        (testing.assert_adjoint, products(lambda x: scale * A @ x, lambda x: 3 * scale * A.T @ x)),
        (testing.assert_symmetric, scale * np.triu(S)),
        (testing.assert_linear, products(lambda x: scale * (A @ x + 1))),
    ):
        with pytest.raises(AssertionError):
            law(op)


class Careless(TensorOperator):
    """An operator on tensors that hands out its input, or its own buffer, or NumPy arrays for tensors."""

    def __init__(self, fault):
        super().__init__((4, 4), torch.float64, torch.device("cpu"))
        self.fault, self.buffer = fault, torch.zeros(4, dtype=torch.float64)

    def rows(self, block):
        return 2 * block

    def matvec(self, x):
        if isinstance(x, torch.Tensor):
            if self.fault == "view":
                return x
            if self.fault == "buffer":
                return self.buffer.copy_(2 * x)
        return super().matvec(x)

    def __matmul__(self, x):
        product = super().__matmul__(x)
        return product.numpy() if self.fault == "array" and isinstance(x, torch.Tensor) else product

    adjoint_rows = rows


@pytest.mark.parametrize(
    ("fault", "words"), [("view", "of a tensor returns a view"), ("buffer", "of a tensor writes over")]
)
def test_tensors_are_watched_as_arrays_are(fault, words):
    with pytest.raises(AssertionError, match=words):
        testing.assert_no_aliasing(Careless(fault))
    testing.assert_no_aliasing(Careless(""))


def test_a_tensor_for_a_tensor():
    with pytest.raises(AssertionError, match="is not a tensor on cpu"):
        testing.assert_matmat_consistent(Careless("array"))
    testing.assert_matmat_consistent(Careless(""))


def test_a_failure_says_both_sides_the_tolerance_and_causes_and_hides_its_own_frames():
    with pytest.raises(AssertionError) as caught:
        testing.assert_adjoint(products(lambda x: A @ x, lambda x: T.T @ x))
    law, causes = str(caught.value).splitlines()
    for word in ("<20x30 _CustomLinearOperator with dtype=float64>", "<u, A v> = ", "<A^H u, v> = ", "tolerance is"):
        assert word in law
    assert causes.startswith("Likely causes: rmatvec multiplies by A")
    assert all("__tracebackhide__" in entry.frame.f_locals for entry in caught.traceback[1:])


def test_a_tolerance_of_ones_own_is_used():
    coarse = products(lambda x: A @ x, lambda x: 1.01 * A.T @ x)
    testing.assert_adjoint(coarse, rtol=0.2)
    testing.assert_adjoint(coarse, atol=1e6)
    testing.assert_symmetric(NEAR, rtol=1e-7)
    testing.assert_psd(INDEFINITE, atol=1e-8)


@pytest.mark.parametrize("law", [*RECTANGULAR, *SQUARE, testing.assert_no_aliasing])
def test_what_is_no_operator_is_refused(law):
    with pytest.raises(TypeError, match="op must be a SciPy LinearOperator, or a dense or sparse matrix, not str"):
        law("operator")


# ----------------------------------------------------------------------------------------------------------- pairs

KNOWN = testing.SpectralOperator([5.0, 5.0, 3.0, 1.0, 0.0, 0.0], rng=3)


def test_eigenpairs_are_taken_as_scipy_and_as_this_package_give_them():
    op = testing.SpectralOperator(np.linspace(1, 0, 60), rng=1)
    for k in (1, 4):
        values, vectors = eigsh(op, k, v0=np.ones(60))
        testing.assert_eigenpairs(op, values, vectors)
        testing.assert_eigenpairs(op, values, vectors.T)
        F = torch.from_numpy(op.matrix)
        r = fo.eigendistortions(F, k)
        testing.assert_eigenpairs(F, r.eigenvalues, r.eigendistortions, r.tol)
    testing.assert_eigenpairs(KNOWN, KNOWN.values, KNOWN.vectors)
    testing.assert_eigenpairs(KNOWN, KNOWN.values, KNOWN.vectors.T)
    testing.assert_eigenpairs(KNOWN.matrix, torch.tensor(3.0), KNOWN.vectors[:, 2])
    values, vectors = np.linalg.eigh(C)
    testing.assert_eigenpairs(C, values[:3], vectors[:, :3])
    photo = fo.FisherOperator(torch.nn.AvgPool2d(2), torch.ones(1, 2, 4, 4))
    r = fo.eigendistortions(photo, 3)
    testing.assert_eigenpairs(photo, r.eigenvalues, r.eigendistortions)
    part = fo.FisherOperator(torch.nn.Conv2d(1, 2, 3), torch.ones(1, 1, 6, 6), within=[1, 2, 3, 9])
    r = fo.eigendistortions(part, 2)
    testing.assert_eigenpairs(part, r.eigenvalues, r.eigendistortions, r.tol)
    testing.assert_eigenpairs(part, r.eigenvalues, part.from_image(r.eigendistortions), r.tol)
    with pytest.raises(AssertionError, match="outside its restriction"):
        testing.assert_eigenpairs(part, r.eigenvalues, r.eigendistortions.roll(1, -1), r.tol)


def turned(angle):
    """Return the third eigenvector, turned towards the fourth."""
    return np.cos(angle) * KNOWN.vectors[:, 2] + np.sin(angle) * KNOWN.vectors[:, 3]


@pytest.mark.parametrize(
    ("values", "vectors", "words"),
    [
        ([3.0], turned(1e-5), "pair 0 of value 3 has residual"),
        ([3.0 + 1e-4], turned(0), "pair 0 of value 3.0001 has residual"),
        ([3.0], 2 * turned(0), "the norm of vector 0 is 2"),
        ([3.0], 0 * turned(0), "the norm of vector 0 is 0"),
        ([3.0, 3.0], np.stack([turned(0), turned(0)]), "<v_0, v_1> = 1"),
        ([3.0, 1.0], KNOWN.vectors[:, [3, 2]], "pair 0 of value 3 has residual"),
        ([3.0], turned(np.nan), "NaN"),
        ([1e-3], KNOWN.vectors[:, 5], "has residual"),
    ],
)
def test_what_is_no_eigenpair_is_caught(values, vectors, words):
    with pytest.raises(AssertionError, match=words):
        testing.assert_eigenpairs(KNOWN, values, vectors)


def test_the_tolerance_is_relative_to_the_largest_eigenvalue_even_if_it_is_not_given():
    big = testing.SpectralOperator(np.r_[1e6, np.linspace(2, 1, 40)])
    testing.assert_eigenpairs(big, [1.0 + 0.4], big.vectors[:, -1], tol=1e-6)
    with pytest.raises(AssertionError, match=r"the tolerance is 1e-07 \* 1e\+06"):
        testing.assert_eigenpairs(big, [1.0 + 0.4], big.vectors[:, -1], tol=1e-7)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"2 values and vectors of shape \(6,\) are no pairs"):
        testing.assert_eigenpairs(KNOWN, [1.0, 2.0], np.ones(6))
    with pytest.raises(ValueError, match="0 values and vectors"):
        testing.assert_eigenpairs(KNOWN, [], np.zeros((0, 6)))
    with pytest.raises(AssertionError, match="not square"):
        testing.assert_eigenpairs(A, [1.0], np.ones(30))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([np.float32, np.float64, np.complex128]))
def test_a_subspace_is_the_same_in_every_basis(seed, k, dtype):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((k, 9)).astype(dtype)
    mix = np.linalg.qr(rng.standard_normal((k, k)))[0].astype(dtype)
    testing.assert_same_subspace(X, mix @ X)
    testing.assert_same_subspace(X.T, X)
    testing.assert_same_subspace(X.reshape(k, 3, 3), X.T)
    with pytest.raises(AssertionError, match="the sine of the largest angle is"):
        testing.assert_same_subspace(X, X + 1e-2 * rng.standard_normal((k, 9)).astype(dtype))


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (np.eye(4)[:2], np.eye(4)[:3], "of dimension 2 and 3"),
        (np.eye(4)[:2], np.eye(5)[:2], "4 and 5 entries"),
        (np.eye(4)[[0, 0]], np.eye(4)[:2], "dependent"),
        (np.eye(4)[:2] * [[1], [0]], np.eye(4)[:2], "dependent"),
        (np.eye(4)[:1] * np.nan, np.eye(4)[:1], "NaN"),
        (np.eye(4)[:2], np.eye(4)[1:3], "angle is 1,"),
        (np.eye(4)[0], [1, 1e-7, 0, 0], "angle is 1e-07, and the tolerance is 1.49e-08"),
    ],
)
def test_subspaces_that_differ_are_told_apart(one, other, words):
    with pytest.raises(AssertionError, match=words):
        testing.assert_same_subspace(one, other)


# ------------------------------------------------------------------------------------------------------ strategies

RELATION = {"fewer": lambda m, n: m < n, "equal": lambda m, n: m == n, "more": lambda m, n: m > n}


@given(st.data(), st.sampled_from(sorted(RELATION)))
def test_models_are_drawn_as_asked_and_their_jacobian_is_that_of_autograd(data, relation):
    model, image = data.draw(strategies.models(relation, dtype=torch.float64))
    assert RELATION[relation](len(model(image)), image.numel())
    J = torch.autograd.functional.jacobian(model, image).reshape(-1, image.numel())
    torch.testing.assert_close(model.jacobian(image), J)


@given(strategies.models())
def test_models_come_in_the_dtype_of_their_image_and_are_the_same_for_the_same_seed(subject):
    model, image = subject
    assert model.weight.dtype == image.dtype
    m, n = model.weight.shape
    twin = testing.DenseModel(m, n, model.nonlinearity, model.rng).to(image.dtype)
    assert torch.equal(twin(image), model(image))


@given(strategies.images(), strategies.images((1, 3, 2, 2), torch.float32))
def test_images_lie_between_0_and_1(image, photo):
    for x in (image, photo):
        assert 0 <= x.min() <= x.max() <= 1
    assert (photo.shape, photo.dtype) == ((1, 3, 2, 2), torch.float32)


@given(strategies.psd_operators())
def test_operators_have_the_eigenpairs_that_they_are_drawn_with(op):
    assert (np.diff(op.values) <= 0).all()
    assert op.values[-1] >= 0
    testing.assert_psd(op)
    testing.assert_matmat_consistent(op)
    testing.assert_no_aliasing(op)
    testing.assert_eigenpairs(op, op.values, op.vectors.astype(op.dtype), tol=1e-5)
    assert op.T is op.H is op


@pytest.mark.parametrize("kind", sorted(testing.known.SPECTRA))
@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_every_spectrum_has_n_values_from_1_downwards(kind, n):
    values = testing.spectrum(kind, n)
    assert len(values) == n
    assert (np.diff(values) <= 0).all()
    assert values[0] == (kind != "zero") or n == 1
    assert values[-1] >= 0


def test_failures_shrink_to_what_is_small_and_like_the_identity():
    quietly = settings(max_examples=2000, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    model, image = find(strategies.models(), lambda subject: True, settings=quietly)
    assert torch.equal(model.jacobian(image), torch.eye(1).double())
    assert image.tolist() == [0.5]
    model, image = find(strategies.models("more"), lambda subject: subject[1].numel() > 2, settings=quietly)
    assert torch.equal(model.jacobian(image), torch.eye(4, 3).double())
    op = find(strategies.psd_operators(), lambda op: op.shape[0] >= 3, settings=quietly)
    assert np.array_equal(op.matrix, np.eye(3))


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (strategies.models("less"), "m_vs_n must be one of equal, fewer, more, not 'less'"),
        (strategies.models(nonlinearity="relu"), "nonlinearity must be one of linear, "),
        (strategies.spectra("flat"), "kind must be one of identity, "),
    ],
)
def test_a_kind_that_is_none_is_refused(strategy, words):
    with pytest.raises(ValueError, match=words):
        find(strategy, lambda x: True, settings=settings(database=None))


def test_a_spectrum_or_model_that_is_none_is_refused():
    with pytest.raises(ValueError, match="kind must be one of identity"):
        testing.spectrum("flat", 3)
    with pytest.raises(ValueError, match="nonlinearity must be one of linear"):
        testing.DenseModel(2, 2, "relu")


@pytest.mark.parametrize(("ci", "examples"), [("", 20), ("1", 50)])
def test_profiles_are_chosen_by_the_environment(monkeypatch, ci, examples):
    before = settings.get_current_profile_name()
    monkeypatch.setenv("CI", ci)
    try:
        strategies.register_profiles()
        assert settings().max_examples == examples
        assert settings().derandomize is bool(ci)
        assert settings().deadline is None
        assert settings.get_profile("nightly").max_examples > 500
    finally:
        settings.load_profile(before)


def test_the_assertions_need_no_hypothesis_and_strategies_say_that_they_do():
    code = """
import sys
sys.modules["hypothesis"] = None
import fisherop as fo, numpy as np
fo.testing.assert_psd(np.eye(2))
try:
    fo.testing.strategies
except ImportError as error:
    assert 'pip install "fisherop[testing]"' in str(error), error
else:
    raise SystemExit("no error")
try:
    fo.testing.laws_of_physics
except AttributeError as error:
    assert "laws_of_physics" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lanczos_leaves_a_subspace_that_is_invariant():
    values = np.r_[np.ones(599), -1e-3]
    with pytest.raises(AssertionError, match="not positive semidefinite"):
        testing.assert_psd(sp.diags_array(values))
    testing.assert_psd(sp.eye_array(600))
