"""What a solver is given and what it gives back, and the few steps of linear algebra that solvers share.

Solvers see an operator, never a model. Vectors are the rows of contiguous (b, n) blocks on the operator's device;
Gram matrices and small eigenproblems are in float64 on the host, whatever the rows are and wherever they lie.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.linearize.autodiff import free_memory
from fisherop.maps import number
from fisherop.rows import RowOperator, unit

BASIS_BYTES = 1 << 30
CUT = "stopped before its search came to an end"

Matrix = Tensor
"""Small float64 matrices on the CPU, where small eigenproblems are solved faster, and without waiting for a device.

Not NumPy's: its BLAS has threads that would fight with torch's for the cores.
"""


@dataclass(frozen=True)
class Progress:
    """How far a solver has come; `callback` gets one after every step and stops the work by returning True.

    Attributes
    ----------
    iteration : int
        Steps so far, a step being one product with a block.
    n_matvec : int
        Products with F so far, counted per vector.
    residuals : ndarray of float64
        Current residuals of the wanted pairs relative to the largest eigenvalue: infinite for pairs that there is no
        vector for yet; empty where a backend hides them.
    """

    iteration: int
    n_matvec: int
    residuals: NDArray[np.float64]


def asks_to_stop(answer: object) -> bool:
    """Tell whether a callback returned True, Python's or NumPy's; anything else that it returns means nothing."""
    return isinstance(answer, (bool, np.bool_)) and bool(answer)


@dataclass
class Control:
    """The budget of a solver call, and the line to the caller's callback."""

    op: RowOperator
    maxiter: int
    callback: Callable[[Progress], object] | None = None
    iteration: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be a function of one Progress, or None, not {self.callback!r}")

    def step(self, residuals: Tensor | None = None) -> bool:
        """Count one product with a block, report it, and tell whether to stop."""
        if self.stopped:
            return True
        self.iteration += 1
        if self.callback is not None:
            shown = np.zeros(0) if residuals is None else residuals.double().cpu().numpy().copy()
            self.stopped = asks_to_stop(self.callback(Progress(self.iteration, self.op.n_matvec, shown)))
        return self.ended

    @property
    def ended(self) -> bool:
        """Tell whether the budget is spent, or the callback asked to stop."""
        return self.stopped or self.iteration >= self.maxiter


@dataclass(frozen=True)
class Request:
    """The pairs wanted, and how well.

    Attributes
    ----------
    largest, smallest : int
        How many pairs from each end.
    tol : float
        Residual relative to the largest eigenvalue.
    v0 : Tensor of shape (b, n) or None
        Rows to start from.
    rng : numpy Generator
        The only source of randomness.
    """

    largest: int
    smallest: int
    tol: float
    rng: np.random.Generator
    v0: Tensor | None = None

    @property
    def k(self) -> int:
        """Pairs wanted in all."""
        return self.largest + self.smallest

    def places(self, size: int, largest: int, smallest: int) -> list[int]:
        """Return the places of the extreme ones of `size` ascending values, descending; where they are few, none twice.

        The pairs wanted at the large end go before any at the small one.
        """
        bottom = min(smallest, size - min(self.largest, size))
        top = min(largest, size - bottom)
        return [size - 1 - i for i in range(top)] + [bottom - 1 - i for i in range(bottom)]

    def start(self, op: RowOperator, count: int, *, smallest: bool = False, blurred: bool = False) -> Tensor:
        """Return `count` orthonormal rows to start from: v0 as far as it goes, then random ones.

        Rows that are eigenvectors already, but of another part of the spectrum, would stop a method that looks no
        further: `blurred` adds random vectors in which every other eigenvector has a part well above the tolerance.

        An earlier result has its smallest pairs last, so the small end starts from the last rows of v0.
        """
        rows = op.random_rows(count, self.rng)
        if self.v0 is None:
            return orthonormal(rows)
        given = unit((self.v0.flip(0) if smallest else self.v0)[:count])
        if blurred:
            blur = min(0.1, 100 * self.tol * op.n**0.5)
            given = given + blur / op.n**0.5 * op.random_rows(len(given), self.rng)
        given = orthonormal(given)
        return torch.cat([given, orthonormal(rows[len(given) :], given)])


