"""Figures of numbers: the spectrum, and how far the model is as linear as its Fisher matrix says.

>>> import torch, fisherop as fo, fisherop.plot
>>> F = fo.FisherOperator(torch.nn.Linear(25, 10), torch.ones(25))
>>> result = fo.eigendistortions(F, k=25)
>>> [ax.get_label() for ax in fo.plot.spectrum(result).axes]
['spectrum']
>>> [ax.get_label() for ax in fo.plot.linearity(F, result, pairs=[0, 9]).axes]
['linearity', 'ratio']
"""

# ruff: noqa: RUF001 - the figures speak of α, ‖ and −

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fisherop.compare import discriminability
from fisherop.maps import real
from fisherop.operators import FisherOperator
from fisherop.plot.pairs import places
from fisherop.plot.panels import SMALL, array_of, empty_figure, named, numbers, order_of
from fisherop.plot.sizes import norm
from fisherop.result import Eigendistortions
from fisherop.spectrum.density import SpectralDensity

Floats = NDArray[np.float64]

ROUNDING = 32
"""Units in the last place of the largest eigenvalue that `eigenvalue_bounds` allow for rounding."""

SAME = 1e-3
"""How far, relative to the largest eigenvalue, a value may be from what the operator says of its vector."""

GREY, SHADE = "0.45", "0.93"


# ------------------------------------------------------------------------------------------------------------ spectrum


def spectrum(
    results: Eigendistortions | Sequence[Eigendistortions] | Mapping[str, Eigendistortions],
    *,
    fig: Figure | None = None,
) -> Figure:
    """Draw the eigenvalues over their index in the spectrum, with their bounds, and the floor where they are zero.

    A bar is the interval that holds a true eigenvalue. Below the dotted floor, 32 units in the last place of the
    largest eigenvalue, every such interval holds zero. A value too small for the axis, which ends below the floor, is
    a triangle at its edge; a pair that did not converge is a cross. Indices that no result has are left out.

    Parameters
    ----------
    results : Eigendistortions, or a sequence or mapping of them
        One spectrum or several; the keys of a mapping name them, else their methods do.
    fig : Figure, optional
        An empty figure to draw into, which is resized; by default a new one of pyplot's.

    Returns
    -------
    Figure
        With one axes, labelled "spectrum".

    Raises
    ------
    ValueError
        If there is no result.

    Examples
    --------
    >>> import numpy as np, fisherop as fo, fisherop.plot
    >>> F = np.diag([4.0, 3.0, 1.0, 0.0])
    >>> methods = "exact", "lobpcg"
    >>> fig = fo.plot.spectrum({name: fo.eigendistortions(F, k=4, method=name) for name in methods})
    >>> fig.axes[0].get_ylabel()
    'eigenvalue λ, and its bounds'
    """
    several = _named_results(results)
    fig = empty_figure() if fig is None else fig
    place, gaps = _index_axis(np.unique(np.concatenate([result.index for result in several.values()])))
    size = 5 if len(place) <= 40 else 3 if len(place) <= 250 else 2
    styles = [_style(number, size) for number in range(len(several))]
    low, high = _value_range(several.values())
    keys = _spectrum_keys(several, styles, low)
    ax = _axes(fig, "spectrum", header=len(keys))
    ax.set(yscale="log", ylim=(low, high))
    _draw_index_axis(ax, place, gaps)
    ax.set_xlabel("index in the spectrum, from what is noticed most to what is noticed least", fontsize=SMALL)
    ax.set_ylabel("eigenvalue λ, and its bounds", fontsize=SMALL)
    for result, style in zip(several.values(), styles, strict=True):
        _draw_eigenvalues(ax, np.array([place[int(i)] for i in result.index]), result, style)
    _header(ax, keys)
    return fig


_STYLES: list[dict[str, Any]] = [
    {"color": "C0", "marker": "o", "fillstyle": "full"},
    {"color": "C1", "marker": "o", "fillstyle": "none"},
    {"color": "C2", "marker": "s", "fillstyle": "none"},
    {"color": "C3", "marker": "D", "fillstyle": "none"},
]


