"""The one call: eigendistortions of an operator, each with its certificate.

>>> import torch, fisherop as fo
>>> F = fo.FisherOperator(torch.nn.Linear(6, 4), torch.zeros(6))
>>> r = fo.eigendistortions(F, k=2, which="BE")
>>> r.index, r.converged, r.nullity
(array([0, 5]), array([ True,  True]), 2)
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop import certificate, metric
from fisherop.linearize import exact_arithmetic
from fisherop.maps import noise_floor, real, whole
from fisherop.result import ConvergenceWarning, Eigendistortions
from fisherop.rows import RowOperator, stream
from fisherop.solvers import BACKENDS, ON_CUDA, Backend, Control, Progress, Request, exact, lobpcg
from fisherop.solvers.contract import rows_in_memory, scale_fault, tolerance

WHICH = ("LM", "LA", "SM", "SA", "BE")
DENSE_ORDER = 512
DENSE_BYTES = 1 << 30
SHORT_BASIS = 100
"""Vectors in memory with fewer than which a Krylov method would restart too often at the small end."""


def eigendistortions(
    op: Any,
    k: int = 2,
    which: str = "BE",
    method: str = "auto",
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    v0: Tensor | NDArray[Any] | None = None,
    M: Any = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
    certify: str = "residuals",
) -> Eigendistortions:
    """Find the distortions that a model notices most and least: extreme eigenpairs of its Fisher matrix, with proof.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n real symmetric positive semidefinite operator, of CuPy's too.
    k : int, optional
        Pairs in all, 1 to n.
    which : {"BE", "LM", "LA", "SM", "SA"}, optional
        As in SciPy: "LM" or "LA" the k largest, "SM" or "SA" the k smallest, "BE" half from each end with the odd
        one from the top.
    method : str, optional
        "exact" (dense, of the short side's size), "lanczos" (block Lanczos for both ends), "nullspace" (projection,
        for the small end of a matrix with a null space), "arpack", "lobpcg", "primme" (where installed), "power",
        "randomized_svd" (largest only), "davidson" (for an M known by its products), "cupyx" (CuPy's Lanczos, on CUDA
        devices), or "auto": exact where that is small, else lanczos, or nullspace where memory is short; `message`
        says which and why.
    tol : float, optional
        A pair is converged when ``||F v - lambda v|| <= tol * lambda_max``, for every method. By default
        ``max(1e-6, 100 * eps)`` of the operator's dtype.
    maxiter : int, optional
        Most steps to take, a step being one product of F with a block of vectors. Has no meaning for "exact".
    v0 : Tensor or ndarray, optional
        One or more vectors to start from, in image shape or as rows of length n, such as the eigendistortions of an
        earlier result. Images are projected on the subspace of a restricted operator.
    M : number, vector, matrix, LinearOperator or FisherOperator, optional
        How the size of a distortion is measured, where not pixel by pixel: pairs are those of F v = lambda M v, so
        that lambda is the squared sensitivity v'Fv relative to v'Mv. Symmetric positive definite: one number, a
        diagonal of n entries in any shape, an n x n matrix, or an operator. Numbers, diagonals and matrices are
        factorized, M = L L^T, and any method serves; an operator needs "davidson", "lobpcg", or "exact" for n
        products with M, and costs one product with M for each with F, some for its checks, and some tens per pair for
        the proof. Vectors come in unit Euclidean norm all the same, and are orthogonal in the sense of M.
        Residuals and `tol` are then those of ``F v - lambda M v`` for ``v'Mv = 1``, in the norm ``sqrt(r' M^-1 r)``,
        the one that bounds the error of lambda; for an operator an upper bound of it, by conjugate gradients.
    rng : optional
        Anything `numpy.random.default_rng` takes; the same seed gives the same answer.
    callback : callable, optional
        Called with a `Progress` (iteration, n_matvec, residuals) after every step; returning True stops the work
        and returns the best pairs so far.
    certify : {"residuals", "probe"}, optional
        "residuals" proves that every pair is an eigenpair, for k products, and for one of the large end where only
        the smallest are asked for: residuals are relative to its eigenvalue. "probe" spends 60 more on a search of what
        is orthogonal to the result: it bounds, with probability 0.999, the rest of the spectrum, so that `message` can
        say whether a larger (smaller) eigenvalue may have been missed, and it estimates the null space.

    Returns
    -------
    Eigendistortions
        Pairs in order of descending eigenvalue, with residuals from fresh products. Tensors for a Fisher operator,
        a tensor or anything of CuPy's, NumPy arrays for anything else.

    Raises
    ------
    TypeError, ValueError
        For an argument that makes no sense; the message says what to change.

    Warns
    -----
    ConvergenceWarning
        Where a pair's residual is above the tolerance, or the search for missed copies of multiple eigenvalues was
        cut short: then every pair marked converged is an eigenpair, but perhaps not of the wanted index. The best
        pairs are returned all the same.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> r = fo.eigendistortions(np.diag([4.0, 3.0, 0.0]), k=3)
    >>> r.eigenvalues
    array([4., 3., 0.])
    >>> fo.eigendistortions(np.diag([4.0, 3.0, 0.0]), k=3, M=np.array([4.0, 1.0, 1.0])).eigenvalues
    array([3., 1., 0.])
    >>> r.converged.all(), r.nullity
    (np.True_, 1)
    """
    operator = RowOperator(op)
    backends = BACKENDS | ON_CUDA
    known(method, ("auto", *backends), "method")
    if M is not None:
        operator = metric.generalized(operator, M, dense=_small(operator, method, whole(k, "k")))
    request = checked_request(operator, k, which, tol, v0, rng)
    name, reason = choose(operator, request) if method == "auto" else (method, "")
    backend = backends[name]
    _check_metric(operator, name, backend, certify)
    if request.smallest and not backend.smallest:
        raise ValueError(f"method {name!r} finds the largest pairs only: use which='LM', or another method")
    most = backend.maxiter if maxiter is None else whole(maxiter, "maxiter", 1)
    known(certify, ("residuals", "probe"), "certify")
    control = Control(operator, most, callback)
    with exact_arithmetic():  # of the solver itself, not of the products alone
        found = backend.solve(operator, request, control)
        result = certificate.certify(operator, request, found, name, reason, probe=certify == "probe")
    if result.lambda_max == 0 and not found.doubt:
        warnings.warn(NOTHING_NOTICED, stacklevel=2)
    elif not result.converged.all() or found.doubt:
        warnings.warn(advice(result, control, name, found.doubt, found.note), ConvergenceWarning, stacklevel=2)
    return result


NOTHING_NOTICED = "F = 0: every direction is a null direction, and these are arbitrary ones"


def _small(op: RowOperator, method: str, k: int) -> bool:
    """Tell whether an M known by its products is better known by its entries."""
    return (
        method == "exact"
        or (method == "auto" and op.n <= DENSE_ORDER)
        or (method == "lobpcg" and op.n <= lobpcg.DENSE_BELOW * k)
    )


def _check_metric(op: RowOperator, name: str, backend: Backend, certify: str) -> None:
    if op.metric is None:
        return
    if not backend.metric:
        able = ", ".join(repr(other) for other, its in BACKENDS.items() if its.metric)
        raise ValueError(f"method {name!r} needs the entries of M: pass M as a matrix, or use {able} or 'exact'")
    if certify == "probe":
        raise ValueError("certify='probe' needs the entries of M: pass M as a matrix, or certify='residuals'")


def choose(op: RowOperator, request: Request) -> tuple[str, str]:
    """Return the method that `auto` takes, and why."""
    if op.metric is not None:
        return "davidson", "chosen because M is known by its products only"
    order = exact.size(op)
    if (order <= DENSE_ORDER or order <= 20 * request.k) and exact.n_bytes(op) * op.sharers <= DENSE_BYTES:
        return "exact", f"chosen for its dense problem of order {order}"
    known_null = op.n - op.m if op.m else 0
    room = rows_in_memory(op)
    if known_null >= request.smallest > 0 and room < SHORT_BASIS:
        return "nullspace", f"chosen for a null space of dimension {known_null} and room for {room} vectors only"
    return "lanczos", f"chosen because a dense problem of order {order} would cost more"


def checked_request(op: RowOperator, k: int, which: str, tol: float | None, v0: Any, rng: Any) -> Request:
    """Return what the arguments ask for; refuse those that make no sense."""
    k = whole(k, "k")
    if not 1 <= k <= op.n:
        raise ValueError(f"k must lie between 1 and n = {op.n}, not {k}")
    which = known(which, WHICH, "which")
    smallest = {"L": 0, "S": k, "B": k // 2}[which[0]]
    tol, generator = tolerance(tol, op.dtype), stream(rng)
    start = None if v0 is None else op.coordinates(_start_rows(op, v0))
    return Request(k - smallest, smallest, tol, generator, start)


def _start_rows(op: RowOperator, v0: Any) -> Tensor:
    rows = op.vectors(real(v0, "v0"))
    sizes = rows.abs().amax(dim=1, keepdim=True)
    if not torch.isfinite(rows).all() or not bool((sizes > 0).all()):
        raise ValueError("v0 must be finite, and no vector of it zero where distortions are allowed")
    return rows / sizes  # the squares of very large or very small entries are beyond any dtype


def known(name: Any, names: tuple[str, ...], what: str) -> str:
    """Return a name that is one of those known; refuse any other, with a guess of what was meant."""
    if name in names:
        return str(name)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what} must be one of {', '.join(names)}, not {name!r}{hint}")


def advice(result: Eigendistortions, control: Control, method: str, doubt: str, note: str = "") -> str:
    """Return why a result is not all that was asked for, and what to change."""
    if result.converged.all():
        remedy = "let the callback go on" if control.stopped else "raise maxiter"
        return f"all {len(result)} pairs are eigenpairs, but " + (note or f"{method!r} was {doubt}: {remedy}")
    fault = scale_fault(control.op.dtype, result.lambda_max)
    if fault:
        return f"no pair can be judged, for {fault}: rescale the model's response"
    worst = result.residuals.max()
    count = f"{int((~result.converged).sum())} of {len(result)}"
    missed = f"{count} pairs did not reach tol={result.tol:.1e} (worst {worst:.1e})"
    if control.stopped:
        way = " with method='lanczos'" if method == "exact" else ""
        return f"{missed}: the callback stopped {method!r}; start again from v0=result.eigendistortions{way}"
    if control.iteration >= control.maxiter and method != "exact":
        return (
            f"{missed} within {control.iteration} steps of {method!r}: raise maxiter, start from "
            "v0=result.eigendistortions, or try another method"
        )
    dtype = control.op.dtype
    if worst > noise_floor(dtype):
        return f"{missed}: {note or 'loosen tol, or try another method'}"
    better = "a float64 image and model" if dtype == torch.float32 else "another method"
    return f"{missed}, which is {method!r}'s floor in {dtype}: loosen tol, or use {better}"
