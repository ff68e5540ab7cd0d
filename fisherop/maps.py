"""Matrices that others bring, in whatever form, as products with the rows of a torch block.

>>> import numpy as np, torch
>>> rows, adjoint_rows = row_products(np.array([[1.0, 2.0]]), torch.zeros(()))
>>> rows(torch.ones(1, 2)), adjoint_rows(torch.ones(1, 1))
(tensor([[3.]]), tensor([[1., 2.]]))
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherop.linearize import Product


def is_matrix(matrix: Any) -> bool:
    """Tell whether this is something with two dimensions that `row_products` takes."""
    known = isinstance(matrix, (Tensor, np.ndarray, LinearOperator)) or issparse(matrix)
    return known and len(matrix.shape) == 2


def row_products(matrix: Any, like: Tensor) -> tuple[Product, Product]:
    """Return x -> A x and x -> A^T x on the rows of blocks of the dtype and device of `like`.

    Parameters
    ----------
    matrix : Tensor, ndarray, sparse matrix or LinearOperator, shape (p, q)
        A. A tensor or an array is brought to the device; anything else stays on the host, and blocks go to it.
    like : Tensor
        Has the dtype and device of the blocks to come.

    Raises
    ------
    TypeError
        For a complex matrix.
    """
    if isinstance(matrix, (Tensor, np.ndarray)):
        dense = _own(matrix, like.device, like.dtype)
        return (lambda rows: rows @ dense.T), (lambda rows: rows @ dense)
    if np.dtype(matrix.dtype or np.float64).kind == "c":
        raise TypeError("a complex operator has no place here: write it as real pairs")
    return (lambda rows: _on_host(matrix, rows)), (lambda rows: _on_host(matrix.T, rows))


def noise_floor(dtype: torch.dtype) -> float:
    """Return what products may err by, relative to their size: some carry errors of their own, as of a simulation."""
    return max(1e3 * torch.finfo(dtype).eps, 1e-5)


def real(x: Any, name: str) -> Tensor:
    """Return numbers in float64, where they lie, whatever holds them: a tensor, an array, a number or a list.

    Raises
    ------
    TypeError
        For what is not made of real numbers.
    """
    try:
        # By way of NumPy, for torch takes Python's numbers as float32 and refuses arrays by their strides.
        numbers = x.detach() if isinstance(x, Tensor) else np.array(x, order="C")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be made of numbers, not {type(x).__name__}") from error
    if numbers.is_complex() if isinstance(numbers, Tensor) else numbers.dtype.kind == "c":
        raise TypeError(f"{name} is complex: write it as real pairs")
    if isinstance(numbers, Tensor):
        return numbers.double()
    if numbers.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be made of numbers, not {type(x).__name__}")
    return torch.from_numpy(numbers.astype(np.float64))


def number(x: Any, name: str) -> float:
    """Return one real number, of whatever type."""
    found = real(x, name)
    if found.numel() != 1:
        raise TypeError(f"{name} must be one number, not {found.numel()}")
    return float(found)


def whole(x: Any, name: str, least: int | None = None) -> int:
    """Return a whole number, of whatever type: Python's, NumPy's, or the only entry of an array or a tensor."""
    try:
        if isinstance(x, (bool, np.bool_)):
            raise TypeError
        found = operator.index(x)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {x!r}") from None
    if least is not None and found < least:
        raise ValueError(f"{name} must be at least {least}, not {found}")
    return found


def _own(matrix: Tensor | NDArray[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a copy: what its owner writes to a matrix later, and how it lies in memory, must not matter."""
    if isinstance(matrix, Tensor) and not matrix.is_complex():
        return matrix.detach().to(device, dtype, copy=True)
    return real(matrix, "a matrix").to(device, dtype)


def _on_host(matrix: Any, rows: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray((matrix @ rows.cpu().numpy().T).T)).to(rows)


def dense_columns(matrix: Any, like: Tensor) -> Tensor:
    """Return any such matrix as a float64 tensor of shape (p, q) on the device of `like`."""
    if isinstance(matrix, (Tensor, np.ndarray)):
        return _own(matrix, like.device, torch.float64)
    identity = torch.eye(matrix.shape[1], dtype=torch.float64, device="cpu")
    return row_products(matrix, identity)[0](identity).T.to(like.device)
