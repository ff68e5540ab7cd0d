"""Operators and models of which everything is known, for tests that need the truth.

>>> SpectralOperator(spectrum("null space", 4)).values.round(2)
array([1.  , 0.5 , 0.33, 0.  ])
>>> DenseModel(2, 2, "square").jacobian(torch.tensor([1.0, 3.0]))
tensor([[2., 0.],
        [0., 6.]], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

SPECTRA: dict[str, Callable[[int], NDArray[Any]]] = {
    "identity": np.ones,
    "rank one": lambda n: np.eye(1, n)[0],
    "zero": np.zeros,
    "power": lambda n: 1 / np.arange(1.0, n + 1) ** 2,
    "exponential": lambda n: 10 ** np.linspace(0, -12, n),
    "null space": lambda n: np.r_[1 / np.arange(1.0, n - n // 4 + 1), np.zeros(n // 4)],
    "flat with a gap": lambda n: np.r_[1, np.linspace(0.98, 0.1, n - 1)],
    "isolated": lambda n: np.r_[np.linspace(1, 0.03, n - 1), 4e-5],
    "clustered": lambda n: np.sort(np.tile(np.linspace(1, 0.1, -(-n // 4)), 4)[:n])[::-1],
}
"""Eigenvalues that solvers find easy or hard, by kind, each a function of their number."""


def spectrum(kind: str, n: int) -> NDArray[Any]:
    """Return n eigenvalues of a kind, descending from 1 (or all zero).

    Parameters
    ----------
    kind : str
        "identity", "rank one", "zero", "power" (i^-2), "exponential" (to 1e-12), "null space" (i^-1, then a quarter of
        zeros), "flat with a gap" (2 % below the largest), "isolated" (one tiny, far below the rest), or "clustered"
        (each four times).
    n : int
        How many, at least 1.

    Returns
    -------
    ndarray of float64, shape (n,)
        Descending.

    Raises
    ------
    ValueError
        For a kind that is not known.

    Examples
    --------
    >>> spectrum("flat with a gap", 3)
    array([1.  , 0.98, 0.1 ])
    """
    if kind not in SPECTRA:
        raise ValueError(f"kind must be one of {', '.join(SPECTRA)}, not {kind!r}")
    return SPECTRA[kind](n)


class SpectralOperator(LinearOperator):  # type: ignore[misc]
    """A symmetric operator made of given eigenvalues and random eigenvectors, for tests that need the truth.

    Parameters
    ----------
    values : array_like of shape (n,)
        Eigenvalues.
    rng : optional
        The seed of the eigenvectors, anything `numpy.random.default_rng` takes; None for those of a diagonal matrix.
    dtype : optional
        float64 or float32, of the products.

    Attributes
    ----------
    values : ndarray of shape (n,), float64
        Eigenvalues, descending.
    vectors : ndarray of shape (n, n), float64
        Eigenvectors, one a column, in the order of `values`.
    matrix : ndarray of shape (n, n)
        The matrix itself, of the operator's dtype.

    Examples
    --------
    >>> import fisherop as fo
    >>> op = SpectralOperator([4.0, 1.0, 1e-3], rng=0)
    >>> r = fo.eigendistortions(op, k=2)
    >>> abs(r.eigenvalues - op.values[r.index]).max() < 1e-12
    np.True_
    """

    def __init__(self, values: ArrayLike, rng: Any = 0, dtype: DTypeLike = np.float64) -> None:
        self.values = np.sort(np.asarray(values, dtype=np.float64))[::-1]
        n = len(self.values)
        super().__init__(np.dtype(dtype), (n, n))
        gaussian = np.eye(n) if rng is None else np.random.default_rng(rng).standard_normal((n, n))
        self.vectors: NDArray[Any] = np.linalg.qr(gaussian)[0] if rng is not None else gaussian
        product = (self.vectors * self.values) @ self.vectors.T
        self.matrix: NDArray[Any] = ((product + product.T) / 2).astype(self.dtype)

    def _matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        product: NDArray[Any] = self.matrix @ x
        return product

    def _matmat(self, X: NDArray[Any]) -> NDArray[Any]:
        product: NDArray[Any] = self.matrix @ X
        return product

    def _adjoint(self) -> LinearOperator:
        return self

    def _transpose(self) -> LinearOperator:
        return self


def _gain(y: Tensor) -> Tensor:
    return y / (1 + (y**2).mean())


def _gain_slopes(y: Tensor) -> Tensor:
    size = 1 + (y**2).mean()
    return torch.eye(len(y), dtype=y.dtype, device=y.device) / size - 2 * torch.outer(y, y) / len(y) / size**2


NONLINEARITIES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda y: y.clone(), lambda y: torch.eye(len(y), dtype=y.dtype, device=y.device)),
    "square": (lambda y: y**2, lambda y: torch.diag(2 * y)),
    "tanh": (torch.tanh, lambda y: torch.diag(1 - torch.tanh(y) ** 2)),
    "softplus": (torch.nn.functional.softplus, lambda y: torch.diag(torch.sigmoid(y))),
    "gain control": (_gain, _gain_slopes),
}
"""What follows the weights, by kind: a function of all of them, and its matrix of derivatives."""


class DenseModel(torch.nn.Module):
    """A small model of m responses to n pixels whose Jacobian is known by formula, and not by autograd.

    Parameters
    ----------
    m, n : int
        Responses and pixels.
    nonlinearity : str, optional
        "linear", "square", "tanh", "softplus" (all responses positive) or "gain control" (each divided by the power of
        all).
    rng : optional
        The seed of the weights, anything `numpy.random.default_rng` takes; None for an identity matrix.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> model, image = DenseModel(3, 4, "tanh", rng=0), torch.rand(1, 1, 2, 2)
    >>> J = fo.JacobianOperator(model.float(), image)
    >>> torch.allclose(J @ torch.eye(4), model.jacobian(image).float(), atol=1e-5)
    True
    """

    def __init__(self, m: int, n: int, nonlinearity: str = "linear", rng: Any = None) -> None:
        super().__init__()
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, not {nonlinearity!r}")
        self.nonlinearity, self.rng = nonlinearity, rng
        weight = np.eye(m, n) if rng is None else np.random.default_rng(rng).standard_normal((m, n)) / n**0.5
        self.weight = torch.nn.Parameter(torch.from_numpy(weight))

    def forward(self, image: Tensor) -> Tensor:
        """Return m responses to an image of n entries."""
        return NONLINEARITIES[self.nonlinearity][0](self.weight @ image.flatten())

    def jacobian(self, image: Tensor) -> Tensor:
        """Return the matrix of derivatives at an image, of shape (m, n), in float64."""
        weight = self.weight.detach().double()
        return NONLINEARITIES[self.nonlinearity][1](weight @ image.detach().double().flatten()) @ weight

    def extra_repr(self) -> str:
        """Return the arguments."""
        m, n = self.weight.shape
        return f"{m}, {n}, {self.nonlinearity!r}, rng={self.rng}"
