"""SciPy's LOBPCG on F scaled to lambda_max = 1, in float64 arithmetic, with a tolerance that means something.

SciPy's default tolerance is absolute and grows with n, its float32 branch divides by quantities below rounding, and it
works in place on what it is given: all three are avoided here. An M that is known by its products is its `B`. Knyazev
(2001), "Toward the optimal preconditioned eigensolver: locally optimal block preconditioned conjugate gradient method".
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lobpcg
from torch import Tensor

from fisherop.rows import RowOperator
from fisherop.solvers import davidson, exact
from fisherop.solvers.contract import CUT, Control, Found, Request, Stop, Watched, largest_ritz_pair, orthonormal

DENSE_BELOW = 8


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Run LOBPCG with a block as wide as the pairs wanted, at each end that is wanted."""
    if op.n <= DENSE_BELOW * max(request.largest, request.smallest):
        return exact.solve_small(op, request, control)
    lambda_max, highest = (largest_ritz_pair if op.metric is None else davidson.scale)(op, request)
    if lambda_max <= 0:
        return Found(request.start(op, request.k), 0.0)
    ends = [(request.largest, True), (request.smallest, False)]
    vectors = [_one_end(op, request, control, count, top, lambda_max) for count, top in ends if count]
    return Found(torch.cat(vectors), lambda_max, doubt=CUT if control.ended else "", top=highest)


def _one_end(
    op: RowOperator, request: Request, control: Control, count: int, largest: bool, lambda_max: float
) -> Tensor:
    watched = Watched(op, control, keep=max(3 * count, 32))

    def scaled(columns: NDArray[np.float64]) -> NDArray[np.float64]:
        columns = columns.reshape(op.n, -1)
        return np.asarray(watched(op.tensor(columns.T.copy())).double().cpu().numpy().T / lambda_max)

    def metric(columns: NDArray[np.float64]) -> NDArray[np.float64]:
        assert op.metric is not None
        # In double precision, if M takes it: noise here spoils the orthogonality that the method lives on.
        rows = torch.from_numpy(columns.reshape(op.n, -1).T.copy()).to(op.device)
        return np.asarray(op.metric.rows(rows).double().cpu().numpy().T)

    start = request.start(op, count, smallest=not largest, blurred=True).double().cpu().numpy().T.copy()
    matrix = LinearOperator((op.n, op.n), matvec=scaled, matmat=scaled, dtype=np.float64)
    # Its residual norm is the usual one: the certificate's is this many times smaller, give or take the square root.
    tol = request.tol / 2 * (1.0 if op.metric is None else min(1.0, (op.metric.low * op.metric.high) ** 0.25))
    B = None if op.metric is None else LinearOperator(matrix.shape, matvec=metric, matmat=metric, dtype=np.float64)
    try:
        with (
            warnings.catch_warnings()
        ):  # LOBPCG says that it stopped early; the certificate says so too, and by how much
            warnings.simplefilter("ignore", UserWarning)
            _, vectors = lobpcg(matrix, start, B=B, tol=tol, maxiter=control.maxiter, largest=largest)
        return orthonormal(op.tensor(vectors.T.copy()))
    except Stop:
        return watched.best(*((count, 0) if largest else (0, count)), request.rng)
