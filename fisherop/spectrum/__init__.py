"""The whole spectrum without the matrix: sums over eigenvalues, how many lie where, and which pixels matter.

>>> import torch, fisherop as fo
>>> F = fo.FisherOperator(fo.OnOff(), torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
>>> fo.sensitivity_map(F, rng=0).value.shape
torch.Size([1, 1, 32, 32])
>>> total = fo.trace(F, 16, rng=0)
>>> total.low < total.value < total.high
True

Every estimate says how far off it may be: `fisherop.Estimate`. Questions that most people ask are at the top,
`fisherop.trace` and so on; the others are found here.
"""

from fisherop.spectrum.density import SpectralDensity, spectral_density
from fisherop.spectrum.ends import condition, lambda_max, lambda_min
from fisherop.spectrum.estimate import Estimate
from fisherop.spectrum.functions import count, effective_dimension, logdet, nullity, rank
from fisherop.spectrum.moments import frobenius_norm, participation_ratio, trace
from fisherop.spectrum.sensitivity import sensitivity_map
from fisherop.spectrum.vectors import left_vectors, subspace_angles

__all__ = [
    "Estimate",
    "SpectralDensity",
    "condition",
    "count",
    "effective_dimension",
    "frobenius_norm",
    "lambda_max",
    "lambda_min",
    "left_vectors",
    "logdet",
    "nullity",
    "participation_ratio",
    "rank",
    "sensitivity_map",
    "spectral_density",
    "subspace_angles",
    "trace",
]
