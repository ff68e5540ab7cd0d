"""Laws of linear operators and of eigenpairs for your tests, and strategies that draw models and operators to test.

>>> import numpy as np
>>> from fisherop import testing
>>> testing.assert_adjoint(np.array([[1.0, 2.0], [3.0, 4.0]]))
>>> testing.assert_symmetric(np.array([[1.0, 2.0], [3.0, 4.0]]))
Traceback (most recent call last):
...
AssertionError: <2x2 MatrixLinearOperator with dtype=float64> is not symmetric: ...

The assertions take any SciPy LinearOperator, dense or sparse matrix, and operators of this package. They need NumPy and
SciPy only; `fisherop.testing.strategies`, which loads when named, needs Hypothesis.
"""

import importlib
from types import ModuleType

from fisherop.testing.known import DenseModel, SpectralOperator, spectrum
from fisherop.testing.laws import (
    assert_adjoint,
    assert_linear,
    assert_matmat_consistent,
    assert_no_aliasing,
    assert_psd,
    assert_symmetric,
)
from fisherop.testing.pairs import assert_eigenpairs, assert_same_subspace

__all__ = [
    "DenseModel",
    "SpectralOperator",
    "assert_adjoint",
    "assert_eigenpairs",
    "assert_linear",
    "assert_matmat_consistent",
    "assert_no_aliasing",
    "assert_psd",
    "assert_same_subspace",
    "assert_symmetric",
    "spectrum",
    "strategies",
]


def __getattr__(name: str) -> ModuleType:
    if name == "strategies":
        return importlib.import_module("fisherop.testing.strategies")
    raise AttributeError(f"module 'fisherop.testing' has no attribute {name!r}")
