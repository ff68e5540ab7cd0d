"""The matrix M of a generalized problem F v = lambda M v: how distortions are measured, where not pixel by pixel.

Where M = L L^T is at hand, the problem is turned into the standard one of L^-1 F L^-T, which any method solves. Where
only products with M are to be had, the operator carries M, and methods work in its inner product.

>>> import torch
>>> op = generalized(RowOperator(torch.diag(torch.tensor([4.0, 1.0]))), torch.tensor([2.0, 1.0]))
>>> op.rows(torch.eye(2)).diagonal()
tensor([2., 1.])
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from fisherop.algebra import TensorOperator, check_spaces
from fisherop.maps import real
from fisherop.rows import RowOperator, row_norms, stream, unit
from fisherop.solvers.contract import gram, ritz_values, symmetric

DENSE_ORDER = 2048
"""A sparse matrix of at most this order is factorized as a dense one."""
RANGE_STEPS = 30
CG_STEPS = 1000
LOOSE = 0.2
"""Part of a squared dual norm that may be a bound instead of a sum."""
BLOCK = 64


def generalized(op: RowOperator, M: Any, *, dense: bool = False) -> RowOperator:
    """Return the operator of F v = lambda M v: reduced where M can be factorized, else with M attached.

    Parameters
    ----------
    op : RowOperator
        F.
    M : number, vector, matrix, LinearOperator or FisherOperator
        Symmetric positive definite: a multiple of the identity, a diagonal (n entries, in any shape), or n x n.
    dense : bool, optional
        Compute the entries of an M that is known by its products only, for n products with it.

    Raises
    ------
    TypeError, ValueError
        Where M is no such thing, or lies on another device, in another precision, at another image or in another
        subspace than F.
    """
    root = _root(op, M)
    if root is None:
        metric = Metric(op, M)
        if not dense:
            op.metric = metric
            op.problem = "generalized problem F v = lambda M v, M known by its products"
            return op
        root = _cholesky(metric.matrix())
    return Reduced(op, root)


class Root(Protocol):
    """A factor L of M = L L^T, applied to the rows of a block in float64."""

    def solve(self, rows: Tensor) -> Tensor:
        """Multiply every row by the inverse of L."""

    def solve_transposed(self, rows: Tensor) -> Tensor:
        """Multiply every row by the inverse of L^T."""

    def multiply_transposed(self, rows: Tensor) -> Tensor:
        """Multiply every row by L^T."""


@dataclass(frozen=True)
class Diagonal:
    """The square roots of a diagonal, or of one number."""

    entries: Tensor

    def solve(self, rows: Tensor) -> Tensor:
        """Divide by the entries."""
        return (rows / self.entries).to(rows.dtype)

    def solve_transposed(self, rows: Tensor) -> Tensor:
        """Divide by the entries."""
        return self.solve(rows)

    def multiply_transposed(self, rows: Tensor) -> Tensor:
        """Multiply by the entries."""
        return (rows * self.entries).to(rows.dtype)


@dataclass(frozen=True)
class Cholesky:
    """A lower triangular factor."""

    lower: Tensor

    def solve(self, rows: Tensor) -> Tensor:
        """Solve with L."""
        solution: Tensor = torch.linalg.solve_triangular(self.lower, rows.T.double(), upper=False)
        return solution.T.to(rows.dtype).contiguous()

    def solve_transposed(self, rows: Tensor) -> Tensor:
        """Solve with L^T."""
        solution: Tensor = torch.linalg.solve_triangular(self.lower.T, rows.T.double(), upper=True)
        return solution.T.to(rows.dtype).contiguous()

    def multiply_transposed(self, rows: Tensor) -> Tensor:
        """Multiply with L^T."""
        return (rows.double() @ self.lower).to(rows.dtype)


class Reduced(RowOperator):
    """The standard problem that is equivalent to F v = lambda L L^T v: L^-1 F L^-T y = lambda y with v = L^-T y.

    Norms of y are those that M gives to v, and norms of residuals are those of L^-1 (F v - lambda M v).
    """

    def __init__(self, base: RowOperator, root: Root) -> None:
        self.base, self.root = base, root
        self.source, self.image, self.m = base.source, base.image, base.m
        self.n, self.dtype, self.device = base.n, base.dtype, base.device
        self.problem = "generalized problem F v = lambda M v, M factorized"

    @property
    def n_matvec(self) -> int:
        """Products with F so far."""
        return self.base.n_matvec

    def unchecked(self, block: Tensor) -> Tensor:
        """Multiply every row by L^-1 F L^-T."""
        return self.root.solve(self.base.unchecked(self.root.solve_transposed(block)))

    def factor(self, block: Tensor) -> Tensor:
        """Multiply every row of (b, n) by the factor of F and L^-T."""
        return self.base.factor(self.root.solve_transposed(block))

    def factor_adjoint(self, block: Tensor) -> Tensor:
        """Multiply every row of (b, m) by the transpose of that."""
        return self.root.solve(self.base.factor_adjoint(block))

    def distortions(self, rows: Tensor) -> Tensor:
        """Return v = L^-T y at unit Euclidean norm."""
        return unit(self.root.solve_transposed(rows))

    def coordinates(self, distortions: Tensor) -> Tensor:
        """Return y = L^T v."""
        return self.root.multiply_transposed(distortions)


class Metric:
    """An M known by its products only: counted, checked, and the inner product and dual norm that it gives.

    Attributes
    ----------
    low, high : float
        The extreme Ritz values of a short Lanczos run: within the spectrum of M, and near its ends.
    """

    def __init__(self, op: RowOperator, M: Any) -> None:
        try:
            self.op = RowOperator(M)
        except (TypeError, ValueError) as error:
            raise type(error)(f"M is no metric: {error}") from error
        _check_same(op, self.op)
        if self.op.m is not None and self.op.m < self.op.n:
            raise ValueError(
                f"M is singular, for its model has {self.op.m} responses to {self.op.n} pixels: add a multiple of the "
                "identity, or use generalized_eigendistortions, which does"
            )
        self.dtype, self.device = op.dtype, op.device
        values = ritz_values(self.op, self.op.random_rows(1, stream(0)), RANGE_STEPS)
        self.low, self.high = float(values[0]), float(values[-1])
        self.floor = 100 * torch.finfo(op.dtype).eps * self.high
        self._check_positive(self.low)

    @property
    def n_matvec(self) -> int:
        """Products with M so far."""
        return self.op.n_matvec

    @property
    def amplification(self) -> float:
        """How much larger rounding in products may look in the norm that the inverse of M gives."""
        return float((self.high / self.low) ** 0.5)

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row by M."""
        return self.op.rows(block.to(self.op.device, self.op.dtype)).to(block)

    def orthonormal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows orthonormal in the inner product of M with the same span, and M times them.

        The rows come orthonormal in the usual sense; what M takes for zero in their span is an error of M.
        """
        return self.orthonormalized(rows, self.rows(rows))

    def orthonormalized(self, rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Do so where `images`, M times the rows, are known."""
        self._check_positive(float(torch.linalg.eigvalsh(symmetric(gram(rows, images)))[0]))
        for _ in range(2):  # the second time for what rounding left of the first
            values, vectors = torch.linalg.eigh(symmetric(gram(rows, images)))
            turn = (vectors / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()).T.to(rows)
            rows, images = turn @ rows, turn @ images
        return rows, images

    def dual_norms(self, rows: Tensor, enough: float = 0.0) -> Tensor:
        """Bound sqrt(r' M^-1 r) of every row from above, to a tenth or until the bound is `enough`.

        Conjugate gradients on M z = r: r' M^-1 r is the sum over steps of step length times squared residual, plus
        s' M^-1 s of the residual s that is left. Hestenes and Stiefel (1952), theorem 6:1; the last term is bounded
        by s's / low with half the smallest Ritz value for `low`.
        """
        size = row_norms(rows)
        rest = rows / size.clamp(min=torch.finfo(rows.dtype).tiny)[:, None].to(rows)
        directions = rest.clone()
        energy, left = torch.zeros_like(size), (rest.double() ** 2).sum(1)
        for _ in range(CG_STEPS):
            bound = energy + 2 * left / self.low
            active = ((2 * left / self.low > LOOSE * energy) & (bound.sqrt() * size > enough)).nonzero().flatten()
            if not len(active):
                break
            p = directions[active]
            image = self.rows(p)
            curvature, before = (p.double() * image.double()).sum(1), left[active]
            step = torch.where(curvature > 0, before / curvature, torch.inf)
            energy[active] += step * before
            if not torch.isfinite(energy).all():  # M is not positive definite: nothing is bounded
                return torch.full_like(size, torch.inf)
            rest[active] -= step[:, None].to(p) * image
            left[active] = (rest[active].double() ** 2).sum(1)
            directions[active] = rest[active] + (left[active] / before)[:, None].to(p) * p
        bounds: Tensor = size * (energy + 2 * left / self.low).sqrt()
        return bounds

    def matrix(self) -> Tensor:
        """Return the entries of M in float64."""
        eye = torch.eye(self.op.n, dtype=self.dtype, device=self.device)
        return torch.cat([self.rows(block) for block in torch.split(eye, BLOCK)]).double()

    def _check_positive(self, value: float) -> None:
        if value < -self.floor:
            raise ValueError("M is not positive definite: v'Mv is negative for some v; add a multiple of the identity")
        if value <= self.floor:
            raise ValueError(
                f"M is singular to the precision of {self.dtype}: add a multiple of the identity to it, a thousandth "
                "of its largest eigenvalue for example"
            )


