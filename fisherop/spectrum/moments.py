"""Trace, Frobenius norm and participation ratio: a Krylov space does what it can, probes orthogonal to it the rest.

For an orthonormal basis Q of any subspace, ``tr F = tr Q^T F Q + tr P F P`` with P the projection on what is orthogonal
to it, and ``||F||_F^2 = ||F Q||_F^2 + ||F P||_F^2``. The second terms are means over random vectors in the range of P.

1.  Q is what a Lanczos run leaves, whose first terms cost nothing more: k products give k directions, where the random
    sketch of Hutch++ (Meyer, Musco, Musco and Woodruff, 2021) needs 1.5 k or 2 k for as many, and none as good. Chen
    and Hallman (2023), "Krylov-aware stochastic trace estimation".
2.  Probes are new, whatever Q turned out to be, so that given Q they are independent, and Student's interval holds.
    Estimators that leave one probe out at a time, as XTrace does (Epperly, Tropp and Webber, 2024), use every product
    twice, but their samples depend on each other: where the spectrum decays fast, intervals from their standard error
    hold the truth in as little as half of the runs.
3.  Probes lie on a sphere, so that a multiple of the identity adds nothing to the variance.
4.  Where F = L^T L is known, ``z^T F z = ||L z||^2`` is half a product.
5.  Where the first few products show that a space takes away less of the variance than as many probes would, as on a
    flat spectrum, it is left at that. Probes are drawn after, so that given Q nothing is biased by the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from fisherop.rows import RowOperator, unit
from fisherop.solvers import exact as dense
from fisherop.solvers.contract import BASIS_BYTES, Matrix, Progress, gram, orthonormal, rows_in_memory, scale_fault
from fisherop.spectrum.estimate import (
    Estimate,
    Floats,
    Judged,
    Plan,
    cheaper,
    critical,
    exactly,
    mean_of,
    more,
    planned,
    sampled,
)

N_PROBES = 64
MOST_PROBES = 4096
BLOCK = 64
LOOKS = (4, 8, 16, 32, 64)
"""Products after which a Krylov space is asked whether it is of use."""


@dataclass(frozen=True)
class Krylov:
    """Orthonormal rows Q from a Lanczos run, and F in them: Q F Q^T, ``||F Q||_F^2``, and what goes beyond the rows."""

    rows: Tensor
    matrix: Matrix
    squares: float
    beyond: float = 0.0

    @property
    def trace(self) -> float:
        """The trace of F within the space."""
        return float(self.matrix.trace())

    @property
    def lambda_max(self) -> float:
        """The largest Ritz value: a lower bound of the largest eigenvalue."""
        return max(0.0, float(torch.linalg.eigvalsh(self.matrix)[-1]))

    def pairs(self, accuracy: float) -> tuple[Floats, Tensor]:
        """Return the Ritz values, and their vectors as rows, whose residuals are a small part of them."""
        values, vectors = torch.linalg.eigh(self.matrix)
        # ||F x||^2 is not kept, but the residual of a Lanczos run's Ritz pair lies along the row that came next.
        residuals = vectors[-1].abs() * self.beyond
        good = residuals <= accuracy * values
        return values[good].numpy(), vectors[:, good].T.to(self.rows) @ self.rows


def krylov(
    op: RowOperator, size: int, rng: np.random.Generator, enough: Callable[[Krylov], bool] = lambda space: False
) -> Krylov:
    """Run Lanczos for `size` products, fully reorthogonalized, with a new random row where a space is exhausted.

    `enough` is asked a few times whether to leave it at that.
    """
    size = max(1, min(size, op.n, rows_in_memory(op)))
    basis = torch.empty(size, op.n, dtype=op.dtype, device=op.device)
    matrix = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    row, squares, beyond = orthonormal(op.random_rows(1, rng)), 0.0, 0.0
    for j in range(size):
        basis[j] = row[0]
        product = op.rows(basis[j : j + 1])
        squares += float(product.double().square().sum())
        matrix[j, : j + 1] = matrix[: j + 1, j] = gram(product, basis[: j + 1])[0]
        rest = product
        for _ in range(2):
            rest = rest - (rest @ basis[: j + 1].T) @ basis[: j + 1]
        beyond = float(rest.double().norm())
        space = Krylov(basis[: j + 1], matrix[: j + 1, : j + 1], squares, beyond)
        if j + 1 in LOOKS and enough(space):
            break
        if beyond <= 10 * torch.finfo(op.dtype).eps * float(matrix[: j + 1, : j + 1].abs().max()):
            rest = op.random_rows(1, rng)
        row = orthonormal(rest, basis[: j + 1])
        if not len(row):
            space = replace(space, beyond=0.0)
            break
    check_scale(op, space.lambda_max)
    return space


def check_scale(op: RowOperator, lambda_max: float) -> None:
    """Refuse an operator whose products have squares that are zero or infinite."""
    fault = scale_fault(op.dtype, lambda_max)
    if fault:
        raise ValueError(f"nothing can be estimated, for {fault}: rescale the model's response")


def worthwhile(op: RowOperator, size: int, rng: np.random.Generator) -> Krylov:
    """Run Lanczos as long as it promises to be worth its products, at most `size` of them, half of all there are.

    The variance of probes is in proportion to ``||F - mu I||_F^2`` with mu the mean eigenvalue, whose estimates from
    the first row q are n times ``||F q - mu q||^2`` and ``mu = q^T F q``. The space takes away ``||(F - mu I) Q||_F^2``
    of it. If that is no larger a part than of the products all there are would leave for probes, it never pays.
    """

    def enough(space: Krylov) -> bool:
        used, mean = len(space.rows), float(space.matrix[0, 0])
        whole = op.n * float(space.matrix[1, 0]) ** 2
        taken = space.squares - 2 * mean * space.trace + used * mean**2
        return bool(taken < used / (2 * size) * whole)

    return krylov(op, size, rng, enough)


def sphere(op: RowOperator, count: int, rng: np.random.Generator, against: Tensor | None = None) -> Tensor:
    """Return rows uniform on the sphere orthogonal to `against`, whose mean outer product is the projection on that."""
    rows = op.random_rows(count, rng)
    size = op.n
    if against is not None and len(against):
        size -= len(against)
        for _ in range(2):
            rows = rows - (rows @ against.T) @ against
    return unit(rows) * math.sqrt(size)


def trace(
    op: Any,
    n_probes: int | None = None,
    *,
    rtol: float | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Estimate:
    """Estimate the trace of F: the sum of its eigenvalues, the model's total sensitivity at the image.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n symmetric positive semidefinite operator.
    n_probes : int, optional
        Random vectors, 64 by default. As much again goes into a Krylov space that they are orthogonal to, or, where
        this is seen to be of no use, into more vectors. A vector costs half a product where F = L^T L is known, as for
        a Fisher operator, else a whole one.
    rtol : float, optional
        Stop when half the 95 % interval is no more than this part of the value; then `n_probes` is the most to take,
        4096 by default, and the result's `converged` says whether it was reached.
    rng : optional
        Anything `numpy.random.default_rng` takes; the same seed gives the same answer.
    callback : callable, optional
        Called with a `Progress` after every batch of probes, its `residuals` half the interval relative to the value;
        returning True stops the work.

    Returns
    -------
    Estimate
        Exact, with a standard error of 0, where that costs no more products.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    References
    ----------
    Chen and Hallman (2023), "Krylov-aware stochastic trace estimation".

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> F = fo.FisherOperator(fo.OnOff(), torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    >>> estimate = fo.trace(F, rng=0)
    >>> estimate.low < float(estimate) < estimate.high
    True
    >>> fo.trace(torch.diag(torch.arange(4.0))).value
    6.0
    """
    operator = RowOperator(op)
    plan = planned(n_probes, rtol, rng, callback, default=N_PROBES, most=MOST_PROBES)
    probe = 0.5 if operator.factored else 1.0

    def sample(plan: Plan) -> Estimate:
        size = int(probe * plan.first)
        space = worthwhile(operator, size, plan.rng)
        plan = more(plan, (size - len(space.rows)) / probe)
        samples: list[float] = []

        def draw(count: int) -> int:
            samples.extend(_forms(operator, sphere(operator, count, plan.rng, space.rows)))
            return len(samples)

        def judge() -> Judged:
            return mean_of(np.array(samples), space.trace, torch.finfo(operator.dtype).eps)

        return sampled(operator, plan, draw, judge, words=_words(space))

    def exact() -> Estimate:
        return exactly(_exact_trace(operator), operator.n_matvec)

    return cheaper(plan, 2 * probe, exact_products(operator), exact, sample)


def frobenius_norm(
    op: Any,
    n_probes: int | None = None,
    *,
    rtol: float | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Estimate:
    """Estimate the Frobenius norm of F: the root of the sum of its squared eigenvalues.

    Parameters
    ----------
    op, n_probes, rtol, rng, callback
        As in `trace`; a vector costs a whole product.

    Returns
    -------
    Estimate
        Exact, with a standard error of 0, where that costs no more products.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> fo.spectrum.frobenius_norm(np.diag([3.0, 4.0])).value
    5.0
    """

    def judge(traces: Floats, squares: Floats, space: Krylov) -> Judged:
        found = mean_of(squares, space.squares, torch.finfo(space.rows.dtype).eps)
        norm = found.value**0.5
        error = found.standard_error / (2 * norm) if norm else 0.0
        return Judged(norm, error, max(0.0, found.low) ** 0.5, found.high**0.5)

    return _second_moment(op, n_probes, rtol, rng, callback, lambda trace, norm: norm, judge)


def participation_ratio(
    op: Any,
    n_probes: int | None = None,
    *,
    rtol: float | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Estimate:
    """Estimate ``(tr F)^2 / ||F||_F^2``: how many directions share the sensitivity, 1 to n.

    Parameters
    ----------
    op, n_probes, rtol, rng, callback
        As in `trace`; a vector costs a whole product.

    Returns
    -------
    Estimate
        Exact, with a standard error of 0, where that costs no more products. The interval is Student's for the
        logarithm, by the delta method.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> round(fo.spectrum.participation_ratio(np.diag([1.0, 1.0, 0.0])).value, 6)
    2.0
    """

    def judge(traces: Floats, squares: Floats, space: Krylov) -> Judged:
        total, norm = space.trace + traces.mean(), space.squares + squares.mean()
        if norm == 0:
            return Judged(0.0, 0.0, 0.0, 0.0)
        influence = 2 * traces / total - squares / norm
        error = float(influence.std(ddof=1) / np.sqrt(len(influence)))
        value = float(total**2 / norm)
        rounding = 64 * torch.finfo(space.rows.dtype).eps
        reach = float(np.exp(critical(0.0, len(traces) - 1) * error + rounding))
        return Judged(value, value * error, value / reach, value * reach)

    def ratio(trace: float, norm: float) -> float:
        return (trace / norm) ** 2 if norm else 0.0

    return _second_moment(op, n_probes, rtol, rng, callback, ratio, judge)


def _second_moment(
    op: Any,
    n_probes: int | None,
    rtol: float | None,
    rng: Any,
    callback: Callable[[Progress], object] | None,
    known: Callable[[float, float], float],
    judge: Callable[[Floats, Floats, Krylov], Judged],
) -> Estimate:
    operator = RowOperator(op)
    plan = planned(n_probes, rtol, rng, callback, default=N_PROBES, most=MOST_PROBES)

    def exact() -> Estimate:
        values = eigenvalues(operator)
        return exactly(known(float(values.sum()), float(scipy.linalg.norm(values))), operator.n_matvec)

    def sample(plan: Plan) -> Estimate:
        space = worthwhile(operator, plan.first, plan.rng)
        plan = more(plan, plan.first - len(space.rows))
        traces: list[float] = []
        squares: list[float] = []

        def draw(count: int) -> int:
            rows = sphere(operator, count, plan.rng, space.rows)
            products = operator.rows(rows)
            traces.extend((rows.double() * products.double()).sum(1).tolist())
            squares.extend(products.double().square().sum(1).tolist())
            return len(traces)

        def found() -> Judged:
            return judge(np.array(traces), np.array(squares), space)

        return sampled(operator, plan, draw, found, words=_words(space))

    return cheaper(plan, 2.0, exact_products(operator), exact, sample)


def _words(space: Krylov) -> str:
    return f" orthogonal to a Krylov space of {len(space.rows)} dimensions"


def _forms(op: RowOperator, rows: Tensor) -> list[float]:
    """Return z^T F z for every row."""
    if op.factored:
        return list(op.factor(rows).double().square().sum(1).tolist())
    return list((rows.double() * op.rows(rows).double()).sum(1).tolist())


# --------------------------------------------------------------------------------------------------------------- exact


def exact_products(op: RowOperator) -> float:
    """Return what all entries of F, or of its factor, cost in products; infinite where they take too much memory."""
    if dense.n_bytes(op) > BASIS_BYTES:
        return math.inf
    return dense.size(op) / 2 if op.factored else op.n


def images_of_identity(op: RowOperator) -> list[Tensor]:
    """Return the images of the identity under the factor, from its short side, or under F where there is none."""
    if not op.factored:
        product, order = op.rows, op.n
    elif op.m and op.m < op.n:
        product, order = op.factor_adjoint, op.m
    else:
        product, order = op.factor, op.n
    blocks = []
    for start in range(0, order, BLOCK):
        rows = torch.zeros(min(BLOCK, order - start), order, dtype=op.dtype, device=op.device)
        rows.diagonal(start).fill_(1)
        blocks.append(product(rows))
    return blocks


def _exact_trace(op: RowOperator) -> float:
    entries = torch.cat(images_of_identity(op)).double()
    return float(entries.square().sum() if op.factored else entries.trace())


def eigenvalues(op: RowOperator) -> Floats:
    """Return all n eigenvalues, ascending, by a dense eigendecomposition in float64."""
    matrix = torch.cat(images_of_identity(op)).double()
    matrix = matrix @ matrix.T if op.factored else (matrix + matrix.T) / 2
    values: Floats = torch.linalg.eigvalsh(matrix).clamp(min=0).cpu().numpy()
    return np.concatenate([np.zeros(op.n - len(values)), values])
