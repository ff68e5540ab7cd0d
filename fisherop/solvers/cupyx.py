"""CuPy's thick-restart Lanczos, on a CUDA device, with its tolerance, its ends and its way of giving up put right.

`cupyx.scipy.sparse.linalg.eigsh` tests an absolute norm: F is scaled to lambda_max = 1. It has no small end: that is
the large end of I - F. It overwrites its start vector, which is a copy here. It divides by the norm of what is left of
a product without asking whether anything is: a space that is exhausted gives NaN, and is taken for an answer. Here that
ends the search, and the vectors seen so far give the best pairs. It returns silently when its budget is spent: the
budget is this package's, and the certificate judges what comes. Missed copies of multiple eigenvalues are searched for
as with ARPACK.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fisherop import gpu
from fisherop.linearize import Product
from fisherop.rows import RowOperator
from fisherop.solvers import arpack, exact
from fisherop.solvers.contract import Control, Found, Request, Stop


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Run CuPy's Lanczos in float64 arithmetic at each end that is wanted."""
    if op.device.type != "cuda":
        raise ValueError(
            f"method 'cupyx' works on CUDA devices, and the operator is on {op.device}: use another method, or make "
            "the operator of a model and an image there"
        )
    gpu.import_cupy()
    if min(op.n, op.m or op.n) <= arpack.basis_size(request.k) + 1:  # a space of so low a rank would be exhausted
        return exact.solve_small(op, request, control)
    with gpu.on_torchs_stream(op.device):
        return arpack.search(op, request, control, _largest)


def _largest(product: Product, n: int, count: int, start: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues, ascending, of a product with single rows, and their vectors as rows."""
    cupy = gpu.import_cupy()
    from cupyx.scipy.sparse.linalg import LinearOperator, eigsh

    def multiply(x: object) -> object:
        row = from_dlpack(x).clone()[None]  # a copy: this is the solver's workspace
        if not torch.isfinite(row).all():
            raise Stop
        return cupy.from_dlpack(product(row)[0])

    matrix = LinearOperator((n, n), matvec=multiply, dtype=np.float64)
    values, vectors = eigsh(
        matrix,
        count,
        which="LA",
        v0=cupy.from_dlpack(start.clone()),
        ncv=arpack.basis_size(count),
        maxiter=np.iinfo(np.int32).max,
        tol=tol / 2,
    )
    rows = from_dlpack(cupy.ascontiguousarray(vectors.T))
    if not torch.isfinite(rows).all():
        raise Stop
    return from_dlpack(values), rows