@dataclass(frozen=True)
class Found:
    """A solver's answer, to be certified by the caller.

    Attributes
    ----------
    vectors : Tensor, shape (largest + smallest, n)
        Rows that span the wanted eigenvectors, those of the largest eigenvalues first.
    lambda_max : float
        The largest Ritz value met, which the solver's own residuals are relative to. The certificate does not believe
        it: an error there would loosen the tolerance of every pair.
    nullity : int or None
        Dimension of the null space, where the solver knows it exactly.
    note : str
        What the user should know of the way.
    doubt : str
        Why a better pair may have been missed, where the solver checks that and could not finish.
    top : Tensor of shape (1, n) or None
        The Ritz vector of `lambda_max`, from which the certificate computes its own where no pair of the large end was
        asked for.
    """

    vectors: Tensor
    lambda_max: float
    nullity: int | None = None
    note: str = ""
    doubt: str = ""
    top: Tensor | None = None


Answer = TypeVar("Answer")
Kind = Literal["rows", "unchecked", "factor", "factor_adjoint"]
Ask = tuple[Kind, Tensor] | tuple[Callable[[list[Any]], list[Any]], Any]
"""A product that is wanted: the method of the operator, and the rows to multiply; or a function that does for many what
is wanted, given a list, and what it should be given for this one."""

Steps = Generator[Ask, Any, Answer]
"""A computation that yields what it wants done and is sent the outcome, so that many can have it done at once."""


def run(op: RowOperator, steps: Steps[Answer]) -> Answer:
    """Carry out a computation with an operator of its own."""
    try:
        what, given = next(steps)
        while True:
            what, given = steps.send(what([given])[0] if callable(what) else getattr(op, what)(given))
    except StopIteration as end:
        answer: Answer = end.value
        return answer


def orthonormal(rows: Tensor, against: Tensor | None = None, images: Tensor | None = None) -> Tensor:
    """Return orthonormal rows that span `rows`, less what lies in the orthonormal rows `against`.

    Those may be orthonormal in another inner product, that of M: `images` are then M times them. Rows that add nothing
    are dropped. Stathopoulos and Wu (2002), "A block orthogonalization procedure with constant synchronization
    requirements", algorithm SVQB. Twice is enough (Parlett, 1998, "The symmetric eigenvalue problem", section 6.9): a
    direction of which the second pass takes more than half was rounding, at norm 1.
    """
    rows, eps = unit(rows), torch.finfo(rows.dtype).eps
    for first in (True, False):
        if against is not None and len(against):
            rows = rows - (rows @ (against if images is None else images).T) @ against
        products = gram(rows, rows)
        sizes = products.diagonal().sqrt() if first else torch.ones_like(products.diagonal())
        kept = sizes > 10 * eps
        if not kept.all():
            rows, sizes, products = rows[kept.nonzero()[:, 0]], sizes[kept], products[kept][:, kept]
        values, vectors = torch.linalg.eigh(products / sizes / sizes[:, None])
        rank = values > (len(rows) * 100 * eps**2 + 1e-14 if first else 0.25)
        rows = (vectors[:, rank] / values[rank].sqrt() / sizes[:, None]).T.to(rows) @ rows
        if first and kept.all() and len(rows) and min(float(sizes.min()), float(values[0])) > 0.5:
            break
    return rows


def gram(a: Tensor, b: Tensor) -> Matrix:
    """Return the inner products of rows."""
    return (a.double() @ b.double().T).cpu()


