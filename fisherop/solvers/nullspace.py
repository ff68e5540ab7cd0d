"""Null vectors by projection: what is left of a row once the part that F sees has been taken away.

For F = L^T L, conjugate gradients on min ||L (x - z)|| give v = x - z, which tends to the orthogonal projection of x on
the null space; ||L v|| and ||F v|| are known at every step, a block of rows goes through one product together, and
nothing grows with the steps taken. Hestenes and Stiefel (1952), "Methods of conjugate gradients for solving linear
systems", section 10; in the form CGLS of Bjorck (1996), "Numerical methods for least squares problems", section 7.4.
Where the factor L is unknown, conjugate gradients on F z = F x give the same iterates, to fewer digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.linearize import exact_arithmetic
from fisherop.maps import whole
from fisherop.operators import InformationOperator
from fisherop.rows import RowOperator, row_norms, stream, unit
from fisherop.solvers import lanczos
from fisherop.solvers.contract import (
    Control,
    Found,
    Progress,
    Request,
    gram,
    largest_ritz_pair,
    orthonormal,
    tolerance,
)

MAXITER = 2000
ROUNDS = 4
SAFETY = 0.8  # part of the tolerance used, for rounding between here and the certificate
LEAST = 1e-3  # the part of a single null direction in a random row that fewer than one row in a thousand falls below


def solve(op: RowOperator, request: Request, control: Control) -> Found:
    """Project random rows on the null space; pairs of the large end come from `lanczos`."""
    if request.largest:
        above = lanczos.solve(op, replace(request, smallest=0), control)
    else:
        lambda_max, highest = largest_ritz_pair(op, request)
        above = Found(highest[:0], lambda_max, top=highest)
    top, lambda_max = above.vectors, above.lambda_max
    if not request.smallest or lambda_max <= 0:
        return replace(above, vectors=torch.cat([top, request.start(op, request.smallest)]))
    if request.v0 is not None:
        request = replace(request, v0=request.v0[-request.smallest :])
    projection = Projection(op, request.start(op, request.smallest), lambda_max)
    least = LEAST / math.sqrt(op.n)
    tol = SAFETY * request.tol
    done = projection.run(tol, least, control)
    independent, apart = _independent(projection.rows)
    if done and not control.ended:  # what makes rows orthogonal that are nearly parallel makes their errors larger
        projection.run(max(tol * apart, 10 * torch.finfo(op.dtype).eps), least, control)
        independent, _ = _independent(projection.rows)
    rows = unit(projection.rows)
    null, missing = orthonormal(rows), request.smallest - min(independent, int((projection.kept > least).sum()))
    found = replace(above, vectors=torch.cat([top, null]))
    if not missing:
        return found
    note = f"no null space of dimension {request.smallest} was found: use method='lanczos'"
    return replace(found, note=note, doubt=above.doubt or "other pairs may be smaller")


def _independent(rows: Tensor) -> tuple[int, float]:
    """Return how many rows are no others but for their errors, and the least singular value of those, at norm 1."""
    rows = unit(rows)
    values = torch.linalg.eigvalsh(gram(rows, rows))
    values = values[values > LEAST**2]
    return len(values), float(values[0].sqrt()) if len(values) else 1.0


@dataclass(frozen=True, eq=False)
class NullProjection:
    """The part of an image that a model does not notice, and how sure that is.

    Attributes
    ----------
    image : Tensor or ndarray
        The orthogonal projection of the given image on the null space of F, in its shape and type; of the
        operator's dtype where the image is of whole numbers.
    sensitivity : float
        ``||W^(1/2) J v|| / ||v||``: the model's discriminability of the projection, scaled to unit norm. It is at
        most ``sqrt(lambda_max)``, and zero to rounding in a null space.
    kept : float
        ``||v|| / ||image||``: the part of the given image that is imperceptible.
    converged : bool
        ``||F v|| <= tol * lambda_max * ||v||``.
    lambda_max : float
        The largest eigenvalue, estimated from below.
    n_matvec : int
        Products with F used.
    message : str
        What was done and found, in words.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> p = fo.project_to_null(np.diag([1.0, 0.0]), np.array([3.0, 4.0]))
    >>> p.image.round(6) + 0.0, round(p.kept, 3), p.converged
    (array([0., 4.]), 0.8, True)
    """

    image: Any
    sensitivity: float
    kept: float
    converged: bool
    lambda_max: float
    n_matvec: int
    message: str


@exact_arithmetic()
def project_to_null(
    op: Any,
    image: Tensor | NDArray[Any],
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    callback: Callable[[Progress], object] | None = None,
) -> NullProjection:
    """Find the imperceptible picture nearest to a given one: its projection on the null space of F.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n real symmetric positive semidefinite operator.
    image : Tensor or ndarray
        n entries in any shape, not all zero: the picture to imitate. It need not be the image that `op` was made at.
        Of an operator that is restricted to some distortions, the picture's part within them is projected.
    tol : float, optional
        The projection v is converged when ``||F v|| <= tol * lambda_max * ||v||``. By default
        ``max(1e-6, 100 * eps)`` of the operator's dtype.
    maxiter : int, optional
        Most products with F to spend on the projection, by default 2000.
    callback : callable, optional
        Called with a `Progress` after every step; returning True stops the work.

    Returns
    -------
    NullProjection
        The projection with its sensitivity. Where F has no null space, or none of the image lies in it, `converged`
        is False and `message` says so.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense; the message says what to change.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> p = fo.project_to_null(np.diag([2.0, 1.0, 0.0, 0.0]), np.array([1.0, 1.0, 3.0, 4.0]))
    >>> p.image.round(6) + 0.0
    array([0., 0., 3., 4.])
    >>> round(p.kept, 3), p.converged
    (0.962, True)
    """
    operator = RowOperator(op)
    tol = tolerance(tol, operator.dtype)
    most = MAXITER if maxiter is None else whole(maxiter, "maxiter", 1)
    row = _row(operator, image)
    control = Control(operator, most, callback)
    lambda_max, _ = largest_ritz_pair(operator, Request(1, 0, tol, stream(0)))
    projection = Projection(operator, row, lambda_max)
    least = 1e3 * torch.finfo(operator.dtype).eps
    projection.run(SAFETY * tol, least, control)
    return _answer(projection, tol, least, control, image)


class Projection:
    """Conjugate gradients on every row of a block at once; rows that are done take no more part in products."""

    def __init__(self, op: RowOperator, rows: Tensor, lambda_max: float) -> None:
        self.op, self.rows, self.lambda_max = op, rows.clone(), lambda_max
        self.scale = lambda_max or 1.0
        self.sizes = _norm(rows)
        self.images = rows.new_zeros(len(rows), op.m or 0)
        self.slopes = torch.zeros_like(rows)
        self._refresh(torch.arange(len(rows), device=rows.device))

    @property
    def kept(self) -> Tensor:
        """Norms of the rows, relative to those at the start."""
        return _norm(self.rows) / self.sizes

    @property
    def residuals(self) -> Tensor:
        """||F v|| / ||v|| relative to the largest eigenvalue."""
        return _norm(self.slopes) / _norm(self.rows)

    def sensitivity(self) -> Tensor:
        """Return ||L v|| / ||v||."""
        if self.op.factored:
            return _norm(self.images) / _norm(self.rows)
        energy = self.scale * _inner(self.rows, self.slopes)[:, 0].clamp(min=0)
        return energy.sqrt() / _norm(self.rows)

    def run(self, tol: float, least: float, control: Control) -> bool:
        """Iterate until every row is null to `tol`, or less than `least` of it is left; tell whether all are."""
        for _ in range(ROUNDS):  # what is tracked drifts from what is true: only fresh products end the work
            if self._round(tol, least, control):
                break
            self._refresh(self._active(tol, 0.0))
            if len(self._active(tol, least)) == 0:
                break
        return len(self._active(tol, least)) == 0

    def _round(self, tol: float, least: float, control: Control) -> bool:
        """Run conjugate gradients from where the rows are; tell whether the budget is spent."""
        directions = self.slopes.clone()
        while len(active := self._active(tol, least)):
            p = directions[active]
            image = self.op.factor(p) if self.op.factored else self.op.rows(p) / self.scale
            curvature = _inner(image, image) / self.scale if self.op.factored else _inner(p, image)
            before = _inner(self.slopes[active], self.slopes[active])
            step = torch.where(curvature > 0, before / curvature, 0).to(p.dtype)
            self.rows[active] -= step * p
            if self.op.factored:
                self.images[active] -= step * image
                self.slopes[active] = self.op.factor_adjoint(self.images[active]) / self.scale
            else:
                self.slopes[active] -= step * image
            after = _inner(self.slopes[active], self.slopes[active])
            directions[active] = self.slopes[active] + (after / before).to(p.dtype) * p
            if control.step(self.residuals):
                return True
        return False

    def _active(self, tol: float, least: float) -> Tensor:
        return ((self.residuals > tol) & (self.kept > least)).nonzero().flatten()

    def _refresh(self, chosen: Tensor) -> None:
        """Compute L v and F v / lambda_max afresh for the chosen rows."""
        if len(chosen) and self.op.factored:
            self.images[chosen] = self.op.factor(self.rows[chosen])
            self.slopes[chosen] = self.op.factor_adjoint(self.images[chosen]) / self.scale
        elif len(chosen):
            self.slopes[chosen] = self.op.rows(self.rows[chosen]) / self.scale


def _norm(rows: Tensor) -> Tensor:
    """Return the rows' norms, none of them zero."""
    return torch.clamp(row_norms(rows), min=torch.finfo(torch.float64).tiny)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(dim=1, keepdim=True)


