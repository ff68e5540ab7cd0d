"""Sums of a function of all eigenvalues, and how many lie where: stochastic Lanczos quadrature with bounds.

A Lanczos run from a random vector z gives nodes and weights of a Gauss quadrature for the measure that puts
``(q_i^T z)^2`` at every eigenvalue; the mean of that over z is the number of eigenvalues. Two errors are kept apart:

1.  The error of a quadrature of d nodes. For log(x + mu) and x / (x + mu), whose derivatives do not change sign, Gauss'
    rule is an upper bound and the Gauss-Radau rule with a node at the left end a lower one; for counts, the rule with
    a node at the threshold bounds the measure on either side of it (the inequalities of Chebyshev, Markov and
    Stieltjes). Golub and Meurant (2010), "Matrices, moments and quadrature with applications", chapter 6. Runs go on
    until the bounds are close in comparison with the other error, or until `steps`.
2.  The error of a mean over few z. It is made small by a control variate: what a Krylov space knows of F is integrated
    exactly, and probes tell of the difference alone. Unbiased, however wrong the space may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fisherop.maps import number, whole
from fisherop.rows import RowOperator, row_norms, unit
from fisherop.solvers.contract import least, rows_in_memory
from fisherop.spectrum.estimate import Estimate, Floats, Judged, Plan, between
from fisherop.spectrum.moments import Krylov, exact_products, sphere

N_PROBES = 16
MOST_PROBES = 256
BATCH = 8
STEPS = 100
SPACE = 32
"""Products that go into the Krylov space of the control variate."""
KNOWN = 0.1
"""Relative residual up to which a Ritz pair takes part in it."""
NONE_NEGATIVE = "exact: no eigenvalue is negative."
GAP = 0.1
"""Distance of the bounds of a quadrature, relative to the standard error, at which more steps are of no use."""


class Functional(Protocol):
    """A function of eigenvalues whose sum is wanted."""

    def of(self, values: Floats, /) -> Floats:
        """Return f at eigenvalues."""

    def bounds(self, alpha: Floats, beta: Floats, floor: float, /) -> tuple[Floats, Floats]:
        """Bound the integral of f for the measure of total mass 1 behind every Jacobi matrix, (b, d) and (b, d)."""


@dataclass(frozen=True)
class Smooth:
    """A function whose derivatives of even order are negative and those of odd order positive, from 0 on."""

    f: Callable[[Floats], Floats]

    def of(self, values: Floats, /) -> Floats:
        """Return f at eigenvalues, which are not negative but for rounding."""
        return self.f(values.clip(min=0))

    def bounds(self, alpha: Floats, beta: Floats, floor: float, /) -> tuple[Floats, Floats]:
        """Bound by the Gauss-Radau rule with a node left of the spectrum from below, by Gauss' rule from above."""
        nodes, weights = gauss(alpha, beta)
        left = np.minimum(nodes[:, 0], 0) - floor
        below, shares = radau(alpha, beta, left)
        low, high = (shares * self.of(below)).sum(1), (weights * self.of(nodes)).sum(1)
        return np.minimum(low, high), high


@dataclass(frozen=True)
class AtMost:
    """1 up to a threshold, 0 beyond."""

    threshold: float

    def of(self, values: Floats, /) -> Floats:
        """Return 1 for eigenvalues up to the threshold."""
        return (values <= self.threshold).astype(np.float64)

    def bounds(self, alpha: Floats, beta: Floats, floor: float, /) -> tuple[Floats, Floats]:
        """Bound by the rule with a node at the threshold, which counts or does not, as do those that coincide with it.

        A run that has found an eigenvalue at the threshold has a node there already, and nothing says which of the two
        got its weight.
        """
        at = max(self.threshold, floor, least(torch.float64))  # not at the only node of F = 0
        nodes, weights = radau(alpha, beta, np.full(len(alpha), at))
        off = np.abs(nodes - at)
        unsure = (off <= floor / 2) | (off == off.min(1, keepdims=True))
        low = (weights * (~unsure & (nodes < at))).sum(1)
        return low, low + (weights * unsure).sum(1)