def _root(op: RowOperator, M: Any) -> Root | None:
    """Factorize M where its entries are at hand: a number, a diagonal, a dense or a small sparse matrix."""
    if isinstance(M, bool) or M is None or isinstance(M, str):
        raise TypeError(f"M must be a number, a vector, a matrix or an operator, not {M!r}")
    if isinstance(M, Tensor) and M.is_floating_point() and M.ndim:
        _check_place(op, M.dtype, M.device)
    if issparse(M):
        if M.shape != (op.n, op.n):
            raise ValueError(_size_words(op, M.shape))
        if M.nnz == np.count_nonzero(M.diagonal()):
            return _diagonal(op, real(M.diagonal(), "M"))
        if op.n > DENSE_ORDER:
            return None
        M = M.toarray()
    if not isinstance(M, (Tensor, np.ndarray, numbers.Real, list, tuple)):
        return None
    entries = real(M, "M")
    if not torch.isfinite(entries).all():
        raise ValueError("M holds NaN or infinity: pass a finite metric")
    if entries.ndim and tuple(entries.shape) == (op.n, op.n) != (1, 1):
        return _cholesky(entries.to(op.device))
    return _diagonal(op, entries)


def _diagonal(op: RowOperator, entries: Tensor) -> Root:
    if entries.numel() not in (1, op.n) or (entries.ndim and entries.numel() != op.n):
        raise ValueError(_size_words(op, tuple(entries.shape)))
    entries = entries.to(op.device).flatten()
    if entries.min() <= 0:
        raise ValueError(
            f"M is not positive definite: an entry of its diagonal is {float(entries.min()):.3g}; add a multiple of "
            "the identity"
        )
    return Diagonal(entries.sqrt())


