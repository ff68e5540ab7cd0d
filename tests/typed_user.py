"""A user's script with types, which `mypy --strict` accepts; test_types.py says where a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fisherop as fo


def most_and_least(model: nn.Module, image: Tensor, layer: str, k: int = 2) -> fo.Eigendistortions:
    """Return what a layer of a model notices most and least of an image, in white light noise of its own."""
    response = fo.Layer(model, layer)
    F = fo.FisherOperator(response, image, noise=fo.noise.Gaussian(0.5), within=fo.restrict.Band(0.0, 0.25))
    result = fo.eigendistortions(F, k, "BE", method="lanczos", tol=1e-4, rng=0, callback=report)
    if not result.converged.all():
        raise RuntimeError(result.message)
    return result


def report(progress: fo.solvers.Progress) -> bool:
    """Stop after a thousand products."""
    return progress.n_matvec > 1000


def summary(result: fo.Eigendistortions, folder: Path) -> tuple[NDArray[np.float64], Tensor]:
    """Store a result and return its eigenvalues and its first distortion."""
    result.save(folder / "result.npz")
    again = fo.Eigendistortions.load(folder / "result.npz")
    values: NDArray[np.float64] = again.eigenvalues
    return values, torch.as_tensor(again.eigendistortions)[0]


def compared(models: list[nn.Module], image: Tensor) -> tuple[float, bool]:
    """Tell two models apart at an image."""
    A, B = (fo.FisherOperator(model, image) for model in models)
    relative = fo.generalized_eigendistortions(A, B, k=1)
    both = fo.sum_fisher([A, B], weights=[1.0, 0.5])
    hidden = fo.project_to_null(both, image)
    return float(relative.eigenvalues[0]), hidden.converged
