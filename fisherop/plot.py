"""Figures of results with matplotlib: the image, its distortions, and the image distorted by them.

>>> import torch, fisherop as fo, fisherop.plot
>>> F = fo.FisherOperator(torch.nn.AvgPool2d(2), torch.full((1, 1, 8, 8), 0.5))
>>> fig = fo.plot.eigendistortions(fo.eigendistortions(F, k=2))
>>> [ax.get_label() for ax in fig.axes]
['image', 'distorted 0', 'distortion 0', 'distorted 63', 'distortion 63']

Panels of images are exact: a pixel of the image is a square of ``zoom`` by ``zoom`` pixels of the figure, in the colour
that it has, so that nothing is seen which interpolation put there. That holds for `Figure.savefig` as it is; another
``dpi`` scales the panels.
"""

# ruff: noqa: RUF001 - the figures speak of α, × and −

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherop.result import Eigendistortions

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
except ImportError as error:
    raise ImportError('figures are drawn with matplotlib: pip install "fisherop[plot]"') from error

__all__ = ["eigendistortions", "show_distorted", "show_distortion", "show_image"]

Artists = list[AxesImage] | list[Line2D]
Panel = NDArray[np.float64]  # (H, W, C), C = 1 or 3, of an image; (T, C) of a signal

RMS = 0.05
"""Root mean square of a distortion, as a fraction of the pixel range, where no alpha is given."""


# ------------------------------------------------------------------------------------------------------ whole figures


