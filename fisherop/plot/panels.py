"""One panel each: an image, a distortion, an image distorted; and the numbers and words that stand in it."""

# ruff: noqa: RUF001 - the figures speak of α, λ and −

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from fisherop.maps import number, real, whole
from fisherop.result import Eigendistortions

Artists = list[AxesImage] | list[Line2D]
Panel = NDArray[np.float64]  # (H, W, C), C = 1 or 3, of an image; (T, C) of a signal
Range = tuple[float, float]

LARGE, SMALL = 9, 8
TITLE: dict[str, Any] = {"fontsize": LARGE, "loc": "left", "pad": 4}


def show_image(ax: Axes, image: ArrayLike, *, vrange: Range | None = None, channel: int | None = None) -> Artists:
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
    panel = panel_of(image, channel)
    return draw_image(ax, panel, checked_range(vrange) or default_vrange(panel))


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
    return draw_distortion(ax, panel_of(distortion, channel))


def show_distorted(
    ax: Axes,
    image: ArrayLike,
    distortion: ArrayLike,
    alpha: float,
    *,
    vrange: Range | None = None,
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

    Raises
    ------
    ValueError
        If the distortion has another shape than the image.

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
    base, added = panel_of(image, channel), panel_of(distortion, channel)
    if base.shape != added.shape:
        raise ValueError(f"the distortion has shape {np.shape(distortion)} and the image {np.shape(image)}")
    return draw_distorted(ax, base, added, number(alpha, "alpha"), checked_range(vrange) or default_vrange(base))


def draw_image(ax: Axes, image: Panel, vrange: Range | None) -> Artists:
    """Draw an image, or a signal."""
    if image.ndim == 2:
        return _draw_lines(ax, clipped(image, vrange)[0])
    shown, share = clipped(image, vrange)
    if share:
        caption(ax, f"{percent(share)} clipped")
    return _draw_pixels(ax, shown, vrange)


def draw_distorted(
    ax: Axes, image: Panel, distortion: Panel, alpha: float, vrange: Range | None, note: str = ""
) -> Artists:
    """Draw a distorted image; or a signal, over the undistorted one in grey."""
    shown, share = clipped(image + alpha * distortion, vrange)
    said = [f"α = {alpha:.3g}", *filter(None, [note])]
    end = [f"{percent(share)} clipped"] if vrange else []
    caption(ax, "\n".join([", ".join(said), *end]) if note else ", ".join(said + end))
    if image.ndim == 2:
        for line in _draw_lines(ax, image):
            line.set(color="0.75", marker="")
        ax.set_prop_cycle(None)  # a channel has the same colour in every panel
        return _draw_lines(ax, shown)
    return _draw_pixels(ax, shown, vrange)


def draw_distortion(ax: Axes, distortion: Panel) -> Artists:
    """Draw a distortion alone, and below it the scale."""
    if distortion.ndim == 2:
        ax.axhline(0, color="0.75", linewidth=0.8)
        return _draw_lines(ax, distortion)
    limit = float(np.abs(distortion).max()) or 1.0
    if distortion.shape[-1] == 1:
        caption(ax, f"v from −{limit:.2g} to {limit:.2g}")
        return _draw_pixels(ax, distortion, (-limit, limit))
    gain = 0.5 / limit
    caption(ax, f"0.5 + {gain:.3g} v")
    return _draw_pixels(ax, 0.5 + gain * distortion, (0.0, 1.0))


def _draw_pixels(ax: Axes, pixels: Panel, vrange: Range | None) -> list[AxesImage]:
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
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    return ax.plot(signal, linewidth=1.2, marker="." if len(signal) <= 64 else "", clip_on=False)


# ------------------------------------------------------------------------------------------------------------- numbers


def checked_range(vrange: Any) -> Range | None:
    """Return black and white as Python's numbers; refuse what makes no sense."""
    if vrange is None:
        return None
    ends = real(vrange, "vrange").flatten().tolist()
    if len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
        raise ValueError(f"vrange must be (black, white) with black < white, both finite, not {vrange}")
    return ends[0], ends[1]


def checked_zoom(zoom: Any) -> int | None:
    """Return a zoom as Python's number; refuse what makes no sense."""
    if zoom is None:
        return None
    found = whole(zoom, "zoom")
    if found < 1:
        raise ValueError(f"zoom must be at least 1, not {zoom}")
    return found


def panels_of(result: Eigendistortions, image: ArrayLike | None, channel: int | None) -> tuple[Panel, list[Panel]]:
    """Return the image and every distortion as arrays to draw."""
    if image is None:
        image = result.image
    if image is None:
        raise ValueError("this result knows no image, for its operator had none: pass image=")
    distortions = array_of(result.eigendistortions)
    whole = array_of(image)
    if distortions[0].size != whole.size:
        raise ValueError(
            f"an image of shape {whole.shape} has {whole.size} values and a distortion {distortions[0].size}: pass the "
            "image that the operator was made at"
        )
    return panel_of(whole, channel), [panel_of(v.reshape(whole.shape), channel) for v in distortions]


def panel_of(image: ArrayLike, channel: int | None) -> Panel:
    """Return an image as (H, W, C) with C = 1 or 3, a signal as (T, C)."""
    array = array_of(image)
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    if array.ndim > 3 or array.size == 0:
        raise ValueError(
            f"an image has shape (H, W), (C, H, W) or (1, C, H, W), with nothing empty, not {np.shape(image)}"
        )
    channels = array.reshape((1,) * (3 - array.ndim) + array.shape)
    count = len(channels)
    if channel is not None:
        channel = whole(channel, "channel")
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


def order_of(result: Eigendistortions) -> int:
    """Return n, the number of pixel values."""
    return int(math.prod(result.eigendistortions.shape[1:]))


def clipped(values: Panel, vrange: Range | None) -> tuple[Panel, float]:
    """Return the values within the range, and the fraction of them that had to be changed for it."""
    if vrange is None:
        return values, 0.0
    shown = values.clip(*vrange)
    return shown, float((shown != values).mean())


def default_vrange(image: Panel) -> Range | None:
    """Return black and white of an image; a signal has no range."""
    return (0.0, 1.0) if image.ndim == 3 else None


def array_of(x: Any) -> NDArray[np.float64]:
    """Return an array, from a tensor of any device too."""
    return real(x, "an image").cpu().numpy()


# --------------------------------------------------------------------------------------------------------------- words


def named(result: Eigendistortions, i: int) -> str:
    """Return a pair's index in the spectrum, and what is to be known of it."""
    index = int(result.index[i])
    note = {0: ", noticed most", result.n - 1: ", noticed least"}.get(index, "")
    return f"index {index}{note if result.converged[i] else ', not converged'}"


def numbers(result: Eigendistortions, i: int) -> str:
    """Return a pair's eigenvalue and residual."""
    return f"λ = {result.eigenvalues[i]:.4g}, residual {result.residuals[i]:.1e}"


def title_pair(ax: Axes, result: Eigendistortions, i: int, prefix: str = "") -> None:
    """Write over a panel which pair is in it."""
    color: dict[str, Any] = {} if result.converged[i] else {"color": "firebrick"}
    ax.set_title(f"{prefix}{named(result, i)}\n{numbers(result, i)}", **TITLE, **color)


def caption(ax: Axes, words: str) -> None:
    """Write below a panel."""
    ax.set_xlabel(words, fontsize=SMALL, loc="left", labelpad=2)


def percent(fraction: float) -> str:
    """Return a share in per cent, never a small one as none and never a large one as all."""
    if 0 < fraction < 1e-4:
        return "< 0.01 %"
    return "> 99.9 %" if 0.9995 <= fraction < 1 else f"{100 * fraction:.3g} %"


def empty_figure() -> Figure:
    """Return a new figure of pyplot's."""
    from matplotlib import pyplot  # here, for it may open windows; a figure that is given has no need of it

    return pyplot.figure()
