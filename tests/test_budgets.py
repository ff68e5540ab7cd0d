"""How many products each method needs, as measured: more of them, or far fewer, and a solver is not what it was.

Rounding differs between machines, so that a tenth and a step are left to it; restarts, at which small differences
grow, are given a sixth.
"""

import warnings

import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator
from strategies import spectrum_operator

import fisherop as fo
from fisherop.metric import generalized
from fisherop.rows import RowOperator
from fisherop.solvers import davidson, lanczos
from fisherop.solvers.contract import Control, Request

SPECTRA = {
    "smooth": 10 ** np.linspace(0, -6, 300),
    "flat": np.append(1, np.linspace(0.97, 0.1, 299)),
    "null": np.append(1 / np.arange(1.0, 201), np.zeros(100)),
}
PRODUCTS = {
    ("lanczos", "smooth", "LM"): 47,
    ("lanczos", "smooth", "SM"): 287,
    ("lanczos", "smooth", "BE"): 265,
    ("lanczos", "flat", "LM"): 160,
    ("lanczos", "flat", "SM"): 189,
    ("lanczos", "flat", "BE"): 130,
    ("lanczos", "null", "LM"): 26,
    ("lanczos", "null", "SM"): 76,
    ("lanczos", "null", "BE"): 50,
    ("davidson", "smooth", "LM"): 60,
    ("davidson", "smooth", "SM"): 257,
    ("davidson", "smooth", "BE"): 231,
    ("davidson", "flat", "LM"): 178,
    ("davidson", "flat", "SM"): 187,
    ("davidson", "null", "SM"): 77,
    ("arpack", "smooth", "LM"): 146,
    ("arpack", "flat", "SM"): 295,
    ("lobpcg", "smooth", "LM"): 103,
    ("lobpcg", "flat", "SM"): 337,
    ("lobpcg", "null", "BE"): 139,
    ("power", "null", "LM"): 204,
    ("randomized_svd", "smooth", "LM"): 94,
    ("randomized_svd", "flat", "LM"): 256,
    ("nullspace", "null", "LM"): 26,
    ("nullspace", "null", "SM"): 150,
    ("nullspace", "null", "BE"): 87,
}
RESTARTED = {
    (lanczos, "flat", (2, 0), 20): 222,
    (lanczos, "flat", (2, 0), 40): 216,
    (lanczos, "flat", (0, 2), 20): 283,
    (lanczos, "flat", (0, 2), 40): 148,
    (lanczos, "flat", (1, 1), 20): 109,
    (davidson, "flat", (2, 0), 20): 92,
    (davidson, "flat", (0, 2), 20): 154,
    (davidson, "flat", (0, 2), 40): 137,
    (davidson, "flat", (1, 1), 20): 154,
}


def spent(name, method, which):
    """Return the products of a run with a generous limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ConvergenceWarning)
        result = fo.eigendistortions(spectrum_operator(SPECTRA[name])[0], 4, which, method, rng=0, maxiter=300)
    return result.n_matvec


@pytest.mark.parametrize(("method", "name", "which"), PRODUCTS)
def test_products_are_those_measured(method, name, which):
    expected = PRODUCTS[method, name, which]
    assert abs(spent(name, method, which) - expected) <= 0.1 * expected + 4


@pytest.mark.parametrize(("method", "most"), [("lanczos", 60), ("arpack", 80)])
def test_one_pair_alone_is_not_searched_for_copies(method, most):
    matrix = spectrum_operator(SPECTRA["flat"])[0]
    assert fo.eigendistortions(matrix, 1, "LM", method, rng=0).n_matvec <= most


def restarted(solver, name, ends, basis):
    """Return the products that a solver needs with a basis so small that it has to restart."""
    op = RowOperator(spectrum_operator(SPECTRA[name])[0])
    if solver is davidson:
        turned = spectrum_operator(np.linspace(1, 2, 300), 1)[0].numpy()
        op = generalized(op, aslinearoperator(turned))
    control = Control(op, 5000)
    solver.solve(op, Request(*ends, 1e-6, np.random.default_rng(0)), control, basis=basis)
    return op.n_matvec


@pytest.mark.parametrize(("solver", "name", "ends", "basis"), RESTARTED)
def test_restarts_cost_what_was_measured(solver, name, ends, basis):
    expected = RESTARTED[solver, name, ends, basis]
    assert abs(restarted(solver, name, ends, basis) - expected) <= expected / 6 + 4
