"""Fisher information of PyTorch models at an image, and the distortions that a model notices most and least.

>>> import torch, fisherop as fo
>>> F = fo.FisherOperator(fo.OnOff(), torch.rand(1, 1, 32, 32))
>>> fo.eigendistortions(F, k=2, which="BE").eigendistortions.shape
torch.Size([2, 1, 32, 32])
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from fisherop import images, noise, restrict, spectrum
from fisherop.compare import (
    ThresholdTable,
    discriminability,
    generalized_eigendistortions,
    threshold_table,
    thresholds,
)
from fisherop.eigen import eigendistortions
from fisherop.frontend import LG, LGG, LN, OnOff
from fisherop.many import eigendistortions_many
from fisherop.models import Layer
from fisherop.operators import FisherOperator, JacobianOperator
from fisherop.principal import PrincipalDistortions, principal_distortions
from fisherop.result import ConvergenceWarning, Eigendistortions
from fisherop.solvers.nullspace import NullProjection, project_to_null
from fisherop.spectrum import (
    Estimate,
    SpectralDensity,
    count,
    effective_dimension,
    logdet,
    sensitivity_map,
    spectral_density,
    trace,
)
from fisherop.sums import mean_fisher, sum_fisher
from fisherop.surveys import Survey, survey

__version__ = "0.1.0"

_LOADED_WHEN_NAMED = ("plenoptic", "plot", "testing")

__all__ = [
    "LG",
    "LGG",
    "LN",
    "ConvergenceWarning",
    "Eigendistortions",
    "Estimate",
    "FisherOperator",
    "JacobianOperator",
    "Layer",
    "NullProjection",
    "OnOff",
    "PrincipalDistortions",
    "SpectralDensity",
    "Survey",
    "ThresholdTable",
    "count",
    "discriminability",
    "effective_dimension",
    "eigendistortions",
    "eigendistortions_many",
    "generalized_eigendistortions",
    "images",
    "logdet",
    "mean_fisher",
    "noise",
    "plenoptic",
    "plot",
    "principal_distortions",
    "project_to_null",
    "restrict",
    "sensitivity_map",
    "spectral_density",
    "spectrum",
    "sum_fisher",
    "survey",
    "testing",
    "threshold_table",
    "thresholds",
    "trace",
]


if TYPE_CHECKING:
    from fisherop import (
        plenoptic,
        plot,
        testing,
    )  # a type checker that saw __getattr__ would let every misspelt name pass
else:

    def __getattr__(name: str) -> ModuleType:
        if name in _LOADED_WHEN_NAMED:
            return importlib.import_module(f"fisherop.{name}")
        raise AttributeError(f"module 'fisherop' has no attribute {name!r}")