def _style(number: int, size: float) -> dict[str, Any]:
    """Return colour and marker of a result, such that those of several at one place are seen."""
    turn = number % len(_STYLES)
    return _STYLES[turn] | {"markersize": size + size / 2 * turn, "zorder": 3 - 0.1 * turn}


def _named_results(results: Any) -> dict[str, Eigendistortions]:
    if isinstance(results, Eigendistortions):
        results = [results]
    if not isinstance(results, Mapping):
        several = list(results)
        repeated = len({result.method for result in several}) < len(several)
        results = {f"{i + 1}, {r.method}" if repeated else r.method: r for i, r in enumerate(several)}
    if not results:
        raise ValueError("there is no result to draw the spectrum of")
    return dict(results)


def _floor(result: Eigendistortions) -> float:
    """Return what an eigenvalue must exceed for its bounds not to hold zero."""
    vectors = result.eigendistortions
    eps = torch.finfo(vectors.dtype).eps if isinstance(vectors, torch.Tensor) else np.finfo(vectors.dtype).eps
    return float(ROUNDING * eps * result.lambda_max)


def _index_axis(indices: NDArray[np.int64]) -> tuple[dict[int, float], list[tuple[float, float]]]:
    """Return where on the axis each index goes, and the gaps: what is left out between them is made short."""
    most = max(3, 0.2 * len(indices))
    width = max(0.3, 0.08 * len(indices))
    start = int(indices[0])
    place: dict[int, float] = {start: start if start <= most else 0}
    gaps = []
    for before, index in zip(indices[:-1].tolist(), indices[1:].tolist(), strict=True):
        x = place[before]
        if index - before <= most:
            place[index] = x + index - before
        else:
            place[index] = x + 1 + width
            gaps.append((x + 0.5, x + 0.5 + width))
    return place, gaps


def _draw_index_axis(ax: Axes, place: dict[int, float], gaps: list[tuple[float, float]]) -> None:
    first, last = min(place.values()), max(place.values())
    margin = max(0.5, 0.02 * (last - first))
    ax.set_xlim(first - margin, last + margin)
    if not gaps and min(place) == place[min(place)]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        return
    for left, right in gaps:
        ax.axvspan(left, right, color="white", linewidth=0, zorder=1)
        ax.vlines([left, right], *ax.get_ylim(), color="0.8", linewidth=0.8, linestyle="--", zorder=1)
        ax.annotate("⋯", ((left + right) / 2, 0), (0, -11), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="center", va="center", annotation_clip=False)  # fmt: skip
    edges = [first - margin, *(edge for gap in gaps for edge in gap), last + margin]
    ticks = []
    for left, right in zip(edges[::2], edges[1::2], strict=True):
        run = sorted(index for index, x in place.items() if left <= x <= right)
        wide = place[run[-1]] - place[run[0]] >= 0.15 * (last - first)
        ticks += [run[0], run[-1]] if wide else [run[0]] if run[0] == min(place) else [run[-1]]
    ax.set_xticks([place[index] for index in ticks], [str(index) for index in ticks])


def _value_range(results: Any) -> tuple[float, float]:
    """Return the ends of the axis: the floor is on it where an eigenvalue is near it or below."""
    highs, lows = [], []
    for result in results:
        floor = _floor(result)
        if result.lambda_max > 0:
            highs.append(float(min(result.eigenvalue_bounds.max(), 10 * result.lambda_max)))
            smallest = float(result.eigenvalues.min())
            lows.append(floor / 30 if smallest <= 30 * floor else smallest / 3)
    if not highs:
        return 0.1, 1.0
    return min(lows), max(2 * max(highs), 10 * min(lows))


