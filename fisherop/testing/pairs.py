"""What eigenpairs must be, and when two sets of vectors span the same subspace.

>>> import numpy as np
>>> assert_eigenpairs(np.diag([3.0, 2.0, 1.0]), [3.0], [[1.0, 0.0, 0.0]])
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import subspace_angles
from torch import Tensor

from fisherop.operators import InformationOperator
from fisherop.testing.probe import Probe, as_rows

NORM_STEPS = 12
"""Steps of Lanczos's method for the largest eigenvalue, to a few per cent from below."""


def assert_eigenpairs(
    op: Any, values: ArrayLike | Tensor, vectors: ArrayLike | Tensor, tol: float | None = None, *, rng: Any = 0
) -> None:
    """Assert that values and vectors are eigenpairs of a symmetric operator, by fresh products.

    The vectors are finite and orthonormal, to the root of `tol`, so that none is zero and none there twice; and every
    residual is small, ``||A v - lambda v|| <= tol * lambda_max``. That proves that the pairs are eigenpairs, not that
    no other is larger or smaller.

    Parameters
    ----------
    op : LinearOperator, sparse or dense matrix, shape (n, n)
        Symmetric, or Hermitian.
    values : array_like of shape (k,)
        In any order.
    vectors : array_like or Tensor
        As `fisherop.eigendistortions` returns them, of shape (k, n) or ``(k, *image)``, also those of a restricted
        operator; or as SciPy does, columns of shape (n, k). Where k = n, whichever fits better.
    tol : float, optional
        By default ``max(1e-6, 100 * eps)`` of the operator's dtype, as that of `fisherop.eigendistortions`.
    rng : optional
        Anything `numpy.random.default_rng` takes, for the estimate of the largest eigenvalue.

    Raises
    ------
    AssertionError
        With the pair that fails, its residual and the tolerance.
    TypeError
        For what is no operator.
    ValueError
        For values and vectors of shapes that do not fit.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> F = fo.FisherOperator(torch.nn.Linear(6, 4), torch.zeros(6))
    >>> r = fo.eigendistortions(F, k=2)
    >>> assert_eigenpairs(F, r.eigenvalues, r.eigendistortions, r.tol)
    """
    __tracebackhide__ = True
    probe = Probe(op, rng)
    if probe.m != probe.n:
        probe.fail("has no eigenpairs: it is not square")
    tol = max(1e-6, 100 * float(np.finfo(probe.dtype).eps)) if tol is None else tol
    of = np.atleast_1d(np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values))
    rows = as_rows(_coordinates(probe, vectors), probe.n).astype(probe.wide)
    if of.ndim != 1 or not of.size or rows.shape != (len(of), probe.n):
        raise ValueError(
            f"{of.size} values and vectors of shape {np.shape(vectors)} are no pairs of an operator with "
            f"n = {probe.n}: give k values, and vectors of shape (k, n), (k, *image) or (n, k)"
        )
    if not (np.isfinite(of).all() and np.isfinite(rows).all()):
        probe.fail("has pairs that hold NaN or infinity")
    norms = _residual_norms(probe, of, rows)
    if len(of) == probe.n:
        rows, norms = min(
            ((x, _residual_norms(probe, of, x)) for x in (rows, rows.T)), key=lambda pair: float(pair[1].max())
        )
    scale = max(float(abs(of).max()), float(abs(probe.ritz_values(min(NORM_STEPS, probe.n))).max()))
    worst = int(np.argmax(norms))
    if not norms[worst] <= tol * scale:
        probe.fail(
            f"has no such eigenpair: pair {worst} of value {of[worst]:.9g} has residual ||A v - lambda v|| = "
            f"{norms[worst]:.3g}, and the tolerance is {tol:.3g} * {scale:.3g}",
            "a solver that stopped before it converged; vectors of another operator or out of order; a generalized "
            "problem, whose vectors solve A v = lambda M v",
        )
    gram = abs(rows.conj() @ rows.T - np.eye(len(rows)))
    i, j = (int(part) for part in np.unravel_index(np.argmax(gram), gram.shape))
    if not gram[i, j] <= tol**0.5:
        what = (
            f"the norm of vector {i} is {np.linalg.norm(rows[i]):.9g}"
            if i == j
            else f"<v_{i}, v_{j}> = {gram[i, j]:.9g}"
        )
        probe.fail(
            f"has eigenvectors that are not orthonormal: {what}, and the tolerance is {tol**0.5:.3g}",
            "vectors that were not normalized; one vector twice; an operator that is not symmetric",
        )


