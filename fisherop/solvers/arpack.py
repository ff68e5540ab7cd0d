"""SciPy's ARPACK, with its tolerance, its small end, its multiplicities and its way of giving up put right.

ARPACK tests the residual against tol * |theta|, which nothing near zero can pass: F is scaled to lambda_max = 1, and
the small end is sought as the large end of I - F. One start vector sees one vector of every multiple eigenvalue: where
more than one pair is wanted, what was found is deflated and the search repeated until nothing better turns up.
Stopped early, ARPACK returns converged pairs only: here the latest Krylov vectors give the best pairs instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from fisherop.linearize import Product
from fisherop.rows import RowOperator
from fisherop.solvers import exact
from fisherop.solvers.contract import CUT, Control, Found, Request, Stop, Watched, largest_ritz_pair, orthonormal

Eigsh = Callable[[Product, int, int, Tensor, float], tuple[Tensor, Tensor]]
"""(product with single float64 rows, n, count, start, tol) to the largest eigenvalues, ascending, and their rows."""


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Run ARPACK in float64 arithmetic at each end that is wanted."""
    if op.n <= basis_size(request.k) + 1:
        return exact.solve_small(op, request, control)
    return search(op, request, control, partial(_largest, rng=request.rng))


def search(op: RowOperator, request: Request, control: Control, largest: Eigsh) -> Found:
    """Run a solver for the large end, which sees one copy of each eigenvalue, at each end that is wanted."""
    lambda_max, highest = largest_ritz_pair(op, request)
    if lambda_max <= 0:
        return Found(request.start(op, request.k), 0.0)
    vectors: list[Tensor] = []
    for count, sign in ((request.largest, 1.0), (request.smallest, -1.0)):
        if count:
            vectors.append(_one_end(op, request, control, count, sign, lambda_max, largest))
    return Found(torch.cat(vectors), lambda_max, doubt=CUT if control.ended else "", top=highest)


def basis_size(k: int) -> int:
    """Return the Lanczos vectors kept: enough that a restart loses little."""
    return max(3 * k + 20, 64)


def _one_end(
    op: RowOperator,
    request: Request,
    control: Control,
    count: int,
    sign: float,
    lambda_max: float,
    largest: Eigsh,
) -> Tensor:
    """Return the vectors of the `count` largest eigenvalues of sign * F / lambda_max."""
    watched = Watched(op, control, keep=basis_size(count))
    shift = 0.0 if sign > 0 else 1.0
    found = torch.zeros(0, op.n, dtype=torch.float64, device=op.device)

    def scaled(row: Tensor) -> Tensor:
        return shift * row + sign * watched(op.tensor(row)).double() / lambda_max

    def deflated(row: Tensor) -> Tensor:
        product = scaled(row - (row @ found.T) @ found)
        return product - (product @ found.T) @ found

    # One vector is all that such a solver starts from: the sum has a part of every vector given.
    start = request.start(op, count, smallest=sign < 0, blurred=sign > 0).sum(0).double()
    try:
        values, rows = largest(scaled, op.n, count, start, request.tol)
        for _ in range(count if count > 1 else 0):
            found = orthonormal(rows)
            again = op.random_rows(1, request.rng)[0].double()
            value, row = largest(deflated, op.n, 1, again - (again @ found.T) @ found, request.tol)
            if value[0] <= values[0] + request.tol:
                break
            values, order = torch.cat([values[1:], value]).sort()
            rows = torch.cat([rows[1:], row])[order]
        return op.tensor(rows)
    except (Stop, ArpackError):
        return watched.best(*((count, 0) if sign > 0 else (0, count)), request.rng)


def _largest(
    product: Product, n: int, count: int, start: Tensor, tol: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    def multiply(x: NDArray[np.float64]) -> NDArray[np.float64]:
        # A copy: x is a view of ARPACK's workspace, and what is watched is kept.
        return product(torch.tensor(x[None], device=start.device))[0].cpu().numpy()

    matrix = LinearOperator((n, n), matvec=multiply, dtype=np.float64)
    # SciPy 1.17 and up draws a vector of its own where a Krylov space is exhausted.
    drawn = {"rng": rng} if "rng" in inspect.signature(eigsh).parameters else {}
    # The margin keeps pairs converged after their residuals are computed afresh; the budget is the product's to end.
    values, vectors = eigsh(
        matrix,
        count,
        which="LA",
        v0=start.cpu().numpy(),
        tol=tol / 2,
        ncv=basis_size(count),
        maxiter=np.iinfo(np.int32).max,
        **drawn,
    )
    order = np.argsort(values)
    return tuple(torch.tensor(part, device=start.device) for part in (values[order], vectors.T[order]))  # type: ignore[return-value]
