"""The judge of every solver: fresh products, bounds, clusters, and a search for what may have been missed.

A residual proves that a pair is an eigenpair; it cannot prove that no larger (smaller) one exists. For that, `certify`
may spend a short Lanczos run on what is orthogonal to the pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.maps import noise_floor
from fisherop.result import Eigendistortions
from fisherop.rows import INDEFINITE, RowOperator, row_norms, unit
from fisherop.solvers.contract import (
    Found,
    Request,
    Steps,
    gram,
    orthonormal,
    ritz,
    rounding,
    run,
    scale_fault,
    symmetric,
    value_rounding,
)

PROBE_STEPS = 60
NULL = 10
"""Tolerances up to which a value is counted to a null space that is estimated."""
ENOUGH = 0.9
"""Part of the tolerance at which a bound of a residual need not be tightened."""
DOUBT = 1e-3
"""Probability that the bounds of a probe do not hold."""


@dataclass(frozen=True)
class Pairs:
    """Ritz pairs from fresh products: values descending, orthonormal rows, norms of the residual vectors on the host.

    `lambda_max` is the largest value that a fresh product proves: of the pairs, or of a vector beside them.

    Where the operator has a metric M, rows are orthonormal in its inner product, and norms are those of its inverse.
    """

    values: Tensor
    rows: Tensor
    norms: Tensor
    lambda_max: float


@dataclass(frozen=True)
class Probe:
    """What a Lanczos run found orthogonal to the pairs: bounds of the rest of F, and its weight near zero."""

    low: float
    high: float
    null_dimension: float
    null_deviation: float
    extremes: Tensor


def certify(
    op: RowOperator, request: Request, found: Found, method: str, reason: str = "", *, probe: bool = False
) -> Eigendistortions:
    """Judge a solver's vectors by fresh products: nothing that a solver says of its own residuals is believed.

    Nor what it says of the largest eigenvalue, that residuals are relative to. Where pairs of the large end were asked
    for it is theirs; else the solver's vector for it costs one more product, or half of one.
    """
    return run(op, certify_steps(op, request, found, method, reason, probe=probe))


def certify_steps(
    op: RowOperator, request: Request, found: Found, method: str, reason: str = "", *, probe: bool = False
) -> Steps[Eigendistortions]:
    """Do what `certify` does, asking for every product."""
    pairs = yield from _fresh_pairs(op, found.vectors, request, found.top)
    _check_semidefinite(op, pairs)
    lambda_max = pairs.lambda_max
    rest, missed = None, False
    if probe and request.k < op.n:
        rest = yield from _probe_rest(op, pairs, request)
        rows = orthonormal(torch.cat([pairs.rows, rest.extremes]))
        _, better, _ = ritz(rows, (yield "rows", rows), request.largest, request.smallest)
        improved = yield from _fresh_pairs(op, better, request)
        slack = request.tol * lambda_max
        ahead = (improved.values - pairs.values)[: request.largest]
        below = (pairs.values - improved.values)[request.largest :]
        missed = bool((ahead > slack).any() or (below > slack).any())
        pairs = improved if missed else pairs
        _check_semidefinite(op, pairs)
        lambda_max = max(lambda_max, pairs.lambda_max)
    blur = value_rounding(op.dtype, lambda_max) * (1.0 if op.metric is None else op.metric.amplification)
    bounds = torch.stack([pairs.values - pairs.norms - blur, pairs.values + pairs.norms + blur], dim=1).clamp(min=0)
    residuals = pairs.norms / lambda_max if lambda_max > 0 else torch.zeros_like(pairs.norms)
    fault = scale_fault(op.dtype, lambda_max)
    converged = (residuals <= request.tol) & (not fault)
    found = replace(found, nullity=None) if fault else found
    nullity, known = _nullity(op, request, found, pairs, converged, lambda_max)
    clusters = _clusters(pairs, blur, nullity)
    words = [
        f"{method}: {int(converged.sum())} of {request.k} pairs converged to {request.tol:.1e} "
        f"in {op.n_matvec} products",
        reason,
        fault,
        op.problem,
        f"{op.metric.n_matvec} products with M" if op.metric is not None else "",
        found.note,
        found.doubt,
        _null_words(nullity, known, rest, int((pairs.values <= NULL * request.tol * lambda_max).sum()), op.n),
        _zero_words(pairs, request, lambda_max, nullity),
        _cluster_words(clusters, request, op.n, nullity if known else None),
        _probe_words(rest, missed, pairs, request, lambda_max),
    ]
    return Eigendistortions(
        eigenvalues=pairs.values.numpy(),
        eigendistortions=op.in_image_shape(signed(op.distortions(pairs.rows))),
        index=np.array([*range(request.largest), *range(op.n - request.smallest, op.n)]),
        residuals=residuals.numpy(),
        converged=converged.numpy(),
        eigenvalue_bounds=bounds.numpy(),
        clusters=clusters,
        n_matvec=op.n_matvec,
        method=method,
        tol=request.tol,
        message="; ".join(word for word in words if word) + ".",
        nullity=nullity,
        lambda_max=lambda_max,
        image=op.image,
        n=op.n,
    )


def fresh_pairs(op: RowOperator, rows: Tensor, request: Request, top: Tensor | None = None) -> Pairs:
    """Return the Ritz pairs of the span of rows, random rows added where there are fewer than k.

    Where no pair of the large end is asked for, `top` is a row that has the largest eigenvalue's vector for the most
    part: its Rayleigh quotient is computed beside.

    Values are the squared singular values of L X where F = L^T L is known, for these keep digits that X^T F X loses
    to rounding. In an inner product given by M, an interval around a value as wide as the residual's norm in the
    inverse of M holds an eigenvalue: Parlett (1998), "The symmetric eigenvalue problem", chapter 15. Such norms
    are bounds, no tighter than the tolerance relative to lambda_max asks for.
    """
    return run(op, _fresh_pairs(op, rows, request, top))


def _fresh_pairs(op: RowOperator, rows: Tensor, request: Request, top: Tensor | None = None) -> Steps[Pairs]:
    x = orthonormal(rows)
    if len(x) < request.k:
        x = torch.cat([x, orthonormal(op.random_rows(request.k - len(x), request.rng), x)])
    beside = x[:0] if top is None or request.largest or request.k == op.n else unit(top)
    dual = x
    if op.metric is not None:
        x, dual = op.metric.orthonormal(x)
        beside = op.metric.orthonormal(beside)[0] if len(beside) else beside
    if op.factored:
        images = yield "factor", torch.cat([x, beside])
        images, above = images[: len(x)], row_norms(images[len(x) :]) ** 2
        padded = torch.nn.functional.pad(images.double(), (0, max(0, len(x) - images.shape[1])))
        mix, singular, _ = torch.linalg.svd(torch.linalg.qr(padded.T, mode="r")[1].T.cpu())
        values = singular**2
        products = yield "factor_adjoint", mix.T.to(x) @ images
    else:
        products = yield "rows", torch.cat([x, beside])
        products, above = products[: len(x)], gram(beside, products[len(x) :]).diagonal()
        values, mix = (part.flip(-1) for part in torch.linalg.eigh(symmetric(gram(x, products))))
        products = mix.T.to(x) @ products
    x, dual = mix.T.to(x) @ x, mix.T.to(x) @ dual
    residuals = products.double() - values[:, None].to(x.device) * dual.double()
    lambda_max = max(float(values[0]), *above.tolist(), 0.0)
    enough = ENOUGH * request.tol * lambda_max
    norms = residuals.norm(dim=1) if op.metric is None else op.metric.dual_norms(residuals, enough)
    return Pairs(values, x, norms.cpu(), lambda_max)


def _check_semidefinite(op: RowOperator, pairs: Pairs) -> None:
    """Refuse an operator of which a pair proves that it has a negative eigenvalue."""
    proven = pairs.values + pairs.norms < -noise_floor(op.dtype) * pairs.values.abs().max()
    if bool(proven.any()):
        raise ValueError(f"{INDEFINITE} (an eigenvalue is {float(pairs.values.min()):.3g})")


def probe_rest(op: RowOperator, pairs: Pairs, request: Request) -> Probe:
    """Bound F on what is orthogonal to the pairs, by Lanczos from a Gaussian start with full reorthogonalization.

    The Lanczos polynomial p is bounded at every eigenvalue by 1 / |component of the start along its eigenvector|; a
    random start has a small component with small probability only. Van Dorsselaer, Hochstenbach and van der Vorst
    (2000), "Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos method",
    section 3. The pairs are eigenpairs up to their residuals, which move the rest by no more than their norm.
    """
    return run(op, _probe_rest(op, pairs, request))


def _probe_rest(op: RowOperator, pairs: Pairs, request: Request) -> Steps[Probe]:
    n = op.n - len(pairs.rows)
    basis = orthonormal(op.random_rows(1, request.rng), pairs.rows)
    diagonal: list[float] = []
    beside: list[float] = []
    products = torch.empty(0, op.n, dtype=op.dtype, device=op.device)
    while True:
        product = yield "rows", basis[-1:]
        products = torch.cat([products, product])
        diagonal.append(float(gram(basis[-1:], product)))
        rest = product
        for _ in range(2):
            rest = rest - (rest @ pairs.rows.T) @ pairs.rows
            rest = rest - (rest @ basis.T) @ basis
        beside.append(float(rest.double().norm()))
        exhausted = beside[-1] <= 10 * torch.finfo(op.dtype).eps * max(map(abs, diagonal))
        if exhausted or len(diagonal) == min(PROBE_STEPS, n):
            break
        basis = torch.cat([basis, rest / beside[-1]])
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
    top = max(float(pairs.values[0]), float(values[-1]))
    share = min(float((vectors[0, values <= NULL * request.tol * top] ** 2).sum()), 1.0)
    drift = float(pairs.norms.norm())
    low, high = float(values[0]), float(values[-1])
    if not exhausted and len(diagonal) < n:
        low, high = -outer(-values[::-1], beside, n), outer(values, beside, n)
    ends = torch.from_numpy(vectors[:, [0, -1]].T.copy()).to(basis) @ basis
    # n times the share is near a chi-squared variable with as many degrees of freedom as the null space has dimensions.
    deviation = math.sqrt(2 * max(n * share, 1.0) * (1 - share))
    return Probe(max(low - drift, 0.0), high + drift, n * share, deviation, ends)


def outer(values: NDArray[np.float64], beside: list[float], n: int) -> float:
    """Return the point above the Ritz values where the Lanczos polynomial says that the spectrum has ended."""
    target = math.log(math.sqrt(2 * n / math.pi) / DOUBT) + float(np.log(beside).sum())
    low = high = float(values[-1])
    step = float(values[-1] - values[0]) or abs(high) or 1.0
    while float(np.log(np.maximum(high - values, 1e-300)).sum()) < target:
        low, high, step = high, high + step, 2 * step
    for _ in range(60):
        middle = (low + high) / 2
        inside = float(np.log(np.maximum(middle - values, 1e-300)).sum()) < target
        low, high = (middle, high) if inside else (low, middle)
    return high


def _nullity(
    op: RowOperator, request: Request, found: Found, pairs: Pairs, converged: Tensor, lambda_max: float
) -> tuple[int, bool]:
    """Return the dimension of the null space as far as it is known, and whether that is all of it."""
    proven = max(0, op.n - op.m) if op.m else 0
    if found.nullity is not None:
        # What fresh products prove to be positive is none of it, whatever the solver saw.
        positive = int((pairs.values - pairs.norms > rounding(op) * lambda_max)[request.largest :].sum())
        most = request.smallest - positive if positive else op.n
        return max(proven, min(found.nullity, most)), True
    # The image must be zero to rounding, under the factor where that is known; what is merely small proves nothing.
    eps = torch.finfo(op.dtype).eps
    if op.factored:
        zero = converged & (pairs.values <= (16 * eps) ** 2 * lambda_max)
    else:
        zero = converged & (pairs.values.abs() + pairs.norms <= 16 * eps * lambda_max)
    return max(proven, int(zero[request.largest :].sum())), False


def _clusters(pairs: Pairs, blur: float, nullity: int) -> NDArray[np.int64]:
    """Return for every pair the dimension of the subspace that is determined where its vector alone is not.

    A residual r turns a vector by up to r / gap (Davis and Kahan, 1970): pairs closer than ten times their residuals
    belong together, and a zero eigenvalue belongs to the whole null space.
    """
    values, norms = pairs.values.numpy(), pairs.norms.numpy()
    apart = -np.diff(values) > 10 * np.maximum(norms[1:], norms[:-1]) + blur
    label = np.concatenate([[0], np.cumsum(apart)])
    dimension: NDArray[np.int64] = np.bincount(label)[label]
    zero = values <= blur
    dimension[zero] = np.maximum(dimension[zero], nullity)
    return dimension


def _null_words(nullity: int, known: bool, rest: Probe | None, null_pairs: int, n: int) -> str:
    if known or rest is None or rest.null_dimension < 1:
        return f"the null space has dimension {nullity}" + ("" if known else " or more") if nullity else ""
    estimate = min(max(rest.null_dimension + null_pairs, nullity), n)
    lower = f"{nullity} or more, " if nullity else ""
    return f"the null space has dimension {lower}by the probe about {estimate:.0f} ± {2 * rest.null_deviation:.0f}"


def _zero_words(pairs: Pairs, request: Request, lambda_max: float, nullity: int) -> str:
    """Say where a small eigenvalue is no more than what the residuals may hide."""
    count = int((pairs.values[request.largest :] <= request.tol * lambda_max).sum())
    if count <= nullity:
        return ""
    return f"{count} of the smallest {'is' if count == 1 else 'are'} zero to within tol: a smaller tol tells more"


def _cluster_words(clusters: NDArray[np.int64], request: Request, n: int, exact: int | None) -> str:
    index = [*range(request.largest), *range(n - request.smallest, n)]
    shared = [i for i, dimension in zip(index, clusters, strict=True) if dimension > 1]
    if not shared:
        return ""
    sizes = sorted({int(d) for d in clusters if d > 1})
    return (
        f"index {_ranges(shared)}: only a subspace, of dimension {' and '.join(map(str, sizes))}"
        f"{'' if sizes == [exact] else ' or more'}, is determined, and the vectors in it depend on the seed"
    )


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers with runs of them shortened: 3, 5-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _probe_words(rest: Probe | None, missed: bool, pairs: Pairs, request: Request, lambda_max: float) -> str:
    if rest is None:
        return ""
    if missed:
        return "the probe found better pairs than the solver's and put them in their place"
    slack = request.tol * lambda_max
    words = []
    if request.largest:
        worst = float(pairs.values[request.largest - 1])
        words.append(
            "no larger eigenvalue was missed"
            if rest.high <= worst + slack
            else f"a missed eigenvalue above {worst:.4g} is not excluded, but none exceeds {rest.high:.4g}"
        )
    if request.smallest:
        worst = float(pairs.values[request.largest])
        words.append(
            "no smaller eigenvalue was missed"
            if rest.low >= worst - slack
            else f"a missed eigenvalue below {worst:.4g} is not excluded, but none is under {rest.low:.4g}"
        )
    return f"with probability {1 - DOUBT:g}, " + " and ".join(words)


def signed(x: Tensor) -> Tensor:
    """Give every row the sign that makes its entry of largest magnitude positive."""
    largest = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -x, x)
