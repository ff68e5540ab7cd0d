"""The spectrum as a whole: an object that counts, smooths and sums without further products.

>>> import numpy as np, fisherop as fo
>>> density = fo.spectral_density(np.diag([3.0, 2.0, 1.0]))
>>> density.eigenvalues
array([1., 2., 3.])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fisherop.maps import number, real
from fisherop.rows import RowOperator
from fisherop.solvers.contract import Progress
from fisherop.spectrum.estimate import Estimate, Floats, exactly, planned, sampled
from fisherop.spectrum.moments import eigenvalues, krylov
from fisherop.spectrum.quadrature import (
    MOST_PROBES,
    N_PROBES,
    NONE_NEGATIVE,
    SPACE,
    Functional,
    Measures,
    Smooth,
    affordable,
    at_most,
    batch_size,
    check_above,
    checked_steps,
    drawing,
    finite,
    gauss,
    positive,
    rounding,
    with_steps,
)


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The spectrum of an operator as far as Lanczos runs from random vectors resolve it; see `spectral_density`.

    Attributes
    ----------
    n : int
        Eigenvalues in all.
    lambda_max : float
        The largest Ritz value.
    floor : float
        What rounding cannot tell from zero.
    n_matvec : int
        Products with F used.
    n_probes, steps : int
        Random vectors, and products for each; 0 where all eigenvalues were computed.
    eigenvalues : ndarray of float64, shape (n,), or None
        All of them, ascending, where that cost no more products.
    message : str
        What was done, in words.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> density = fo.spectral_density(np.diag([3.0, 2.0, 1.0]))
    >>> float(density.count(2.5)), round(float(density.logdet(1e-9)), 3)
    (2.0, 1.792)
    """

    n: int
    lambda_max: float
    floor: float
    n_matvec: int
    n_probes: int
    steps: int
    eigenvalues: Floats | None
    message: str
    measures: Measures | None = field(default=None, repr=False)

    def count(self, threshold: float) -> Estimate:
        """Return how many eigenvalues are no larger than a threshold, as `fisherop.count` does, without a product."""
        threshold = finite(threshold)
        if threshold < 0:
            return exactly(0.0, self.n_matvec, NONE_NEGATIVE)
        return self._sum(at_most(threshold, self.floor), (0, self.n))

    def logdet(self, mu: float) -> Estimate:
        """Return log det(F + mu I), as `fisherop.logdet` does, without a product."""
        mu = positive(mu)
        check_above(mu, self.floor)
        return self._sum(Smooth(lambda x: np.log(x + mu)), (-np.inf, np.inf))

    def effective_dimension(self, mu: float) -> Estimate:
        """Return tr F (F + mu)^-1, as `fisherop.effective_dimension` does, without a product."""
        mu = positive(mu)
        check_above(mu, self.floor)
        return self._sum(Smooth(lambda x: x / (x + mu)), (0, self.n))

    def cumulative(self, thresholds: Any) -> tuple[Floats, Floats, Floats]:
        """Return, for every threshold, how many eigenvalues are no larger, and a 95 % interval for it.

        Parameters
        ----------
        thresholds : array_like of float, shape (t,)
            In units of F.

        Returns
        -------
        value, low, high : ndarray of float64, shape (t,)
            Each interval holds its true value with probability 0.95, not all of them at once. The value rises with the
            threshold.

        Raises
        ------
        TypeError, ValueError
            For thresholds that are not finite numbers in one dimension.
        """
        thresholds = real(thresholds, "thresholds").cpu().numpy()
        if thresholds.ndim != 1:
            raise ValueError(f"thresholds come in one dimension, not in shape {thresholds.shape}: pass a list of them")
        found = [self.count(threshold) for threshold in thresholds]
        value, low, high = (np.array([getattr(e, name) for e in found]) for name in ("value", "low", "high"))
        order = np.argsort(thresholds)
        value[order] = np.maximum.accumulate(value[order])
        return value, low, high

    def density(self, edges: Any) -> Floats:
        """Return the number of eigenvalues in bins, per decade.

        Parameters
        ----------
        edges : array_like of float, shape (t + 1,)
            Ascending and positive, the edges of the bins.

        Returns
        -------
        ndarray of float64, shape (t,)
            Smoothed as far as the nodes of the quadratures are apart.

        Raises
        ------
        TypeError, ValueError
            For edges that are not positive, ascending and two at least.
        """
        edges = real(edges, "edges").cpu().numpy()
        if edges.ndim != 1 or len(edges) < 2 or not (edges[0] > 0 and (np.diff(edges) > 0).all()):
            raise ValueError("edges of bins must be ascending and positive, two at least")
        if self.eigenvalues is not None:
            counts = np.histogram(self.eigenvalues, edges)[0].astype(np.float64)
        else:
            counts = np.diff(self._smoothed(edges))
        per_decade: Floats = counts / np.diff(np.log10(edges))
        return per_decade

    def resolution(self, at: float) -> float:
        """Return how far apart the nodes about an eigenvalue are: nothing finer is resolved. 0 where all are known."""
        at = number(at, "an eigenvalue")
        if self.measures is None:
            return 0.0
        gaps = []
        for nodes, _ in self._rules():
            real = nodes[nodes > self.floor]
            if len(real) > 1:
                place = int(np.clip(np.searchsorted(real, at), 1, len(real) - 1))
                gaps.append(real[place] - real[place - 1])
        return float(np.median(gaps)) if gaps else 0.0

    def _sum(self, f: Functional, within: tuple[float, float]) -> Estimate:
        if self.measures is None:
            assert self.eigenvalues is not None
            return exactly(float(f.of(self.eigenvalues).sum()), self.n_matvec)
        found = self.measures.judged(f)
        value, low, high = (float(x) for x in np.clip([found.value, found.low, found.high], *within))
        return Estimate(
            value, found.standard_error, self.n_matvec, low, high, self.n_probes, message=f"from: {self.message}"
        )

    def _rules(self) -> list[tuple[Floats, Floats]]:
        assert self.measures is not None
        rules = [gauss(*jacobi) for jacobi in self.measures.jacobi]
        return [rule for nodes, weights in rules for rule in zip(nodes, weights, strict=True)]

    def _smoothed(self, at: Floats) -> Floats:
        """Return cumulative counts: half of a node's weight lies on either side of it, spread up to its neighbours.

        It goes no farther than half a decade: beyond that, an isolated node is an eigenvalue and no part of a density.
        """
        total = np.zeros(len(at))
        rules = self._rules()
        for nodes, weights in rules:
            zero = nodes <= self.floor
            logs, shares, start = np.log10(nodes[~zero]), weights[~zero], weights[zero].sum()
            inner = np.minimum(np.diff(logs) / 2, 0.5) if len(logs) > 1 else np.full(1, 0.5)
            reach = np.concatenate([inner[:1], inner, inner[-1:]]) if len(logs) > 1 else np.repeat(inner, 2)
            ends = start + np.concatenate([[0.0], np.cumsum(shares)])
            if len(logs):
                places = np.stack([logs - reach[:-1], logs, logs + reach[1:]], axis=1).ravel()
                heights = np.stack([ends[:-1], (ends[:-1] + ends[1:]) / 2, ends[1:]], axis=1).ravel()
                total += np.interp(np.log10(at), places, heights)
            else:
                total += start
        smoothed: Floats = self.n * total / len(rules)
        return smoothed


