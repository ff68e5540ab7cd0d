"""How often the default solver claims a wrong set of eigenpairs, over many seeds, and what it costs: one table.

    python benchmarks/claims.py --seeds 200
    python benchmarks/claims.py --problems r6-48 "gain control" --seeds 20 --dtype float32

A run is wrong if it marks all pairs converged, without a warning, and an eigenvalue differs from the dense truth of its
index by more than twice the tolerance. Products are those of the solver and of the certificate, a vector wanted.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
from solvers import MODELS, SPECTRA, problem

import fisherop as fo


def row(op: Any, truth: np.ndarray, end: str, k: int, tol: float, seeds: int) -> str:
    """Return one line of the table."""
    wrong = missed = 0
    products = []
    for seed in range(seeds):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = fo.eigendistortions(op, k, end, "lanczos", tol=tol, rng=seed)
        claimed = result.converged.all() and not any(w.category is fo.ConvergenceWarning for w in caught)
        error = np.abs(result.eigenvalues - truth[result.index]).max() / truth[0]
        wrong += bool(claimed and error > 2 * tol)
        missed += not claimed
        products.append(result.n_matvec / k)
    return f"{seeds:6d} {wrong:6d} {missed:14d} {np.median(products):10.0f} {max(products):6.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=[*SPECTRA, *MODELS], default=list(SPECTRA))
    parser.add_argument("--ends", nargs="+", choices=["LM", "SM", "BE"], default=["LM", "SM"])
    parser.add_argument("--k", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--seeds", type=int, default=20)
    chosen = parser.parse_args()
    tol = 1e-6 if chosen.dtype == "float64" else 1e-5
    head = f"{'seeds':>6} {'wrong':>6} {'not converged':>14} {'products':>10} {'most':>6}"
    print(f"{'problem':<14}{'end':<4}{'k':>3} {head}")
    for name in chosen.problems:
        op, truth = problem(name, chosen.dtype)
        if truth is None:
            parser.error(f"the eigenvalues of {name} are not known: its dense problem is too large")
        for end in chosen.ends:
            for k in chosen.k:
                if k > 1 or end != "BE":
                    print(f"{name:<14}{end:<4}{k:>3} {row(op, truth, end, k, tol, chosen.seeds)}", flush=True)


if __name__ == "__main__":
    main()