def _draw_eigenvalues(ax: Axes, x: Floats, result: Eigendistortions, style: dict[str, Any]) -> None:
    low, high = ax.get_ylim()
    values, bounds, floor = result.eigenvalues, result.eigenvalue_bounds.clip(low, high), _floor(result)
    if floor > low:
        ax.axhspan(low, floor, color=SHADE, zorder=-2, linewidth=0)
        ax.axhline(floor, color=style["color"], linewidth=0.8, linestyle=":", zorder=0)
    ax.vlines(x, bounds[:, 0], bounds[:, 1], color=style["color"], linewidth=min(1.0, 40 / len(x)))
    inside = values >= low
    for where, marker in (
        (inside & result.converged, {}),
        (inside & ~result.converged, {"marker": "x"}),
        (~inside, {"marker": "v", "fillstyle": "none"}),
    ):
        if where.any():
            y = np.where(inside, values, low)
            ax.plot(x[where], y[where], linestyle="", clip_on=False, **style | marker)


def _spectrum_words(name: str, result: Eigendistortions) -> str:
    null = f", null space of {result.nullity} or more" if result.nullity else ""
    return f"{name}: {len(result)} of {result.n} eigenvalues" + (null if result.lambda_max else ", F = 0")


def _spectrum_keys(several: dict[str, Eigendistortions], styles: list[dict[str, Any]], low: float) -> list[Line2D]:
    results = list(several.values())
    keys = [_key(_spectrum_words(name, several[name]), **style) for name, style in zip(several, styles, strict=True)]
    if max(map(_floor, results)) > low:
        keys.append(_key("zero to rounding below", color=GREY, linestyle=":", linewidth=1))
    if not all(result.converged.all() for result in results):
        keys.append(_key("not converged", color=GREY, marker="x"))
    if any((result.eigenvalues < low).any() for result in results):
        keys.append(_key("below the axis", color=GREY, marker="v", fillstyle="none"))
    return keys


# ------------------------------------------------------------------------------------------------------------- density


def density(
    densities: SpectralDensity | Mapping[str, SpectralDensity],
    results: Eigendistortions | Mapping[str, Eigendistortions] | None = None,
    *,
    decades: float | None = None,
    fig: Figure | None = None,
) -> Figure:
    """Draw the whole spectrum, both axes logarithmic, with the pairs that are known exactly marked.

    Above: how many eigenvalues are larger than λ, with a 95 % interval that holds what the Lanczos runs could not
    resolve. Below: how many there are per decade, dotted where that interval is wider than half of it. Markers
    are the pairs of the results, in the upper axes at their index in the spectrum plus one half.

    Parameters
    ----------
    densities : SpectralDensity, or mapping of str to SpectralDensity
        What `fisherop.spectral_density` returned; the keys of a mapping name them.
    results : Eigendistortions, or mapping of str to Eigendistortions, optional
        Pairs to mark, by the same names.
    decades : float, optional
        How far below the largest eigenvalue the axis goes; by default as far as rounding allows, at most 8.
    fig : Figure, optional
        An empty figure to draw into, which is resized; by default a new one of pyplot's.

    Returns
    -------
    Figure
        With the axes labelled "count" and "density".

    Raises
    ------
    ValueError
        If there is nothing to draw, or results have other names than densities.

    Examples
    --------
    >>> import numpy as np, fisherop as fo, fisherop.plot
    >>> F = np.diag(np.geomspace(1, 1e-4, 50))
    >>> fig = fo.plot.density(fo.spectral_density(F), fo.eigendistortions(F, k=4))
    >>> [ax.get_label() for ax in fig.axes]
    ['count', 'density']
    """
    several = dict(densities) if isinstance(densities, Mapping) else {"": densities}
    marked = {} if results is None else dict(results) if isinstance(results, Mapping) else {"": results}
    if not several or not marked.keys() <= several.keys() or not any(d.lambda_max > 0 for d in several.values()):
        raise ValueError("there is no density to draw for some result, or none at all: give both the same names")
    top = max(d.lambda_max for d in several.values())
    floor = min(max(d.floor, 1e-8 * top) for d in several.values() if d.lambda_max > 0)
    low = floor if decades is None else top * 10.0**-decades
    fig = empty_figure() if fig is None else fig
    lines = len(several) + bool(marked)
    above, below = _axes(fig, "count", lines, below=1.8), _axes(fig, "density", lines, below=1.8, lower=True)
    grid = np.geomspace(low, 1.3 * top, 161)
    keys = []
    for number, (name, one) in enumerate(several.items()):
        color = f"C{number % 10}"
        value, least, most = one.cumulative(grid)
        # Less than half an eigenvalue is none; it would only make the axis long.
        larger, fewest, largest = (np.where(x >= 0.5, x, 0.0) for x in (one.n - value, one.n - most, one.n - least))
        above.fill_between(grid, np.maximum(fewest, 0.3), np.maximum(largest, 0.3), color=color, alpha=0.2, linewidth=0)
        above.plot(grid, np.where(larger > 0, larger, np.nan), color=color, linewidth=1.2, label=name)
        edges = np.geomspace(low, 1.3 * top, 61)
        per_decade = one.density(edges)
        unsure = np.interp((edges[1:] * edges[:-1]) ** 0.5, grid, most - least) > per_decade / 2
        for part, line in ((~unsure, "-"), (unsure, ":")):
            shown = np.where(part & (per_decade > 0), per_decade, np.nan)
            below.stairs(shown, edges, baseline=None, color=color, linewidth=1.2, linestyle=line, label=name)
        if name in marked:
            _mark(above, below, marked[name], color, low)
        keys.append(_key(_density_words(name, one), color=color, linestyle="-", linewidth=1.5))
    if marked:
        keys.append(_key("pairs that are known", color=GREY, marker="o", fillstyle="none"))
    above.set(xscale="log", yscale="log", xlim=(low, 1.5 * top), ylim=(0.4, 2 * max(d.n for d in several.values())))
    below.set(xscale="log", yscale="log", xlim=(low, 1.5 * top))
    above.tick_params(labelbottom=False)
    above.set_ylabel("eigenvalues larger than λ", fontsize=SMALL)
    below.set_ylabel("eigenvalues per decade", fontsize=SMALL)
    below.set_xlabel("eigenvalue λ", fontsize=SMALL)
    _header(above, keys)
    return fig


