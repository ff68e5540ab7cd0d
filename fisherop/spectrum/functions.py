"""Sums of functions of the eigenvalues: counts, the determinant, and the effective dimension at some level.

>>> import numpy as np, fisherop as fo
>>> F = np.diag([3.0, 2.0, 0.0])
>>> fo.count(F, 2.5).value, fo.spectrum.rank(F).value
(2.0, 2.0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fisherop.rows import RowOperator
from fisherop.solvers.contract import Progress
from fisherop.spectrum.estimate import Estimate, Judged, Plan, cheaper, exactly, planned, sampled
from fisherop.spectrum.moments import eigenvalues, exact_products, krylov, participation_ratio
from fisherop.spectrum.quadrature import (
    MOST_PROBES,
    N_PROBES,
    NONE_NEGATIVE,
    SPACE,
    AtMost,
    Functional,
    Measures,
    Smooth,
    at_most,
    batch_size,
    check_above,
    checked_steps,
    drawing,
    finite,
    positive,
    rounding,
    with_steps,
)


def logdet(
    op: Any,
    mu: float,
    n_probes: int | None = None,
    *,
    rtol: float | None = None,
    steps: int | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Estimate:
    """Estimate log det(F + mu I): the information about an image in nats, but for constants, under a Gaussian prior.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n symmetric positive semidefinite operator.
    mu : float
        Positive, in units of F, such as the precision of the prior. It must be above what rounding makes of zero.
    n_probes : int, optional
        Random vectors, 16 by default, each the start of a Lanczos run.
    rtol : float, optional
        Stop when half the 95 % interval is no more than this part of the value; then `n_probes` is the most to take,
        256 by default.
    steps : int, optional
        The most products for each of them, 100 by default. Runs are shorter where that is enough.
    rng, callback
        As in `trace`.

    Returns
    -------
    Estimate
        Its interval holds the error of the quadrature too. Exact where that costs no more products.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    References
    ----------
    Ubaru, Chen and Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature".

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> fo.logdet(np.diag([np.e - 1, 0.0]), mu=1.0).value
    1.0
    """
    mu = positive(mu)

    def functional(floor: float) -> Functional:
        check_above(mu, floor)
        return Smooth(lambda x: np.log(x + mu))

    return _summed(RowOperator(op), functional, n_probes, rtol, steps, rng, callback)


def effective_dimension(
    op: Any,
    mu: float | None = None,
    n_probes: int | None = None,
    *,
    rtol: float | None = None,
    steps: int | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Estimate:
    """Estimate how many directions the model sees: tr F (F + mu)^-1, or, without mu, the participation ratio.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n symmetric positive semidefinite operator.
    mu : float, optional
        An eigenvalue counts as x / (x + mu): nearly one where it is far above mu, nearly none far below. In units of F,
        positive. By default the estimate is ``(tr F)^2 / ||F||_F^2`` instead, which is k for k equal eigenvalues.
    n_probes, rtol, steps, rng, callback
        As in `logdet`; without mu as in `fisherop.spectrum.participation_ratio`, and steps have no meaning.

    Returns
    -------
    Estimate
        Between 0 and n.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> F = np.diag([3.0, 3.0, 0.0])
    >>> round(fo.effective_dimension(F).value, 6), fo.effective_dimension(F, mu=1.0).value
    (2.0, 1.5)
    """
    if mu is None:
        if steps is not None:
            raise ValueError("steps belong to the effective dimension at some mu: pass mu, or leave them out")
        return participation_ratio(op, n_probes, rtol=rtol, rng=rng, callback=callback)
    level = positive(mu)

    def functional(floor: float) -> Functional:
        check_above(level, floor)
        return Smooth(lambda x: x / (x + level))

    operator = RowOperator(op)
    return _summed(operator, functional, n_probes, rtol, steps, rng, callback, within=(0, operator.n))


def count(
    op: Any,
    threshold: float,
    n_probes: int | None = None,
    *,
    rtol: float | None = None,
    steps: int | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Estimate:
    """Estimate how many eigenvalues are no larger than a threshold; n less that is how many are larger.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n symmetric positive semidefinite operator.
    threshold : float
        In units of F. An eigenvalue that rounding cannot tell from it counts as no larger, be it larger or smaller by
        up to ``4 sqrt(n) eps lambda_max``: that of the threshold itself always counts, and at 0 the null space.
    n_probes, rtol, steps, rng, callback
        As in `logdet`.

    Returns
    -------
    Estimate
        Between 0 and n. Its interval holds what so many steps cannot resolve: how many eigenvalues there may be within
        the distance of two nodes from the threshold. It is wide in the midst of many, more so far below the largest
        eigenvalue, and narrow in a gap.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> fo.count(np.diag([3.0, 2.0, 1.0]), 2.5).value
    2.0
    """
    threshold = finite(threshold)
    operator = RowOperator(op)
    if threshold < 0:
        return exactly(0.0, 0, NONE_NEGATIVE)

    def functional(floor: float) -> Functional:
        return at_most(threshold, floor)

    return _summed(operator, functional, n_probes, rtol, steps, rng, callback, within=(0, operator.n))


def nullity(
    op: Any,
    n_probes: int | None = None,
    *,
    rtol: float | None = None,
    steps: int | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Estimate:
    """Estimate the dimension of the null space: how many directions the model is blind to.

    Parameters
    ----------
    op, n_probes, rtol, steps, rng, callback
        As in `count`, for a threshold of 0: what rounding cannot tell from zero counts as zero.

    Returns
    -------
    Estimate
        Never less than what follows from a response of fewer numbers than the image has.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> F = fo.FisherOperator(torch.nn.AvgPool2d(2), torch.rand(1, 1, 8, 8))
    >>> fo.spectrum.nullity(F).value
    48.0
    """
    operator = op if isinstance(op, RowOperator) else RowOperator(op)
    least = max(0, operator.n - operator.m) if operator.m is not None else 0
    return _summed(operator, AtMost, n_probes, rtol, steps, rng, callback, within=(least, operator.n))


def rank(
    op: Any,
    n_probes: int | None = None,
    *,
    rtol: float | None = None,
    steps: int | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Estimate:
    """Estimate the rank: n less the `nullity`. `rtol` is that of the nullity.

    Parameters
    ----------
    op, n_probes, rtol, steps, rng, callback
        As in `nullity`.

    Returns
    -------
    Estimate
        Between 0 and n.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> fo.spectrum.rank(np.diag([3.0, 2.0, 0.0])).value
    2.0
    """
    operator = RowOperator(op)
    n = operator.n
    found = nullity(operator, n_probes, rtol=rtol, steps=steps, rng=rng, callback=callback)
    turned = {"value": n - found.value, "low": n - found.high, "high": n - found.low}
    return replace(found, **turned)


def _summed(
    op: RowOperator,
    functional: Callable[[float], Functional],
    n_probes: int | None,
    rtol: float | None,
    steps: int | None,
    rng: Any,
    callback: Callable[[Progress], object] | None,
    *,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """Estimate the sum of a function over all eigenvalues; `functional` makes it, given the level of rounding."""
    plan = planned(n_probes, rtol, rng, callback, default=N_PROBES, most=MOST_PROBES)
    most = checked_steps(op, steps)

    def exact() -> Estimate:
        values = eigenvalues(op)
        f = functional(rounding(op, float(values[-1])))
        return exactly(float(f.of(values).sum()), op.n_matvec)

    def sample(plan: Plan) -> Estimate:
        measures = Measures.around(op, krylov(op, SPACE, plan.rng))
        f = functional(measures.floor)

        def judge() -> Judged:
            found = measures.judged(f)
            value, low, high = (float(x) for x in np.clip([found.value, found.low, found.high], *within))
            return Judged(value, found.standard_error, low, high)

        draw = drawing(op, plan, most, measures, f)
        return with_steps(sampled(op, plan, draw, judge, batch=batch_size(op, most)), measures)

    return cheaper(plan, most, exact_products(op), exact, sample)
