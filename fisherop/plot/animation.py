"""A file in which an image and a distorted one take turns, so that an observer may see what has changed.

>>> import pathlib, tempfile, torch, fisherop as fo, fisherop.plot
>>> F = fo.FisherOperator(torch.nn.AvgPool2d(2), torch.full((1, 1, 8, 8), 0.5))
>>> path = pathlib.Path(tempfile.mkdtemp()) / "flip.gif"
>>> fo.plot.flip(fo.eigendistortions(F, k=2), path, pair=-1)
>>> path.read_bytes()[:6]
b'GIF89a'
"""

# ruff: noqa: RUF001 - the caption speaks of α

from __future__ import annotations

import math
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from fisherop.maps import number, whole
from fisherop.plot.pairs import places
from fisherop.plot.panels import Range, checked_range, checked_zoom, clipped, named, numbers, panels_of
from fisherop.plot.sizes import Choice
from fisherop.result import Eigendistortions

if TYPE_CHECKING:
    import PIL.Image

Bytes = NDArray[np.uint8]  # (H, W, C), C = 1 or 3

SPAN = 256
"""Pixels that a small image is magnified to at least."""

GREYS = 8
"""Levels of the caption in a palette that has room for no more."""


def flip(
    result: Eigendistortions,
    path: str | os.PathLike[str],
    image: ArrayLike | None = None,
    *,
    pair: int = 0,
    alpha: str | float = "norm",
    d_prime: float = 1.0,
    seconds: float = 1.0,
    vrange: Range | None = None,
    channel: int | None = None,
    zoom: int | None = None,
) -> None:
    """Write an endless animation of the image and the image distorted by one pair, with a caption that stands still.

    A pixel that the distortion does not change does not change in the file: grey images are exact in 256 levels, and
    those in colour share one palette, without dithering. A palette has 256 colours, in which gentle distortions of a
    photograph are coarse: ``.png`` writes an animated PNG, which has all colours.

    Parameters
    ----------
    result, image, alpha, d_prime, vrange, channel
        As in `eigendistortions`.
    path : path
        Where to write, ending in ``.gif`` or ``.png``.
    pair : int, optional
        Which of the result's pairs, by its place in it: 0 is its first, -1 its last.
    seconds : float, optional
        How long each of the two images stays, in hundredths of a second. More than three flashes a second can cause
        seizures (WCAG 2.2, criterion 2.3.1), so less than a sixth of a second is refused.
    zoom : int, optional
        Side of an image's pixel in pixels of the file; by default the smallest for which the image spans 256.

    Raises
    ------
    ValueError
        For a signal, which `both_signs` draws; or a path that ends in something else.

    Examples
    --------
    >>> import pathlib, tempfile, torch, fisherop as fo, fisherop.plot
    >>> F = fo.FisherOperator(torch.nn.Conv2d(3, 8, 5), torch.rand(1, 3, 16, 16))
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "flip.png"
    >>> fo.plot.flip(fo.eigendistortions(F), path, alpha="threshold", seconds=0.5, zoom=8)
    """
    vrange, zoom, seconds = checked_range(vrange), checked_zoom(zoom), number(seconds, "seconds")
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".png"):
        raise ValueError(f"an animation is written to a file that ends in .gif or .png, not {os.fspath(path)!r}")
    if not 1 / 6 <= seconds <= 600:
        raise ValueError(f"seconds must lie between 1/6, for faster flicker is dangerous, and 600, not {seconds}")
    [place] = places(result, whole(pair, "pair"))
    picture, distortions = panels_of(result, image, channel)
    if picture.ndim == 2:
        raise ValueError("a signal has no pixels to flip: draw it with both_signs")
    vrange = vrange or (0.0, 1.0)
    [size] = Choice(alpha, d_prime).sizes(result, [place], result.image if image is None else image, vrange, (1,))
    zoom = zoom or math.ceil(SPAN / max(picture.shape[:2]))
    words = [
        named(result, place),
        numbers(result, place),
        f"x and x + αv, α = {size.alpha:.3g}",
        *filter(None, [size.note]),
    ]
    still = _caption(words, max(zoom * picture.shape[1], SPAN))
    moved = picture + size.alpha * distortions[place]
    frames = [_bytes(picture, vrange), _bytes(moved, vrange)]
    first, second = _in_palette(frames, still, zoom) if suffix == ".gif" else _in_full(frames, still, zoom)
    # Not optimized: Pillow 13 gets some palettes wrong by a level when it shortens them.
    milliseconds = round(100 * seconds) * 10
    first.save(path, save_all=True, append_images=[second], optimize=False, duration=milliseconds, loop=0)


def _bytes(picture: NDArray[np.float64], vrange: Range) -> Bytes:
    low, high = vrange
    return np.round((clipped(picture, vrange)[0] - low) / (high - low) * 255).astype(np.uint8)


def _caption(words: list[str], width: int) -> Bytes:
    """Draw lines of text, black on white, in an image of this width."""
    lines = [line for text in words for line in textwrap.wrap(text, width // 7)]
    fig = Figure(figsize=((width + 0.01) / 100, (16 * len(lines) + 8.01) / 100), dpi=100, facecolor="white")
    canvas: Any = FigureCanvasAgg(fig)
    x, y = 4 / width, 1 - 5 / (16 * len(lines) + 8)
    fig.text(x, y, "\n".join(lines), fontsize=8, va="top", linespacing=1.3, color="black")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :1].copy()


def _in_full(frames: list[Bytes], still: Bytes, zoom: int) -> list[PIL.Image.Image]:
    from PIL import Image

    sheets = [_sheet(frame, still, zoom, 255) for frame in frames]
    return [Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet) for sheet in sheets]


def _in_palette(frames: list[Bytes], still: Bytes, zoom: int) -> list[PIL.Image.Image]:
    """Return the frames in one palette, so that a colour which stays the same stays the same."""
    from PIL import Image

    if frames[0].shape[-1] == 1:
        return _in_full(frames, still, zoom)
    places, colors = _quantized(np.concatenate(frames))
    grey = np.linspace(0, 255, GREYS).round().astype(np.uint8)
    palette = np.concatenate([colors, np.repeat(grey[:, None], 3, axis=1)])
    caption = (len(colors) + np.round(still / 255 * (GREYS - 1))).astype(np.uint8)
    images = []
    for frame in np.split(places, 2):
        sheet = Image.fromarray(_sheet(frame, caption, zoom, len(palette) - 1)[..., 0], mode="P")
        sheet.putpalette(palette.tobytes())
        images.append(sheet)
    return images


def _quantized(pixels: Bytes) -> tuple[Bytes, Bytes]:
    """Return every pixel's place in a palette, (H, W, 1), and the palette: exact where the colours fit in it."""
    from PIL import Image

    room = 256 - GREYS
    colors, places = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colors) > room:
        image = Image.fromarray(pixels).quantize(room, kmeans=2, dither=Image.Dither.NONE)
        colors = np.frombuffer(bytes(image.getpalette() or []), np.uint8).reshape(-1, 3)
        places = np.asarray(image)
    return places.reshape(*pixels.shape[:2], 1).astype(np.uint8), colors


def _sheet(frame: Bytes, caption: Bytes, zoom: int, white: Any) -> Bytes:
    """Magnify a frame without interpolation, and put the caption below it."""
    big = frame.repeat(zoom, axis=0).repeat(zoom, axis=1)
    height, width, channels = big.shape
    sheet = np.full((height + len(caption), caption.shape[1], channels), white, dtype=np.uint8)
    sheet[:height, :width] = big
    sheet[height:] = caption
    return sheet