def _cholesky(matrix: Tensor) -> Root:
    scale = float(matrix.abs().max())
    if float((matrix - matrix.T).abs().max()) > 1e-5 * scale:
        raise ValueError("M is not symmetric: pass its symmetric part, (M + M.T) / 2")
    matrix = symmetric(matrix)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    pivots = lower.diagonal() ** 2
    # A pivot overstates the smallest eigenvalue; one at the level of rounding is rounding.
    if failed or float(pivots.min()) <= len(matrix) * torch.finfo(torch.float64).eps * scale:
        least = float(torch.linalg.eigvalsh(matrix)[0])
        raise ValueError(
            f"M is not positive definite: its smallest eigenvalue is {least:.3g}, its largest entry {scale:.3g}; add "
            "a multiple of the identity"
        )
    return Cholesky(lower)


def _check_same(op: RowOperator, metric: RowOperator) -> None:
    """Refuse a metric that does not fit F: in size, place, precision, image or restriction."""
    if metric.n != op.n:
        raise ValueError(_size_words(op, (metric.n, metric.n)))
    if isinstance(metric.source, (Tensor, TensorOperator)):
        _check_place(op, metric.dtype, metric.device)
    elif metric.dtype == torch.float32 and op.dtype == torch.float64:
        raise ValueError("M gives float32 products but the operator float64 ones: pass M in float64")
    check_spaces(op.source, metric.source, "the operator and M")
    if op.image is not None and metric.image is not None:
        check_images(op.image, metric.image, "the operator and M")


def check_images(one: Tensor, other: Tensor, names: str) -> None:
    """Refuse operators that were linearized at different images."""
    if one.shape != other.shape or not torch.equal(one, other.to(one)):
        raise ValueError(f"{names} are taken at different images: linearize both models at the same one")


def _check_place(op: RowOperator, dtype: torch.dtype, device: torch.device) -> None:
    if device.type != op.device.type or (device.index or 0) != (op.device.index or 0):
        raise ValueError(f"M lies on {device} but the operator on {op.device}: move one of them")
    if dtype != op.dtype:
        raise ValueError(f"M is {dtype} but the operator {op.dtype}: convert one of them")


def _size_words(op: RowOperator, shape: tuple[int, ...]) -> str:
    within = " (coordinates within its restriction)" if op.image is not None and op.image.numel() != op.n else ""
    return (
        f"M of shape {tuple(shape)} fits no operator of order n = {op.n}{within}: pass n x n, n entries, or one number"
    )
