"""Figures of eigendistortions: the image, its distortions, and the image distorted by them, exact to the pixel."""

# ruff: noqa: RUF001 - the figures speak of α, × and −

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from fisherop.maps import whole
from fisherop.plot.panels import (
    SMALL,
    TITLE,
    Panel,
    Range,
    caption,
    checked_range,
    checked_zoom,
    default_vrange,
    draw_distorted,
    draw_distortion,
    draw_image,
    empty_figure,
    panels_of,
    title_pair,
)
from fisherop.plot.sizes import Alpha, Choice
from fisherop.result import Eigendistortions


def eigendistortions(
    result: Eigendistortions,
    image: ArrayLike | None = None,
    *,
    pairs: int | Sequence[int] | None = None,
    alpha: Alpha = "norm",
    d_prime: float = 1.0,
    vrange: Range | None = None,
    channel: int | None = None,
    zoom: int | None = None,
    fig: Figure | None = None,
) -> Figure:
    """Draw the image, the image with each distortion added, and below it the distortion alone.

    Every pair has its index in the spectrum, its eigenvalue and its residual over it. Under a distorted image stands
    the share of its values that had to be clipped; under a distortion, how it was scaled to be seen.

    Parameters
    ----------
    result : Eigendistortions
        What `fisherop.eigendistortions` returned.
    image : array_like, optional
        The image, ``(H, W)``, ``(C, H, W)`` or ``(1, C, H, W)``; by default the result's own. A signal, of height or
        width 1 or with no more than one dimension longer than 1, is drawn as lines.
    pairs : int or sequence of int, optional
        Which of the result's pairs, by their place in it: 0 is its first, -1 its last. By default all.
    alpha : "norm", "threshold", float or a float for each pair, optional
        What the distortions, which have unit norm, are multiplied by before they are added. "norm", the default, is
        the same number for all, so that they are compared at equal norms: a root mean square of 5 % of the pixel range.
        "threshold" is d′/√λ, where the model is predicted to notice each of them equally. Where that is more than the
        pixel range can show, it is capped, and the caption says so: at the size where clipping hides a twentieth of
        the distortion's norm, values that are black or white already not counted; of a signal without ``vrange``, at
        the signal's own norm.
    d_prime : float, optional
        The discriminability d′ that counts as threshold, in standard deviations of the response's noise.
    vrange : (float, float), optional
        The pixel values of black and white, (0, 1) by default; what lies outside is clipped. Signals are clipped only
        if it is given.
    channel : int, optional
        Draw this channel alone, in grey: needed where there are neither 1 nor 3 of them.
    zoom : int, optional
        Side of an image's pixel in pixels of the figure; by default the smallest for which panels span 2.56
        inches, 256 pixels at matplotlib's 100 dpi.
    fig : Figure, optional
        An empty figure to draw into, which is resized; by default a new one of pyplot's.

    Returns
    -------
    Figure
        With the axes labelled "image", and "distorted i" and "distortion i" for every index i that is drawn.

    Raises
    ------
    ValueError
        If there is no image, or it does not fit the distortions.

    Examples
    --------
    >>> import torch, fisherop as fo, fisherop.plot
    >>> F = fo.FisherOperator(torch.nn.Conv2d(3, 8, 5), torch.rand(1, 3, 16, 16))
    >>> fig = fo.plot.eigendistortions(fo.eigendistortions(F, k=2), alpha=3)
    >>> fig.axes[1].get_title(loc="left").splitlines()[0]
    'index 0, noticed most'
    """
    vrange, zoom = checked_range(vrange), checked_zoom(zoom)
    chosen = places(result, pairs)
    picture, distortions = panels_of(result, image, channel)
    vrange = vrange or default_vrange(picture)
    choice = Choice(alpha, d_prime)
    sizes = choice.sizes(result, chosen, result.image if image is None else image, vrange, (1,))
    bands = math.ceil(len(chosen) / _MAX_COLUMNS)
    per_band = math.ceil(len(chosen) / bands)
    lines = 2 if any(size.note for size in sizes) else 1
    fig = empty_figure() if fig is None else fig
    layout = _Layout(fig, picture, (bands, 2, per_band + 1), zoom, lines)
    for band in range(bands):
        ax = layout.axes(band, 0, 0, "image")
        draw_image(ax, picture, vrange)
        ax.set_title(_kind(picture), **TITLE)
    limit = "at the signal's own norm" if vrange is None else "where the pixel range cannot show that"
    capped = f", capped {limit}" if lines > 1 else ""
    layout.note(_facts(result, picture, choice.words(result, sizes) + capped))
    for place, (i, size) in enumerate(zip(chosen, sizes, strict=True)):
        band, column = divmod(place, per_band)
        ax = layout.axes(band, 0, column + 1, f"distorted {result.index[i]}")
        draw_distorted(ax, picture, distortions[i], size.alpha, vrange, size.note)
        title_pair(ax, result, i)
        ax = layout.axes(band, 1, column + 1, f"distortion {result.index[i]}")
        draw_distortion(ax, distortions[i])
    if picture.ndim == 2:
        alone = [ax for ax in fig.axes if str(ax.get_label()).startswith("distortion")]
        _same_scale(alone)
        _same_scale([ax for ax in fig.axes if ax not in alone])
    return fig


