"""Laws that every linear operator keeps, as assertions that say what was compared and what may be wrong.

>>> import numpy as np
>>> from scipy.sparse.linalg import LinearOperator
>>> A = np.array([[1.0, 2.0], [0.0, 1.0]])
>>> assert_adjoint(LinearOperator((2, 2), matvec=lambda x: A @ x, rmatvec=lambda x: A.T @ x))
>>> assert_adjoint(LinearOperator((2, 2), matvec=lambda x: A @ x, rmatvec=lambda x: 1.01 * A.T @ x))
Traceback (most recent call last):
...
AssertionError: <2x2 _CustomLinearOperator with dtype=float64> and its adjoint do not belong together: ...

Each takes a seed and draws the same vectors for it. Errors are allowed as rounding makes them in the operator's dtype,
relative to the operator's size, which is estimated from a few products: in float64 an error of one part in 10^12 is
found. Where an operator is coarser than its dtype says, give ``rtol``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.algebra import TensorOperator
from fisherop.testing.probe import COUNT, KRYLOV_STEPS, Probe, norm

SCALES = (2.0**-10, 2.0**10)
"""Factors, exact in binary, at which thresholds and saturations show."""


def assert_linear(op: Any, *, rng: Any = 0, rtol: float | None = None, atol: float = 0.0) -> None:
    """Assert that sums, multiples and zero go through an operator as they go through a matrix.

    Parameters
    ----------
    op : LinearOperator, sparse or dense matrix, shape (m, n)
        The operator under test.
    rng : optional
        Anything `numpy.random.default_rng` takes: the seed of the vectors.
    rtol, atol : float, optional
        Error allowed, relative to the operator's size, by default about 1000 times the rounding of its dtype; and
        absolute.

    Raises
    ------
    AssertionError
        With the two sides of the law that fails, their difference, the tolerance, and likely causes.
    TypeError
        For what is no operator.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import LinearOperator
    >>> assert_linear(LinearOperator((3, 3), matvec=lambda x: 2 * x, dtype=float))
    >>> assert_linear(LinearOperator((3, 3), matvec=lambda x: 2 * x + 1, dtype=float))
    Traceback (most recent call last):
    ...
    AssertionError: <3x3 _CustomLinearOperator with dtype=float64> is not linear: A(0) is not zero...
    """
    __tracebackhide__ = True
    probe = Probe(op, rng, rtol, atol)
    x, y = probe.draw(2, probe.n)
    a, b = probe.draw(2)
    of_x, of_y, of_zero = (probe.product(vector) for vector in (x, y, np.zeros_like(x)))
    if not norm(of_zero) <= probe.tolerance():
        probe.fail(
            f"is not linear: A(0) is not zero, {_numbers(norm(of_zero), 0.0, probe.tolerance(), '|A(0)|')}",
            "a constant is added, as a bias or an offset; matvec keeps state between calls",
        )
    laws = [("A(a x + b y) and a A(x) + b A(y)", a * x + b * y, a * of_x + b * of_y, float(abs(a) + abs(b)))]
    laws += [(f"A(s x) and s A(x), s = {s:g}", x.dtype.type(s) * x, s * of_x, s) for s in SCALES]
    for names, argument, expected, scale in laws:
        found, tolerance = probe.product(argument), probe.tolerance(scale)
        if not norm(found - expected) <= tolerance:
            worst = int(np.argmax(abs(found - expected)))
            probe.fail(
                f"is not linear: {names} differ by {norm(found - expected):.3g}, "
                f"{_numbers(found[worst], expected[worst], tolerance, f'in entry {worst}')}",
                "a threshold, clipping, normalization or rounding in matvec; only the real part of a complex vector is "
                "used; matvec keeps state between calls, or is random",
            )


def assert_adjoint(op: Any, *, rng: Any = 0, rtol: float | None = None, atol: float = 0.0) -> None:
    """Assert that products with an operator and with its adjoint belong together: <u, A v> = <A^H u, v>.

    The vectors of both sides are drawn independently: with u = v a square matrix would pass for its own transpose.

    Parameters
    ----------
    op : LinearOperator, sparse or dense matrix, shape (m, n)
        Real or complex, with matvec and rmatvec.
    rng, rtol, atol : optional
        As in `assert_linear`.

    Raises
    ------
    AssertionError
        With both inner products, their difference, the tolerance, and likely causes.
    TypeError
        For what is no operator.

    References
    ----------
    Claerbout (1992), "Earth soundings analysis", the dot-product test.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> assert_adjoint(fo.JacobianOperator(torch.nn.Linear(3, 2), torch.zeros(3)))
    """
    __tracebackhide__ = True
    probe = Probe(op, rng, rtol, atol)
    V, U = probe.draw(COUNT, probe.n), probe.draw(COUNT, probe.m)
    try:
        back = np.stack([probe.adjoint_product(u) for u in U])
    except NotImplementedError:
        probe.fail("has no adjoint", "rmatvec= was not given, or the class has neither _rmatvec nor _adjoint")
    left = U.conj() @ np.stack([probe.product(v) for v in V]).T
    right = back.conj() @ V.T
    tolerance = probe.tolerance()
    if (abs(left - right) <= tolerance).all():
        return
    causes = (
        "rmatvec multiplies by A, or by the transpose without its conjugate; a step of matvec (padding, a mask, a "
        "scale, units) is missing in rmatvec; one of them is nonlinear or coarser than its dtype"
    )
    length = norm(right) or 1.0
    factor = np.vdot(right / length, left) / length
    if factor and (abs(left - factor * right) <= tolerance).all():
        causes = f"rmatvec lacks the factor {np.conj(factor):.9g}, by which alone it is wrong"
    i, j = np.unravel_index(np.argmax(abs(left - right)), left.shape)
    probe.fail(
        "and its adjoint do not belong together: "
        f"<u, A v> = {left[i, j]:.9g} and <A^H u, v> = {right[i, j]:.9g} "
        f"differ by {abs(left[i, j] - right[i, j]):.3g}, and the tolerance is {tolerance:.3g}",
        causes,
    )


def assert_symmetric(op: Any, *, rng: Any = 0, rtol: float | None = None, atol: float = 0.0) -> None:
    """Assert that an operator is its own adjoint: <u, A v> = <A u, v>, Hermitian where it is complex.

    Parameters
    ----------
    op : LinearOperator, sparse or dense matrix, shape (n, n)
        Only products with A itself are used; `assert_adjoint` looks at its adjoint.
    rng, rtol, atol : optional
        As in `assert_linear`.

    Raises
    ------
    AssertionError
        With both inner products, their difference, the tolerance, and likely causes.
    TypeError
        For what is no operator.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> assert_symmetric(fo.FisherOperator(torch.nn.Linear(3, 2), torch.zeros(3)))
    """
    __tracebackhide__ = True
    _assert_symmetric(Probe(op, rng, rtol, atol))


def _assert_symmetric(probe: Probe) -> None:
    __tracebackhide__ = True
    if probe.m != probe.n:
        probe.fail("is not symmetric: it is not square")
    V, U = probe.draw(2, COUNT, probe.n)
    left = U.conj() @ np.stack([probe.product(v) for v in V]).T
    right = np.stack([probe.product(u) for u in U]).conj() @ V.T
    tolerance = probe.tolerance()
    if not (abs(left - right) <= tolerance).all():
        i, j = np.unravel_index(np.argmax(abs(left - right)), left.shape)
        probe.fail(
            f"is not symmetric: <u, A v> = {left[i, j]:.9g} and <A u, v> = {right[i, j]:.9g} "
            f"differ by {abs(left[i, j] - right[i, j]):.3g}, and the tolerance is {tolerance:.3g}",
            "J^T W J with a W that is not symmetric, or a J^T that is not the transpose of J (see assert_adjoint); "
            "products that are random or coarser than their dtype",
        )


def assert_psd(op: Any, *, rng: Any = 0, rtol: float | None = None, atol: float = 0.0) -> None:
    """Assert that an operator is symmetric (Hermitian) and positive semidefinite: no eigenvalue is below zero.

    Up to n = 512 all eigenvalues are computed, from n products. A larger operator is searched for a negative <v, A v>
    by 60 steps of Lanczos's method, which finds what is negative beside the largest eigenvalue, and can miss one that
    is tiny within a crowd.

    Parameters
    ----------
    op : LinearOperator, sparse or dense matrix, shape (n, n)
        The operator under test.
    rng, rtol, atol : optional
        As in `assert_linear`; errors are relative to the operator's size.

    Raises
    ------
    AssertionError
        With the least and the largest value of <v, A v> found for unit vectors v, the tolerance, and likely causes.
    TypeError
        For what is no operator.

    Examples
    --------
    >>> import numpy as np
    >>> assert_psd(np.diag([2.0, 1.0, 0.0]))
    >>> assert_psd(np.diag([2.0, 1.0, -1e-9]))
    Traceback (most recent call last):
    ...
    AssertionError: <3x3 MatrixLinearOperator with dtype=float64> is not positive semidefinite: <v, A v> = -1e-09 ...
    """
    __tracebackhide__ = True
    probe = Probe(op, rng, rtol, atol)
    _assert_symmetric(probe)
    values = probe.ritz_values(min(KRYLOV_STEPS, probe.n))
    tolerance = probe.tolerance()
    if not values[0] >= -tolerance:
        probe.fail(
            f"is not positive semidefinite: <v, A v> = {values[0]:.9g} for a unit vector v, where it is "
            f"{values[-1]:.9g} for another, and the tolerance is {tolerance:.3g}",
            "a Hessian where a Gauss-Newton or Fisher matrix was meant; a precision or covariance with a negative "
            "eigenvalue; a difference of matrices",
        )


def assert_matmat_consistent(op: Any, *, rng: Any = 0, rtol: float | None = None, atol: float = 0.0) -> None:
    """Assert that an operator gives the same product in whatever form it is asked for.

    The products with single columns are compared with those of matmat, ``@`` and dot, of vectors of shape (n,), (n, 1)
    and (n, k), in C and Fortran order, strided, reversed, read-only, in float32, float64 and integers, and with a
    second call; shapes and dtype are checked. The same for rmatvec, rmatmat, ``.H`` and ``.T``, where the operator has
    them. Operators of this package are given tensors besides.

    Parameters
    ----------
    op : LinearOperator, sparse or dense matrix, shape (m, n)
        The operator under test.
    rng, rtol, atol : optional
        As in `assert_linear`.

    Raises
    ------
    AssertionError
        With the form that fails, both numbers where they differ most, and the tolerance.
    TypeError
        For what is no operator.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import LinearOperator
    >>> A = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> assert_matmat_consistent(LinearOperator((2, 2), matvec=lambda x: A @ x, matmat=lambda X: A @ X))
    >>> assert_matmat_consistent(LinearOperator((2, 2), matvec=lambda x: A @ x, matmat=lambda X: A.T @ X))
    Traceback (most recent call last):
    ...
    AssertionError: <2x2 _CustomLinearOperator with dtype=float64> is not consistent: matmat(X) ...
    """
    __tracebackhide__ = True
    probe = Probe(op, rng, rtol, atol)
    # Whole numbers, which every dtype holds: none is rounded on its way in.
    whole = probe.rng.integers(-9, 10, (probe.n, 3))
    columns = [probe.product(x) for x in whole.T.astype(probe.dtype)]
    _compare_forms(probe, _forward_forms(probe, whole), "matvec", columns)
    whole = probe.rng.integers(-9, 10, (probe.m, 3))
    try:
        columns = [probe.adjoint_product(x) for x in whole.T.astype(probe.dtype)]
    except NotImplementedError:
        return
    _compare_forms(probe, _adjoint_forms(probe, whole), "rmatvec", columns)


_COLUMNS_ARE_VECTORS = tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 18)
"""SciPy 1.18 deprecates matvec of a column, and 1.20 is to take it for a batch of vectors."""

_Form = tuple[str, Callable[[Any], Any], Any, bool]
"""A name, a product, its argument, and whether that is in the operator's own dtype."""


