"""An operator under test: the vectors drawn for it, its products, and the rounding that they may carry.

>>> import numpy as np
>>> probe = Probe(np.diag([3.0, 4.0]), rng=0)
>>> probe.ritz_values()
array([3., 4.])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

COUNT = 4
"""Vectors drawn on each side: a product that is small by chance for one is not for all."""
DENSE_ORDER = 512
"""Sides up to which all eigenvalues are computed, from as many products."""
KRYLOV_STEPS = 60


class Probe:
    """An operator with a source of Gaussian vectors of its dtype.

    Parameters
    ----------
    op : LinearOperator, sparse or dense matrix, tensor, of shape (m, n)
    rng : anything `numpy.random.default_rng` takes
    rtol, atol : float, optional
        Errors allowed, relative to the operator's `size`, by default what rounding does to random sums as long as the
        operator's sides, with room for a model's depth; and absolute.
    """

    def __init__(self, op: Any, rng: Any = 0, rtol: float | None = None, atol: float = 0.0) -> None:
        self.op = as_operator(op)
        self.m, self.n = self.op.shape
        self.rng = np.random.default_rng(rng)
        declared = np.dtype(self.op.dtype or np.float64)
        self.dtype = declared if declared.kind in "fc" else np.dtype(np.float64)
        self.wide = np.result_type(self.dtype, np.float64)
        rounding = float(np.finfo(self.dtype).eps) * (1000 + 10 * max(self.op.shape) ** 0.5)
        self.rtol = rounding if rtol is None else rtol
        self.atol = atol

    def draw(self, *shape: int) -> NDArray[Any]:
        """Draw Gaussian numbers of the operator's dtype, complex ones of unit variance for a complex operator."""
        real = self.rng.standard_normal(shape)
        if self.dtype.kind == "c":
            return ((real + 1j * self.rng.standard_normal(shape)) / 2**0.5).astype(self.dtype)
        return real.astype(self.dtype)

    def product(self, x: NDArray[Any]) -> NDArray[Any]:
        """Multiply a vector, and see that the result is one."""
        return self._checked(self.op.matvec, x, self.m, "matvec")

    def adjoint_product(self, x: NDArray[Any]) -> NDArray[Any]:
        """Multiply a vector by the adjoint, and see that the result is one."""
        return self._checked(self.op.rmatvec, x, self.n, "rmatvec")

    def _checked(self, multiply: Callable[[Any], Any], x: NDArray[Any], size: int, name: str) -> NDArray[Any]:
        given = x.copy()
        try:
            y = multiply(x)
        except ValueError as error:  # of SciPy, which reshapes what is returned
            if not str(error).startswith("cannot reshape array of size"):
                raise
            self.fail(f"{name} of a vector returns another number of entries than {size}: {error}")
        if not np.array_equal(x, given):
            self.fail(f"changes its input: {name} writes into the vector given to it", "an operation in place")
        if np.shape(y) != (size,):
            self.fail(f"{name} of a vector returns shape {np.shape(y)}, not ({size},)")
        if not np.isfinite(y).all():
            self.fail(f"{name} of a finite vector holds NaN or infinity", "a division by zero, or an overflow")
        return np.asarray(y, dtype=np.result_type(y, self.wide))

    @cached_property
    def size(self) -> float:
        """The root mean square of the norms of products with Gaussian vectors: the Frobenius norm, about."""
        return norm(np.stack([self.product(self.draw(self.n)) for _ in range(COUNT)])) / math.sqrt(COUNT)

    def tolerance(self, scale: float = 1.0) -> float:
        """Return the error allowed to what is `scale` times as large as products with Gaussian vectors are."""
        return self.rtol * self.size * scale + self.atol

    def fail(self, words: str, causes: str = "") -> NoReturn:
        """Raise AssertionError, with likely causes."""
        __tracebackhide__ = True
        raise AssertionError(f"{self.op!r} {words}" + (f"\nLikely causes: {causes}." if causes else ""))

    def ritz_values(self, steps: int = KRYLOV_STEPS) -> NDArray[Any]:
        """Return eigenvalues of a symmetric operator, ascending: all of a small one, else Ritz values by Lanczos.

        Each Ritz value is v^H A v for some unit vector v, so that no eigenvalue is below the least (Lanczos 1950, here
        with full orthogonalization; a subspace that is invariant is left by a fresh vector).
        """
        n = self.n
        basis = np.zeros((n, n if n <= DENSE_ORDER else steps), self.wide)
        products = np.zeros_like(basis)
        start = self.draw(n).astype(self.wide)
        for i in range(basis.shape[1]):
            if n <= DENSE_ORDER:
                basis[i, i] = 1
            else:
                basis[:, i] = _orthogonal(start, basis[:, :i])
                if not basis[:, i].any():
                    basis[:, i] = _orthogonal(self.draw(n).astype(self.wide), basis[:, :i])
            products[:, i] = start = self.product(basis[:, i].astype(self.dtype))
        small = basis.conj().T @ products
        values: NDArray[Any] = np.linalg.eigvalsh((small + small.conj().T) / 2)
        return values


def norm(y: NDArray[Any]) -> float:
    """Return the root of the sum of squares, which may be beyond any dtype themselves."""
    largest = float(abs(y).max(initial=0))
    return largest * float(np.linalg.norm(y / largest)) if largest else 0.0


def _orthogonal(x: NDArray[Any], basis: NDArray[Any]) -> NDArray[Any]:
    """Return the unit vector of what of x is orthogonal to the basis; zero where that is rounding."""
    rest = x
    for _ in range(2):
        rest = rest - basis @ (basis.conj().T @ rest)
    length = norm(rest)
    return rest / length if length > 1e-10 * norm(x) else np.zeros_like(rest)


def as_operator(op: Any) -> LinearOperator:
    """Return anything with products as a SciPy operator."""
    if isinstance(op, Tensor):
        op = op.detach().cpu().numpy()
    try:
        return aslinearoperator(op)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"op must be a SciPy LinearOperator, or a dense or sparse matrix, not {type(op).__name__}"
        ) from error


def as_rows(vectors: Any, n: int | None = None) -> NDArray[Any]:
    """Return vectors, given as images or rows (k, ...) or as SciPy's columns (n, k), as the rows of a matrix.

    Without n, two dimensions are told apart by their lengths: independent vectors are no more than their entries.
    """
    array = vectors.detach().cpu().numpy() if isinstance(vectors, Tensor) else np.asarray(vectors)
    if array.ndim != 2:
        return array.reshape(1, -1) if array.ndim < 2 else array.reshape(len(array), -1)
    columns = array.shape[1] < array.shape[0] if n is None else array.shape[1] != n
    return array.T if columns else array