def at_most(threshold: float, floor: float) -> AtMost:
    """Return what counts the eigenvalues up to a threshold, and those that rounding cannot tell from it."""
    return AtMost(threshold + floor)


def gauss(alpha: Floats, beta: Floats) -> tuple[Floats, Floats]:
    """Return nodes, ascending, and weights of Gauss' rules for Jacobi matrices with these diagonals.

    The last entry of `beta` leads out of the matrix and has no part in it.
    """
    index = np.arange(alpha.shape[1])
    matrix = np.zeros((*alpha.shape, alpha.shape[1]))
    matrix[:, index, index] = alpha
    matrix[:, index[:-1], index[1:]] = matrix[:, index[1:], index[:-1]] = beta[:, :-1]
    nodes, vectors = torch.linalg.eigh(torch.from_numpy(matrix))  # not NumPy's: its threads would fight with torch's
    return nodes.numpy(), vectors[:, 0].square().numpy()


def radau(alpha: Floats, beta: Floats, node: Floats) -> tuple[Floats, Floats]:
    """Return the rules of one node more, one of which is given, for each matrix its own.

    Golub (1973), "Some modified matrix eigenvalue problems", section 7: the entry that is added to the diagonal is
    ``node + x_d`` with ``(T - node) x = beta_d^2 e_d``, and x_d comes from the pivots of T - node.
    """
    pivot = alpha[:, 0] - node
    tiny = np.finfo(np.float64).eps * (np.abs(alpha).max(1) + np.abs(node) + 1e-300)
    for j in range(1, alpha.shape[1]):
        pivot = np.where(np.abs(pivot) < tiny, tiny, pivot)
        pivot = alpha[:, j] - node - beta[:, j - 1] ** 2 / pivot
    pivot = np.where(np.abs(pivot) < tiny, tiny, pivot)
    last = node + beta[:, -1] ** 2 / pivot
    return gauss(np.column_stack([alpha, last]), np.column_stack([beta, np.zeros(len(beta))]))


def lanczos(
    op: RowOperator, starts: Tensor, steps: int, enough: Callable[[Floats, Floats], bool]
) -> tuple[Floats, Floats]:
    """Run Lanczos from every row at once, fully reorthogonalized; returns the diagonals alpha and beta, (b, d) each.

    A run that exhausts its space goes on with zeros, which have no weight.
    """
    count, n = starts.shape
    basis = torch.empty(count, steps, n, dtype=op.dtype, device=op.device)
    alpha, beta = np.zeros((count, steps)), np.zeros((count, steps))
    rows = unit(starts)
    judged = 8
    for j in range(steps):
        basis[:, j] = rows
        rest = op.rows(rows)
        alpha[:, j] = (rows.double() * rest.double()).sum(1).cpu().numpy()
        past = basis[:, : j + 1]
        for _ in range(2):
            rest = rest - torch.bmm(torch.bmm(rest[:, None], past.transpose(1, 2)), past)[:, 0]
        sizes = row_norms(rest)
        scale = torch.from_numpy(np.abs(alpha[:, : j + 1]).max(1) + beta.max(1)).to(sizes)
        sizes = torch.where(sizes <= 10 * torch.finfo(op.dtype).eps * scale, 0, sizes)
        beta[:, j] = sizes.cpu().numpy()
        if not beta[:, j].any():
            return alpha[:, : j + 1], beta[:, : j + 1]
        rows = torch.where(sizes > 0, 1 / sizes, 0).to(rest)[:, None] * rest
        if j + 1 >= 1.25 * judged:
            judged = j + 1
            if enough(alpha[:, : j + 1], beta[:, : j + 1]):
                return alpha[:, : j + 1], beta[:, : j + 1]
    return alpha, beta


