"""Randomized block Krylov iteration for the largest pairs: a random block, its images, one Rayleigh-Ritz.

Musco and Musco (2015), "Randomized block Krylov methods for stronger and faster approximate singular value
decomposition", algorithm 2, with every block orthogonalized against all before it and a residual test after each.
"""

from __future__ import annotations

import torch

from fisherop.rows import RowOperator, row_norms
from fisherop.solvers.contract import Control, Found, Request, orthonormal, ritz, rows_in_memory

OVERSAMPLE = 5


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Grow the Krylov space of a random block until the wanted residuals are small; restart when memory is full."""
    width = min(op.n, request.largest + OVERSAMPLE)
    room = max(3 * width, min(op.n, rows_in_memory(op) // 2))
    basis = request.start(op, width)
    products = op.rows(basis)
    while True:
        values, x, residual_vectors = ritz(basis, products, request.largest, 0)
        lambda_max = max(float(values[0]), 0.0)
        residuals = row_norms(residual_vectors) / (lambda_max or 1.0)
        if control.step(residuals) or bool((residuals <= 0.7 * request.tol).all()):
            return Found(x, lambda_max)
        if len(basis) + width > room:
            _, basis, residual_vectors = ritz(basis, products, width, 0)
            products = op.rows(basis)
        fresh = orthonormal(products[-width:], basis)
        if len(fresh) == 0:
            fresh = orthonormal(op.random_rows(width, request.rng), basis)
        if len(fresh) == 0:
            return Found(x, lambda_max)
        basis = torch.cat([basis, fresh])
        products = torch.cat([products, op.rows(fresh)])
