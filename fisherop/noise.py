"""Response noise: what turns a model's Jacobian J into Fisher information F = J^T W J.

>>> import torch
>>> from fisherop import noise
>>> response = torch.tensor([1.0, 2.0])
>>> noise.Gaussian(covariance=4.0).at(response).apply(torch.ones(1, 2))
tensor([[0.2500, 0.2500]])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Precision(Protocol):
    """The matrix W of a noise at one response, applied to the rows of a (b, m) block."""

    def apply(self, rows: Tensor) -> Tensor:
        """Multiply every row by W."""

    def root(self, rows: Tensor) -> Tensor:
        """Multiply every row by a matrix R with R^T R = W."""

    def root_transpose(self, rows: Tensor) -> Tensor:
        """Multiply every row by the transpose of that R."""


class Noise(Protocol):
    """A model of response noise: anything that knows its precision at a response."""

    def at(self, response: Tensor) -> Precision:
        """Return the precision at a response of shape (m,)."""


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise whose covariance does not depend on the response: F = J^T C^-1 J.

    Parameters
    ----------
    covariance : None, float or Tensor of shape (m,), optional
        None for unit variance, a number for one variance, a vector for the variance of every response, in the
        response's order and in squared units of the response. Positive.

    Raises
    ------
    TypeError, ValueError
        When the noise meets a response: a variance that is not positive and finite, or a vector of wrong length.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> noise = fo.noise.Gaussian(covariance=torch.tensor([1.0, 100.0]))
    >>> F = fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), noise=noise)
    >>> F @ torch.ones(2)
    tensor([1.0000, 0.0100])

    References
    ----------
    Berardino, Laparra, Balle, Simoncelli (2017), "Eigen-distortions of hierarchical representations", eq. 2.
    """

    covariance: float | Tensor | None = None

    def at(self, response: Tensor) -> Precision:
        """Return the precision at a response of shape (m,)."""
        if self.covariance is None:
            return Diagonal(None)
        variance = torch.as_tensor(self.covariance, dtype=response.dtype, device=response.device).detach()
        if variance.ndim > 0:
            if variance.numel() != response.numel():
                raise ValueError(
                    f"covariance has {variance.numel()} entries and the response {response.numel()}: "
                    "give one number, or one variance for every response"
                )
            variance = variance.reshape(-1)
        if not bool(((variance > 0) & torch.isfinite(variance)).all()):
            raise ValueError("covariance must be positive and finite: a variance of zero is infinite information")
        return Diagonal(1 / variance)


@dataclass(frozen=True)
class Diagonal:
    """A diagonal precision: one weight, a weight for every response, or None for the identity."""

    weights: Tensor | None

    def apply(self, rows: Tensor) -> Tensor:
        """Multiply every row by W."""
        return rows if self.weights is None else rows * self.weights

    def root(self, rows: Tensor) -> Tensor:
        """Multiply every row by W^(1/2)."""
        return rows if self.weights is None else rows * self.weights.sqrt()

    def root_transpose(self, rows: Tensor) -> Tensor:
        """Multiply every row by W^(1/2), which is symmetric."""
        return self.root(rows)