def _coordinates(probe: Probe, vectors: Any) -> Any:
    """Return images that lie in the subspace of a restricted operator as vectors of its space."""
    op, entries = probe.op, math.prod(np.shape(vectors)[1:])
    if not isinstance(op, InformationOperator) or entries != op.image_shape.numel() or entries == probe.n:
        return vectors
    images = torch.as_tensor(vectors, dtype=op.torch_dtype, device=op.device).reshape(len(vectors), -1)
    found = op.from_image(images)
    outside = float((images - op.to_image(found).reshape(images.shape)).norm())
    if not outside <= 1e3 * torch.finfo(images.dtype).eps * float(images.norm()):
        probe.fail(f"has no such eigenvectors: of their norm {outside:.3g} is outside its restriction")
    return found


def _residual_norms(probe: Probe, values: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    products = np.stack([probe.product(row) for row in rows.astype(probe.dtype)])
    norms: NDArray[Any] = np.linalg.norm(products - values[:, None] * rows, axis=1)
    return norms


def assert_same_subspace(one: ArrayLike | Tensor, other: ArrayLike | Tensor, tol: float | None = None) -> None:
    """Assert that two sets of vectors span the same subspace: the sine of the largest angle between them is small.

    Eigenvectors of equal or nearly equal eigenvalues are determined as a subspace only: compare them so, and not one by
    one.

    Parameters
    ----------
    one, other : array_like or Tensor
        k independent vectors each, of shape ``(k, *image)``, (k, n) or columns (n, k) with k <= n; or one
        of shape (n,).
    tol : float, optional
        Largest sine, by default the square root of the coarser dtype's rounding. For eigenvectors of residuals r, with
        a gap g to the nearest other eigenvalue, it is r / g (Davis and Kahan 1970).

    Raises
    ------
    AssertionError
        With the sine of the largest angle and the tolerance, or the dimensions where they differ.

    Examples
    --------
    >>> assert_same_subspace([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]])
    >>> assert_same_subspace([1.0, 0.0], [1.0, 0.1])
    Traceback (most recent call last):
    ...
    AssertionError: the subspaces differ: the sine of the largest angle is 0.0995, and the tolerance is 1.49e-08
    """
    __tracebackhide__ = True
    rows = [as_rows(vectors) for vectors in (one, other)]
    eps = max(float(np.finfo(x.dtype).eps) if x.dtype.kind in "fc" else 2.2e-16 for x in rows)
    tol = eps**0.5 if tol is None else tol
    a, b = (x.astype(np.result_type(x, np.float64)) for x in rows)
    if a.shape[1] != b.shape[1]:
        raise AssertionError(f"vectors of {a.shape[1]} and {b.shape[1]} entries span no common subspace")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise AssertionError("the vectors hold NaN or infinity")
    for x in (a, b):
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(float).tiny)
        if np.linalg.svd(unit, compute_uv=False)[-1] <= len(x) * eps:
            raise AssertionError(f"the {len(x)} vectors of a set are dependent: they span fewer dimensions")
    if len(a) != len(b):
        raise AssertionError(f"the subspaces are of dimension {len(a)} and {len(b)}")
    sine = float(np.sin(subspace_angles(a.T, b.T)[0]))
    if not sine <= tol:
        raise AssertionError(
            f"the subspaces differ: the sine of the largest angle is {sine:.3g}, and the tolerance is {tol:.3g}"
        )