def _forward_forms(probe: Probe, whole: NDArray[Any]) -> Iterator[_Form]:
    op, X = probe.op, whole.astype(probe.dtype)
    yield "matvec(x), again,", op.matvec, X[:, 0], True
    if _COLUMNS_ARE_VECTORS:
        yield "matvec(x) of shape (n, 1)", op.matvec, X[:, :1], True
    yield "A @ x", op.__matmul__, X[:, 0], True
    yield from _layouts("matmat(X)", op.matmat, X)
    yield "A @ X of shape (n, 1)", op.__matmul__, X[:, :1], True
    yield "dot(X)", op.dot, X, True
    yield from _layouts("A @ X", op.__matmul__, X)
    for dtype in (np.float32, np.float64, np.int64, np.int32):
        yield f"matvec(x) in {np.dtype(dtype)}", op.matvec, whole[:, 0].astype(dtype), False
        yield f"A @ X in {np.dtype(dtype)}", op.__matmul__, whole.astype(dtype), False
    if isinstance(op, TensorOperator):
        yield from _tensors("A @ X", op.__matmul__, whole, op)


def _adjoint_forms(probe: Probe, whole: NDArray[Any]) -> Iterator[_Form]:
    op, X = probe.op, whole.astype(probe.dtype)

    def transposed(x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(op.T @ x.conj()).conj()

    yield "rmatvec(x), again,", op.rmatvec, X[:, 0], True
    if _COLUMNS_ARE_VECTORS:
        yield "rmatvec(x) of shape (m, 1)", op.rmatvec, X[:, :1], True
    yield from _layouts("rmatmat(X)", op.rmatmat, X)
    yield "A.H @ x", op.H.__matmul__, X[:, 0], True
    yield "A.T @ x", transposed, X[:, 0], True
    yield "A.H @ X", op.H.__matmul__, X, True
    yield "A.T @ X", transposed, X, True
    for dtype in (np.float32, np.float64, np.int64, np.int32):
        yield f"rmatvec(x) in {np.dtype(dtype)}", op.rmatvec, whole[:, 0].astype(dtype), False
        yield f"rmatmat(X) in {np.dtype(dtype)}", op.rmatmat, whole.astype(dtype), False
    if isinstance(op, TensorOperator):
        yield from _tensors("A.T @ X", op.T.__matmul__, whole, op)


def _layouts(name: str, product: Callable[[Any], Any], X: NDArray[Any]) -> Iterator[_Form]:
    strided = np.zeros((2 * len(X), 2 * X.shape[1]), X.dtype)[::2, ::2]
    strided[...] = X
    read_only = X.copy()
    read_only.setflags(write=False)
    yield name, product, X, True
    yield f"{name} in Fortran order", product, np.asfortranarray(X), True
    yield f"{name}, X strided,", product, strided, True
    yield f"{name}, X of negative strides,", product, X[::-1, ::-1].copy()[::-1, ::-1], True
    yield f"{name}, X read-only,", product, read_only, True


def _tensors(name: str, product: Callable[[Any], Any], whole: NDArray[Any], op: TensorOperator) -> Iterator[_Form]:
    X = torch.from_numpy(whole)
    own = X.to(op.device, op.torch_dtype)
    yield f"{name}, X a tensor,", product, own, True
    yield f"{name}, X a strided tensor,", product, own.repeat_interleave(2, 1)[:, ::2], True
    yield f"{name}, X a tensor of a vector,", product, own[:, 0], True
    for dtype in (torch.float32, torch.float64, torch.int64):
        yield f"{name}, X a tensor in {dtype},", product, X.to(dtype), False


def _compare_forms(probe: Probe, forms: Iterator[_Form], reference: str, columns: list[NDArray[Any]]) -> None:
    __tracebackhide__ = True
    for name, product, x, own in forms:
        try:
            result = product(x)
        except Exception as raised:
            raise AssertionError(f"{probe.op!r} is not consistent: {name} raises {raised!r}") from raised
        if isinstance(x, Tensor):
            if not isinstance(result, Tensor) or result.device != x.device:
                probe.fail(f"is not consistent: {name} is not a tensor on {x.device}")
            result = result.cpu().numpy()
        expected = np.stack(columns, axis=1)
        expected = expected[:, 0] if x.ndim == 1 else expected[:, : x.shape[1]]
        if not isinstance(result, np.ndarray) or result.shape != expected.shape:
            probe.fail(f"is not consistent: {name} has shape {np.shape(result)}, not {expected.shape}")
        declared = probe.op.dtype
        if own and declared is not None and declared.kind in "fc" and result.dtype != declared:
            probe.fail(
                f"is not consistent: {name} is of dtype {result.dtype} for {probe.dtype}",
                "a constant of another dtype in the product; the dtype declared is not that of the products",
            )
        # Products in a coarser dtype than the operator's may be as coarse.
        coarse = np.finfo(result.dtype).eps / np.finfo(probe.dtype).eps if result.dtype.kind in "fc" else 1
        error = abs(result - expected)
        tolerance = max(1.0, float(coarse)) * probe.tolerance(5.5)  # whole numbers of -9 to 9 are as large as that
        if not error.max(initial=0) <= tolerance:
            place = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
            probe.fail(
                f"is not consistent: {name} and {reference} of its columns "
                f"{_numbers(result[place], expected[place], tolerance, f'in entry {place}')}",
                "matmat, rmatmat, .H or .T is written apart from matvec and rmatvec; the memory of an array is read as "
                "if it were contiguous; an integer array is divided or written as one; state is kept between calls",
            )


def assert_no_aliasing(op: Any, *, rng: Any = 0) -> None:
    """Assert that products neither change their input, nor share memory with it, nor with one another.

    Solvers write over the vectors that they passed and over the products that they got. An operator that keeps either,
    or hands out a buffer of its own, gives them wrong answers and no error.

    Parameters
    ----------
    op : LinearOperator, sparse or dense matrix, shape (m, n)
        All of matvec, matmat, and rmatvec and rmatmat, where it has them; with tensors too, if it is of this package.
    rng : optional
        Anything `numpy.random.default_rng` takes: the seed of the vectors.

    Raises
    ------
    AssertionError
        With the product that fails and the way in which it does.
    TypeError
        For what is no operator.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import LinearOperator
    >>> assert_no_aliasing(LinearOperator((3, 3), matvec=lambda x: 1.0 * x, dtype=float))
    >>> assert_no_aliasing(LinearOperator((3, 3), matvec=lambda x: x, dtype=float))
    Traceback (most recent call last):
    ...
    AssertionError: <3x3 _CustomLinearOperator with dtype=float64> shares memory: matvec returns a view of its input...
    """
    __tracebackhide__ = True
    probe = Probe(op, rng)
    products = [("matvec", probe.op.matvec, (probe.n,)), ("matmat", probe.op.matmat, (probe.n, 2))]
    try:
        probe.op.rmatvec(probe.draw(probe.m))
    except NotImplementedError:
        pass
    else:
        products += [("rmatvec", probe.op.rmatvec, (probe.m,)), ("rmatmat", probe.op.rmatmat, (probe.m, 2))]
    for name, product, shape in products:
        _assert_apart(probe, name, product, probe.draw(*shape), probe.draw(*shape))
        if isinstance(probe.op, TensorOperator):
            tensors = [torch.from_numpy(probe.draw(*shape)).to(probe.op.device) for _ in range(2)]
            _assert_apart(probe, f"{name} of a tensor", product, *tensors)


def _assert_apart(probe: Probe, name: str, product: Callable[[Any], Any], x: Any, other: Any) -> None:
    __tracebackhide__ = True
    given = _copy(x)
    first = product(x)
    if not _same(x, given):
        probe.fail(f"changes its input: {name} writes into the vectors given to it", "an operation in place")
    if _share(first, x):
        probe.fail(
            f"shares memory: {name} returns a view of its input",
            "a product that is the identity, a slice or a reshape of its input: return a copy",
        )
    kept = _copy(first)
    second = product(other)
    if _share(first, second) or not _same(first, kept):
        probe.fail(
            f"shares memory: the next {name} writes over what the one before returned",
            "an output buffer that is used again: return a copy",
        )
    if not _writeable(first):
        probe.fail(
            f"returns a read-only array from {name}, and solvers such as LOBPCG write into products",
            "a broadcast array, or a view of a constant: return a copy",
        )
    if change := _change(probe, product(x), kept):
        probe.fail(f"gives another {name} of the same vector, {change}", "it is random, or keeps state between calls")
    first[...] = 0
    if change := _change(probe, product(x), kept):
        probe.fail(
            f"shares memory: writing into what {name} returned changes its next product, {change}",
            "a product that is kept and returned again, or a view of the operator's own data: return a copy",
        )


def _change(probe: Probe, again: Any, kept: Any) -> str:
    """Say by how much a product has changed; empty where it has not, but for rounding."""
    error = float(abs(again - kept).max()) if np.size(kept) else 0.0
    return "" if error <= probe.tolerance() else f"by {error:.3g} where the tolerance is {probe.tolerance():.3g}"


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else np.array(x)


def _same(x: Any, y: Any) -> bool:
    return bool(torch.equal(x, y) if isinstance(x, Tensor) else np.array_equal(x, y))


def _share(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor):
        return bool(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr())
    return bool(np.shares_memory(x, y))


def _writeable(x: Any) -> bool:
    return isinstance(x, Tensor) or bool(x.flags.writeable)


def _numbers(found: Any, expected: Any, tolerance: float, where: str) -> str:
    return f"{where}: {found:.9g}, not {expected:.9g}, and the tolerance is {tolerance:.3g}"