def both_signs(
    result: Eigendistortions,
    image: ArrayLike | None = None,
    *,
    pairs: int | Sequence[int] | None = None,
    alpha: Alpha = "norm",
    d_prime: float = 1.0,
    vrange: Range | None = None,
    channel: int | None = None,
    zoom: int | None = None,
    fig: Figure | None = None,
) -> Figure:
    """Draw the image between its distortions in either direction, x − αv, x and x + αv: one row a pair.

    A model notices both directions equally as long as it is linear; an observer need not.

    Parameters
    ----------
    result, image, pairs, vrange, channel, zoom, fig
        As in `eigendistortions`.
    alpha, d_prime
        As in `eigendistortions`. A threshold is capped where the pixel range can show it in one direction only.

    Returns
    -------
    Figure
        With the axes labelled "minus i", "image" and "plus i" for every index i.

    Examples
    --------
    >>> import torch, fisherop as fo, fisherop.plot
    >>> F = fo.FisherOperator(torch.nn.AvgPool2d(2), torch.full((1, 1, 8, 8), 0.5))
    >>> fig = fo.plot.both_signs(fo.eigendistortions(F, k=2), pairs=0, alpha="threshold", d_prime=0.1)
    >>> [ax.get_label() for ax in fig.axes]
    ['minus 0', 'image', 'plus 0']
    >>> fig.axes[0].get_xlabel()
    'α = 0.2, 0 % clipped'
    """
    vrange, zoom = checked_range(vrange), checked_zoom(zoom)
    chosen = places(result, pairs)
    picture, distortions = panels_of(result, image, channel)
    vrange = vrange or default_vrange(picture)
    choice = Choice(alpha, d_prime)
    sizes = choice.sizes(result, chosen, result.image if image is None else image, vrange, (-1, 1))
    lines = 2 if any(size.note for size in sizes) else 1
    fig = empty_figure() if fig is None else fig
    layout = _Layout(fig, picture, (len(chosen), 1, 3), zoom, lines)
    for band, (i, size) in enumerate(zip(chosen, sizes, strict=True)):
        minus, middle, plus = (
            layout.axes(band, 0, column, label)
            for column, label in enumerate((f"minus {result.index[i]}", "image", f"plus {result.index[i]}"))
        )
        _draw_middle(middle, picture, vrange, choice.words(result, sizes))
        for ax, sign, prefix in ((minus, -1, "x − αv: "), (plus, 1, "x + αv: ")):
            draw_distorted(ax, picture, sign * distortions[i], size.alpha, vrange, size.note)
            title_pair(ax, result, i, prefix)
        if picture.ndim == 2:
            _same_scale([minus, middle, plus])
    return fig


def places(result: Eigendistortions, pairs: int | Sequence[int] | None) -> list[int]:
    """Return the places in a result that were asked for, counted from 0."""
    k = len(result)
    if pairs is None:
        return list(range(k))
    given: Any = pairs if np.ndim(pairs) else [pairs]
    chosen = [whole(i, "pairs") for i in given]
    if not chosen or not all(-k <= i < k for i in chosen):
        raise ValueError(f"pairs must be one or more of 0 to {k - 1}, or of -{k} to -1, not {pairs}")
    return [i % k for i in chosen]


