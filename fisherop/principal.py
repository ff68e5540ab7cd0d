"""Principal distortions: those that tell a set of models apart best.

>>> import numpy as np, fisherop as fo
>>> A, B = np.diag([4.0, 1.0, 1.0]), np.diag([1.0, 1.0, 9.0])
>>> p = fo.principal_distortions([A, B])
>>> abs(p.distortions).round(3)
array([[0., 0., 1.],
       [1., 0., 0.]])
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.certificate import signed
from fisherop.compare import DELTA, Lifted, checked, squared_sensitivity
from fisherop.eigen import eigendistortions
from fisherop.maps import number, whole
from fisherop.result import ConvergenceWarning
from fisherop.rows import RowOperator, stream, unit
from fisherop.solvers.contract import gram, orthonormal, ritz_values

BASIS_ROWS = 60
MAXITER = 300
START_STEPS = 40
TOP_STEPS = 30
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class PrincipalDistortions:
    """The distortions that tell a set of models apart best, and how sure that is.

    Attributes
    ----------
    distortions : Tensor or ndarray, shape (k, ...)
        Unit norm, in the image's shape; those that the models notice more, on average of their logarithms, first.
    sensitivities : ndarray of float64, shape (N, k)
        sqrt(d'F_i d) of every model i to every distortion d.
    objective : float
        The generalized variance, across models, of the log ratios of sensitivities; for two distortions the variance
        of log(sensitivity to the first / sensitivity to the second).
    gradient_norm : float
        Norm of the gradient of log objective along the spheres, from fresh products, relative to the sum of the norms
        of the terms that cancel in it: 0 at a stationary point.
    converged : bool
        ``gradient_norm <= tol``, and no sensitivity is zero to rounding.
    n_matvec : int
        Products with all the Fisher matrices together.
    message : str
        What was done and found, in words.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> p = fo.principal_distortions([np.diag([4.0, 1.0]), np.diag([1.0, 9.0])])
    >>> len(p), p.sensitivities.round(3)
    (2, array([[1., 2.],
           [3., 1.]]))
    """

    distortions: Any
    sensitivities: NDArray[np.float64]
    objective: float
    gradient_norm: float
    converged: bool
    n_matvec: int
    message: str

    def __len__(self) -> int:
        return len(self.distortions)


def principal_distortions(
    ops: Sequence[Any],
    k: int = 2,
    *,
    delta: float | None = None,
    restarts: int = 4,
    tol: float | None = None,
    maxiter: int = MAXITER,
    rng: Any = 0,
) -> PrincipalDistortions:
    """Find the k distortions of an image that tell N models apart best, by how much each model notices them.

    For two distortions a and b, these maximize over models i the variance of ``log(s_i(a) / s_i(b))`` with the
    sensitivity ``s_i(d) = sqrt(d'F_i d)``: some models notice a more than b, others b more than a. For more of them,
    the determinant of the covariance matrix of ``log(s_i(d_1) / s_i(d_k)), ..., log(s_i(d_k-1) / s_i(d_k))``, which
    does not depend on the order and is the variance for k = 2. Nothing changes where a model's response is scaled.

    Parameters
    ----------
    ops : sequence of N operators
        Fisher matrices of N >= 2 models at the same image: Fisher operators, SciPy operators, sparse or dense matrices.
    k : int, optional
        Distortions, 2 to N: N models differ in no more than N - 1 independent ratios.
    delta : float, optional
        A floor under every squared sensitivity, relative to the largest eigenvalue of the model's F (as a short Lanczos
        run estimates it), without which a null space makes the variance infinite. By default 0, or 1e-3 where a model
        has fewer responses than pixels.
    restarts : int, optional
        Random starts beside the one from the extreme generalized eigenvectors of all pairs of models.
    tol : float, optional
        The `gradient_norm` to stop at, by default 1e-5 in float64 and 1e-3 in float32.
    maxiter : int, optional
        Most steps of every start; a step is N k products.
    rng : optional
        Anything `numpy.random.default_rng` takes.

    Returns
    -------
    PrincipalDistortions
        The best stationary point of all starts: a local maximum, which is global for two models.

    Raises
    ------
    TypeError, ValueError
        For operators at different images, of different size, restriction, precision or device, and arguments that make
        no sense.

    Warns
    -----
    ConvergenceWarning
        Where the gradient is larger than the tolerance, or the variance has no upper bound, for want of a floor; the
        best distortions are returned all the same.

    Notes
    -----
    The gradient of s_i(d) comes from the product F_i d alone. Every step adds the gradients on the sphere to a search
    space that all distortions share, and maximizes within it, which needs no products: conjugate directions and
    more, without a step length.

    References
    ----------
    Feather, Lipshutz, Harvey, Williams and Simoncelli (2025), "Discriminating image representations with principal
    distortions", arXiv 2410.15433: the objective for two distortions. For more, the determinant is our choice: it keeps
    distortions apart, where a sum of variances would repeat the first pair.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> image = torch.rand(1, 1, 6, 6)
    >>> models = torch.nn.Conv2d(1, 8, 3), torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Tanh())
    >>> p = fo.principal_distortions([fo.FisherOperator(model, image) for model in models])
    >>> p.distortions.shape, p.sensitivities.shape, p.converged
    (torch.Size([2, 1, 6, 6]), (2, 2), True)
    """
    try:
        ops = list(ops)
    except TypeError:
        raise TypeError(f"ops must be a sequence of Fisher matrices, not {type(ops).__name__}") from None
    rows = checked(ops, tuple(f"ops[{i}]" for i in range(len(ops))))
    if len(rows) < 2:
        raise ValueError("principal distortions compare two models or more: pass a sequence of Fisher matrices")
    k, restarts, maxiter = whole(k, "k"), whole(restarts, "restarts"), whole(maxiter, "maxiter")
    if not 2 <= k <= min(len(rows), rows[0].n):
        raise ValueError(f"k must be a whole number from 2 to the number of models, {len(rows)}, not {k}")
    if delta is None:
        delta = DELTA if any(op.m is not None and op.m < op.n for op in rows) else 0.0
    delta = number(delta, "delta")
    if not 0 <= delta < 1:
        raise ValueError(f"delta is relative to each model's largest eigenvalue: from 0 to 1, not {delta}")
    if restarts < 0 or maxiter < 1:
        raise ValueError(f"restarts must be 0 or more and maxiter 1 or more, not {restarts} and {maxiter}")
    tol = (1e-5 if rows[0].dtype == torch.float64 else 1e-3) if tol is None else number(tol, "tol")
    generator = stream(rng)
    family = Family(rows, delta)
    starts = [_from_pairs(family, k, generator)]
    starts += [orthonormal(rows[0].random_rows(k, generator)) for _ in range(restarts)]
    found = [_ascend(family, start, tol, maxiter) for start in starts]
    best = max(range(len(found)), key=lambda i: found[i][1])
    result = _judged(family, *found[best], tol, delta, [objective for _, objective in found])
    if not result.converged:
        warnings.warn(result.message, ConvergenceWarning, stacklevel=2)
    return result


class Family:
    """The models to be told apart: their Fisher matrices, each divided by its largest eigenvalue, floor added."""

    def __init__(self, ops: list[RowOperator], delta: float) -> None:
        self.ops, self.delta = ops, delta
        self.tops = [float(ritz_values(op, op.random_rows(1, stream(0)), TOP_STEPS)[-1]) for op in ops]
        for i, top in enumerate(self.tops):
            if top <= 0:
                raise ValueError(f"ops[{i}] is zero at this image: its model notices nothing; leave it out")
        # A floor at the level of rounding keeps logarithms finite.
        self.floor = max(delta, 10 * torch.finfo(ops[0].dtype).eps)

    @property
    def n_matvec(self) -> int:
        """Products of all models so far."""
        return sum(op.n_matvec for op in self.ops)

    def products(self, rows: Tensor) -> Tensor:
        """Multiply every row by every matrix: returns (N, b, n)."""
        return torch.stack(
            [op.rows(rows) / top + self.floor * rows for op, top in zip(self.ops, self.tops, strict=True)]
        )


def _ascend(family: Family, start: Tensor, tol: float, maxiter: int) -> tuple[Tensor, float]:
    """Climb from one start; return the distortions and log objective."""
    k = len(start)
    basis = orthonormal(start)
    products = family.products(basis)
    room = min(basis.shape[1], max(BASIS_ROWS, 6 * k))
    mix = (start @ basis.T).double().cpu().numpy().T
    value, previous = -math.inf, mix[:, :0]
    for _ in range(maxiter):
        small = np.stack([gram(basis, product).numpy() for product in products])
        mix, value = _maximized((small + small.swapaxes(1, 2)) / 2, mix)
        turn = torch.from_numpy(mix.T).to(basis)
        gradients, relative = _gradients(turn @ basis, turn @ products, value)
        if relative <= 0.5 * tol:
            break
        if len(basis) + k > room:
            kept = np.linalg.qr(np.hstack([mix, _padded(previous, len(mix))]))[0]
            keep = torch.from_numpy(kept.T).to(basis)
            basis, products, mix = keep @ basis, keep @ products, kept.T @ mix
        fresh = orthonormal(gradients, basis)
        if not len(fresh):
            break
        basis, products = torch.cat([basis, fresh]), torch.cat([products, family.products(fresh)], dim=1)
        previous, mix = mix, _padded(mix, len(basis))
    return torch.from_numpy(mix.T).to(basis) @ basis, value


def _maximized(small: NDArray[np.float64], mix: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Maximize log objective over combinations of the basis, from `mix` on, by L-BFGS; columns have unit norm.

    Sensitivities of d / ||d|| make a function of all of space, so that the spheres need no constraint.
    """
    from scipy.optimize import minimize  # here, for importing it takes as long as all of fisherop

    size, k = mix.shape

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        c = flat.reshape(size, k)
        norms = (c**2).sum(0)
        images = small @ c
        squares = np.maximum((images * c).sum(1), TINY * norms)
        value, slopes = _log_volume(np.log(squares / norms) / 2)
        slope = np.einsum("ij,isj->sj", slopes / squares, images) - slopes.sum(0) * c / norms
        return -value, -slope.ravel()

    best = minimize(loss, mix.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 60, "ftol": 0, "gtol": 1e-10})
    c = best.x.reshape(size, k)
    return c / np.linalg.norm(c, axis=0), -float(best.fun)


