"""Where distortions may live: a mask, a channel, pixels, a frequency band, or the range of any matrix.

Each is a subspace of the images with an orthonormal basis B, so that F restricted to it is B^T F B.

>>> import torch, fisherop as fo
>>> image = torch.rand(1, 1, 32, 32)
>>> F = fo.FisherOperator(fo.OnOff(), image, within=fo.restrict.Band(0.0, 0.1))
>>> F.shape
(37, 37)
>>> fo.eigendistortions(F, k=1).eigendistortions.shape
torch.Size([1, 1, 32, 32])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherop.linearize import Product
from fisherop.maps import dense_columns, is_matrix, number, row_products, whole

__all__ = ["Band", "Channel", "Pixels", "Restriction", "Subspace", "subspace"]

DENSE_BYTES = 1 << 30
"""Memory in float64 up to which a basis given as an operator is made dense, to be orthonormalized."""


@dataclass(frozen=True)
class Subspace:
    """A subspace of the images of n entries, of dimension `size`, by an orthonormal basis B of shape (n, size).

    Write a restriction of your own as a class whose method ``at(image)`` returns one.

    Parameters
    ----------
    size : int
        Columns of B.
    expand : function
        Multiplies every row of a (b, size) tensor by B: returns (b, n).
    project : function
        Multiplies every row of a (b, n) tensor by the transpose of B: returns (b, size).

    Examples
    --------
    Images whose left and right halves are the same:

    >>> import torch, fisherop as fo
    >>> class Repeated:
    ...     def at(self, image):
    ...         both = lambda rows: torch.cat([rows, rows], dim=1) / 2**0.5
    ...         folded = lambda rows: (rows[:, :2] + rows[:, 2:]) / 2**0.5
    ...         return Subspace(2, both, folded)
    >>> F = fo.FisherOperator(torch.nn.Identity(), torch.zeros(4), within=Repeated())
    >>> torch.allclose(F @ torch.eye(2), torch.eye(2))
    True
    """

    size: int
    expand: Product
    project: Product


class Restriction(Protocol):
    """Anything that knows its subspace at an image."""

    def at(self, image: Tensor) -> Subspace:
        """Return the subspace for images of this one's shape, dtype and device."""


def subspace(within: Any, image: Tensor) -> Subspace:
    """Return the subspace that the argument `within` of `FisherOperator` means.

    Parameters
    ----------
    within : optional
        - None: all images.
        - A boolean tensor or array, in the image's shape or one that broadcasts to it: a mask, True where pixels may
          change.
        - `Channel`, `Pixels`, `Band`, or any object with a method ``at(image)``.
        - A list or vector of whole numbers: `Pixels`.
        - A matrix or LinearOperator of shape (n, r) and full rank: its range. An operator whose columns are
          orthonormal is used as it is; any other is made dense and orthonormalized, with B = Q of its QR
          decomposition, the diagonal of R positive.
    image : Tensor
        n entries.

    Returns
    -------
    Subspace
        Its orthonormal basis, as two products.

    Raises
    ------
    TypeError, ValueError
        For a restriction that leaves nothing, does not fit the image, or has dependent columns.

    Examples
    --------
    >>> within = subspace([0, 3], torch.zeros(1, 1, 2, 2))
    >>> within.size, within.expand(torch.tensor([[5.0, 7.0]]))
    (2, tensor([[5., 0., 0., 7.]]))
    """
    if within is None:
        return Subspace(image.numel(), _as_it_is, _as_it_is)
    if hasattr(within, "at") and not isinstance(within, type):
        return _own(within.at(image), image)
    if isinstance(within, (Tensor, np.ndarray)) and str(within.dtype).endswith("bool"):
        return _mask(within if isinstance(within, Tensor) else torch.from_numpy(np.array(within, order="C")), image)
    if isinstance(within, (list, tuple, range)) or (isinstance(within, (Tensor, np.ndarray)) and within.ndim == 1):
        return Pixels(within).at(image)
    if is_matrix(within):
        return _operator(within, image) if isinstance(within, LinearOperator) else _range(within, image)
    shape = tuple(getattr(within, "shape", ()))
    raise TypeError(
        f"within must be a boolean mask, a list of pixels, a matrix of shape (n, r), or one of fisherop.restrict, not "
        f"{type(within).__name__}{f' of shape {shape} and dtype {within.dtype}' if shape else ''}"
    )


