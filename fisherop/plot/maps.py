"""Where the model looks: sensitivity maps over the photograph.

>>> import torch, fisherop as fo, fisherop.plot
>>> F = fo.FisherOperator(torch.nn.Conv2d(3, 8, 5), torch.rand(1, 3, 12, 12))
>>> [ax.get_label() for ax in fo.plot.sensitivity_map(fo.sensitivity_map(F)).axes]
['image', 'sensitivity']
"""

# ruff: noqa: RUF001 - the figures speak of d′

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from fisherop.plot.pairs import _Layout
from fisherop.plot.panels import (
    SMALL,
    TITLE,
    Panel,
    Range,
    array_of,
    caption,
    checked_range,
    checked_zoom,
    default_vrange,
    draw_image,
    empty_figure,
    panel_of,
    percent,
)
from fisherop.spectrum.estimate import Estimate

BRIGHTEST = 99.5
"""Percentile of a map that the end of the scale stands for: a few pixels may be far more sensitive than all others."""
SHOWN = 0.25
"""Share of the photograph in the colours of a map over it."""


def sensitivity_map(
    maps: Estimate | Mapping[str, Estimate],
    image: ArrayLike | None = None,
    *,
    vrange: Range | None = None,
    channel: int | None = None,
    zoom: int | None = None,
    fig: Figure | None = None,
) -> Figure:
    """Draw how sensitive a model is to every pixel, over the photograph, one model beside the other.

    The map is the root of the diagonal of F: the discriminability d′ of a change of one pixel by 1, its root mean
    square over channels. From dark to bright it runs from zero to the brightest but half a percent of the pixels;
    the photograph is seen through it. Below it stand the ends of the scale and the map's standard error.

    Parameters
    ----------
    maps : Estimate, or mapping of str to Estimate
        What `fisherop.sensitivity_map` returned; the keys of a mapping are titles.
    image : array_like, optional
        The image, by default the estimates' own. A signal is drawn as lines, with 95 % intervals.
    vrange, channel, zoom, fig
        As in `fisherop.plot.eigendistortions`; a channel that is chosen is that of the maps too.

    Returns
    -------
    Figure
        With the axes "image" and "sensitivity", or one "sensitivity name" for each.

    Raises
    ------
    ValueError
        If there is no image, or a map does not fit it.

    Examples
    --------
    >>> import torch, fisherop as fo, fisherop.plot
    >>> F = fo.FisherOperator(torch.nn.Conv2d(3, 8, 5), torch.rand(1, 3, 12, 12))
    >>> fig = fo.plot.sensitivity_map({"layer 1": fo.sensitivity_map(F)})
    >>> fig.axes[1].get_title(loc="left").splitlines()[0]
    'layer 1'
    """
    several = dict(maps) if isinstance(maps, Mapping) else {"sensitivity": maps}
    if not several:
        raise ValueError("there is no map to draw")
    vrange, zoom = checked_range(vrange), checked_zoom(zoom)
    if image is None:
        image = next(iter(several.values())).image
    if image is None:
        raise ValueError("these maps know no image, for their operator had none: pass image=")
    whole = array_of(image)
    picture = panel_of(whole, channel)
    vrange = vrange or default_vrange(picture)
    fig = empty_figure() if fig is None else fig
    layout = _Layout(fig, picture, (1, 1, len(several) + 1), zoom, 2)
    ax = layout.axes(0, 0, 0, "image")
    draw_image(ax, picture, vrange)
    ax.set_title("image" if picture.ndim == 3 else "signal", **TITLE)
    for column, (name, found) in enumerate(several.items(), start=1):
        label = f"sensitivity {name}" if isinstance(maps, Mapping) else "sensitivity"
        ax = layout.axes(0, 0, column, label)
        ax.set_title(f"{name}\nd′ of a change of one pixel by 1", **TITLE)
        parts = {part: _fitted(getattr(found, part), whole, channel) for part in ("value", "low", "high")}
        if picture.ndim == 2:
            _draw_signal(ax, parts)
        else:
            _draw_map(ax, parts["value"], picture, vrange)
        ends = f"from 0, dark, to {ax.images[0].get_clim()[1]:.3g}, bright" if ax.images else "with 95 % intervals"
        caption(ax, f"{ends}\n{_error_words(found)}")
    return fig


def _fitted(values: Any, image: NDArray[np.float64], channel: int | None) -> Panel:
    """Return the diagonal's root, as (H, W, 1) with a mean over channels, or (T, C) for a signal."""
    array = array_of(values)
    if array.size != image.size:
        raise ValueError(f"a map of {array.size} values does not fit an image of {image.size}: pass its own image")
    squares = panel_of(array.reshape(image.shape), channel)
    roots: Panel = np.sqrt(squares if squares.ndim == 2 else squares.mean(-1, keepdims=True))
    return roots


def _draw_map(ax: Axes, values: Panel, picture: Panel, vrange: Range | None) -> None:
    """Draw a map in colours, through which the photograph's luminance shows."""
    low, high = vrange or (0.0, 1.0)
    grey = ((picture.mean(-1) - low) / (high - low)).clip(0, 1)
    top = float(np.percentile(values, BRIGHTEST)) or float(values.max()) or 1.0
    colours = colormaps["inferno"]((values[..., 0] / top).clip(0, 1))[..., :3]
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    fixed: dict[str, Any] = {"interpolation": "nearest", "origin": "upper", "aspect": "equal"}
    # The numbers themselves lie beneath, for who asks the axes for them; what is seen is the mixture.
    ax.imshow(values[..., 0], cmap="inferno", vmin=0, vmax=top, **fixed)
    ax.imshow((1 - SHOWN) * colours + SHOWN * grey[..., None], **fixed)


def _draw_signal(ax: Axes, parts: dict[str, Panel]) -> None:
    for i, value in enumerate(parts["value"].T):
        ax.fill_between(range(len(value)), parts["low"][:, i], parts["high"][:, i], color=f"C{i}", alpha=0.25, lw=0)
        ax.plot(value, color=f"C{i}", linewidth=1.2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=SMALL)


def _error_words(found: Estimate) -> str:
    value, error = array_of(found.value), array_of(found.standard_error)
    inside = value > 0
    if not error.any():
        return "exact"
    return f"standard error {percent(float(np.median(error[inside] / value[inside])) / 2)} of d′"