def _mark(above: Axes, below: Axes, result: Eigendistortions, color: str, low: float) -> None:
    shown = result.converged & (result.eigenvalues > low)
    values, index = result.eigenvalues[shown], result.index[shown]
    style: dict[str, Any] = {"linestyle": "", "fillstyle": "none", "color": color, "label": "pairs"}
    above.plot(values, index + 0.5, marker="o", markersize=4, **style)
    transform = below.get_xaxis_transform()
    below.plot(values, np.full(len(values), 0.03), marker="|", markersize=6, transform=transform, **style)


def _density_words(name: str, one: SpectralDensity) -> str:
    zero = one.count(0.0)
    how = "all of them computed" if one.measures is None else f"{one.n_probes} probes of {one.steps} steps"
    null = f", {zero.low:.0f} to {zero.high:.0f} of them zero" if zero.high >= 1 else ""
    return f"{name + ': ' if name else ''}{one.n} eigenvalues, {how}{null}"


# ----------------------------------------------------------------------------------------------------------- linearity


def linearity(
    op: FisherOperator,
    result: Eigendistortions,
    *,
    pairs: int | Sequence[int] | None = None,
    alphas: Sequence[float] | None = None,
    fig: Figure | None = None,
) -> Figure:
    """Draw how much the response changes along each distortion, as measured and as F predicts, in both directions.

    The change is ``‖W^(1/2) (f(x ± αv) − f(x))‖``, in standard deviations of the response's noise, which is the
    discriminability d′; the prediction is ``α √λ``. Below, the ratio of the two: 1 as far as the model is linear.
    Changes in the shaded region are rounding of the response, and have no ratio. The model sees x ± αv as it is, with
    nothing clipped.

    Parameters
    ----------
    op : FisherOperator
        What the result is of; it knows the model.
    result : Eigendistortions
        What `fisherop.eigendistortions` returned for it.
    pairs : int or sequence of int, optional
        Which of the result's pairs, by their place in it; by default all, or six spread from first to last.
    alphas : sequence of float, optional
        Sizes of the distortions, positive; by default sixteen, three decades up to a root mean square of 15 % of the
        pixel range, for a signal of its largest value.
    fig : Figure, optional
        An empty figure to draw into, which is resized; by default a new one of pyplot's.

    Returns
    -------
    Figure
        With the axes labelled "linearity" and "ratio". In either, the lines of pair i are labelled "predicted i",
        "plus i" and "minus i".

    Raises
    ------
    TypeError, ValueError
        If ``op`` knows no model, or is not what the result is of.

    Examples
    --------
    >>> import torch, fisherop as fo, fisherop.plot
    >>> F = fo.FisherOperator(torch.nn.Softplus(), torch.zeros(5))
    >>> fig = fo.plot.linearity(F, fo.eigendistortions(F, k=1), alphas=[0.1, 1, 10])
    >>> predicted, plus, minus = fig.axes[0].get_lines()[:3]
    >>> plus.get_ydata() / predicted.get_ydata()
    array([1.02..., 1.24..., 1.86...])
    """
    if not isinstance(op, FisherOperator):
        raise TypeError(f"linearity needs the FisherOperator, which knows the model, not {type(op).__name__}")
    if order_of(result) != op.image.numel():
        raise ValueError(f"the operator has {op.image.numel()} pixels and the result {order_of(result)}: pass its own")
    chosen = _spread(len(result)) if pairs is None else places(result, pairs)
    _check_same(op, result, chosen)
    sizes = _checked_sizes(alphas, op)
    rounding = _rounding(op)
    fig = empty_figure() if fig is None else fig
    ax = _axes(fig, "linearity", header=len(chosen) + 1, below=1.5)
    ratio = _axes(fig, "ratio", header=len(chosen) + 1, below=1.5, lower=True, sharex=ax)
    ax.set(xscale="log", yscale="log")
    keys = []
    for number, i in enumerate(chosen):
        v = torch.as_tensor(array_of(result.eigendistortions)[i], dtype=op.torch_dtype, device=op.device)
        predicted = sizes * math.sqrt(max(float(result.eigenvalues[i]), 0.0))
        color, index = f"C{number % 10}", result.index[i]
        ax.plot(sizes, predicted, color=color, linewidth=1, label=f"predicted {index}")
        for name, sign, marker in (("plus", 1, _PLUS), ("minus", -1, _MINUS)):
            change = np.array([_change(op, sign * alpha * v) for alpha in sizes])
            ax.plot(sizes, change, color=color, linestyle="", label=f"{name} {index}", **marker)
            clear = predicted > 10 * rounding
            ratio.plot(
                sizes[clear],
                change[clear] / predicted[clear],
                color=color,
                linewidth=0.6,
                label=f"{name} {index}",
                **marker,
            )
        keys.append(_key(f"{named(result, i)}: {numbers(result, i)}", color=color, linestyle="-", linewidth=1.5))
    _finish_linearity(ax, ratio, rounding)
    keys.append(_key("line: predicted, α√λ;  filled: x + αv;  open: x − αv", color=GREY, **_PLUS))
    _header(ax, keys)
    return fig


