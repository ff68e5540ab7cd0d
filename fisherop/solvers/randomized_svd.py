"""Randomized block Krylov iteration for the largest pairs: a random block, its images, one Rayleigh-Ritz.

Musco and Musco (2015), "Randomized block Krylov methods for stronger and faster approximate singular value
decomposition", algorithm 2, with every block orthogonalized against all before it and a residual test after each.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fisherop.rows import RowOperator, row_norms
from fisherop.solvers.contract import CUT, Control, Found, Request, orthonormal, ritz, rows_in_memory

OVERSAMPLE = 5
GUARD = 3  # steps of the random rows before pairs that came with v0 are believed


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Grow the Krylov space of a random block until the wanted residuals are small; restart when memory is full."""
    width, k = min(op.n, request.largest + OVERSAMPLE), request.largest
    room = max(3 * width, min(op.n, rows_in_memory(op) // 2))
    if request.v0 is not None:
        request = replace(request, v0=request.v0[:k])
    basis = request.start(op, width)
    products = op.rows(basis)
    while True:
        values, x, residual_vectors = ritz(basis, products, k + 1, 0)
        lambda_max = max(float(values[0]), 0.0)
        residuals = row_norms(residual_vectors) / (lambda_max or 1.0)
        converged = len(basis) == op.n or bool((residuals[:k] <= 0.7 * request.tol).all())
        if converged and request.v0 is not None and k < len(basis) < op.n:
            # The next pair, which random rows make, may pass those that were given.
            rising = values[k] + residuals[k].cpu() * lambda_max > values[k - 1] + request.tol * lambda_max
            converged = control.iteration >= GUARD and not rising
        if control.step(residuals[:k]) or converged:
            return Found(x[:k], lambda_max, doubt="" if converged else CUT)
        if len(basis) + width > room:
            _, basis, residual_vectors = ritz(basis, products, width, 0)
            products = op.rows(basis)
        fresh = orthonormal(products[-width:], basis)
        if len(fresh) == 0:
            fresh = orthonormal(op.random_rows(width, request.rng), basis)
        basis = torch.cat([basis, fresh])
        products = torch.cat([products, op.rows(fresh)])