def ritz(rows: Tensor, products: Tensor, largest: int, smallest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the extreme Ritz values, descending and on the host, with their vectors and residual vectors.

    `rows` are orthonormal, `products` are F times them.
    """
    values, vectors = torch.linalg.eigh(symmetric(gram(rows, products)))
    size = len(rows)
    order = [size - 1 - i for i in range(min(largest, size))] + list(reversed(range(min(smallest, size))))
    mix = vectors[:, order].T.to(rows)
    x = mix @ rows
    residuals = mix @ products - values[order, None].to(rows) * x
    return values[order], x, residuals


def tolerance(tol: Any, dtype: torch.dtype = torch.float64) -> float:
    """Return the residual asked for, relative to the largest eigenvalue; by default what the dtype has room for."""
    if tol is None:
        return max(1e-6, 100 * torch.finfo(dtype).eps)
    found = number(tol, "tol")
    if not 0 < found < 1:
        raise ValueError(f"tol is relative to the largest eigenvalue and must lie between 0 and 1, not {found}")
    return found


def least(dtype: torch.dtype) -> float:
    """Return the least norm that is told from zero: norms are the roots of sums of squares in float64."""
    return max(torch.finfo(dtype).tiny, math.sqrt(torch.finfo(torch.float64).tiny))


def scale_fault(dtype: torch.dtype, lambda_max: float) -> str:
    """Tell why rows of this dtype cannot carry an operator with such a largest eigenvalue; empty where they can.

    What matters as little as rounding must still be above the least norm, and squares of norms below infinity.
    """
    eps, norms = torch.finfo(dtype).eps, torch.finfo(torch.float64)
    low, high = least(dtype) / eps, norms.eps * math.sqrt(norms.max)
    if lambda_max == 0 or low <= lambda_max <= high:
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"the largest eigenvalue, {lambda_max:.1e}, is outside {name}'s room of {low:.0e} to {high:.0e}"


def value_rounding(dtype: torch.dtype, lambda_max: float) -> float:
    """Return what rounding may do to a Ritz value."""
    return float(32 * torch.finfo(dtype).eps * lambda_max)


def rounding(op: RowOperator) -> float:
    """Return the level, relative to the largest eigenvalue, below which rounding cannot tell an eigenvalue from zero.

    Squared singular values of a factor keep twice the digits of eigenvalues of F.
    """
    if op.factored:
        return float(16 * max(op.n, op.m or 0) * torch.finfo(op.dtype).eps ** 2)
    return float(4 * math.sqrt(op.n) * torch.finfo(op.dtype).eps)


def rows_in_memory(op: RowOperator) -> int:
    """Return how many rows a search space may hold: on a CUDA device, half of what is free there."""
    allowed = BASIS_BYTES
    if op.device.type == "cuda":
        allowed = free_memory(op.device) // 2
    return int(allowed // op.sharers // (op.n * op.dtype.itemsize))


def null_dimension(op: RowOperator, values: Tensor, lambda_max: float) -> int | None:
    """Return how many of all Ritz values are zero; None where that is not certain.

    One is needed for every dimension; where F has a factor, which tells smaller eigenvalues from zero than products
    with F do, only those are certain that its shape proves.
    """
    if len(values) < op.n:
        return None
    zeros = int((values.abs() <= 4 * math.sqrt(op.n) * torch.finfo(op.dtype).eps * lambda_max).sum())
    return zeros if op.m is None or zeros == max(0, op.n - op.m) else None


def symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part."""
    return (matrix + matrix.T) / 2


def largest_ritz_pair(op: RowOperator, request: Request, steps: int = 12) -> tuple[float, Tensor]:
    """Estimate the largest eigenvalue from below by a few Lanczos steps, and return its Ritz vector as one row."""
    values, x, _ = ritz(*_krylov(op, request.start(op, 1, blurred=True), steps), 1, 0)
    return float(values[0]), x


def ritz_values(op: RowOperator, start: Tensor, steps: int) -> Tensor:
    """Return the ascending Ritz values of a few Lanczos steps from one row."""
    values: Tensor = torch.linalg.eigvalsh(symmetric(gram(*_krylov(op, start, steps))))
    return values


def _krylov(op: RowOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a few Lanczos steps with full reorthogonalization, and F times them."""
    basis = orthonormal(start)
    products = op.rows(basis)
    for _ in range(min(steps, op.n) - 1):
        fresh = orthonormal(products[-1:], basis)
        if len(fresh) == 0:
            break
        basis = torch.cat([basis, fresh])
        products = torch.cat([products, op.rows(fresh)])
    return basis, products


class Stop(Exception):
    """Raised inside a product to leave a solver that has no other way out."""


@dataclass
class Watched:
    """A product with single vectors or blocks that keeps the latest ones, so that a stopped solver leaves something."""

    op: RowOperator
    control: Control
    keep: int
    seen: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply rows by F; raise Stop at the end of the budget."""
        products = self.op.rows(rows)
        self.seen.append((rows, products))
        while sum(len(block) for block, _ in self.seen) > max(self.keep, len(rows)):
            self.seen.popleft()
        if self.control.step():
            raise Stop
        return products

    def best(self, largest: int, smallest: int, rng: np.random.Generator) -> Tensor:
        """Return the Ritz vectors of the latest rows: the best pairs that a stopped solver leaves behind."""
        rows = orthonormal(
            torch.cat([block for block, _ in self.seen] + [self.op.random_rows(largest + smallest, rng)])
        )
        if self.op.metric is not None:
            rows, _ = self.op.metric.orthonormal(rows)
        return ritz(rows, self.op.rows(rows), largest, smallest)[1]
