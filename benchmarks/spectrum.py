"""Estimates of the spectrum: how often their intervals hold the truth, and how far off they are beside others'.

    python benchmarks/spectrum.py coverage --runs 400
    python benchmarks/spectrum.py coverage --runs 400 --rtol 0.02 --estimates trace
    python benchmarks/spectrum.py coverage --runs 1000 --probes 4 --estimates trace "Frobenius norm" --operators i^-2
    python benchmarks/spectrum.py accuracy --runs 40          with matfree and skerch, where they are installed

Eight operators with n about 2000, whose truth is a dense eigendecomposition: five spectra, and the Fisher matrices of
three models. Vectors of our estimators are Gaussian, and so are the same in every orthonormal basis: coverage of a
spectrum is that of the diagonal matrix with these eigenvalues, whatever basis it is meant in. Others draw signs, for
which a diagonal matrix would be no test: accuracy is that in a random basis.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import diags

import fisherop as fo

N = 2000
STEPS = 40
"""Of Lanczos runs: with the default, all eigenvalues of operators as small as these would cost no more."""
STEP = np.arange(1.0, N + 1)
SPECTRA = {
    "i^-2": STEP**-2,
    "i^-1, null": np.where(STEP <= N - 500, 1 / STEP, 0),
    "exponential": 10 ** np.linspace(0, -12, N),
    "flat": np.append(1, np.linspace(0.98, 0.1, N - 1)),
    "clusters": np.concatenate([np.ones(50), np.linspace(0.9, 0.2, N - 100), np.full(50, 0.1)]),
}


def convolutions() -> torch.nn.Module:
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Softplus())


def pooled() -> torch.nn.Module:
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 64, 5, stride=2), nn.AvgPool2d(3))


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "convolutions": (convolutions, (1, 3, 26, 26)),
    "pooled": (pooled, (1, 3, 26, 26)),
    "OnOff": (fo.OnOff, (1, 1, 45, 45)),
}


def problem(name: str, *, dense: bool) -> tuple[Any, np.ndarray, np.ndarray | None]:
    """Return an operator, its eigenvalues, and its diagonal where it is a model's."""
    if name in SPECTRA:
        values = SPECTRA[name]
        if not dense:
            return diags(values).tocsr(), values, None
        q = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
        return torch.from_numpy((q * values) @ q.T), values, None
    torch.manual_seed(0)
    build, shape = MODELS[name]
    op = fo.FisherOperator(build().double().requires_grad_(False), torch.rand(shape).double())
    matrix = (op @ torch.eye(op.shape[0], dtype=torch.float64)).numpy()
    return op, np.linalg.eigvalsh((matrix + matrix.T) / 2).clip(min=0), matrix.diagonal()


