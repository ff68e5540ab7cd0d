"""What every estimate of the spectrum returns: a number, how far off it may be, and what it cost.

>>> from fisherop.spectrum.estimate import Estimate
>>> print(Estimate(10.0, 0.5, 64, low=9.0, high=11.0))
10 ± 0.5, 95 % interval 9 to 11, 64 products
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fisherop.maps import number, whole
from fisherop.rows import RowOperator, stream
from fisherop.solvers.contract import Progress, asks_to_stop

LEVEL = 0.95
"""Probability with which an interval holds the true value."""
BATCH = 16

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A property of a spectrum, with its uncertainty.

    Attributes
    ----------
    value : float, or Tensor or ndarray for a map
        The estimate.
    standard_error : like value
        Standard deviation of `value` over seeds, as estimated; 0 where it is exact, and NaN where nothing is known but
        bounds.
    n_matvec : int
        Products with F used; a pass in one direction counts as half.
    low, high : like value
        An interval that holds the true value with probability 0.95, what the method may be biased by included.
    n_probes : int
        Random vectors that the value is a mean over; 0 where it is exact.
    converged : bool
        Whether `rtol` was reached, where one was asked for; else True.
    message : str
        What was done, in words.
    image : Tensor or None
        The image, where the value is a map of it.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> total = fo.trace(np.diag([3.0, 2.0, 1.0]))
    >>> float(total), total.low <= 6 <= total.high
    (6.0, True)
    """

    value: Any
    standard_error: Any
    n_matvec: int
    low: Any = None
    high: Any = None
    n_probes: int = 0
    converged: bool = True
    message: str = ""
    image: Tensor | None = field(default=None, repr=False)

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        if np.ndim(self.value):
            return f"a map of shape {tuple(self.value.shape)}, {self.n_matvec} products"
        spread = f" ± {self.standard_error:.2g}" if self.standard_error == self.standard_error else ""
        return f"{self.value:.6g}{spread}, 95 % interval {self.low:.6g} to {self.high:.6g}, {self.n_matvec} products"


@dataclass(frozen=True)
class Judged:
    """What samples say: a value, its standard error, and an interval; arrays for a map."""

    value: Any
    standard_error: Any
    low: Any
    high: Any

    def relative(self) -> float:
        """Return half the interval relative to the value; for a map its median over the pixels that are not zero."""
        value, half = np.abs(self.value), (np.asarray(self.high) - self.low) / 2
        if not np.ndim(value):
            return float(half / value) if value > 0 else float(half > 0)
        inside = value > 0
        return float(np.median(half[inside] / value[inside])) if inside.any() else 0.0


@dataclass(frozen=True)
class Plan:
    """How many probes to take, at most and at first, and when to stop."""

    n_probes: int
    first: int
    rtol: float | None
    rng: np.random.Generator
    callback: Callable[[Progress], object] | None


def planned(
    n_probes: int | None,
    rtol: float | None,
    rng: Any,
    callback: Callable[[Progress], object] | None,
    *,
    default: int,
    most: int,
) -> Plan:
    """Check the arguments that all estimators share; `most` is the default where `rtol` decides when to stop."""
    if n_probes is None:
        n_probes = default if rtol is None else most
    n_probes = whole(n_probes, "n_probes")
    if n_probes < 4:
        raise ValueError(f"n_probes must be at least 4, for fewer do not tell their own uncertainty, not {n_probes}")
    rtol = None if rtol is None else number(rtol, "rtol")
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(
            f"rtol, half the 95 % interval relative to the value, must lie between 0 and 1, not {rtol}: leave it out "
            "to take all probes"
        )
    generator = stream(rng)
    first = n_probes if rtol is None else min(n_probes, default)
    return Plan(n_probes, first, rtol, generator, callback)


def more(plan: Plan, probes: float) -> Plan:
    """Return a plan with more probes: what something else was to cost, and did not."""
    return replace(plan, n_probes=plan.n_probes + int(probes))


def cheaper(
    plan: Plan, probe: float, dense: float, exact: Callable[[], Estimate], sample: Callable[[Plan], Estimate]
) -> Estimate:
    """Compute exactly where that costs no more products than probes do, or where these have cost as much in vain.

    Parameters
    ----------
    plan : Plan
    probe, dense : float
        What a probe and what the exact value costs, in products.
    exact, sample : callable
        The two ways.
    """
    if dense <= probe * plan.first:
        return exact()
    if plan.rtol is None or probe * plan.n_probes < dense:
        return sample(plan)
    most = max(4, int(dense / probe))
    found = sample(replace(plan, n_probes=most))
    return found if found.converged or found.n_probes < most else exact()