def eigendistortions(
    result: Eigendistortions,
    image: ArrayLike | None = None,
    *,
    alpha: float | Sequence[float] | None = None,
    vrange: tuple[float, float] | None = None,
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
    alpha : float or k floats, optional
        What the distortions, which have unit norm, are multiplied by before they are added. By default the same number
        for all, so that they are compared at equal norms: a root mean square of 5 % of the pixel range.
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
        With the axes labelled "image", and "distorted i" and "distortion i" for every index i.

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
    if vrange is not None and not vrange[0] < vrange[1]:
        raise ValueError(f"vrange must be (black, white) with black < white, not {vrange}")
    if zoom is not None and zoom < 1:
        raise ValueError(f"zoom must be a whole number of at least 1, not {zoom}")
    picture, distortions = _panels(result, image, channel)
    alphas = _alphas(alpha, result, picture, vrange)
    fig = _empty_figure() if fig is None else fig
    layout = _Layout(fig, picture, len(result), zoom)
    vrange = vrange or _default_vrange(picture)
    for band in range(layout.bands):
        ax = layout.axes(band, 0, 0, "image")
        _draw_image(ax, picture, vrange)
        ax.set_title("image" if picture.ndim == 3 else "signal", **_TITLE)
    layout.note(_facts(result, picture, alphas))
    for i, (distortion, size) in enumerate(zip(distortions, alphas, strict=True)):
        band, column = divmod(i, layout.pairs_per_band)
        ax = layout.axes(band, 0, column + 1, f"distorted {result.index[i]}")
        _draw_distorted(ax, picture, distortion, size, vrange)
        _name_pair(ax, result, i)
        ax = layout.axes(band, 1, column + 1, f"distortion {result.index[i]}")
        _draw_distortion(ax, distortion)
    return fig


# ------------------------------------------------------------------------------------------------------ single panels


def show_image(
    ax: Axes, image: ArrayLike, *, vrange: tuple[float, float] | None = None, channel: int | None = None
) -> Artists:
    """Draw an image pixel by pixel, or a signal as lines.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    image, vrange, channel
        As in `eigendistortions`.

    Returns
    -------
    list of AxesImage or of Line2D
        One image; or the lines, one a channel.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> [artist] = show_image(Figure().add_subplot(), [[0.0, 0.5], [1.0, 2.0]])
    >>> artist.get_array().data
    array([[0. , 0.5],
           [1. , 1. ]])
    """
    panel = _panel(image, channel)
    return _draw_image(ax, panel, vrange or _default_vrange(panel))


def show_distortion(ax: Axes, distortion: ArrayLike, *, channel: int | None = None) -> Artists:
    """Draw a distortion alone: zero is mid-grey and its largest entry black, white or a full colour.

    Below it stands the scale: the limits of black and white, or the gain in ``0.5 + gain * v`` where there is colour.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    distortion : array_like
        ``(H, W)``, ``(C, H, W)`` or ``(1, C, H, W)``, or a signal.
    channel : int, optional
        Draw this channel alone.

    Returns
    -------
    list of AxesImage or of Line2D
        One image; or the lines, one a channel.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().add_subplot()
    >>> [artist] = show_distortion(ax, [[0.0, 0.8], [-0.6, 0.0]])
    >>> artist.get_clim(), ax.get_xlabel()
    ((-0.8, 0.8), 'v from −0.8 to 0.8')
    """
    return _draw_distortion(ax, _panel(distortion, channel))


def show_distorted(
    ax: Axes,
    image: ArrayLike,
    distortion: ArrayLike,
    alpha: float,
    *,
    vrange: tuple[float, float] | None = None,
    channel: int | None = None,
) -> Artists:
    """Draw ``image + alpha * distortion``, and write below it the share of values that had to be clipped.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    image, vrange, channel
        As in `eigendistortions`.
    distortion : array_like
        Of the image's shape.
    alpha : float
        What it is multiplied by.

    Returns
    -------
    list of AxesImage or of Line2D
        One image; or the lines, one a channel.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = Figure().add_subplot()
    >>> [artist] = show_distorted(ax, [[0.0, 0.5], [1.0, 0.5]], [[0.0, 0.8], [0.6, 0.0]], alpha=0.5)
    >>> artist.get_array().data
    array([[0. , 0.9],
           [1. , 0.5]])
    >>> ax.get_xlabel()
    'α = 0.5, 25 % clipped'
    """
    base, added = _panel(image, channel), _panel(distortion, channel)
    if base.shape != added.shape:
        raise ValueError(f"the distortion has shape {np.shape(distortion)} and the image {np.shape(image)}")
    return _draw_distorted(ax, base, added, alpha, vrange or _default_vrange(base))


def _draw_image(ax: Axes, image: Panel, vrange: tuple[float, float] | None) -> Artists:
    if image.ndim == 2:
        return _draw_lines(ax, _clipped(image, vrange)[0])
    shown, clipped = _clipped(image, vrange)
    if clipped:
        _caption(ax, f"{_percent(clipped)} clipped")
    return _draw_pixels(ax, shown, vrange)


def _draw_distorted(
    ax: Axes, image: Panel, distortion: Panel, alpha: float, vrange: tuple[float, float] | None
) -> Artists:
    shown, clipped = _clipped(image + alpha * distortion, vrange)
    _caption(ax, f"α = {alpha:.3g}" + (f", {_percent(clipped)} clipped" if vrange else ""))
    if image.ndim == 2:
        for line in _draw_lines(ax, image):
            line.set(color="0.75", marker="")
        ax.set_prop_cycle(None)  # a channel has the same colour in every panel
        return _draw_lines(ax, shown)
    return _draw_pixels(ax, shown, vrange)


def _draw_distortion(ax: Axes, distortion: Panel) -> Artists:
    if distortion.ndim == 2:
        ax.axhline(0, color="0.75", linewidth=0.8)
        return _draw_lines(ax, distortion)
    limit = float(np.abs(distortion).max()) or 1.0
    if distortion.shape[-1] == 1:
        _caption(ax, f"v from −{limit:.2g} to {limit:.2g}")
        return _draw_pixels(ax, distortion, (-limit, limit))
    gain = 0.5 / limit
    _caption(ax, f"0.5 + {gain:.3g} v")
    return _draw_pixels(ax, 0.5 + gain * distortion, (0.0, 1.0))


def _draw_pixels(ax: Axes, pixels: Panel, vrange: tuple[float, float] | None) -> list[AxesImage]:
    assert vrange is not None
    low, high = vrange
    # All that matplotlib would otherwise take from the user's rcParams, so that a figure is the same everywhere.
    fixed: dict[str, Any] = {"interpolation": "nearest", "origin": "upper", "aspect": "equal"}
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if pixels.shape[-1] == 1:
        return [ax.imshow(pixels[..., 0], cmap="gray", vmin=low, vmax=high, **fixed)]
    return [ax.imshow((pixels - low) / (high - low), **fixed)]


def _draw_lines(ax: Axes, signal: Panel) -> list[Line2D]:
    ax.tick_params(labelsize=_SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    return ax.plot(signal, linewidth=1.2, marker="." if len(signal) <= 64 else "", clip_on=False)


# ------------------------------------------------------------------------------------------------------------- numbers


def _panels(result: Eigendistortions, image: ArrayLike | None, channel: int | None) -> tuple[Panel, list[Panel]]:
    """Return the image and every distortion as arrays to draw."""
    if image is None:
        image = result.image
    if image is None:
        raise ValueError("this result knows no image, for its operator had none: pass image=")
    distortions = _array(result.eigendistortions)
    whole = _array(image)
    if distortions[0].size != whole.size:
        raise ValueError(
            f"an image of shape {whole.shape} has {whole.size} values and a distortion {distortions[0].size}: pass the "
            "image that the operator was made at"
        )
    return _panel(whole, channel), [_panel(v.reshape(whole.shape), channel) for v in distortions]


def _panel(image: ArrayLike, channel: int | None) -> Panel:
    array = _array(image)
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    if array.ndim > 3 or array.size == 0:
        raise ValueError(
            f"an image has shape (H, W), (C, H, W) or (1, C, H, W), with nothing empty, not {np.shape(image)}"
        )
    channels = array.reshape((1,) * (3 - array.ndim) + array.shape)
    count = len(channels)
    if channel is not None:
        if not -count <= channel < count:
            raise ValueError(f"channel must be one of 0 to {count - 1}, not {channel}")
        channels = channels[[channel]]
    if 1 in channels.shape[1:]:
        return channels.reshape(len(channels), -1).T
    if len(channels) not in (1, 3):
        raise ValueError(
            f"an image of {count} channels is neither grey nor RGB: pass channel=0 to {count - 1} to see one of them"
        )
    return np.moveaxis(channels, 0, -1)


def _alphas(
    alpha: float | Sequence[float] | None,
    result: Eigendistortions,
    image: Panel,
    vrange: tuple[float, float] | None,
) -> list[float]:
    k = len(result)
    if alpha is None:
        low, high = vrange or _default_vrange(image) or (0.0, float(np.abs(image).max()) or 1.0)
        return [RMS * (high - low) * math.sqrt(_order(result))] * k
    given = np.asarray(alpha, dtype=np.float64)
    if given.ndim > 1 or given.size not in (1, k):
        raise ValueError(f"alpha must be one number or {k}, one for each pair, not {given.size}")
    return [float(size) for size in np.broadcast_to(given, k)]


def _order(result: Eigendistortions) -> int:
    return int(math.prod(result.eigendistortions.shape[1:]))


def _clipped(values: Panel, vrange: tuple[float, float] | None) -> tuple[Panel, float]:
    """Return the values within the range, and the fraction of them that had to be changed for it."""
    if vrange is None:
        return values, 0.0
    shown = values.clip(*vrange)
    return shown, float((shown != values).mean())


def _default_vrange(image: Panel) -> tuple[float, float] | None:
    return (0.0, 1.0) if image.ndim == 3 else None


def _array(x: Any) -> NDArray[np.float64]:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


# --------------------------------------------------------------------------------------------------------------- words

_LARGE, _SMALL = 9, 8
_TITLE: dict[str, Any] = {"fontsize": _LARGE, "loc": "left", "pad": 4}


def _name_pair(ax: Axes, result: Eigendistortions, i: int) -> None:
    index, style = int(result.index[i]), dict(_TITLE)
    note = {0: ", noticed most", _order(result) - 1: ", noticed least"}.get(index, "")
    if not result.converged[i]:
        note, style["color"] = ", not converged", "firebrick"
    ax.set_title(f"index {index}{note}\nλ = {result.eigenvalues[i]:.4g}, residual {result.residuals[i]:.1e}", **style)


def _caption(ax: Axes, words: str) -> None:
    ax.set_xlabel(words, fontsize=_SMALL, loc="left", labelpad=2)


def _facts(result: Eigendistortions, image: Panel, alphas: list[float]) -> str:
    size = f"{image.shape[0]} × {image.shape[1]} pixels" if image.ndim == 3 else f"{len(image)} samples"
    what = "image" if image.ndim == 3 else "signal"
    rms = alphas[0] / math.sqrt(_order(result))
    norms = f"all of norm {alphas[0]:.3g} (RMS {rms:.2g})" if len(set(alphas)) == 1 else "each of its own norm α"
    paragraphs = (
        f"{size}\n{result.method}, {result.n_matvec} products",
        f"Above: the {what} with distortions αv added, {norms}",
        "Right: the distortions v alone, of norm 1; λ is how much the model notices them",
    )
    return "\n\n".join(textwrap.fill(words, 38, replace_whitespace=False) for words in paragraphs)


def _percent(fraction: float) -> str:
    return "< 0.01 %" if 0 < fraction < 1e-4 else f"{100 * fraction:.3g} %"


# -------------------------------------------------------------------------------------------------------------- layout


class _Layout:
    """Where the panels are, in whole pixels: bands of two rows, the image in front and then a column for each pair.

    What surrounds the panels is given in inches, for that is what text is measured in.
    """

    PANEL, CELL, SIGNAL = 2.56, 2.3, (3.2, 1.8)
    GAP, TITLE, CAPTION, MARGIN, TICKS = 0.14, 0.42, 0.25, 0.08, 0.45
    MAX_PAIRS = 6

    def __init__(self, fig: Figure, image: Panel, k: int, zoom: int | None) -> None:
        self.fig = fig
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
        self.caption = self._pixels(self.CAPTION + ticks / 2)
        self.bands = math.ceil(k / self.MAX_PAIRS)
        self.pairs_per_band = math.ceil(k / self.bands)
        self.band = self.title + 2 * (self.height + self.caption)
        # A hundredth of a pixel more: a canvas has the whole pixels of its size, and rounding must not take one.
        self.size = (
            self.left + (self.cell + self.gap) * (self.pairs_per_band + 1) - self.gap + self.margin + 0.01,
            self.band * self.bands + 2 * self.margin + 0.01,
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
        """Write below the image, beside the distortions."""
        x, y = self._corner(0, 1, 0)
        width, height = self.size
        self.fig.text(x / width, 1 - y / height, words, fontsize=_SMALL, va="top", linespacing=1.4)

    def _corner(self, band: int, row: int, column: int) -> tuple[int, int]:
        """Return the left and upper edge of a panel, from the figure's upper left corner."""
        x = self.left + column * (self.cell + self.gap)
        return x, self.margin + band * self.band + self.title + row * (self.height + self.caption)

    def _pixels(self, inches: float) -> int:
        return round(inches * self.fig.dpi)


def _empty_figure() -> Figure:
    from matplotlib import pyplot  # here, for it may open windows; a figure that is given has no need of it

    return pyplot.figure()
