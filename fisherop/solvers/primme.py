"""PRIMME's Davidson and LOBPCG methods, where the package `primme` is installed.

Its test, the residual against tol * ||F||, is already the right one. Stathopoulos and McCombs (2010), "PRIMME:
preconditioned iterative multimethod eigensolver".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherop.rows import RowOperator
from fisherop.solvers import exact
from fisherop.solvers.contract import CUT, Control, Found, Request, Stop, Watched, largest_ritz_pair, orthonormal

DENSE_BELOW = 8


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Run PRIMME in float64 arithmetic at each end that is wanted."""
    primme = _primme()
    if op.n <= DENSE_BELOW * request.k:
        return exact.solve_small(op, request, control)
    lambda_max, highest = largest_ritz_pair(op, request)
    if lambda_max <= 0:
        return Found(request.start(op, request.k), 0.0)
    ends = [(request.largest, True), (request.smallest, False)]
    vectors = [_one_end(primme, op, request, control, count, top, lambda_max) for count, top in ends if count]
    return Found(torch.cat(vectors), lambda_max, doubt=CUT if control.ended else "", top=highest)


def _one_end(
    primme: Any, op: RowOperator, request: Request, control: Control, count: int, largest: bool, lambda_max: float
) -> Tensor:
    watched = Watched(op, control, keep=max(3 * count, 32))
    raised: list[BaseException] = []

    def scaled(columns: NDArray[np.float64]) -> NDArray[np.float64]:
        # PRIMME swallows exceptions: it is let run out on the identity, and its answer is not used.
        if control.ended or raised:
            return columns
        try:
            products = watched(op.tensor(columns.reshape(op.n, -1).T.copy()))
            return np.asarray(products.double().cpu().numpy().T / lambda_max)
        except Stop:
            return columns
        except BaseException as error:
            raised.append(error)
            return columns

    matrix = LinearOperator((op.n, op.n), matvec=scaled, matmat=scaled, dtype=np.float64)
    start = request.start(op, count, smallest=not largest, blurred=True).double().cpu().numpy().T.copy()
    # One start vector sees one copy of a multiple eigenvalue: the block is as wide as the pairs wanted.
    # By default PRIMME picks its method by the clock; this one needs the fewest products and is deterministic.
    options = {
        "method": "PRIMME_DEFAULT_MIN_MATVECS",
        "maxBlockSize": count,
        "maxMatvecs": count * (control.maxiter + 2),
        "raise_for_unconverged": False,
    }
    values, vectors = primme.eigsh(
        matrix, count, which="LA" if largest else "SA", v0=start, tol=request.tol / 2, **options
    )[:2]
    if raised:
        raise raised[0]
    if control.ended or len(values) < count:
        return watched.best(*((count, 0) if largest else (0, count)), request.rng)
    return orthonormal(op.tensor(np.ascontiguousarray(vectors.T)))


def _primme() -> Any:
    try:
        import primme
    except ImportError as error:
        raise ValueError(
            "method 'primme' needs the package primme: pip install primme, which needs LAPACK and BLAS to build"
        ) from error
    return primme
