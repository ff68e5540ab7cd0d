"""Hypothesis strategies: seeds and names are drawn, well-scaled arrays are made from them."""

import numpy as np
import torch
from hypothesis import strategies as st
from models import MODELS, build

import fisherop as fo

dtypes = st.sampled_from([torch.float32, torch.float64])
names = st.sampled_from(sorted(MODELS))
seeds = st.integers(0, 2**32 - 1)


def operators():
    """Jacobian operators of the small models, at random weights and images."""
    return st.builds(lambda name, dtype, seed: fo.JacobianOperator(*build(name, dtype, seed)), names, dtypes, seeds)


def fishers():
    """Fisher operators of the small models, with unit, scalar and vector noise."""

    def make(name, dtype, seed, noise):
        model, image = build(name, dtype, seed)
        if noise == "vector":
            m = fo.JacobianOperator(model, image).shape[0]
            return fo.FisherOperator(model, image, fo.noise.Gaussian(torch.linspace(0.5, 2, m)))
        return fo.FisherOperator(model, image, fo.noise.Gaussian(noise))

    return st.builds(make, names, dtypes, seeds, st.sampled_from([None, 0.3, "vector"]))


def block(seed: int, *shape: int, dtype=np.float64):
    """Return a Gaussian array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def spectrum_operator(values, seed=0, dtype=torch.float64):
    """Return a symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    q = np.linalg.qr(block(seed, len(values), len(values)))[0]
    return torch.tensor((q * np.asarray(values)) @ q.T, dtype=dtype), q
