"""Several Fisher matrices as one operator: of independent responses to one image, or averaged over images and models.

>>> import torch, fisherop as fo
>>> x = torch.tensor([1.0, 2.0])
>>> both = fo.sum_fisher([fo.FisherOperator(torch.square, x), fo.FisherOperator(torch.neg, x)])
>>> both @ torch.ones(2)
tensor([ 5., 17.])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.algebra import check_spaces
from fisherop.maps import real
from fisherop.operators import InformationOperator


def sum_fisher(
    ops: Iterable[InformationOperator], weights: Sequence[float] | NDArray[Any] | Tensor | None = None
) -> FisherSum:
    """Add the Fisher information that several models, or several looks, give about one image.

    Independent responses add their information: this is the operator of all responses together.

    Parameters
    ----------
    ops : iterable of FisherOperator
        Operators at one image, of one dtype and device, with one restriction; sums may be summed again.
    weights : sequence of float, optional
        How often each is looked at: not negative, not all zero; by default once each.

    Returns
    -------
    FisherSum
        A SciPy LinearOperator that `eigendistortions` takes as it takes a `FisherOperator`.

    Raises
    ------
    TypeError, ValueError
        For operators that have no sum: at different images, of different shape, dtype, device or restriction. For the
        average over images see `mean_fisher`.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> x = torch.tensor([1.0, 2.0])
    >>> F = fo.FisherOperator(torch.square, x)
    >>> fo.sum_fisher([F, F], weights=[1.0, 0.5]) @ torch.ones(2)
    tensor([ 6., 24.])
    """
    ops = _checked(ops)
    image = ops[0].image
    if image is None or any(op.image is None or not torch.equal(op.image, image) for op in ops):
        raise ValueError(
            "these operators belong to different images, and responses to different images tell of no single one: "
            "use mean_fisher to average over images"
        )
    return FisherSum(ops, _weights(weights, len(ops)))


def mean_fisher(
    ops: Iterable[InformationOperator], weights: Sequence[float] | NDArray[Any] | Tensor | None = None
) -> FisherSum:
    """Average Fisher matrices over images, models, or both: to what a population is sensitive on the average.

    The leading eigenvectors of the average over images span the active subspace of a model.

    Parameters
    ----------
    ops : iterable of FisherOperator
        Operators at any images of one shape, of one dtype and device, with one restriction.
    weights : sequence of float, optional
        Shares, not negative and not all zero; they are scaled to sum to 1. Equal by default.

    Returns
    -------
    FisherSum
        A SciPy LinearOperator that `eigendistortions` takes as it takes a `FisherOperator`. Where the images differ,
        it belongs to none, and its results have ``image=None``.

    Raises
    ------
    TypeError, ValueError
        For operators that have no average: of different shape, dtype, device or restriction.

    Notes
    -----
    Each operator is multiplied in turn. Where the model takes batches and memory allows, one operator goes through all
    images at once: the response of the whole batch to a distortion common to its images, as below.

    References
    ----------
    Constantine, Dow, Wang (2014), "Active subspace methods in theory and practice", eq. 1.2.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> images = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> mean = fo.mean_fisher([fo.FisherOperator(torch.square, x) for x in images])
    >>> mean @ torch.ones(2)
    tensor([20., 40.])

    The same, all images through the model in one batch:

    >>> together = lambda distortion: torch.square(images + distortion)
    >>> batched = fo.FisherOperator(together, torch.zeros(1, 2), noise=fo.noise.Gaussian(float(len(images))))
    >>> torch.allclose(batched @ torch.ones(2), mean @ torch.ones(2))
    True
    """
    ops = _checked(ops)
    shares = _weights(weights, len(ops))
    return FisherSum(ops, [share / sum(shares) for share in shares])


class FisherSum(InformationOperator):
    """A weighted sum of Fisher matrices; its factor is theirs, one below the other. See `sum_fisher`, `mean_fisher`.

    Attributes
    ----------
    ops : list of FisherOperator
    weights : list of float
    """

    def __init__(self, ops: list[InformationOperator], weights: list[float]) -> None:
        super().__init__(ops[0].shape, ops[0].torch_dtype, ops[0].device)
        self.ops, self.weights = ops, weights
        sizes = [op.factor_size for op in ops]
        known = [size for size in sizes if size is not None]
        self.factor_size = sum(known) if len(known) == len(sizes) else None

    @property
    def image(self) -> Tensor | None:
        """The image that all operators belong to, where there is one."""
        first = self.ops[0].image
        same = first is not None and all(op.image is not None and torch.equal(op.image, first) for op in self.ops)
        return first if same else None

    @property
    def image_shape(self) -> torch.Size:
        """The shape of the images."""
        return self.ops[0].image_shape

    def expand(self, block: Tensor) -> Tensor:
        """Turn coordinates into pixels, as all the operators do."""
        return self.ops[0].expand(block)

    def project(self, block: Tensor) -> Tensor:
        """Turn pixels into coordinates, as all the operators do."""
        return self.ops[0].project(block)

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the weighted sum."""
        total = torch.zeros_like(block)
        for op, weight in zip(self.ops, self.weights, strict=True):
            total.add_(op.rows(block), alpha=weight)
        return total

    def factor_rows(self, block: Tensor) -> Tensor:
        """Multiply every row of (b, r) by the factors, each times the root of its weight: (b, `factor_size`)."""
        parts = zip(self.ops, self.weights, strict=True)
        return torch.cat([weight**0.5 * op.factor_rows(block) for op, weight in parts], dim=1)

    def factor_adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row of (b, `factor_size`) by the transpose of `factor_rows`."""
        total = block.new_zeros(len(block), self.shape[0])
        parts = torch.split(block, [op.factor_size or 0 for op in self.ops], dim=1)
        for op, weight, part in zip(self.ops, self.weights, parts, strict=True):
            total.add_(op.factor_adjoint_rows(part.contiguous()), alpha=weight**0.5)
        return total

    def refresh(self) -> None:
        """Linearize all again, at the same images, after the models' weights were changed."""
        for op in self.ops:
            op.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return FisherSum, (self.ops, self.weights)


def _checked(ops: Iterable[InformationOperator]) -> list[InformationOperator]:
    if isinstance(ops, InformationOperator):
        raise TypeError("ops must be several operators: put them in a list")
    found = list(ops)
    if not found:
        raise ValueError("there is nothing to add: ops is empty")
    first = found[0]
    for i, op in enumerate(found):
        if not isinstance(op, InformationOperator):
            raise TypeError(f"ops must hold Fisher operators, and ops[{i}] is {type(op).__name__}")
        for name in ("image_shape", "torch_dtype", "device", "shape"):
            if getattr(op, name) != getattr(first, name):
                raise ValueError(
                    f"operators of one sum agree in {name}, and ops[{i}] has {getattr(op, name)} where the first has "
                    f"{getattr(first, name)}: make them at images of one shape, dtype, device and restriction"
                )
        check_spaces(first, op, f"ops[0] and ops[{i}]")
    return found


def _weights(weights: Any, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    array = real(weights, "weights").cpu().numpy()
    if array.shape != (count,):
        raise ValueError(f"weights of shape {array.shape} do not fit {count} operators: give one for each")
    if not (np.isfinite(array).all() and (array >= 0).all() and array.any()):
        raise ValueError("weights must be finite, not negative, and not all zero: F would not be semidefinite")
    return [float(weight) for weight in array]