_PLUS: dict[str, Any] = {"marker": "^", "markersize": 4.5, "fillstyle": "full"}
_MINUS: dict[str, Any] = {"marker": "v", "markersize": 6.5, "fillstyle": "none"}


def _check_same(op: FisherOperator, result: Eigendistortions, chosen: list[int]) -> None:
    """Refuse a result that is not the operator's, or that of a generalized problem: its values are not those of F."""
    measured = np.atleast_1d(discriminability(op, result.eigendistortions[chosen])) ** 2
    values, index = result.eigenvalues[chosen], result.index[chosen]
    off = np.abs(measured - values)
    i = int(off.argmax())
    if off[i] > SAME * max(result.lambda_max, measured.max()):
        raise ValueError(
            f"the operator gives the pair of index {index[i]} a value of {measured[i]:.4g}, the result "
            f"{values[i]:.4g}: pass the operator that the result is of"
        )


def _spread(k: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, k - 1, min(k, 6))})


def _checked_sizes(alphas: Sequence[float] | None, op: FisherOperator) -> Floats:
    if alphas is None:
        shape = op.image.shape
        signal = len(shape) < 2 or 1 in shape[-2:]
        most = 3 * norm(op.image.numel(), array_of(op.image), None if signal else (0.0, 1.0))
        return np.geomspace(most / 1000, most, 16)
    sizes = np.unique(real(alphas, "alphas").cpu().numpy())
    if len(sizes) == 0 or not (sizes[0] > 0 and np.isfinite(sizes).all()):
        raise ValueError("alphas must be positive numbers")
    return sizes