def _same_scale(panels: list[Axes]) -> None:
    """Let signals be compared by eye."""
    limits = [ax.get_ylim() for ax in panels]
    for ax in panels:
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _draw_middle(ax: Axes, picture: Panel, vrange: Range | None, words: str) -> None:
    draw_image(ax, picture, vrange)
    ax.set_title(f"x, the {_kind(picture)}", **TITLE)
    caption(ax, ", ".join([*filter(None, [ax.get_xlabel()]), words]))


def _kind(picture: Panel) -> str:
    return "image" if picture.ndim == 3 else "signal"


def _facts(result: Eigendistortions, image: Panel, how_large: str) -> str:
    size = f"{image.shape[0]} × {image.shape[1]} pixels" if image.ndim == 3 else f"{len(image)} samples"
    paragraphs = (
        f"{size}\n{result.method}, {result.n_matvec} products",
        f"Above: the {_kind(image)} with distortions αv added, {how_large}",
        "Right: the distortions v alone, of norm 1; λ is how much the model notices them",
    )
    return "\n\n".join(textwrap.fill(words, 38, replace_whitespace=False) for words in paragraphs)


# -------------------------------------------------------------------------------------------------------------- layout

_MAX_COLUMNS = 6
"""Pairs beside each other; what is more goes into a further band."""


class _Layout:
    """Where the panels are, in whole pixels: bands with a title over them, of rows with lines of caption, in columns.

    What surrounds the panels is given in inches, for that is what text is measured in.
    """

    PANEL, CELL, SIGNAL = 2.56, 2.3, (3.2, 1.8)
    GAP, TITLE, CAPTION, LINE, MARGIN, TICKS = 0.14, 0.42, 0.12, 0.13, 0.08, 0.45

    def __init__(self, fig: Figure, image: Panel, grid: tuple[int, int, int], zoom: int | None, lines: int) -> None:
        self.fig = fig
        bands, rows, columns = grid
        if image.ndim == 3:
            zoom = zoom or math.ceil(self.PANEL * fig.dpi / max(image.shape[:2]))
            self.height, self.width = (zoom * length for length in image.shape[:2])
            ticks = 0.0
        else:
            self.width, self.height = map(self._pixels, self.SIGNAL)
            ticks = self.TICKS
        self.cell = max(self.width, self._pixels(self.CELL))
        self.margin, self.title = self._pixels(self.MARGIN), self._pixels(self.TITLE)
        self.left, self.gap = self._pixels(self.MARGIN + ticks), self._pixels(self.GAP + ticks)
        self.caption = self._pixels(self.CAPTION + self.LINE * lines + ticks / 2)
        self.band = self.title + rows * (self.height + self.caption)
        # A hundredth of a pixel more: a canvas has the whole pixels of its size, and rounding must not take one.
        self.size = (
            self.left + (self.cell + self.gap) * columns - self.gap + self.margin + 0.01,
            self.band * bands + 2 * self.margin + 0.01,
        )
        fig.set_layout_engine("none")
        fig.set_size_inches(*(pixels / fig.dpi for pixels in self.size))

    def axes(self, band: int, row: int, column: int, label: str) -> Axes:
        """Add the panel at this place."""
        x, y = self._corner(band, row, column)
        width, height = self.size
        box = (x / width, 1 - (y + self.height) / height, self.width / width, self.height / height)
        return self.fig.add_axes(box, label=label)

    def note(self, words: str) -> None:
        """Write below the first panel, beside those of the second row."""
        x, y = self._corner(0, 1, 0)
        width, height = self.size
        self.fig.text(x / width, 1 - y / height, words, fontsize=SMALL, va="top", linespacing=1.4)

    def _corner(self, band: int, row: int, column: int) -> tuple[int, int]:
        """Return the left and upper edge of a panel, from the figure's upper left corner."""
        x = self.left + column * (self.cell + self.gap)
        return x, self.margin + band * self.band + self.title + row * (self.height + self.caption)

    def _pixels(self, inches: float) -> int:
        return round(inches * self.fig.dpi)
