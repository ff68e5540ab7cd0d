"""Every eigensolver on spectra with a known answer and on the Fisher matrices of real models: one table.

    python benchmarks/solvers.py --quick
    python benchmarks/solvers.py --problems r3-48 r6-48 --ends BE --k 2 --methods lanczos arpack plenoptic-power
    python benchmarks/solvers.py --problems isolated flat --ends LM SM --k 1 4 8 --dtype float64

Residuals come from fresh products and are relative to the largest eigenvalue, as are errors of eigenvalues, which are
known for the spectra and, for models, where the short side is small enough for a dense solution. Products are counted
per vector; a step is a product with a block. A dash stands for what is not known.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.fft import dct, idct
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg

import fisherop as fo
from fisherop.certificate import certify
from fisherop.rows import RowOperator
from fisherop.solvers import BACKENDS, Control, Found, Request, exact, lanczos, nullspace
from fisherop.solvers.contract import largest_ritz_pair

N = 2000
DENSE = 7000
"""Largest dense problem to take the truth from; it takes a minute or two."""
MAXITER = 3000
STEP = np.arange(1.0, N + 1)
SPECTRA = {
    "i^-2": STEP**-2,
    "exponential": 10 ** np.linspace(0, -12, N),
    "null": np.where(STEP <= N - 500, 1 / STEP, 0),
    "soft": np.where(STEP <= N - 500, 10 ** (-14 * (STEP - 1) / (N - 501)), 0),
    "flat": np.append(1, np.linspace(0.98, 0.1, N - 1)),
    "isolated": np.append(np.linspace(1, 0.032, N - 1), 4.3e-5),
    "clusters": np.concatenate([np.ones(50), np.linspace(0.9, 0.2, N - 100), np.full(50, 0.1)]),
    "close": np.concatenate([[1, 1 - 1e-5], np.linspace(0.9, 0.1, N - 2)]),
    "crowd": np.concatenate(
        [[1 + 4e-5], np.ones(400), np.linspace(0.9, 0.2, N - 802), np.full(400, 0.01 + 4e-5), [0.01]]
    ),
}


class Mixed(LinearOperator):
    """A matrix of a given spectrum whose eigenvectors are mixed by two signed cosine transforms."""

    def __init__(self, values: np.ndarray, dtype: str) -> None:
        super().__init__(np.dtype(dtype), (len(values), len(values)))
        self.values, self.signs = values, np.random.default_rng(0).choice([-1.0, 1.0], (2, len(values), 1))

    def _matmat(self, x: np.ndarray) -> np.ndarray:
        y = x.astype(float)
        for sign in self.signs:
            y = dct(sign * y, axis=0, norm="ortho")
        y = self.values[:, None] * y
        for sign in self.signs[::-1]:
            y = sign * idct(y, axis=0, norm="ortho")
        return y.astype(self.dtype)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _adjoint(self) -> LinearOperator:
        return self


def resnet(layer: int) -> Callable[[], torch.nn.Module]:
    import torchvision

    return lambda: fo.Layer(torchvision.models.resnet18(weights=None), layer)


def vgg() -> torch.nn.Module:
    import torchvision

    return torchvision.models.vgg16(weights=None).features[:10]


def pooled() -> torch.nn.Module:
    nn = torch.nn
    convolutions = nn.Conv2d(3, 64, 5), nn.ReLU(), nn.Conv2d(64, 128, 5, stride=2), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, int]]] = {
    "r3-48": (lambda: resnet(3)(), (3, 48)),
    "r6-48": (lambda: resnet(6)(), (3, 48)),
    "r3-128": (lambda: resnet(3)(), (3, 128)),
    "r6-128": (lambda: resnet(6)(), (3, 128)),
    "vgg": (vgg, (3, 32)),
    "gain control": (lambda: fo.LGG(), (1, 48)),
    "pooled": (pooled, (3, 32)),
}


def problem(name: str, dtype: str) -> tuple[Any, np.ndarray | None]:
    """Return an operator, and its eigenvalues, descending, where they can be known."""
    if name in SPECTRA:
        return Mixed(SPECTRA[name], dtype), SPECTRA[name]
    build, (channels, side) = MODELS[name]
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False).to(getattr(torch, dtype))
    op = fo.FisherOperator(model, torch.rand(1, channels, side, side).to(getattr(torch, dtype)))
    if exact.size(RowOperator(op)) > DENSE:
        return op, None
    J = fo.JacobianOperator(model.double(), op.image.double())
    short = J @ J.T if J.shape[0] < J.shape[1] else J.T @ J
    matrix = (short @ torch.eye(short.shape[0], dtype=torch.float64)).numpy()
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1].clip(min=0)
    return op, np.append(values, np.zeros(J.shape[1] - len(values)))


def by_backend(name: str) -> Callable[[RowOperator, Request, Control], Found]:
    ours = {"lanczos": lanczos.solve, "nullspace": nullspace.solve}
    if name.startswith("lanczos-"):
        return lambda *args: lanczos.solve(*args, block=int(name.split("-")[1]))
    return ours[name] if name in ours else BACKENDS[name].solve


def by_user(solver: str) -> Callable[[RowOperator, Request, Control], Found]:
    """Return SciPy's or PRIMME's solver as a user would call it: the small end as such, tolerances as documented."""

    def solve(op: RowOperator, request: Request, control: Control) -> Found:
        def product(x: np.ndarray) -> np.ndarray:
            control.step()
            return op.rows(op.tensor(x.reshape(op.n, -1).T.copy())).numpy().T.astype(float)

        matrix = LinearOperator((op.n, op.n), matvec=product, matmat=product, dtype=float)
        rows = []
        for count, largest in ((request.largest, True), (request.smallest, False)):
            which = "LA" if largest else "SA"
            if count and solver == "eigsh":
                rows.append(eigsh(matrix, count, which=which, tol=request.tol, maxiter=MAXITER // 10)[1].T)
            elif count and solver == "lobpcg":
                start = request.rng.standard_normal((op.n, count))
                rows.append(lobpcg(matrix, start, tol=request.tol, maxiter=MAXITER, largest=largest)[1].T)
            elif count:
                import primme

                start = request.rng.standard_normal((op.n, 1))
                options = {"method": "PRIMME_DEFAULT_MIN_MATVECS", "maxMatvecs": MAXITER}
                rows.append(primme.eigsh(matrix, count, which=which, v0=start, tol=request.tol, **options)[1].T)
        return Found(op.tensor(np.concatenate(rows)), 0.0)

    return solve


def by_plenoptic(method: str) -> Callable[[RowOperator, Request, Control], Found]:
    def solve(op: RowOperator, request: Request, control: Control) -> Found:
        import plenoptic

        if op.image is None:
            raise ValueError("needs a model")
        peer = plenoptic.Eigendistortion(op.image, op.source.linearization.model)
        with open(os.devnull, "w") as bars, contextlib.redirect_stderr(bars):
            peer.synthesize(method=method, k=max(request.largest, request.smallest), max_iter=400)
        rows = peer.eigendistortions.reshape(len(peer.eigendistortions), -1)
        return Found(torch.cat([rows[: request.largest], rows[len(rows) - request.smallest :]]), 0.0)

    return solve


PEERS = {
    "scipy-eigsh": by_user("eigsh"),
    "scipy-lobpcg": by_user("lobpcg"),
    "primme-alone": by_user("primme"),
    "plenoptic-power": by_plenoptic("power"),
    "plenoptic-svd": by_plenoptic("randomized_svd"),
}
METHODS = ["lanczos", "lanczos-8", "nullspace", *(name for name in BACKENDS if name not in ("lanczos", "nullspace"))]


def measure(op: Any, truth: np.ndarray | None, method: str, request: Request) -> str:
    """Return one line of the table."""
    operator = RowOperator(op)
    control = Control(operator, MAXITER)
    start, before = time.perf_counter(), operator.n_matvec
    try:
        found = PEERS[method](operator, request, control) if method in PEERS else None
        found = found or by_backend(method)(operator, request, control)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    seconds, used = time.perf_counter() - start, operator.n_matvec - before
    if found.top is None:
        found = dataclasses.replace(found, top=largest_ritz_pair(operator, request, steps=40)[1])
    result = certify(operator, request, found, method)
    error = "-" if truth is None else f"{np.abs(result.eigenvalues - truth[result.index]).max() / truth[0]:.1e}"
    counted = f"{used:8d} {used / request.k:8.1f} {control.iteration:6d}" if used else f"{'-':>8} {'-':>8} {'-':>6}"
    right = f"{int(result.converged.sum())}/{request.k}"
    return f"{counted} {seconds:8.2f} {result.residuals.max():9.1e} {error:>9} {right:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=[*SPECTRA, *MODELS], default=[*SPECTRA, *MODELS])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *PEERS], default=[*METHODS, *PEERS])
    parser.add_argument("--ends", nargs="+", choices=["LM", "SM", "BE"], default=["LM", "SM"])
    parser.add_argument("--k", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="three spectra, one model, k = 1 and 4, the better methods"
    )
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.problems, chosen.k = ["i^-2", "null", "isolated", "pooled"], [1, 4]
        chosen.methods = ["lanczos", "lanczos-8", "nullspace", "arpack", "lobpcg", "scipy-eigsh"]
    warnings.simplefilter("ignore")
    tol = 1e-6 if chosen.dtype == "float64" else 1e-5
    header = (
        f"{'products':>8} {'a vector':>8} {'steps':>6} {'seconds':>8} {'residual':>9} {'error':>9} {'converged':>9}"
    )
    print(f"{'problem':<14}{'end':<4}{'k':>3}  {'method':<16}{header}")
    for name in chosen.problems:
        op, truth = problem(name, chosen.dtype)
        for end in chosen.ends:
            for k in chosen.k:
                smallest = {"LM": 0, "SM": k, "BE": k // 2}[end]
                for method in chosen.methods:
                    if method == "randomized_svd" and smallest:
                        continue
                    request = Request(k - smallest, smallest, tol, np.random.default_rng(chosen.seed))
                    print(f"{name:<14}{end:<4}{k:>3}  {method:<16}{measure(op, truth, method, request)}", flush=True)


if __name__ == "__main__":
    main()