@dataclass(frozen=True)
class Channel:
    """One channel of an image of shape (..., C, H, W).

    Parameters
    ----------
    index : int
        From 0; a negative one counts from the last.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> fo.FisherOperator(torch.nn.Identity(), torch.zeros(1, 3, 4, 4), within=Channel(-1)).shape
    (16, 16)
    """

    index: int

    def at(self, image: Tensor) -> Subspace:
        """Return the subspace for images of this one's shape."""
        index = whole(self.index, "the index of a channel")
        count = image.shape[-3] if image.ndim >= 3 else 0
        if not -count <= index < count:
            raise ValueError(
                f"an image of shape {tuple(image.shape)} has {count} channels, and none of index {index}: the "
                "channel is the third dimension from the last"
            )
        mask = torch.zeros(image.shape, dtype=torch.bool, device="cpu")
        mask[..., index, :, :] = True
        return _mask(mask, image)


@dataclass(frozen=True, eq=False)
class Pixels:
    """A list of pixels.

    Parameters
    ----------
    where : sequence of int, or of (row, column)
        Whole numbers are places in the flattened image; pairs are rows and columns of an image of shape (..., H, W),
        and mean all its channels. Coordinates of the restricted operator come in the order of the flattened image.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> fo.FisherOperator(torch.nn.Identity(), torch.zeros(1, 3, 4, 4), within=Pixels([(0, 0), (2, 1)])).shape
    (6, 6)
    """

    where: Sequence[Any] | Tensor | NDArray[Any]

    def at(self, image: Tensor) -> Subspace:
        """Return the subspace for images of this one's shape."""
        try:
            where = self.where.cpu().numpy() if isinstance(self.where, Tensor) else np.array(self.where)
        except (TypeError, ValueError):  # lists of different lengths
            where = np.array(None)
        if where.size == 0:
            raise ValueError("within lists no pixel, which leaves no distortion: list one at least")
        paired = where.ndim == 2 and where.shape[1] == 2 and image.ndim >= 2
        if where.dtype.kind not in "iu":
            raise TypeError(f"pixels are whole numbers, or pairs of them, not {where.dtype}; a mask is boolean")
        if where.ndim != 1 and not paired:
            raise ValueError(
                f"pixels of shape {tuple(where.shape)} are neither places in the flattened image nor (row, column)"
            )
        sizes = np.array(image.shape[-2:] if paired else [image.numel()])
        where = where.astype(np.int64).reshape(len(where), -1)
        if ((where < 0) | (where >= sizes)).any():
            raise ValueError(f"a pixel lies outside the image of shape {tuple(image.shape)}: count from 0")
        if len(set(map(tuple, where.tolist()))) < len(where):
            raise ValueError("a pixel is listed twice: list each of them once")
        mask = torch.zeros(image.shape, dtype=torch.bool, device="cpu")
        if paired:
            mask[..., where[:, 0], where[:, 1]] = True
        else:
            mask.view(-1)[where[:, 0]] = True
        return _mask(mask, image)


@dataclass(frozen=True)
class Band:
    """Spatial frequencies f with low <= f < high, in cycles per pixel, in every direction and channel.

    The last two dimensions are space, the last one alone where there is no other. Frequencies go up to 0.5 along an
    axis and 0.71 along a diagonal. Neighbouring bands that share an edge share no distortion, and all of them together
    make up all images.

    Parameters
    ----------
    low : float
        Cycles per pixel, not negative.
    high : float, optional
        Cycles per pixel, above `low`; by default there is no end.

    Notes
    -----
    The basis are the waves cos + sin of the discrete Hartley transform, real, orthonormal and its own inverse, at
    the cost of an FFT. Bracewell (1983), "Discrete Hartley transform".

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> image = torch.zeros(1, 1, 8, 8)
    >>> [fo.FisherOperator(torch.nn.Identity(), image, within=band).shape[0] for band in (Band(0, 0.3), Band(0.3))]
    [21, 43]
    """

    low: float
    high: float = math.inf

    def at(self, image: Tensor) -> Subspace:
        """Return the subspace for images of this one's shape."""
        low, high = (number(edge, "an edge of a band") for edge in (self.low, self.high))
        if not 0 <= low < high:
            raise ValueError(f"a band needs 0 <= low < high in cycles per pixel, not {low} and {high}")
        space = image.shape[-2:]
        axes = [torch.fft.fftfreq(size, dtype=torch.float64, device="cpu").square() for size in space]
        squared = axes[0] if len(space) < 2 else axes[0][:, None] + axes[1]
        # The square root is rounded, so that waves of one frequency but for rounding stay together.
        frequency = squared.sqrt().mul(1e12).round().div(1e12)
        inside = (frequency >= low) & (frequency < high)
        if not inside.any():
            raise ValueError(
                f"no frequency of an image of {' x '.join(map(str, space))} pixels lies in [{low}, {high}) "
                "cycles per pixel: widen the band"
            )
        waves = _mask(inside, image)
        dims = tuple(range(-len(space), 0))

        def hartley(rows: Tensor) -> Tensor:
            if len(rows) == 0:  # of which not every library knows the transform
                return rows
            spectrum: Tensor = torch.fft.fftn(rows.reshape(len(rows), *image.shape), dim=dims, norm="ortho")
            return (spectrum.real - spectrum.imag).flatten(1)

        return Subspace(waves.size, lambda rows: hartley(waves.expand(rows)), lambda rows: waves.project(hartley(rows)))


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _mask(mask: Tensor, image: Tensor) -> Subspace:
    try:
        whole = torch.broadcast_to(mask, image.shape)
    except RuntimeError:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit an image of shape {tuple(image.shape)}: give it the "
            "image's shape"
        ) from None
    index = whole.reshape(-1).nonzero().flatten().to(image.device)
    if len(index) == 0:
        raise ValueError("the mask is empty, which leaves no distortion: set it True where pixels may change")
    n = image.numel()
    return Subspace(
        len(index), lambda rows: rows.new_zeros(len(rows), n).index_copy_(1, index, rows), lambda rows: rows[:, index]
    )