def _row(op: RowOperator, image: Any) -> Tensor:
    """Return an image as one row, or say what is wrong with it."""
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"image must be a tensor or an array, not {type(image).__name__}")
    if "complex" in str(image.dtype):
        raise TypeError("image is complex, and distortions are real: pass its real part")
    row = op.tensor(image.detach() if isinstance(image, Tensor) else image).reshape(1, -1)
    if _restricted(op, row.shape[1]):
        row = op.source.from_image(row)
    if row.shape[1] != op.n:
        raise ValueError(
            f"image has {row.shape[1]} entries but the operator has n = {op.n}: pass one image of its size"
        )
    if not torch.isfinite(row).all() or not bool(row.any()):
        raise ValueError("image must be finite, and not zero everywhere")
    return row


def _restricted(op: RowOperator, size: int) -> bool:
    """Tell whether something of this size is a picture, and the operator one of distortions within a subspace.

    Where the subspace is all of the images, in coordinates of its own, a picture is a picture still.
    """
    return isinstance(op.source, InformationOperator) and size == op.source.image_shape.numel()


def _answer(projection: Projection, tol: float, least: float, control: Control, image: Any) -> NullProjection:
    op = projection.op
    projection._refresh(torch.arange(1, device=op.device))
    kept, residual = float(projection.kept[0]), float(projection.residuals[0])
    converged = residual <= tol and kept > least
    if converged:
        verdict = f"{kept:.3g} of the image's norm lies in the null space of F, to {residual:.1e} of lambda_max"
    elif kept <= least:
        verdict = "nothing of the image lies in a null space of F, if F has one at all"
    elif control.ended:
        verdict = (
            f"not converged within {control.iteration} steps (residual {residual:.1e} of lambda_max): raise maxiter, "
            "pass the result's image to go on, or loosen tol"
        )
    else:
        verdict = f"rounding in {op.dtype} stopped it at a residual of {residual:.1e}: loosen tol, or use float64"
    row = projection.rows[0]
    row = op.source.expand(row[None])[0] if _restricted(op, math.prod(image.shape)) else row
    result = row.reshape(image.shape)
    if isinstance(image, Tensor):  # whole numbers cannot hold it
        result = result.to(image) if image.is_floating_point() else result.to(image.device)
    else:
        result = result.cpu().numpy()
    return NullProjection(
        image=result,
        sensitivity=float(projection.sensitivity()[0]),
        kept=kept,
        converged=converged,
        lambda_max=projection.lambda_max,
        n_matvec=op.n_matvec,
        message=f"{verdict}; {op.n_matvec} products.",
    )
