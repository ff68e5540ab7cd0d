"""Figures of an `Eigendistortion`, by plenoptic's names: all images of a figure share one grey scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from fisherop.maps import number, real, whole
from fisherop.plenoptic.synthesis import Eigendistortion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Process = Callable[[Tensor], Tensor]


def imshow(
    image: Tensor | Sequence[Tensor],
    *,
    vrange: tuple[float, float] | None = None,
    zoom: float | None = None,
    title: str | Sequence[str] | None = "",
    ax: Axes | None = None,
    channel_idx: int | None = None,
    as_rgb: bool = False,
) -> Figure:
    """Draw images side by side, pixel by pixel.

    Parameters
    ----------
    image : Tensor or list of Tensor
        ``(B, C, H, W)``, all of one height and width; leading dimensions may lack.
    vrange : (float, float), optional
        The values of black and white, to which others are clipped; by default (0, 1) for images within, else each
        image's smallest and largest value.
    zoom : float, optional
        Side of a pixel in pixels of the figure: a whole number, or 1 over one. By default the smallest for which
        panels span 2.56 inches.
    title : str or list of str, optional
        Of all panels, or of each.
    ax : Axes, optional
        Where to draw a single panel, in the size that the axes have.
    channel_idx : int, optional
        Draw this channel alone.
    as_rgb : bool, optional
        Draw channels as one panel in colour, else each in grey.

    Returns
    -------
    Figure
        With one panel a channel, or one an image.

    Raises
    ------
    ValueError
        If titles are not as many as panels, or panels are several for one `ax`.

    Examples
    --------
    >>> import torch, fisherop.plenoptic as po
    >>> fig = po.imshow(torch.rand(1, 3, 8, 8), as_rgb=True, zoom=3)
    >>> fig.axes[0].images[0].get_array().shape
    (8, 8, 3)
    """
    from fisherop import plot

    images = [image] if isinstance(image, Tensor) else image
    parts = [part for one in images for part in _parts(one, channel_idx, as_rgb)]
    titles = [title or ""] * len(parts) if title is None or isinstance(title, str) else list(title)
    if len(titles) != len(parts):
        raise ValueError(f"{len(titles)} titles for {len(parts)} panels: give as many, or one")
    if ax is not None and len(parts) != 1:
        raise ValueError(f"{len(parts)} panels do not fit one ax: pass as_rgb=True, or channel_idx")
    grid = _grid(parts[0], 1, len(parts), zoom) if ax is None else [ax]
    for place, part, words in zip(grid, parts, titles, strict=True):
        plot.show_image(place, part, vrange=vrange or _range(part))
        place.set_title(words, **_TITLE)
    return cast("Figure", grid[0].figure)


def display_eigendistortion(
    eigendistortion: Eigendistortion,
    eigenindex: int = 0,
    alpha: float = 5.0,
    process_image: Process | None = None,
    ax: Axes | None = None,
    plot_complex: str = "rectangular",
    as_rgb: bool = False,
    zoom: float | None = None,
    title: str | None = None,
    **kwargs: Any,
) -> Figure:
    """Draw the image with one eigendistortion added, clipped to [0, 1]: the figure of plenoptic 1.x.

    Parameters
    ----------
    eigendistortion : Eigendistortion
        With eigendistortions synthesized.
    eigenindex : int, optional
        Which, by its index in the spectrum: 0 is noticed most, -1 least.
    alpha : float, optional
        What it is multiplied by.
    process_image : callable, optional
        Applied to the sum before it is clipped.
    plot_complex : str, optional
        Without effect: images here are real.
    ax, as_rgb, zoom, title, **kwargs
        As in `imshow`.

    Returns
    -------
    Figure
        With one panel, or one a channel.

    Raises
    ------
    ValueError
        If there is no eigendistortion of this index.

    Examples
    --------
    >>> import torch, fisherop.plenoptic as po
    >>> eig = po.Eigendistortion(torch.rand(1, 1, 8, 8), torch.nn.AvgPool2d(2).eval())
    >>> eig.synthesize()
    >>> po.display_eigendistortion(eig, -1, zoom=4).axes[0].get_title()
    'image + 5 * eigendistortion[-1]'
    """
    eigenindex, alpha = whole(eigenindex, "eigenindex"), number(alpha, "alpha")
    distorted = eigendistortion.image + alpha * eigendistortion._distortion(eigenindex)
    distorted = distorted if process_image is None else process_image(distorted)
    title = f"image + {alpha:g} * eigendistortion[{eigenindex}]" if title is None else title
    options = {"vrange": (0.0, 1.0), "ax": ax, "as_rgb": as_rgb, "zoom": zoom, "title": title} | kwargs
    return imshow(distorted, **options)


def display_eigendistortion_all(
    eigendistortion: Eigendistortion,
    eigenindex: int | Sequence[int] = (0, -1),
    alpha: float | Sequence[float] = 5.0,
    process_image: Process | None = None,
    plot_complex: str = "rectangular",
    as_rgb: bool = False,
    **kwargs: Any,
) -> Figure:
    """Draw the image, eigendistortions, and the image with each added, clipped to [0, 1]: plenoptic 1.3's figure.

    Parameters
    ----------
    eigendistortion, eigenindex, process_image, **kwargs
        As in `eigendistortion_imshow_all`.
    alpha : float or list of float, optional
        What each is multiplied by.
    plot_complex, as_rgb : optional
        Without effect: images here are real, and colour is drawn as colour.

    Returns
    -------
    Figure
        As of `eigendistortion_imshow_all`.

    Examples
    --------
    >>> import torch, fisherop.plenoptic as po
    >>> eig = po.Eigendistortion(torch.rand(1, 1, 8, 8), torch.nn.AvgPool2d(2).eval())
    >>> eig.synthesize()
    >>> len(po.display_eigendistortion_all(eig).axes)
    6
    """

    def clipped(x: Tensor) -> Tensor:
        return (x if process_image is None else process_image(x)).clamp(0, 1)

    options = {"distortion_scale": alpha, "process_image": clipped} | kwargs
    return eigendistortion_imshow_all(eigendistortion, eigenindex, **options)


def eigendistortion_imshow_all(
    eigendistortion: Eigendistortion,
    eigenindex: int | Sequence[int] = (0, -1),
    channel_idx: int | None = None,
    distortion_scale: float | Sequence[float] = 5.0,
    process_image: Process | None = None,
    process_distortion: Process | None = None,
    suptitle: str = "Eigendistortions",
    suptitle_kwargs: dict[str, Any] | None = None,
    *,
    vrange: tuple[float, float] | None = None,
    zoom: float | None = None,
) -> Figure:
    """Draw the image, eigendistortions alone, and below each the image with it added: the figure of plenoptic 2.x.

    Parameters
    ----------
    eigendistortion : Eigendistortion
        With eigendistortions synthesized.
    eigenindex : int or list of int, optional
        Which, by their indices in the spectrum: 0 is noticed most, -1 least.
    channel_idx : int, optional
        Draw this channel alone; by default all, in colour.
    distortion_scale : float or list of float, optional
        What each is multiplied by.
    process_image, process_distortion : callable, optional
        Applied before drawing to the images, and to the distortions alone. Without the latter, a distortion is scaled
        so that zero is mid-grey and its largest entry black, white or a full colour; the scale stands below it.
    suptitle, suptitle_kwargs : optional
        Title of the figure, and arguments for `Figure.suptitle`.
    vrange : (float, float), optional
        The values of black and white in all images; by default (0, 1) if the image lies within, else its range.
    zoom : float, optional
        As in `imshow`.

    Returns
    -------
    Figure
        Its axes are a grid of two rows, the first of which is blank: distortions above, images below.

    Raises
    ------
    ValueError
        If there is no eigendistortion of an index, or scales are not as many.

    Examples
    --------
    >>> import torch, fisherop.plenoptic as po
    >>> eig = po.Eigendistortion(torch.rand(1, 1, 8, 8), torch.nn.AvgPool2d(2).eval())
    >>> eig.synthesize()
    >>> fig = po.eigendistortion_imshow_all(eig, distortion_scale=[2, 4], zoom=8)
    >>> [ax.get_title() for ax in fig.axes[3:]]
    ['image', 'image + 2 * eigendistortion[0]', 'image + 4 * eigendistortion[-1]']
    """
    from fisherop import plot

    several: Any = eigenindex if np.ndim(eigenindex) else [eigenindex]
    indices = [whole(i, "eigenindex") for i in several]
    given = real(distortion_scale, "scales")
    scales = given.tolist() if given.ndim else [float(given)] * len(indices)
    if len(scales) != len(indices):
        raise ValueError(f"{len(scales)} scales for {len(indices)} values of eigenindex: give as many, or one")
    vectors = [eigendistortion._distortion(index) for index in indices]
    moved = [("image", eigendistortion.image)]
    for index, scale, v in zip(indices, scales, vectors, strict=True):
        moved.append((f"image + {scale:g} * eigendistortion[{index}]", eigendistortion.image + scale * v))
    images = [(title, image if process_image is None else process_image(image)) for title, image in moved]
    [original] = _parts(images[0][1], channel_idx, True)
    grid = _grid(original, 2, len(images), zoom, head=0.4 if suptitle else 0.0)
    above, below = grid[1 : len(images)], grid[len(images) :]
    grid[0].set_visible(False)
    for ax, index, v in zip(above, indices, vectors, strict=True):
        ax.set_title(f"eigendistortion[{index}]", **_TITLE)
        [part] = _parts(v if process_distortion is None else process_distortion(v), channel_idx, True)
        if process_distortion is None:
            plot.show_distortion(ax, part)
        else:
            plot.show_image(ax, part, vrange=_range(part))
    for ax, (title, image) in zip(below, images, strict=True):
        ax.set_title(title, **_TITLE)
        [part] = _parts(image, channel_idx, True)
        plot.show_image(ax, part, vrange=vrange or _range(original))
        if part.ndim == 2 and ax.images:
            ax.images[0].set_data(part.numpy())  # the numbers themselves, which the grey scale alone clips
    fig = cast("Figure", grid[0].figure)
    fig.suptitle(suptitle, **({"y": 1 - 0.1 / fig.get_figheight(), "va": "top"} | (suptitle_kwargs or {})))
    return fig


_TITLE: dict[str, Any] = {"fontsize": 9, "pad": 4}


def _grid(part: Tensor, rows: int, columns: int, zoom: float | None, head: float = 0.0) -> list[Axes]:
    """Return axes of whole pixels for panels like this one, row by row; `head` inches are left free above."""
    from matplotlib import pyplot

    zoom = None if zoom is None else number(zoom, "zoom")
    if zoom is not None and not (zoom > 0 and (zoom if zoom >= 1 else 1 / zoom) % 1 == 0):
        raise ValueError(f"zoom must be a whole number, or 1 over one, not {zoom}")
    fig = pyplot.figure(layout="none")
    signal = _is_signal(part)
    zoom = zoom or math.ceil(2.56 * fig.dpi / max(part.shape[-2:]))
    height, width = (180, 320) if signal else (round(length * zoom) for length in part.shape[-2:])
    top, title, caption, gap = (round(inches * fig.dpi) for inches in (head, 0.3, 0.3, 0.5 if signal else 0.15))
    cell = max(width, round(2.3 * fig.dpi)) + gap
    # A hundredth of a pixel more: a canvas has the whole pixels of its size, and rounding must not take one.
    whole = columns * cell + gap + 0.01, top + rows * (title + height + caption) + 0.01
    fig.set_size_inches(whole[0] / fig.dpi, whole[1] / fig.dpi)
    left, down = gap + (cell - gap - width) // 2, title + height + caption
    return [
        fig.add_axes((x / whole[0], 1 - (y + height) / whole[1], width / whole[0], height / whole[1]))
        for y in (top + title + row * down for row in range(rows))
        for x in (left + column * cell for column in range(columns))
    ]


def _parts(image: Tensor, channel_idx: int | None, as_rgb: bool) -> list[Tensor]:
    """Return what is drawn side by side: of each image one channel, all in colour, or each in grey."""
    image = image.detach().cpu()
    if image.ndim < 3:
        return [image]
    images = image.reshape(-1, *image.shape[-3:])
    if channel_idx is not None:
        return list(images[:, whole(channel_idx, "channel_idx")])
    if as_rgb and images.shape[1] > 1:
        return list(images)
    return list(images.flatten(0, 1))


def _is_signal(part: Tensor) -> bool:
    return part.ndim < 2 or 1 in part.shape[-2:]


def _range(image: Tensor) -> tuple[float, float] | None:
    if _is_signal(image):
        return None
    low, high = float(image.min()), float(image.max())
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high if high > low else low + 1)
