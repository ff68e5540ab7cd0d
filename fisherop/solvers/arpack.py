"""SciPy's ARPACK, with its tolerance, its small end, its multiplicities and its way of giving up put right.

ARPACK tests the residual against tol * |theta|, which nothing near zero can pass: F is scaled to lambda_max = 1, and
the small end is sought as the large end of I - F. One start vector sees one vector of every multiple eigenvalue: where
more than one pair is wanted, what was found is deflated and the search repeated until nothing better turns up.
Stopped early, ARPACK returns converged pairs only: here the latest Krylov vectors give the best pairs instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from fisherop.rows import RowOperator
from fisherop.solvers import exact
from fisherop.solvers.contract import Control, Found, Request, Stop, Watched, largest_ritz_value, orthonormal

Vectors = NDArray[np.float64]


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Run ARPACK in float64 arithmetic at each end that is wanted."""
    if op.n <= basis_size(request.k) + 1:
        return exact.solve_small(op, request, control)
    lambda_max = largest_ritz_value(op, request)
    if lambda_max <= 0:
        return Found(request.start(op, request.k), 0.0)
    vectors: list[Tensor] = []
    for count, sign in ((request.largest, 1.0), (request.smallest, -1.0)):
        if count:
            vectors.append(_one_end(op, request, control, count, sign, lambda_max))
    return Found(torch.cat(vectors), lambda_max)


def basis_size(k: int) -> int:
    """Return the Lanczos vectors kept: enough that a restart loses little."""
    return max(3 * k + 20, 64)


def _one_end(op: RowOperator, request: Request, control: Control, count: int, sign: float, lambda_max: float) -> Tensor:
    """Return the vectors of the `count` largest eigenvalues of sign * F / lambda_max."""
    watched = Watched(op, control, keep=basis_size(count))
    shift = 0.0 if sign > 0 else 1.0
    found = np.zeros((0, op.n))

    def scaled(x: Vectors) -> Vectors:
        # A copy: x is a view of ARPACK's workspace, and what is watched is kept.
        product = watched(op.tensor(x[None].copy()))[0].double().cpu().numpy()
        return np.asarray(shift * x + sign * product / lambda_max)

    def deflated(x: Vectors) -> Vectors:
        inside = found.T @ (found @ x)
        product = scaled(x - inside)
        return np.asarray(product - found.T @ (found @ product))

    # One vector is all that ARPACK starts from: the sum has a part of every vector given.
    start = request.start(op, count, smallest=sign < 0).sum(0).double().cpu().numpy()
    try:
        values, vectors = _largest(scaled, op.n, count, start, request.tol)
        for _ in range(count if count > 1 else 0):
            found = np.asarray(orthonormal(torch.from_numpy(vectors.T)).numpy())
            again = op.random_rows(1, request.rng)[0].double().cpu().numpy()
            value, vector = _largest(deflated, op.n, 1, again - found.T @ (found @ again), request.tol)
            if value[0] <= values[0] + request.tol:
                break
            values, vectors = np.append(values[1:], value), np.hstack([vectors[:, 1:], vector])
            order = np.argsort(values)
            values, vectors = values[order], vectors[:, order]
        return op.tensor(vectors.T)
    except (Stop, ArpackError):
        return watched.best(*((count, 0) if sign > 0 else (0, count)), request.rng)


def _largest(
    product: Callable[[Vectors], Vectors], n: int, count: int, start: Vectors, tol: float
) -> tuple[Vectors, Vectors]:
    matrix = LinearOperator((n, n), matvec=product, dtype=np.float64)
    # The margin keeps pairs converged after their residuals are computed afresh; the budget is the product's to end.
    values, vectors = eigsh(
        matrix, count, which="LA", v0=start, tol=tol / 2, ncv=basis_size(count), maxiter=np.iinfo(np.int32).max
    )
    order = np.argsort(values)
    return values[order], vectors[:, order]
