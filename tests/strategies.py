"""Operators of the small models for Hypothesis, beside what `fisherop.testing.strategies` draws."""

import numpy as np
import torch
from hypothesis import strategies as st
from models import MODELS, build, parts, real

import fisherop as fo
from fisherop import testing
from fisherop.testing import strategies

dtypes, seeds = strategies.dtypes(), strategies.seeds()
names = st.sampled_from(sorted(MODELS))


def operators():
    """Jacobian operators of the small models, at random weights and images."""
    return st.builds(lambda name, dtype, seed: fo.JacobianOperator(*build(name, dtype, seed)), names, dtypes, seeds)


def fishers():
    """Fisher operators of the small models, with several kinds of noise and restrictions."""

    def make(name, dtype, seed, noise, within):
        model, image = build(name, dtype, seed)
        m = sum(real(part).numel() for part in parts(model(image)))
        if noise == "vector":
            noise = fo.noise.Gaussian(torch.linspace(0.5, 2, m))
        elif noise == "low rank":
            noise = fo.noise.Gaussian((block(seed, m, 2), 0.5))
        if within == "mask":
            within = torch.arange(image.numel()).reshape(image.shape) % 3 > 0
        elif within == "basis":
            within = block(seed, image.numel(), 5)
        return fo.FisherOperator(model, image, noise, within)

    noises = st.sampled_from([None, fo.noise.Gaussian(0.3), fo.noise.Categorical(), "vector", "low rank"])
    return st.builds(make, names, dtypes, seeds, noises, st.sampled_from([None, "mask", "basis"]))


def block(seed: int, *shape: int, dtype=np.float64):
    """Return a Gaussian array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def spectrum_operator(values, seed=0, dtype=torch.float64):
    """Return a symmetric matrix with these eigenvalues as a tensor, and its eigenvectors as columns, descending."""
    op = testing.SpectralOperator(values, seed)
    return torch.tensor(op.matrix, dtype=dtype), op.vectors


def spd(n, seed=0, low=0.1):
    """Return a dense matrix with eigenvalues from 1 to `low`."""
    return spectrum_operator(np.linspace(1, low, n), seed)[0].numpy()


def pair(name="attention", dtype=torch.float64):
    """Return two models of one kind at one image, and their Fisher operators."""
    model, image = build(name, dtype)
    other, _ = build(name, dtype, seed=3)
    return (model, other), image, [fo.FisherOperator(m, image) for m in (model, other)]
