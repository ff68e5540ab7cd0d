"""Every kind of response noise, with its precision written out as a dense matrix by another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models import Model, parts, real
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

import fisherop as fo


def rates(model: Model, scale: float = 1.0) -> Model:
    """Return a model whose response is one positive vector: a softplus of all that the model returns."""

    def respond(x: Tensor) -> Tensor:
        flat = torch.cat([real(part).flatten() for part in parts(model(x))])
        return scale * (torch.nn.functional.softplus(flat) + 0.1)

    return respond


def covariance(m: int, seed: int = 0) -> Tensor:
    """Return a covariance matrix of condition number about 30."""
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((m, m)))[0]
    return torch.tensor((q * np.geomspace(0.2, 6, m)) @ q.T)


def low_rank(m: int, r: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a low-rank factor and a diagonal."""
    return torch.tensor(np.random.default_rng(seed).standard_normal((m, r))), torch.linspace(0.3, 2, m).double()


def _operator(matrix: Tensor) -> LinearOperator:
    return LinearOperator(matrix.shape, lambda x: matrix.numpy() @ x, lambda x: matrix.numpy().T @ x, dtype=float)


def _differences(m: int) -> Tensor:
    return torch.diff(torch.eye(m).double(), dim=0)


def _dense_low_rank(m: int) -> Tensor:
    U, d = low_rank(m)
    return torch.linalg.inv(U @ U.T + torch.diag(d))


def _bernoulli(f: Tensor) -> Tensor:
    p = torch.sigmoid(f)
    return torch.diag(p * (1 - p))


def _categorical(f: Tensor) -> Tensor:
    p = torch.softmax(f, 0)
    return torch.diag(p) - torch.outer(p, p)


def _eigenroot(W: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(W)
    return (vectors * values.sqrt()) @ vectors.T


NOISES: dict[str, tuple[Callable[[int], Any], Callable[[Tensor], Tensor]]] = {
    "unit": (lambda m: None, lambda f: torch.eye(len(f)).double()),
    "scalar": (lambda m: fo.noise.Gaussian(4.0), lambda f: torch.eye(len(f)).double() / 4),
    "vector": (
        lambda m: fo.noise.Gaussian(torch.linspace(0.5, 2, m)),
        lambda f: torch.diag(1 / torch.linspace(0.5, 2, len(f)).double()),
    ),
    "matrix": (lambda m: fo.noise.Gaussian(covariance(m).numpy()), lambda f: torch.linalg.inv(covariance(len(f)))),
    "low rank": (lambda m: fo.noise.Gaussian(low_rank(m)), lambda f: _dense_low_rank(len(f))),
    "precision": (lambda m: fo.noise.Gaussian(precision=_operator(covariance(m))), lambda f: covariance(len(f))),
    "poisson": (lambda m: fo.noise.Poisson(gain=3.0), lambda f: torch.diag(3 / f)),
    "gains": (
        lambda m: fo.noise.Poisson(gain=torch.linspace(1, 2, m)),
        lambda f: torch.diag(torch.linspace(1, 2, len(f)).double() / f),
    ),
    "bernoulli": (lambda m: fo.noise.Bernoulli(), _bernoulli),
    "categorical": (lambda m: fo.noise.Categorical(), _categorical),
    "custom": (
        lambda m: fo.noise.Custom(_differences(m).T @ _differences(m)),
        lambda f: _differences(len(f)).T @ _differences(len(f)),
    ),
    "custom root": (
        lambda m: fo.noise.Custom(_operator(_differences(m).T @ _differences(m)), root=_differences(m)),
        lambda f: _differences(len(f)).T @ _differences(len(f)),
    ),
    "custom functions": (
        lambda m: fo.noise.Custom(lambda x: x @ covariance(m), root=lambda x: x @ _eigenroot(covariance(m))),
        lambda f: covariance(len(f)),
    ),
}