def _change(op: FisherOperator, shift: torch.Tensor) -> float:
    """Return the length of what a shift of the image changes in the response, in units of its noise."""
    moved = op.linearization.respond(op.image + shift.reshape(op.image.shape))
    return float(op.precision.root((moved - op.response)[None]).double().norm())


def _rounding(op: FisherOperator) -> float:
    """Return what rounding of the response alone may change in it."""
    return float(torch.finfo(op.torch_dtype).eps * op.precision.root(op.response[None]).double().norm())


def _finish_linearity(ax: Axes, ratio: Axes, rounding: float) -> None:
    measured = np.concatenate([line.get_ydata() for line in ax.get_lines() if "predicted" not in str(line.get_label())])
    positive = measured[measured > 0]
    low, high = (positive.min() / 3, positive.max() * 3) if len(positive) else (0.1, 1.0)
    ax.set_ylim(low, high)
    if rounding > low:
        ax.axhspan(low, rounding, color=SHADE, zorder=-1, linewidth=0)
        _beside(ax, rounding, "rounding", va="top")
    if low < 1 < high:
        ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        _beside(ax, 1, "d′ = 1", va="center")
    ax.set_ylabel("change of the response, d′", fontsize=SMALL)
    ax.tick_params(labelbottom=False)
    ratio.axhline(1, color=GREY, linewidth=0.8, zorder=0)
    ratio.set_ylim(0, 2)
    ratio.set_ylabel("measured / predicted", fontsize=SMALL)
    ratio.set_xlabel("size of the distortion, α = ‖αv‖", fontsize=SMALL)
    if not any(np.size(line.get_xdata()) for line in ratio.get_lines()[:-1]):
        ratio.text(0.5, 0.5, "no predicted change is above rounding", transform=ratio.transAxes, ha="center",
                   va="bottom", fontsize=SMALL, color=GREY)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- layout


WIDTH, HEIGHT = 5.2, 3.2
LEFT, RIGHT, BOTTOM, LINE, GAP = 0.85, 0.7, 0.5, 0.155, 0.15


def _axes(fig: Figure, label: str, header: int, below: float = 0.0, lower: bool = False, **options: Any) -> Axes:
    """Add axes with room for lines of text above, and for others below of the height given; sizes are in inches."""
    room = below + GAP if below else 0.0
    width, height = LEFT + WIDTH + RIGHT, BOTTOM + room + HEIGHT + LINE * header + 0.1
    fig.set_layout_engine("none")
    fig.set_size_inches(width, height)
    y, tall = (BOTTOM, below) if lower else (BOTTOM + room, HEIGHT)
    ax = fig.add_axes((LEFT / width, y / height, WIDTH / width, tall / height), label=label, **options)
    ax.tick_params(which="both", labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _beside(ax: Axes, y: float, words: str, va: str) -> None:
    """Write at the right of the axes."""
    ax.annotate(words, (1, y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va=va, fontsize=SMALL, color=GREY)  # fmt: skip


def _key(words: str, **style: Any) -> Line2D:
    style = {"linestyle": ""} | style | {"markersize": min(style.get("markersize", 5), 6)}
    return Line2D([], [], label=words, **style)


def _header(ax: Axes, keys: list[Line2D]) -> None:
    """Write over the axes what is in them."""
    ax.legend(handles=keys, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=SMALL, ncols=1,
              borderaxespad=0.2, borderpad=0.2, labelspacing=0.3, handletextpad=0.5, handlelength=1.2)  # fmt: skip
