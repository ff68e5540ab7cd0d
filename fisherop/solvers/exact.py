"""All eigenpairs from the Gram matrix of the factor's short side, in float64.

For F = L^T L with L of shape m x n and m < n, the m x m matrix L L^T has the same positive eigenvalues; its
eigenvectors u give those of F as L^T u / sqrt(lambda), and everything orthogonal to them is the null space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherop.rows import RowOperator
from fisherop.solvers.contract import Control, Found, Kind, Request, Steps, orthonormal, run, symmetric

BLOCK = 64


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Return the wanted pairs by a dense eigendecomposition of size min(m, n)."""
    return run(op, steps(op, request, control))


def steps(op: RowOperator, request: Request, control: Control) -> Steps[Found]:
    """Do what `solve` does, asking for every product."""
    if op.m and op.m < op.n:
        return (yield from _short_side(op, request, control))
    columns = (yield from _images_of_identity("factor" if op.factored else "rows", op.n, op, control)).double()
    matrix = columns @ columns.T if op.factored else symmetric(columns)
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(matrix))
    wanted = [*range(request.largest), *range(op.n - request.smallest, op.n)]
    return Found(vectors[:, wanted].T.to(op.dtype).contiguous(), float(values[0]), _zeros(values, op))


def solve_small(op: RowOperator, request: Request, control: Control) -> Found:
    """Solve a problem that is too small for an iterative method, and say so."""
    found = solve(op, request, control)
    return Found(found.vectors, found.lambda_max, found.nullity, "n is so small that the dense problem was solved")


def size(op: RowOperator) -> int:
    """Return the order of the dense eigenproblem."""
    return int(min(op.n, op.m or op.n))


def n_bytes(op: RowOperator) -> int:
    """Return the memory that the dense factor takes, in float64."""
    return int(8 * size(op) * max(op.n, op.m or op.n))


def _short_side(op: RowOperator, request: Request, control: Control) -> Steps[Found]:
    assert op.m is not None
    factor = (yield from _images_of_identity("factor_adjoint", op.m, op, control)).double()
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(factor @ factor.T))
    rank = op.m - _zeros(values, op)
    left = vectors[:, :rank] / values[:rank].sqrt()
    wanted = [*range(request.largest), *range(op.n - request.smallest, op.n)]
    positive = [i for i in wanted if i < rank]
    rows = left[:, positive].T @ factor
    if len(positive) < len(wanted):
        null = op.random_rows(len(wanted) - len(positive), request.rng).double()
        for _ in range(2):
            null = null - ((null @ factor.T) @ left) @ left.T @ factor
        rows = torch.cat([rows, orthonormal(null)])
    return Found(rows.to(op.dtype), float(values[0]), op.n - rank)


def _images_of_identity(product: Kind, order: int, op: RowOperator, control: Control) -> Steps[Tensor]:
    blocks = []
    for start in range(0, order, BLOCK):
        rows = torch.zeros(min(BLOCK, order - start), order, dtype=op.dtype, device=op.device)
        rows.diagonal(start).fill_(1)
        blocks.append((yield product, rows))
        control.step()
    return torch.cat(blocks)


def _zeros(values: Tensor, op: RowOperator) -> int:
    """Count the eigenvalues that rounding cannot tell from zero."""
    rounding = (
        (4 * max(op.n, op.m or op.n) ** 0.5 * torch.finfo(op.dtype).eps) ** 2
        if op.factored
        else (4 * op.n**0.5 * torch.finfo(op.dtype).eps)
    )
    floor = max(rounding, 10 * len(values) * torch.finfo(torch.float64).eps)
    return int((values <= floor * values[0]).sum())
