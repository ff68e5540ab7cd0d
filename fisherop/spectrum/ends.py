"""The ends of the spectrum by bounds: the largest and the smallest eigenvalue, and their ratio.

A Ritz value lies within the spectrum. How far beyond it the spectrum may go follows from the Lanczos polynomial, which
cannot be large at an eigenvalue unless the random start all but lacks its vector. Van Dorsselaer, Hochstenbach and van
der Vorst (2000), "Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos
method".
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from fisherop.certificate import DOUBT, outer
from fisherop.rows import RowOperator
from fisherop.solvers.contract import value_rounding
from fisherop.spectrum.estimate import Estimate, exactly, planned
from fisherop.spectrum.moments import check_scale, eigenvalues, exact_products, sphere
from fisherop.spectrum.quadrature import checked_steps, gauss, lanczos, rounding

STEPS = 60


def lambda_max(op: Any, *, steps: int | None = None, rng: Any = None) -> Estimate:
    """Bracket the largest eigenvalue.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n symmetric positive semidefinite operator.
    steps : int, optional
        Products, 60 by default.
    rng : optional
        Anything `numpy.random.default_rng` takes; the same seed gives the same answer.

    Returns
    -------
    Estimate
        `value` is a Ritz value, which the largest eigenvalue is not below, and `low` is what rounding leaves of it; it
        is not above `high` but with probability 0.001. `standard_error` is NaN, for nothing is known of it. Exact where
        that costs no more.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> found = fo.spectrum.lambda_max(np.diag(np.linspace(0.0, 1.0, 200)), rng=0)
    >>> found.low <= 1.0 <= found.high
    True
    """
    return _ends(op, steps, rng)[1]


def lambda_min(op: Any, *, steps: int | None = None, rng: Any = None) -> Estimate:
    """Bracket the smallest eigenvalue.

    Parameters
    ----------
    op, steps, rng
        As in `lambda_max`.

    Returns
    -------
    Estimate
        `value` is a Ritz value, which the smallest eigenvalue is not above but for rounding, which is in `high`; it is
        not below `low` but with probability 0.001. See `lambda_max`.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> fo.spectrum.lambda_min(np.diag([3.0, 2.0, 1.0])).value
    1.0
    """
    return _ends(op, steps, rng)[0]


def condition(op: Any, *, steps: int | None = None, rng: Any = None) -> Estimate:
    """Bracket the ratio of the largest to the smallest eigenvalue.

    Parameters
    ----------
    op, steps, rng
        As in `lambda_max`.

    Returns
    -------
    Estimate
        `value` is a ratio of Ritz values, which the true one is not below but for rounding, which is in `low`; it is
        not above `high` but with probability 0.002. Infinite where the smallest eigenvalue may be, or is, zero to
        rounding.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> fo.spectrum.condition(np.diag([3.0, 2.0, 1.0])).value
    3.0
    """
    operator = RowOperator(op)
    least, most = _ends(operator, steps, rng)
    floor = rounding(operator, most.value)
    seen = least.value > floor
    value, low = (most.value / least.value, most.low / least.high) if seen else (math.inf, math.inf)
    high = most.high / least.low if least.low > floor else math.inf
    return replace(most, value=value, low=low, high=high)


def _ends(op: Any, steps: int | None, rng: Any) -> tuple[Estimate, Estimate]:
    """Return the smallest and the largest eigenvalue, with bounds."""
    operator = op if isinstance(op, RowOperator) else RowOperator(op)
    plan = planned(None, None, rng, None, default=4, most=4)
    most = checked_steps(operator, steps, STEPS)
    if exact_products(operator) <= most:
        values = eigenvalues(operator)
        return exactly(float(values[0]), operator.n_matvec), exactly(float(values[-1]), operator.n_matvec)
    alpha, beta = lanczos(operator, sphere(operator, 1, plan.rng), most, lambda *_: False)
    check_scale(operator, float(alpha.max()))
    values = gauss(alpha, beta)[0][0]
    smallest, largest = max(0.0, float(values[0])), max(0.0, float(values[-1]))
    low, high = smallest, largest
    if beta[0, -1] > 0:
        low, high = -outer(-values[::-1], list(beta[0]), operator.n), outer(values, list(beta[0]), operator.n)
    blur = value_rounding(operator.dtype, largest)
    words = f"{len(values)} Lanczos steps; the outer bound holds with probability {1 - DOUBT:g}."
    end = Estimate(smallest, np.nan, operator.n_matvec, max(0.0, low - blur), smallest + blur, 1, message=words)
    if operator.m is not None and operator.m < operator.n:
        end = replace(end, value=0.0, low=0.0, high=0.0)
    return end, replace(end, value=largest, low=max(0.0, largest - blur), high=max(high, largest) + blur)