def sampled(
    op: RowOperator,
    plan: Plan,
    draw: Callable[[int], int],
    judge: Callable[[], Judged],
    *,
    batch: int = BATCH,
    words: str = "",
    n_matvec: Callable[[], int] | None = None,
) -> Estimate:
    """Draw probes until there are enough, or `rtol` is reached, or the callback returns True.

    `draw` takes so many more probes and returns how many there are. Where `rtol` is to stop the work it is looked at
    whenever the number of probes has doubled, and no oftener: a mean that is looked at after every sample stops by
    preference where its spread happens to look small.
    """
    used = n_matvec or (lambda: op.n_matvec)
    count, looked, iteration, stopped = 0, 0, 0, False
    while count < plan.n_probes and not stopped:
        count = draw(min(batch, plan.n_probes - count))
        iteration += 1
        relative = None
        if plan.callback is not None:
            relative = judge().relative() if count >= 4 else np.inf
            stopped = asks_to_stop(plan.callback(Progress(iteration, used(), np.array([relative]))))
        if plan.rtol is not None and count >= 2 * looked:
            looked = count
            if (judge().relative() if relative is None else relative) <= plan.rtol:
                break
    found = judge()
    relative = found.relative()
    reached = plan.rtol is None or relative <= plan.rtol
    notes = [f"{count} probes{words}"]
    if stopped and count < plan.n_probes:
        notes.append("stopped by the callback")
    if not reached:
        notes.append(f"rtol={plan.rtol:g} was not reached but {relative:.2g}: raise n_probes")
    return Estimate(
        found.value, found.standard_error, used(), found.low, found.high, count, reached, "; ".join(notes) + "."
    )


def exactly(value: Any, n_matvec: int, message: str = "exact: the dense problem costs no more.") -> Estimate:
    """Return what is known without error."""
    return Estimate(value, value * 0.0, n_matvec, value, value, message=message)


def mean_of(samples: Floats, known: float, eps: float) -> Judged:
    """Return `known` plus the mean of independent samples that are not negative, from products rounded to eps.

    Samples are sums of squares: where a few terms matter most of them are small, and so are their mean and their spread
    together, so that the upper end of Student's interval misses the truth in up to a sixth of all runs. It is therefore
    that of the logarithm, less what is left of the statistic's skewness for gamma variables: a shift by the squared
    relative error times (t^2 / 2 + 1) / 3, from the Edgeworth expansion (after Hall, 1992, "On the removal of skewness
    by transformation"). The lower end is Student's.
    """
    mean, error = float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(len(samples)))
    reach = critical(0.0, len(samples) - 1)
    part = error / max(mean, error) if error > 0 else 1.0
    above = error * float(np.expm1(part**2 * (1 + reach**2 / 2) / 3 + reach * part)) / part
    rounding = 16 * eps * (abs(known) + abs(mean))
    return Judged(
        known + mean, error, known + max(0.0, mean - reach * error) - rounding, known + mean + above + rounding
    )


def between(lows: Floats, highs: Floats, eps: float) -> Judged:
    """Return a mean of which samples are known up to bounds, from products rounded to eps.

    The interval holds the mean with probability 0.95 wherever it lies between the means of the bounds: Imbens and
    Manski (2004), "Confidence intervals for partially identified parameters", eq. 7, with Student's distribution.
    """
    count = len(lows)
    middle = (lows + highs) / 2
    spread = float(middle.std(ddof=1) / np.sqrt(count))
    low, high = float(lows.mean()), float(highs.mean())
    reach = critical((high - low) / spread if spread > 0 else np.inf, count - 1) * spread
    # An interval is not narrower than what rounding leaves of the value.
    rounding = 4 * eps * float(np.abs(middle).mean())
    return Judged((low + high) / 2, spread, low - reach - rounding, high + reach + rounding)


def critical(gap: float, freedom: int) -> float:
    """Return c with P(-c <= t <= c + gap) = 0.95 for Student's t: 1.96 for no gap and many, 1.64 for a wide one."""
    from scipy import special  # here, for it takes as long to import as all of this package

    low, high = special.stdtrit(freedom, LEVEL), special.stdtrit(freedom, (1 + LEVEL) / 2)
    for _ in range(60):
        middle = (low + high) / 2
        inside = special.stdtr(freedom, middle + gap) - special.stdtr(freedom, -middle)
        low, high = (middle, high) if inside < LEVEL else (low, middle)
    return float(high)