def _range(matrix: Any, image: Tensor) -> Subspace:
    _check_shape(matrix, image)
    columns = dense_columns(matrix, image)
    norms = columns.norm(dim=0)
    if not torch.isfinite(norms).all():
        raise ValueError("the basis holds NaN or infinity")
    # Columns of equal size, for a basis may mix units; a column of zeros stays one.
    singular = torch.linalg.svdvals(columns / torch.where(norms > 0, norms, 1))
    precision = torch.finfo(torch.float32 if "32" in str(matrix.dtype) else torch.float64).eps
    rank = int((singular > len(columns) * precision * singular[0]).sum()) if bool(norms.any()) else 0
    if rank < columns.shape[1]:
        raise ValueError(
            f"the basis has rank {rank} and {columns.shape[1]} columns: drop dependent ones, or pass "
            "scipy.linalg.orth(B)"
        )
    q, r = torch.linalg.qr(columns)
    basis = (q * r.diagonal().sign()).to(image.dtype)
    return Subspace(columns.shape[1], *row_products(basis, image))


def _operator(op: LinearOperator, image: Tensor) -> Subspace:
    """Use an operator with orthonormal columns as it is; make any other dense, if that is small."""
    _check_shape(op, image)
    n, r = op.shape
    found = Subspace(r, *row_products(op, image))
    if _has_orthonormal_columns(found, image):
        return found
    if 8 * n * r > DENSE_BYTES:
        raise ValueError(
            f"the basis is an operator of shape ({n}, {r}) whose columns are not orthonormal, too large to be made so "
            "here: pass one with B.T @ B = I, or fewer columns"
        )
    return _range(op, image)


def _own(found: Any, image: Tensor) -> Subspace:
    """Check a subspace of the user's own."""
    if not isinstance(found, Subspace):
        raise TypeError(f"within.at(image) must return a Subspace, not {type(found).__name__}")
    if not _has_orthonormal_columns(found, image):
        raise ValueError(
            "the basis of within.at(image) is not orthonormal: project(expand(rows)) must be rows; a matrix passed as "
            "within= is made so"
        )
    return found


def _has_orthonormal_columns(found: Subspace, image: Tensor) -> bool:
    source = torch.Generator("cpu").manual_seed(0)
    rows, images = (
        torch.randn(2, size, generator=source, dtype=torch.float64, device="cpu").to(image)
        for size in (found.size, image.numel())
    )
    try:
        expanded, projected = found.expand(rows), found.project(images)
        again = found.project(expanded)
    except (NotImplementedError, TypeError):  # what SciPy raises for an operator without its transpose
        return False
    rounding = 1e2 * torch.finfo(image.dtype).eps
    same = bool((again - rows).norm() <= rounding * rows.norm())
    # Not every inverse from the left is the transpose.
    difference = (expanded.double() @ images.double().T - rows.double() @ projected.double().T).norm()
    return same and bool(difference <= rounding * rows.double().norm() * images.double().norm())


def _check_shape(matrix: Any, image: Tensor) -> None:
    n, r = matrix.shape
    if n != image.numel() or not 1 <= r <= n:
        raise ValueError(
            f"a basis within an image of n = {image.numel()} entries has shape (n, r) with 1 <= r <= n, "
            f"not ({n}, {r})"
            + (": pass its transpose" if r == image.numel() else "")
            + (": of a mask pass mask > 0, for it must be boolean" if (n, r) == image.shape[-2:] else "")
        )