def _log_volume(logs: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Return log det of the covariance, across models, of the log ratios of sensitivities, and its gradient.

    `logs` is (N, k). With orthonormal contrasts C of the k distortions, the determinant for ratios to the last one is
    k times that for C.
    """
    n_models, k = logs.shape
    contrasts = _contrasts(k)
    centred = (logs - logs.mean(0)) @ contrasts
    covariance = centred.T @ centred / n_models
    # Models that agree at a start have no variance there: a trace of it shows the way out.
    covariance += 1e-30 * np.eye(k - 1)
    slopes = 2 / n_models * np.linalg.solve(covariance, centred.T).T @ contrasts.T
    return float(np.linalg.slogdet(covariance)[1]) + math.log(k), slopes


@functools.cache
def _contrasts(k: int) -> NDArray[np.float64]:
    """Return an orthonormal basis, (k, k - 1), of the combinations of k numbers that ignore their mean."""
    return np.linalg.svd(np.eye(k) - 1 / k)[0][:, : k - 1]


def _gradients(x: Tensor, products: Tensor, value: float) -> tuple[Tensor, float]:
    """Return the gradients of log objective on the spheres, (k, n), and their norm relative to that of their terms."""
    squares = _inner(products, x)
    _, slopes = _log_volume((squares.log() / 2).cpu().numpy())
    weights = torch.from_numpy(slopes).to(squares)[:, :, None]
    terms = weights * (products.double() / squares[:, :, None])
    total = terms.sum(0)
    tangent = total - (total * x.double()).sum(1, keepdim=True) * x.double()
    scale = float(terms.norm(dim=2).sum()) or 1.0
    return tangent.to(x), float(tangent.norm()) / scale


def _inner(products: Tensor, x: Tensor) -> Tensor:
    """Return d'F_i d in float64, (N, k), which rounding must not make negative."""
    return (products.double() * x.double()).sum(2).clamp(min=TINY)


def _from_pairs(family: Family, k: int, rng: np.random.Generator) -> Tensor:
    """Choose, among the extreme generalized eigenvectors of all pairs of models, those that tell all of them apart."""
    pool = []
    for a, b in itertools.combinations(range(len(family.ops)), 2):
        with warnings.catch_warnings():  # a start need not have converged
            warnings.simplefilter("ignore")
            floor = max(family.delta, DELTA) * family.tops[b]
            one, other = Lifted(family.ops[a], 0.0), Lifted(family.ops[b], floor)
            pair = eigendistortions(one, 2, M=other, tol=1e-2, maxiter=START_STEPS, rng=rng)
        pool.append(family.ops[0].tensor(pair.eigendistortions).reshape(2, -1))
    rows = torch.cat(pool)
    logs = _inner(family.products(rows), rows).log().cpu().numpy() / 2
    chosen: list[int] = []
    while len(chosen) < k:
        size = 2 if not chosen else 1
        sets = [[*chosen, *more] for more in itertools.combinations(range(len(rows)), size) if not {*more} & {*chosen}]
        chosen = max(sets, key=lambda members: _log_volume(logs[:, members])[0])
    return rows[chosen]


def _judged(
    family: Family, x: Tensor, value: float, tol: float, delta: float, values: list[float]
) -> PrincipalDistortions:
    """Judge distortions by fresh products, and bring them into an order that depends on no order of models."""
    x = unit(x)
    products = family.products(x)
    squares = _inner(products, x)
    order = squares.log().mean(0).argsort(descending=True)
    x, products, squares = x[order], products[:, order], squares[:, order]
    _, gradient_norm = _gradients(x, products, value)
    sensitivities = torch.stack([squared_sensitivity(op, x) for op in family.ops]).sqrt().cpu().numpy()
    value = _log_volume((squares.log() / 2).cpu().numpy())[0]
    # At the floor that rounding sets, a larger variance is only a matter of a smaller floor.
    unbounded = not delta and float(squares.min()) <= 10 * family.floor
    # Between proportional matrices all is rounding, the gradient too.
    alike = value <= 2 * (len(x) - 1) * math.log(100 * torch.finfo(x.dtype).eps)
    converged = alike or (gradient_norm <= tol and not unbounded)
    agree = sum(other >= max(values) - 1e-3 for other in values)
    words = [
        f"{agree} of {len(values)} starts reached the best objective, {math.exp(value):.4g}",
        f"gradient norm {gradient_norm:.1e}"
        + ("" if gradient_norm <= tol or alike else f", above tol={tol:.1e}: raise maxiter"),
        "the models do not differ, up to rounding: their sensitivities are in proportion" if alike else "",
        "a model does not notice one of them at all, so that no variance is largest: pass delta=1e-3"
        if unbounded
        else "",
        f"floor delta = {delta:g}" if delta else "",
        f"{family.n_matvec} products",
    ]
    return PrincipalDistortions(
        distortions=family.ops[0].in_image_shape(signed(x)),
        sensitivities=sensitivities,
        objective=math.exp(value),
        gradient_norm=gradient_norm,
        converged=converged,
        n_matvec=family.n_matvec,
        message="; ".join(word for word in words if word) + ".",
    )


def _padded(mix: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    return np.pad(mix, ((0, size - len(mix)), (0, 0)))
