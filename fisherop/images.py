"""Images to distort, as tensors ``(1, C, H, W)`` in [0, 1]: photographs, files, a colour wheel; crop, resize, grey.

>>> color_wheel(64).shape
torch.Size([1, 3, 64, 64])
>>> to_grey(center_crop(color_wheel(64), 32)).shape
torch.Size([1, 1, 32, 32])
"""

from __future__ import annotations

import difflib
import operator
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["PHOTOGRAPHS", "center_crop", "color_wheel", "load", "photograph", "resize", "to_grey"]

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "retina",
    "rocket",
)
"""The photographs that scikit-image brings in its wheel, and so need no download."""


def photograph(
    name: str = "astronaut", size: int | None = None, grey: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return one of the photographs that come with scikit-image.

    Parameters
    ----------
    name : str
        One of `PHOTOGRAPHS`; scikit-image tells where each is from. ``brick``, ``camera``, ``coins``, ``grass``,
        ``gravel`` and ``moon`` are grey, the others in colour.
    size : int, optional
        Cut the largest square out of the middle, and resize it to ``size × size``; the whole photograph by default.
    grey : bool
        Return luminance, one channel.
    dtype : torch.dtype
        Of the tensor.

    Returns
    -------
    Tensor
        ``(1, C, H, W)`` in [0, 1], C = 3 in colour and 1 in grey.

    Raises
    ------
    ValueError
        If there is no such photograph.
    ImportError
        If scikit-image is not installed.

    Examples
    --------
    >>> photograph("chelsea", size=64).shape
    torch.Size([1, 3, 64, 64])
    """
    if name not in PHOTOGRAPHS:
        close = difflib.get_close_matches(name, PHOTOGRAPHS)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(PHOTOGRAPHS)}"
        raise ValueError(f"unknown photograph {name!r}: {hint}")
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError('photographs come with scikit-image: pip install "fisherop[plot]"') from error
    return _prepared(getattr(data, name)(), 255, size, grey, dtype)


def load(
    path: str | os.PathLike[str], size: int | None = None, grey: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Read an image file: PNG, JPEG, TIFF and what else Pillow reads.

    Parameters
    ----------
    path : path
        The file. It is turned upright as its camera noted, flattened on white where it is transparent, and of an
        animation the first frame is taken.
    size, grey, dtype
        As in `photograph`.

    Returns
    -------
    Tensor
        ``(1, C, H, W)`` in [0, 1], C = 3 in colour and 1 in grey.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no image that Pillow can read.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "red.png"
    >>> Image.new("RGB", (40, 30), "red").save(path)
    >>> load(path).shape, load(path, size=16, grey=True).shape
    (torch.Size([1, 3, 30, 40]), torch.Size([1, 1, 16, 16]))
    """
    name = os.fspath(path)
    image = _opened(name)
    if image.mode.startswith(("I", "F")):  # 16 bits or more
        pixels, white = np.asarray(image), 1 if image.mode == "F" else 65535
        if not (pixels.min() >= 0 and pixels.max() <= white):
            raise ValueError(
                f"the pixels of {name!r} go from {pixels.min()} to {pixels.max()}: scale them to [0, {white}]"
            )
        return _prepared(pixels, white, size, grey, dtype)
    target = "L" if image.mode in {"1", "L", "LA", "La"} else "RGB"
    return _prepared(np.asarray(_flattened(image).convert(target)), 255, size, grey, dtype)


def color_wheel(size: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a colour wheel on white: hue turns with the angle, saturation grows from 0 in the middle to 1 at the rim.

    Parameters
    ----------
    size : int
        Side in pixels; the wheel touches all four.
    dtype : torch.dtype
        Of the tensor.

    Returns
    -------
    Tensor
        ``(1, 3, size, size)`` in [0, 1]. Red is to the right, green up left, blue down left.

    Raises
    ------
    ValueError
        If the size is less than one pixel.

    Examples
    --------
    >>> wheel = color_wheel(64)
    >>> wheel[0, :, 32, 63].round(decimals=1)
    tensor([1., 0., 0.])
    """
    height, _ = _pair(size)
    offset = (2 * torch.arange(height, dtype=torch.float64, device="cpu") + 1 - height) / height
    y, x = -offset[:, None], offset[None, :]
    radius = torch.hypot(x, y)
    sextant = torch.atan2(y, x) * (3 / torch.pi)
    # HSV to RGB at value 1: 1 - S max(0, min(k, 4 - k, 1)), k = (n + H / 60°) mod 6, n = 5, 3, 1 for R, G, B.
    k = (torch.tensor([5, 3, 1], device="cpu")[:, None, None] + sextant) % 6
    darkness = torch.minimum(k, 4 - k).clamp(0, 1)
    inside = ((1 - radius) * height / 2 + 0.5).clamp(0, 1)  # the part of a pixel on the rim that is in the wheel
    return (1 - inside * radius.clamp(max=1) * darkness)[None].to(dtype)


def center_crop(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Cut the middle out of the last two dimensions.

    Parameters
    ----------
    x : Tensor
        ``(..., H, W)``.
    size : int or (int, int)
        Height and width in pixels; one number for a square. What is left over and odd goes to the bottom and right.

    Returns
    -------
    Tensor
        A view of ``x``.

    Raises
    ------
    ValueError
        If the image is smaller than that.

    Examples
    --------
    >>> center_crop(torch.arange(6.0).reshape(2, 3), (2, 1)).flatten()
    tensor([1., 4.])
    """
    height, width = _pair(size)
    if height > x.shape[-2] or width > x.shape[-1]:
        raise ValueError(f"cannot crop {height}x{width} out of {x.shape[-2]}x{x.shape[-1]}: take less, or resize first")
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def resize(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize an image to ``size``, bicubic and without aliasing; what overshoots is cut to [0, 1].

    Parameters
    ----------
    x : Tensor
        ``(1, C, H, W)`` in [0, 1].
    size : int or (int, int)
        Height and width in pixels; one number for a square.

    Returns
    -------
    Tensor
        ``(1, C, height, width)`` in [0, 1].

    Raises
    ------
    ValueError
        If the image has another shape than that.

    Examples
    --------
    >>> resize(color_wheel(64), 16).shape
    torch.Size([1, 3, 16, 16])
    """
    if x.ndim != 4:
        raise ValueError(f"resize takes an image of shape (1, C, H, W), not {tuple(x.shape)}")
    return F.interpolate(x, _pair(size), mode="bicubic", antialias=True).clamp(0, 1)


def to_grey(x: Tensor) -> Tensor:
    """Return the luminance of a colour image ``(..., 3, H, W)`` as ``(..., 1, H, W)``; a grey one comes back as it is.

    The weights are those of ITU-R BT.709, applied to the pixel values as they are stored.

    Parameters
    ----------
    x : Tensor
        ``(..., 3, H, W)`` or ``(..., 1, H, W)``.

    Returns
    -------
    Tensor
        ``(..., 1, H, W)``.

    Raises
    ------
    ValueError
        If there are neither three channels nor one.

    Examples
    --------
    >>> to_grey(torch.ones(1, 3, 1, 1))
    tensor([[[[1.]]]])
    """
    channels = x.shape[-3] if x.ndim >= 3 else None
    if channels == 1:
        return x
    if channels != 3:
        raise ValueError(f"an image has shape (1, 3, H, W) in colour or (1, 1, H, W) in grey, not {tuple(x.shape)}")
    weights = x.new_tensor([0.2126, 0.7152, 0.0722])
    return (x * weights[:, None, None]).sum(-3, keepdim=True)


def _opened(name: str) -> PIL.Image.Image:
    """Return the upright Pillow image in a file."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError('image files are read by Pillow: pip install "fisherop[plot]"') from error
    if os.path.isdir(name):
        raise ValueError(f"{name!r} is a folder: name an image file in it")
    try:
        with Image.open(name) as file:
            return ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image file {name!r}") from None
    except PermissionError:
        raise
    except (OSError, SyntaxError, EOFError, ValueError) as error:  # Pillow's ways to say that bytes are no image
        raise ValueError(f"{name!r} is no image that Pillow can read, or not a whole one: {error}") from error


def _flattened(image: PIL.Image.Image) -> PIL.Image.Image:
    """Lay an image with transparent parts on white."""
    if not image.has_transparency_data:
        return image
    from PIL import Image

    colors = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    sizes: Any = size if np.ndim(size) else (size, size)
    try:
        height, width = map(operator.index, sizes)
    except (TypeError, ValueError):
        raise TypeError(f"a size in pixels is a whole number, or two of them, not {size!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"a size in pixels must be at least 1, not {size}")
    return int(height), int(width)


def _prepared(pixels: np.ndarray[Any, Any], white: int, size: int | None, grey: bool, dtype: torch.dtype) -> Tensor:
    """Turn ``(H, W)`` or ``(H, W, 3)`` pixels with values up to ``white`` into an image as asked for."""
    values = torch.from_numpy(pixels.astype(np.float64) / white)
    image = (values[None] if values.ndim == 2 else values.movedim(-1, 0))[None]
    if grey:
        image = to_grey(image)
    if size is not None:
        image = resize(center_crop(image, min(image.shape[-2:])), size)
    return image.to(dtype).contiguous()
