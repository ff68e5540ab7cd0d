"""Where in the image the model looks: the diagonal of F, from squares of gradients of random sums of responses.

For u with independent normal entries and F = L^T L, every entry of ``L^T u`` is normal with the variance that stands in
the diagonal of F. So a mean of squares is never negative, its distribution is known whatever F is, and the interval of
every pixel is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherop.operators import InformationOperator
from fisherop.result import Eigendistortions
from fisherop.rows import RowOperator
from fisherop.solvers.contract import Progress, orthonormal, symmetric
from fisherop.spectrum.estimate import (
    LEVEL,
    Estimate,
    Floats,
    Judged,
    Plan,
    cheaper,
    critical,
    exactly,
    planned,
    sampled,
)
from fisherop.spectrum.moments import exact_products, images_of_identity, worthwhile

N_PROBES = 64
MOST_PROBES = 4096
PAIR = 2
"""Cotangents that cost as much as a product with F: a pass in one direction is half a product."""


def sensitivity_map(
    op: Any,
    n_probes: int | None = None,
    *,
    rtol: float | None = None,
    deflate: Eigendistortions | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Estimate:
    """Estimate how sensitive the model is to every pixel alone: the diagonal of F, in image shape.

    The entry of a pixel is the squared discriminability d' of a change of that pixel by 1.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n symmetric positive semidefinite operator. For one restricted to a subspace, the map is that of the
        projected image: zero where no distortion is allowed.
    n_probes : int, optional
        What to spend, in products with F, 64 by default: each pays for two random combinations of the responses, whose
        squared gradients are averaged, or for one random image where F = L^T L is not known in factored form.
    rtol : float, optional
        Stop when half the 95 % interval, relative to the value, is no more than this in the median over pixels; then
        `n_probes` is the most to spend, 4096 by default.
    deflate : Eigendistortions, optional
        Pairs that are known: what they contribute is then computed, for one more product each, and only the rest
        estimated. Of use as far as they make up the map: where their eigenvalues are a large part of the trace. They
        need not have converged.
    rng : optional
        Anything `numpy.random.default_rng` takes; the same seed gives the same answer.
    callback : callable, optional
        Called with a `Progress` after every batch of probes, its `residuals` what is compared to `rtol`; returning
        True stops the work.

    Returns
    -------
    Estimate
        `value`, `standard_error`, `low` and `high` are maps: float64 tensors in image shape for a Fisher operator, of
        shape (n,) for a tensor, else arrays of shape (n,). No value is negative. Exact where that costs no more.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense, and where `deflate` belongs to another operator.

    Notes
    -----
    The standard error of a pixel is ``sqrt(2 / N)`` of its value, for N = 2 n_probes combinations: 8.8 % of it with
    n_probes = 128, half of the pixels within 6 %. Its interval is that of a chi-squared variable with N degrees of
    freedom, exact for any model. Without the factor the estimate is the mean of z * (F z) over random signs z: Bekas,
    Kokiopoulou and Saad (2007), "An estimator for the diagonal of a matrix". What a Krylov space of up to half of the
    products knows of F, or what `deflate` does, is taken out and added exactly, and no rest is let below zero.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> F = fo.FisherOperator(lambda x: x**2, torch.tensor([[1.0, 2.0]]))
    >>> fo.sensitivity_map(F).value
    tensor([[ 4., 16.]], dtype=torch.float64)
    """
    operator = RowOperator(op)
    plan = planned(n_probes, rtol, rng, callback, default=N_PROBES, most=MOST_PROBES)
    rows = None if deflate is None else _known(operator, deflate)
    found = cheaper(
        plan,
        1.0,
        exact_products(operator),
        lambda: exactly(_exact_diagonal(operator), operator.n_matvec),
        lambda plan: (_by_cotangents if operator.factored else _by_signs)(operator, plan, rows),
    )
    maps = {name: _shaped(operator, getattr(found, name)) for name in ("value", "standard_error", "low", "high")}
    return replace(found, **maps, image=operator.image)


def _by_cotangents(op: RowOperator, plan: Plan, known: Tensor | None) -> Estimate:
    """Average (L^T u)^2 over normal u, which are orthogonal to the images of known vectors under L."""
    left = None if known is None else orthonormal(op.factor(known))
    certain = np.zeros(_pixels(op)) if left is None else _squared(op, op.factor_adjoint(left))
    total = np.zeros_like(certain)
    cotangents = 0

    def draw(count: int) -> int:
        nonlocal cotangents
        u = op.tensor(plan.rng.standard_normal((PAIR * count, op.m or 0)))
        if left is not None:
            u = u - (u @ left.T) @ left
        total[:] += _squared(op, op.factor_adjoint(u))
        cotangents += PAIR * count
        return cotangents // PAIR

    def judge() -> Judged:
        from scipy import special  # here, as in `critical`

        rest = total / cotangents
        tail = (1 - LEVEL) / 2
        # chdtri is the inverse of the upper tail.
        low, high = (total / special.chdtri(cotangents, p) for p in (tail, 1 - tail))
        return Judged(certain + rest, (2 / cotangents) ** 0.5 * rest, certain + low, certain + high)

    words = " of two cotangents" + ("" if left is None else f" orthogonal to those of {len(left)} known pairs")
    return sampled(op, plan, draw, judge, batch=8, words=words)


def _by_signs(op: RowOperator, plan: Plan, known: Tensor | None) -> Estimate:
    """Average z * (F z) over random signs, less the Nystrom approximation from known vectors, which is added exactly.

    The approximation is F V (V^T F V)^-1 V^T F: it lies below F, so that what is left is semidefinite. Where nothing is
    known, V is a Krylov space for half of the products, or fewer where it is of no use: signs alone see every
    off-diagonal entry of F as noise.
    """
    if known is None:
        space = worthwhile(op, plan.first // 2, plan.rng)
        plan = replace(plan, n_probes=plan.n_probes - len(space.rows))
        # The products with all rows but the last lie in the space.
        known, products = space.rows[:-1].double(), space.matrix[:-1].to(space.rows.device) @ space.rows.double()
    else:
        products = op.rows(known).double()
    values, vectors = torch.linalg.eigh(symmetric(products @ known.double().T))
    kept = values > 1e3 * torch.finfo(op.dtype).eps * float(torch.cat([values, values.new_zeros(1)]).max())
    factor = (vectors[:, kept] / values[kept].sqrt()).T @ products
    certain: Floats = factor.square().sum(0).cpu().numpy()
    total, squares = np.zeros_like(certain), np.zeros_like(certain)
    taken = 0

    def draw(count: int) -> int:
        nonlocal taken
        z = op.tensor(plan.rng.choice([-1.0, 1.0], (count, op.n)))
        rest = op.rows(z).double() - (z.double() @ factor.T) @ factor
        samples: Floats = (z.double() * rest).cpu().numpy()
        total[:] += samples.sum(0)
        squares[:] += (samples**2).sum(0)
        taken += count
        return taken

    def judge() -> Judged:
        mean = total / taken
        error = np.sqrt(np.maximum(squares / taken - mean**2, 0) / (taken - 1))
        reach = critical(0.0, taken - 1) * error
        # What is left of F is semidefinite: its diagonal is not negative.
        low, value, high = (certain + np.maximum(x, 0) for x in (mean - reach, mean, mean + reach))
        return Judged(value, error, low, high)

    words = f" less what a space of {len(factor)} dimensions contributes"
    return sampled(op, plan, draw, judge, batch=8, words=words)


def _exact_diagonal(op: RowOperator) -> Floats:
    blocks = images_of_identity(op)
    if not op.factored:
        diagonal: Floats = torch.cat(blocks).double().diagonal().clamp(min=0).cpu().numpy()
        return diagonal
    if op.m and op.m < op.n:  # rows of L
        return _squared(op, torch.cat(blocks))
    return _squared(op, torch.cat(blocks).T.contiguous())


def _squared(op: RowOperator, rows: Tensor) -> Floats:
    """Return the sum over rows of what they have in every pixel, squared."""
    total = np.zeros(_pixels(op))
    for block in torch.split(rows, 64):
        pixels = op.source.expand(block) if isinstance(op.source, InformationOperator) else block
        total += pixels.double().square().sum(0).cpu().numpy()
    return total


def _pixels(op: RowOperator) -> int:
    return op.source.image_shape.numel() if isinstance(op.source, InformationOperator) else op.n


def _known(op: RowOperator, result: Eigendistortions) -> Tensor:
    if not isinstance(result, Eigendistortions):
        raise TypeError(f"deflate takes what eigendistortions returned, not {type(result).__name__}")
    if int(np.prod(result.eigendistortions.shape[1:])) not in (op.n, _pixels(op)):
        raise ValueError(
            f"deflate has distortions of shape {tuple(result.eigendistortions.shape[1:])}, which do not fit this "
            "operator: pass a result of its own"
        )
    return orthonormal(op.vectors(result.eigendistortions))


def _shaped(op: RowOperator, pixels: Floats) -> Any:
    """Return a map as the operator's user knows images."""
    if isinstance(op.source, InformationOperator):
        return torch.from_numpy(pixels).to(op.device).reshape(op.source.image_shape)
    return torch.from_numpy(pixels).to(op.device) if isinstance(op.source, Tensor) else pixels
