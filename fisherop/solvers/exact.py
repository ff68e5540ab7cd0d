"""All eigenpairs from the Gram matrix of the factor's short side, in float64.

For F = L^T L with L of shape m x n and m < n, the m x m matrix L L^T has the same positive eigenvalues; its
eigenvectors u give those of F as L^T u / sqrt(lambda), and everything orthogonal to them is the null space.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fisherop.rows import RowOperator
from fisherop.solvers.contract import Control, Found, Kind, Request, Steps, orthonormal, rounding, run, symmetric

BLOCK = 64
STOPPED = "stopped before all of the dense problem was known"


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Return the wanted pairs by a dense eigendecomposition of size min(m, n)."""
    return run(op, steps(op, request, control))


def steps(op: RowOperator, request: Request, control: Control) -> Steps[Found]:
    """Do what `solve` does, asking for every product."""
    if op.m and op.m < op.n:
        return (yield from _short_side(op, request, control))
    images = (yield from _images_of_identity("factor" if op.factored else "rows", op.n, op, control)).double()
    if len(images) < op.n:
        return _best_in(images, op, request)
    if op.factored:
        values, vectors = _left(images, op)
    else:
        values, vectors = _descending(symmetric(images))
    wanted = [*range(request.largest), *range(op.n - request.smallest, op.n)]
    rows = vectors[:, [*wanted, 0]].T.to(op.dtype).contiguous()
    return Found(rows[:-1], float(values[0]), _zeros(values, op), top=rows[-1:])


def solve_small(op: RowOperator, request: Request, control: Control) -> Found:
    """Solve a problem that is too small for an iterative method, and say so."""
    found = solve(op, request, control)
    return found if found.doubt else replace(found, note="n is so small that the dense problem was solved")


def size(op: RowOperator) -> int:
    """Return the order of the dense eigenproblem."""
    return int(min(op.n, op.m or op.n))


def n_bytes(op: RowOperator) -> int:
    """Return the memory that the dense factor takes, in float64."""
    return int(8 * size(op) * max(op.n, op.m or op.n))


def _short_side(op: RowOperator, request: Request, control: Control) -> Steps[Found]:
    assert op.m is not None
    factor = (yield from _images_of_identity("factor_adjoint", op.m, op, control)).double()
    values, left, factor = _right(factor, op)
    rank = len(factor) - _zeros(values, op)
    left = left[:, :rank]
    wanted = [*range(request.largest), *range(op.n - request.smallest, op.n)]
    positive = [i for i in wanted if i < rank]
    rows = left[:, positive].T @ factor
    if len(positive) < len(wanted):
        null = op.random_rows(len(wanted) - len(positive), request.rng).double()
        for _ in range(2):
            null = null - ((null @ factor.T) @ left) @ left.T @ factor
        rows = torch.cat([rows, orthonormal(null)])
    top = (left[:, :1].T @ factor).to(op.dtype)
    if len(factor) < op.m:
        return Found(rows.to(op.dtype), float(values[0]), doubt=STOPPED, top=top)
    return Found(rows.to(op.dtype), float(values[0]), op.n - rank, top=top)


def _best_in(images: Tensor, op: RowOperator, request: Request) -> Found:
    """Return the Ritz pairs in the span of the first unit vectors, whose images were computed before a stop."""
    size = len(images)
    values, vectors = _left(images, op) if op.factored else _descending(symmetric(images[:, :size]))
    places = [size - 1 - i for i in request.places(size, request.largest, request.smallest)]
    rows = torch.nn.functional.pad(vectors[:, [*places, 0]].T.to(op.dtype), (0, op.n - size))
    return Found(rows[:-1], float(values[0]), doubt=STOPPED, top=rows[-1:])


def _images_of_identity(product: Kind, order: int, op: RowOperator, control: Control) -> Steps[Tensor]:
    """Return the images of the unit vectors, in their order; of the first ones only where the callback stops it."""
    blocks: list[Tensor] = []
    for start in range(0, order, BLOCK):
        rows = torch.zeros(min(BLOCK, order - start), order, dtype=op.dtype, device=op.device)
        rows.diagonal(start).fill_(1)
        blocks.append((yield product, rows))
        control.step()
        if control.stopped:
            break
    return torch.cat(blocks)


def _descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a symmetric matrix, descending, and their vectors as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1), vectors.flip(-1)


def _left(rows: Tensor, op: RowOperator) -> tuple[Tensor, Tensor]:
    """Return the squared singular values of A, descending, and the left singular vectors as columns."""
    values, vectors = _descending(rows @ rows.T)
    if _lost(values, op):
        vectors, singular, _ = torch.linalg.svd(torch.linalg.qr(rows.T, mode="r")[1].T)
        values = singular**2
    return values, vectors


def _right(rows: Tensor, op: RowOperator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the squared singular values of A, descending, and two matrices: X^T Y has the right vectors as rows."""
    values, vectors = _descending(rows @ rows.T)
    if not _lost(values, op):
        return values, vectors / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt(), rows
    columns, upper = torch.linalg.qr(rows.T)
    _, singular, turn = torch.linalg.svd(upper.T)
    return singular**2, torch.eye(len(rows), dtype=rows.dtype, device=rows.device), turn @ columns.T


def _lost(values: Tensor, op: RowOperator) -> bool:
    """Tell whether some eigenvalues of A A^T are rounding that A itself does not have."""
    level = 10 * len(values) * torch.finfo(values.dtype).eps
    return rounding(op) < level and bool(values[-1] <= level * values[0])


def _zeros(values: Tensor, op: RowOperator) -> int:
    """Count the eigenvalues that rounding cannot tell from zero."""
    floor = max(rounding(op), 0.0 if op.factored else 10 * len(values) * torch.finfo(torch.float64).eps)
    return int((values.abs() <= floor * values[0]).sum())
