"""How large a distortion is drawn: at equal norm, at the threshold of being noticed, or as given."""

# ruff: noqa: RUF001 - the figures speak of α and −

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherop.maps import number, real
from fisherop.plot.panels import Panel, Range, array_of, clipped, order_of
from fisherop.result import Eigendistortions

Alpha = str | float | Sequence[float]

RMS = 0.05
"""Root mean square of a distortion, as a fraction of the pixel range, where all have equal norm."""

HIDDEN = 0.05
"""The part of a distortion's norm that clipping may hide before a larger one is not drawn."""


@dataclass(frozen=True)
class Size:
    """What a unit distortion is multiplied by, and what is to be said of that."""

    alpha: float
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """How the sizes of distortions are chosen: ``alpha`` and ``d_prime`` of the public functions."""

    alpha: Alpha = "norm"
    d_prime: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, str):
            given = tuple(real(self.alpha, "alpha").flatten().tolist())
            if not np.isfinite(given).all():
                raise ValueError(f"alpha must be finite, not {self.alpha}")
            object.__setattr__(self, "alpha", given)
        elif self.alpha not in ("norm", "threshold"):
            raise ValueError(f"alpha must be 'norm', 'threshold', a number or a number a pair, not {self.alpha!r}")
        object.__setattr__(self, "d_prime", number(self.d_prime, "d_prime"))
        if not 0 < self.d_prime < math.inf:
            raise ValueError(f"d_prime must be positive and finite, not {self.d_prime}")

    def sizes(
        self, result: Eigendistortions, pairs: Sequence[int], image: Any, vrange: Range | None, signs: Sequence[int]
    ) -> list[Size]:
        """Return the size of each of these pairs, all signs of which are drawn."""
        if self.alpha == "norm":
            return [Size(norm(order_of(result), array_of(image), vrange))] * len(pairs)
        if self.alpha == "threshold":
            x, v = array_of(image).reshape(-1), array_of(result.eigendistortions).reshape(len(result), -1)
            return [self._at_threshold(float(result.eigenvalues[i]), x, v[i], vrange, signs) for i in pairs]
        given = [float(alpha) for alpha in np.ravel(self.alpha)]
        if len(given) not in (1, len(pairs)):
            raise ValueError(f"alpha must be one number or {len(pairs)}, one for each pair, not {len(given)}")
        return [Size(alpha) for alpha in (given if len(given) == len(pairs) else given * len(pairs))]

    def words(self, result: Eigendistortions, sizes: Sequence[Size]) -> str:
        """Say how large the distortions are."""
        if self.alpha == "threshold":
            return f"at threshold d′ = {self.d_prime:.3g}, α = d′/√λ"
        if len({size.alpha for size in sizes}) > 1:
            return "each of its own norm α"
        alpha = sizes[0].alpha
        return f"all of norm {alpha:.3g} (RMS {alpha / math.sqrt(order_of(result)):.2g})"

    def _at_threshold(
        self, eigenvalue: float, x: NDArray[np.float64], v: NDArray[np.float64], vrange: Range | None, signs: Any
    ) -> Size:
        threshold = self.d_prime / math.sqrt(eigenvalue) if eigenvalue > 0 else math.inf
        most = min(_most(x, sign * v, vrange) for sign in signs)
        if threshold <= most:
            return Size(threshold)
        return Size(most, f"capped at d′ = {most * math.sqrt(max(eigenvalue, 0.0)):.2g}")


def norm(order: int, image: Panel, vrange: Range | None) -> float:
    """Return the norm that distortions have where all have the same."""
    low, high = vrange or (0.0, float(np.abs(image).max()) or 1.0)
    return RMS * (high - low) * math.sqrt(order)


def _most(x: NDArray[np.float64], v: NDArray[np.float64], vrange: Range | None) -> float:
    """Return the largest size at which clipping hides no more than a twentieth of a distortion's norm.

    A value that is at the edge of the range already, such as white paper that is to be whiter, is hidden at every
    size and says nothing of any; it is left out. A signal without a range takes a distortion as large as itself.
    """
    if vrange is None:
        return float(np.linalg.norm(x)) or 1.0
    base = clipped(x, vrange)[0]
    room = np.where(v > 0, vrange[1] - base, base - vrange[0])
    seen, rooms = np.abs(v[room > 0]), room[room > 0]
    whole = float(np.linalg.norm(seen))
    if whole == 0:  # nothing of it can be seen, and no size is too large
        return norm(len(x), x, vrange)
    low, high = 0.0, float(np.linalg.norm(rooms)) / ((1 - HIDDEN) * whole)
    for _ in range(50):
        middle = (low + high) / 2
        hidden = float(np.linalg.norm(np.minimum(middle * seen, rooms))) < (1 - HIDDEN) * middle * whole
        low, high = (low, middle) if hidden else (middle, high)
    return low
