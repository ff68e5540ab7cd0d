"""Eigenvectors on the response's side, and angles between the subspaces of two results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.maps import real
from fisherop.operators import FisherOperator, InformationOperator
from fisherop.result import Eigendistortions
from fisherop.rows import RowOperator


def left_vectors(op: InformationOperator, result: Eigendistortions) -> Any:
    """Return how the response changes along each eigendistortion, at unit norm: U = W^(1/2) J V / sqrt(lambda).

    These are the left singular vectors of W^(1/2) J, in units of the response noise: with the default noise, what the
    model's units do when a distortion is shown.

    Parameters
    ----------
    op : FisherOperator
        The operator, with its factor known.
    result : Eigendistortions
        What `eigendistortions` returned for it.

    Returns
    -------
    Tensor, or tuple, list or dict of them
        As the model returns its response, complex where that is; in every tensor k takes the place of a leading
        dimension of 1, else it is put in front. A pair whose eigenvalue is zero to rounding has none, and is zero
        here. A tensor of shape (k, `op.factor_size`) where the root of the noise's precision does not lead from
        responses to responses, as for a sum of operators.

    Raises
    ------
    TypeError, ValueError
        For an operator without a factor, and a result that does not fit it.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> F = fo.FisherOperator(lambda x: {"double": 2 * x, "none": None}, torch.zeros(1, 3))
    >>> fo.spectrum.left_vectors(F, fo.eigendistortions(F, k=2))["double"].shape
    torch.Size([2, 3])
    """
    if not isinstance(op, InformationOperator) or op.factor_size is None:
        raise TypeError("left vectors need a FisherOperator whose factor W^(1/2) J is known: give the noise its root")
    if not isinstance(result, Eigendistortions):
        raise TypeError(f"left vectors are those of what eigendistortions returned, not of {type(result).__name__}")
    size = int(np.prod(result.eigendistortions.shape[1:]))
    if size != op.image_shape.numel():
        raise ValueError(f"the result has distortions of {size} entries and the operator {op.image_shape.numel()}")
    operator = RowOperator(op)
    images = operator.factor(operator.vectors(result.eigendistortions))
    norms = images.double().norm(dim=1, keepdim=True)
    floor = 4 * op.shape[0] ** 0.5 * torch.finfo(op.torch_dtype).eps * result.lambda_max**0.5
    left = torch.where(norms > floor, images.double() / norms.clamp(min=floor or 1.0), 0).to(op.torch_dtype)
    if not isinstance(op, FisherOperator) or left.shape[1] != op.response.numel():
        return left
    with torch.no_grad():
        response = op.linearization.model(op.image.clone())
    return _structured(response, iter(_split(response, left)))


def _split(response: Any, rows: Tensor) -> list[Tensor]:
    sizes = [leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in _leaves(response)]
    return list(torch.split(rows, sizes, dim=1))


def _leaves(response: Any) -> Iterator[Tensor]:
    """Return the tensors of a response in the order in which it is flattened."""
    if isinstance(response, Tensor):
        yield response
    elif response is not None:
        for part in response.values() if isinstance(response, dict) else response:
            yield from _leaves(part)


def _structured(response: Any, parts: Iterator[Tensor]) -> Any:
    """Return the parts of flattened rows in the structure of a response."""
    if isinstance(response, Tensor):
        rows, shape = next(parts), response.shape
        inner = shape[1:] if len(shape) > 1 and shape[0] == 1 else shape
        if response.is_complex():
            return torch.view_as_complex(rows.reshape(len(rows), *inner, 2).contiguous())
        return rows.reshape(len(rows), *inner)
    if isinstance(response, dict):
        return {name: _structured(part, parts) for name, part in response.items()}
    if isinstance(response, (tuple, list)):
        return [_structured(part, parts) for part in response] if isinstance(response, list) else tuple(
            _structured(part, parts) for part in response
        )  # fmt: skip
    return None


def subspace_angles(one: Any, other: Any) -> NDArray[np.float64]:
    """Return the principal angles between what two results span: how much of one model's distortions another shares.

    Parameters
    ----------
    one, other : Eigendistortions, or Tensor or ndarray of shape (k, ...)
        Results, or vectors along the first axis. They need not have as many.

    Returns
    -------
    ndarray of float64, shape (min(k, l),)
        In radians, descending: 0 for a common direction, pi / 2 for orthogonal ones.

    Raises
    ------
    TypeError, ValueError
        For what is not made of vectors, and vectors of different length.

    References
    ----------
    Knyazev and Argentati (2002), "Principal angles between subspaces in an A-based scalar product".

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> fo.spectrum.subspace_angles(np.eye(3)[:2], np.eye(3)[1:]).round(4)
    array([1.5708, 0.    ])
    """
    first, second = (_columns(x) for x in (one, other))
    if len(first) != len(second):
        raise ValueError(f"vectors of {len(first)} and {len(second)} entries have no angle: compare those of one image")
    angles: NDArray[np.float64] = scipy.linalg.subspace_angles(first, second)
    return angles


def _columns(given: Any) -> NDArray[np.float64]:
    vectors = given.eigendistortions if isinstance(given, Eigendistortions) else given
    array = real(vectors, "vectors").cpu().numpy()
    if array.ndim < 2:
        raise ValueError(f"vectors come along the first axis of (k, ...), not in shape {array.shape}")
    return array.reshape(len(array), -1).T