def level(values: np.ndarray) -> float:
    """Return the geometric mean of the largest seventh of the eigenvalues."""
    return float(np.exp(np.log(np.sort(values)[-len(values) // 7 :]).mean()))


def truths(values: np.ndarray) -> dict[str, float]:
    mu = level(values)
    return {
        "trace": values.sum(),
        "Frobenius norm": np.linalg.norm(values),
        "participation ratio": values.sum() ** 2 / (values @ values),
        "log det(F + mu)": np.log(values + mu).sum(),
        "tr F (F + mu)^-1": (values / (values + mu)).sum(),
        "count(mu)": (values <= mu).sum(),
    }


def estimates(mu: float, options: dict[str, Any]) -> dict[str, Callable[[Any, int], fo.Estimate]]:
    return {
        "trace": lambda op, seed: fo.trace(op, rng=seed, **options),
        "Frobenius norm": lambda op, seed: fo.spectrum.frobenius_norm(op, rng=seed, **options),
        "participation ratio": lambda op, seed: fo.effective_dimension(op, rng=seed, **options),
        "log det(F + mu)": lambda op, seed: fo.logdet(op, mu, steps=STEPS, rng=seed, **options),
        "tr F (F + mu)^-1": lambda op, seed: fo.effective_dimension(op, mu, steps=STEPS, rng=seed, **options),
        "count(mu)": lambda op, seed: fo.count(op, mu, steps=STEPS, rng=seed, **options),
    }


def coverage(names: list[str], wanted: list[str], runs: int, options: dict[str, Any]) -> None:
    print("| operator | estimate | interval holds truth, % | error, rms, % | said / true spread | products |")
    print("|---|---|---|---|---|---|")
    for name in names:
        op, values, diagonal = problem(name, dense=False)
        truth, calls = truths(values), estimates(level(values), options)
        for kind in [kind for kind in calls if kind in wanted]:
            found = [calls[kind](op, seed) for seed in range(runs)]
            held = np.mean([e.low <= truth[kind] <= e.high for e in found])
            errors = np.array([e.value - truth[kind] for e in found])
            said = np.mean([e.standard_error for e in found]) / errors.std()
            size, cost = (errors**2).mean() ** 0.5 / abs(truth[kind]), np.mean([e.n_matvec for e in found])
            print(f"| {name} | {kind} | {100 * held:.1f} | {100 * size:.2g} | {said:.2f} | {cost:.0f} |", flush=True)
        if diagonal is not None and "map" in wanted:
            maps = [fo.sensitivity_map(op, rng=seed, **options) for seed in range(max(1, runs // 10))]
            lows, found_values, highs = (
                np.stack([getattr(e, part).numpy().ravel() for e in maps]) for part in ("low", "value", "high")
            )
            held = ((lows <= diagonal) & (diagonal <= highs)).mean()
            seen = diagonal > 1e-9 * diagonal.max()
            error = np.median(np.abs(found_values - diagonal)[:, seen] / diagonal[seen])
            cost = np.mean([e.n_matvec for e in maps])
            print(f"| {name} | map, median error | {100 * held:.1f} | {100 * error:.2g} | | {cost:.0f} |", flush=True)


# ------------------------------------------------------------------------------------------------------------ accuracy

PRODUCTS = 64


def peers(matrix: np.ndarray, mu: float, products: dict[str, float]) -> dict[str, dict[str, Callable[[int], Any]]]:
    """Return others' estimators at our number of products with F, where they are installed."""
    found: dict[str, dict[str, Callable[[int], Any]]] = {kind: {} for kind in products}
    n = len(matrix)
    try:
        import jax
        from matfree import decomp, funm, stochtrace
    except ImportError:
        print("matfree is not installed")
    else:
        jax.config.update("jax_enable_x64", True)
        like, array = jax.numpy.zeros(n), jax.numpy.asarray(matrix)

        def product(v: Any) -> Any:
            return array @ v

        def mean(integrand: Any, number: int, *, signs: bool = True, rest: Callable[[Any], Any] = float) -> Any:
            sampler = (stochtrace.sampler_signs if signs else stochtrace.sampler_normal)(like, num=number)
            kind = stochtrace.estimator_monte_carlo if signs else stochtrace.estimator_leave_one_out
            estimate = jax.jit(lambda key: kind(integrand, sampler=sampler)(product, key))
            return lambda seed: rest(estimate(jax.random.PRNGKey(seed)))

        P = PRODUCTS
        found["trace"] |= {
            "matfree Hutchinson": mean(stochtrace.monte_carlo_trace(), P),
            "matfree XTrace": mean(stochtrace.leave_one_out_xtrace(), P // 2, signs=False),
            "matfree XNysTrace": mean(stochtrace.leave_one_out_xnystrace(), P, signs=False),
        }
        found["Frobenius norm"] |= {
            "matfree": mean(stochtrace.monte_carlo_frobeniusnorm_squared(), P, rest=lambda x: float(x) ** 0.5)
        }
        found["diagonal"] |= {
            "matfree Hutchinson": mean(stochtrace.monte_carlo_diagonal(), P, rest=np.asarray),
            "matfree XDiag": mean(stochtrace.leave_one_out_xdiag(), P // 2, signs=False, rest=np.asarray),
            "matfree XNysDiag": mean(stochtrace.leave_one_out_xnysdiag(), P, signs=False, rest=np.asarray),
        }
        steps = 24
        tridiagonal = decomp.tridiag_sym(steps, reortho="full")
        dense = funm.dense_funm_sym_eigh(lambda x: jax.numpy.log(jax.numpy.maximum(x, 0) + mu))
        number = max(1, round(products["log det(F + mu)"] / steps))
        found["log det(F + mu)"] |= {
            f"matfree, {steps} steps": mean(funm.monte_carlo_funm_sym(dense, tridiagonal), number)
        }
    try:
        from skerch.algorithms import hutch, xhutchpp
    except ImportError:
        print("skerch is not installed")
    else:
        tensor, kind, P = torch.from_numpy(matrix), torch.float64, PRODUCTS
        thirds = {"x_dims": P // 3, "gh_meas": P - 2 * (P // 3)}
        for name, key in (("trace", "tr"), ("diagonal", "diag")):
            found[name] |= {
                "skerch Hutchinson": lambda s, key=key: np.asarray(
                    hutch(tensor, "cpu", kind, P, seed=1000 * s + 1)[key]
                ),
                "skerch XHutch++": lambda s, key=key: np.asarray(
                    xhutchpp(tensor, "cpu", kind, seed=1000 * s + 1, **thirds)[key]
                ),
            }
    return found


def accuracy(names: list[str], runs: int) -> None:
    print(f"Root mean square errors, %, of {runs} runs at {PRODUCTS} products (log det: at ours); a map: median error")
    for name in names:
        op, values, diagonal = problem(name, dense=True)
        mu, truth = level(values), {**truths(values), "diagonal": diagonal}
        matrix = op.numpy() if isinstance(op, torch.Tensor) else (op @ torch.eye(len(values)).double()).numpy()
        if diagonal is None:
            truth["diagonal"] = matrix.diagonal()
        probes = PRODUCTS if diagonal is not None else PRODUCTS // 2
        ours: dict[str, Callable[[int], fo.Estimate]] = {
            "trace": lambda seed, op=op, probes=probes: fo.trace(op, probes, rng=seed),
            "Frobenius norm": lambda seed, op=op: fo.spectrum.frobenius_norm(op, PRODUCTS // 2, rng=seed),
            "diagonal": lambda seed, op=op: fo.sensitivity_map(op, PRODUCTS, rng=seed),
            "log det(F + mu)": lambda seed, op=op, mu=mu: fo.logdet(op, mu, steps=STEPS, rng=seed),
        }
        found = {kind: [call(seed) for seed in range(runs)] for kind, call in ours.items()}
        products = {kind: float(np.mean([e.n_matvec for e in several])) for kind, several in found.items()}
        others = peers(matrix, mu, products)
        for kind in ours:
            lines = {"fisherop": [np.asarray(e.value) for e in found[kind]]}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lines |= {peer: [call(seed) for seed in range(runs)] for peer, call in others[kind].items()}
            words = ", ".join(f"{peer} {100 * _error(kind, v, truth[kind]):.2g}" for peer, v in lines.items())
            print(f"{name}, {kind}, {products[kind]:.0f} products: {words}", flush=True)


def _error(kind: str, values: list[Any], truth: Any) -> float:
    if kind != "diagonal":
        return float((np.mean((np.array(values, dtype=float) - truth) ** 2)) ** 0.5 / abs(truth))
    seen = truth > 1e-9 * truth.max()
    return float(np.median(np.abs(np.stack([v.ravel() for v in values]) - truth)[:, seen] / truth[seen]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["coverage", "accuracy"])
    parser.add_argument("--operators", nargs="+", default=[*SPECTRA, *MODELS])
    parser.add_argument("--estimates", nargs="+", default=[*truths(np.ones(9)), "map"])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--rtol", type=float)
    parser.add_argument("--probes", type=int)
    args = parser.parse_args()
    if args.table == "coverage":
        options = {"rtol": args.rtol, "n_probes": args.probes}
        given = {name: value for name, value in options.items() if value is not None}
        coverage(args.operators, args.estimates, args.runs, given)
    else:
        accuracy(args.operators, args.runs)


if __name__ == "__main__":
    main()