@dataclass
class Measures:
    """What the probes said: Jacobi matrices in batches, and how each probe lies to the known pairs."""

    n: int
    values: Floats
    vectors: Tensor
    floor: float
    jacobi: list[tuple[Floats, Floats]] = field(default_factory=list)
    overlaps: list[Floats] = field(default_factory=list)

    @classmethod
    def around(cls, op: RowOperator, space: Krylov) -> Measures:
        """Begin with the pairs that a Krylov space knows well."""
        values, vectors = space.pairs(KNOWN)
        return cls(op.n, values, vectors, rounding(op, space.lambda_max))

    def shares(self, probes: Tensor) -> Floats:
        """Return (q^T z)^2 for every probe and known vector."""
        shares: Floats = (probes @ self.vectors.T).double().square().cpu().numpy()
        return shares

    def bounds(self, f: Functional) -> tuple[Floats, Floats]:
        """Bound, for every probe, a sample whose mean is the sum of f over the eigenvalues."""
        parts = [
            self.batch_bounds(f, *jacobi, shares) for jacobi, shares in zip(self.jacobi, self.overlaps, strict=True)
        ]
        return np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts])

    def batch_bounds(self, f: Functional, alpha: Floats, beta: Floats, shares: Floats) -> tuple[Floats, Floats]:
        """Do so for one batch."""
        low, high = f.bounds(alpha, beta, self.floor)
        rise = f.of(self.values) - f.of(np.zeros(1))
        control = ((1 - shares) * rise).sum(1)
        return self.n * low + control, self.n * high + control

    def judged(self, f: Functional) -> Judged:
        """Return the sum of f over the eigenvalues."""
        return between(*self.bounds(f), torch.finfo(self.vectors.dtype).eps)


def rounding(op: RowOperator, lambda_max: float) -> float:
    """Return the largest eigenvalue that rounding cannot tell from zero."""
    return float(4 * math.sqrt(op.n) * torch.finfo(op.dtype).eps * lambda_max)


def drawing(op: RowOperator, plan: Plan, steps: int, measures: Measures, f: Functional | None) -> Callable[[int], int]:
    """Return what takes some more probes, with as many steps as f needs, or all where there is no f."""

    def draw(count: int) -> int:
        probes = sphere(op, count, plan.rng)
        shares = measures.shares(probes)

        def enough(alpha: Floats, beta: Floats) -> bool:
            if f is None or count < 4:
                return False
            low, high = measures.batch_bounds(f, alpha, beta, shares)
            return bool((high - low).mean() <= GAP * ((low + high) / 2).std(ddof=1) / plan.n_probes**0.5)

        measures.jacobi.append(lanczos(op, probes, steps, enough))
        measures.overlaps.append(shares)
        return sum(map(len, measures.overlaps))

    return draw


def affordable(op: RowOperator, plan: Plan, steps: int) -> bool:
    """Tell whether all eigenvalues can be had for the products that quadrature would take."""
    return exact_products(op) <= plan.n_probes * steps


def checked_steps(op: RowOperator, steps: int | None, default: int = STEPS) -> int:
    """Return how many steps a Lanczos run may take: as asked for, as there are dimensions, as memory has room for."""
    wanted = default if steps is None else whole(steps, "steps", 2)
    return int(max(2, min(wanted, op.n, rows_in_memory(op))))


def batch_size(op: RowOperator, steps: int) -> int:
    """Return how many runs may be kept in memory side by side."""
    return int(max(1, min(BATCH, rows_in_memory(op) // steps)))


def with_steps(found: Estimate, measures: Measures) -> Estimate:
    """Say in the message how long the runs were."""
    steps = max(alpha.shape[1] for alpha, _ in measures.jacobi)
    words = found.message.replace("probes", f"probes of up to {steps} Lanczos steps", 1)
    return replace(found, message=words)


def positive(mu: Any) -> float:
    """Return a level that was given, checked."""
    found = number(mu, "mu")
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"mu must be positive and finite, for F has null directions, not {found}")
    return found


def finite(threshold: Any) -> float:
    """Return a threshold that was given, checked."""
    found = number(threshold, "threshold")
    if not math.isfinite(found):
        raise ValueError(f"threshold must be finite, not {found}")
    return found


def check_above(mu: float, floor: float) -> None:
    """Refuse a level that rounding reaches."""
    if mu <= floor:
        raise ValueError(
            f"mu = {mu:.3g} is below {floor:.3g}, which rounding cannot tell from zero: raise mu, or use float64"
        )
