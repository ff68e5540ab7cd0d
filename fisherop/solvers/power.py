"""Block power iteration with Rayleigh-Ritz and a residual test; the small end from lambda_max - F.

The classical method, for comparison: its convergence depends on the ratio of neighbouring eigenvalues, where Krylov
methods depend on the square root of the gap. Golub and Van Loan (2013), "Matrix Computations", section 8.2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherop.rows import RowOperator, row_norms
from fisherop.solvers.contract import CUT, Control, Found, Request, largest_ritz_pair, orthonormal, ritz


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Iterate a block as wide as the pairs wanted, first at the large end, then at the small one."""
    lambda_max, highest = largest_ritz_pair(op, request)
    vectors, doubt = [], ""
    for largest, smallest in ((request.largest, 0), (0, request.smallest)):
        if largest + smallest:
            x, lambda_max, converged = _iterate(op, request, control, largest, smallest, lambda_max)
            vectors.append(x)
            doubt = doubt if converged else CUT
    return Found(torch.cat(vectors), lambda_max, doubt=doubt, top=highest)


def _iterate(
    op: RowOperator, request: Request, control: Control, largest: int, smallest: int, lambda_max: float
) -> tuple[Tensor, float, bool]:
    x = request.start(op, largest + smallest, smallest=smallest > 0, blurred=True)
    while True:
        products = op.rows(x)
        values, x, residual_vectors = ritz(x, products, largest, smallest)
        lambda_max = max(lambda_max, float(values[0]))
        residuals = row_norms(residual_vectors) / (lambda_max or 1.0)
        converged = bool((residuals <= 0.7 * request.tol).all())
        if control.step(residuals) or converged:
            return x, lambda_max, converged
        # F x = residual + value x, so the next block costs no second product.
        products = residual_vectors + values[:, None].to(x) * x
        fresh = orthonormal(lambda_max * x - products if smallest else products)
        x = torch.cat([fresh, orthonormal(op.random_rows(len(x) - len(fresh), request.rng), fresh)])