def spectral_density(
    op: Any,
    n_probes: int | None = None,
    *,
    steps: int | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> SpectralDensity:
    """Estimate the whole spectrum: how many eigenvalues lie where, for some hundreds of products.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n symmetric positive semidefinite operator.
    n_probes : int, optional
        Random vectors, 16 by default, each the start of a Lanczos run with full reorthogonalization.
    steps : int, optional
        Products for each of them, 100 by default: more of them resolve more, above all among small eigenvalues.
    rng : optional
        Anything `numpy.random.default_rng` takes; the same seed gives the same answer.
    callback : callable, optional
        Called with a `Progress` after every batch of probes, its `residuals` half the interval of the trace relative
        to it; returning True stops the work.

    Returns
    -------
    SpectralDensity
        Counts, density and sums of functions of the eigenvalues, with their uncertainty; exact where all eigenvalues
        cost no more products.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense.

    References
    ----------
    Lin, Saad and Yang (2016), "Approximating spectral densities of large matrices", section 3.2.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> density = fo.spectral_density(np.diag(np.arange(5.0)))
    >>> density.count(2.5).value, density.cumulative([0.5, 2.5])[0]
    (3.0, array([1., 3.]))
    """
    operator = RowOperator(op)
    plan = planned(n_probes, None, rng, callback, default=N_PROBES, most=MOST_PROBES)
    most = checked_steps(operator, steps)
    if affordable(operator, plan, most):
        values = eigenvalues(operator)
        top = float(values[-1])
        words = "all eigenvalues, for the dense problem costs no more."
        return SpectralDensity(operator.n, top, rounding(operator, top), operator.n_matvec, 0, 0, values, words)
    measures = Measures.around(operator, krylov(operator, SPACE, plan.rng))
    draw = drawing(operator, plan, most, measures, None)
    trace = Smooth(lambda x: x)
    found = with_steps(
        sampled(operator, plan, draw, lambda: measures.judged(trace), batch=batch_size(operator, most)), measures
    )
    tops = [float(gauss(*jacobi)[0].max()) for jacobi in measures.jacobi]
    reached = max(alpha.shape[1] for alpha, _ in measures.jacobi)
    return SpectralDensity(
        operator.n, max(tops), measures.floor, operator.n_matvec, found.n_probes, reached, None, found.message, measures
    )
