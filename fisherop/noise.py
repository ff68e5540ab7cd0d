"""Response noise: what turns a model's Jacobian J into Fisher information F = J^T W J.

A noise knows its precision W at a response, the Fisher information of the response about its own mean parameter f;
F is that information as a function of the image. Write another one as a class with the method `at` of `Noise`.

>>> import torch
>>> from fisherop import noise
>>> response = torch.tensor([1.0, 2.0])
>>> noise.Gaussian(covariance=4.0).at(response).apply(torch.ones(1, 2))
tensor([[0.2500, 0.2500]])
>>> noise.Poisson().at(response).apply(torch.ones(1, 2))
tensor([[1.0000, 0.5000]])
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherop.linearize import Product
from fisherop.maps import dense_columns, is_matrix, noise_floor, real, row_products

__all__ = ["Bernoulli", "Categorical", "Custom", "Gaussian", "Noise", "Poisson", "Precision"]

DENSE_ORDER = 512
"""Responses up to which a precision given as an operator is made dense, for the sake of its root."""

LITTLE_LOST = 0.9
"""Part of a direction's weight that may be taken away by a difference, which then loses two digits at most."""


class Precision(Protocol):
    """The matrix W of a noise at one response, applied to the rows of a (b, m) block."""

    def apply(self, rows: Tensor, /) -> Tensor:
        """Multiply every row by W."""

    def root(self, rows: Tensor, /) -> Tensor:
        """Multiply every row by a matrix R with R^T R = W; raise NotImplementedError where none is known."""

    def root_transpose(self, rows: Tensor, /) -> Tensor:
        """Multiply every row by the transpose of that R."""


class Noise(Protocol):
    """A model of response noise: anything that knows its precision at a response."""

    def at(self, response: Tensor) -> Precision:
        """Return the precision at a response of shape (m,); what depends on the response is computed here, once."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian noise whose covariance C does not depend on the response: F = J^T C^-1 J.

    Parameters
    ----------
    covariance : optional
        In squared units of the response, its entries in the response's order; positive definite.

        - None: unit variance; a number: one variance; m numbers: the variance of every response.
        - A matrix of shape (m, m), applied through the inverse of its Cholesky factor.
        - A pair of a matrix U of shape (m, r) and a number or m numbers d: low rank plus diagonal,
          C = U U^T + diag(d), as in `torch.distributions.LowRankMultivariateNormal`; no m x m matrix is formed.
    precision : optional
        In place of the covariance, its inverse: a SciPy LinearOperator or a matrix of shape (m, m), see `Custom`.

    Raises
    ------
    TypeError, ValueError
        When the noise meets a response: a covariance of wrong size, or one that is not positive definite and finite.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> noise = fo.noise.Gaussian(covariance=torch.tensor([1.0, 100.0]))
    >>> F = fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), noise=noise)
    >>> F @ torch.ones(2)
    tensor([1.0000, 0.0100])

    Responses that share a source of noise:

    >>> shared = fo.noise.Gaussian(covariance=(torch.ones(2, 1), 1.0))
    >>> fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), noise=shared) @ torch.ones(2)
    tensor([0.3333, 0.3333])

    References
    ----------
    Berardino, Laparra, Balle, Simoncelli (2017), "Eigen-distortions of hierarchical representations", eq. 2.
    """

    covariance: Any = None
    precision: Any = None

    def at(self, response: Tensor) -> Precision:
        """Return the precision at a response of shape (m,)."""
        if self.precision is not None:
            if self.covariance is not None:
                raise ValueError("covariance and precision are each other's inverse: give one of them")
            return Custom(self.precision).at(response)
        if self.covariance is None:
            return Products(_as_it_is, _as_it_is, _as_it_is)
        if isinstance(self.covariance, LinearOperator) or issparse(self.covariance):
            raise TypeError(
                "a covariance is inverted, and a sparse matrix or operator cannot be: give its inverse as precision="
            )
        if isinstance(self.covariance, tuple):
            return _low_rank(self.covariance, response)
        covariance = _numbers(self.covariance, response, "covariance")
        if covariance.ndim == 2 and covariance.shape == (response.numel(),) * 2 and response.numel() > 1:
            return _cholesky(covariance, response)
        variance = _per_response(covariance, response, "covariance", "one variance")
        if not bool((variance > 0).all()):
            raise ValueError("covariance must be positive and finite: a variance of zero is infinite information")
        return _diagonal(1 / variance, response)


@dataclass(frozen=True, eq=False)
class Poisson:
    """Counts, as of spikes or photons, of mean gain * f: F = J^T diag(gain / f) J.

    Parameters
    ----------
    gain : float or Tensor of shape (m,), optional
        Expected count per unit of response, such as the time over which spikes are counted. Positive.
    floor : float, optional
        Responses below it are taken to be as large as it is, for a silent unit would carry infinite information. In
        units of the response. Positive.

    Raises
    ------
    ValueError
        For a gain or floor that is not positive, and when the noise meets a response with a negative entry.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> F = fo.FisherOperator(lambda x: x**2, torch.tensor([1.0, 2.0]), noise=fo.noise.Poisson(gain=10.0))
    >>> F @ torch.ones(2)
    tensor([40., 40.])

    References
    ----------
    Seung and Sompolinsky (1993), "Simple models for reading neuronal population codes".
    """

    gain: float | Tensor = 1.0
    floor: float = 1e-6

    def at(self, response: Tensor) -> Precision:
        """Return the precision at a response of shape (m,)."""
        gain = _per_response(_numbers(self.gain, response, "gain"), response, "gain", "one gain")
        floor = _numbers(self.floor, response, "floor")
        if floor.ndim or not bool((gain > 0).all()) or not bool(floor > 0):
            raise ValueError("gain and floor of Poisson noise must be positive, and floor one number")
        negative = int((response < 0).sum())
        if negative:
            raise ValueError(
                f"{negative} of {response.numel()} responses are negative (lowest {float(response.min()):.3g}), and a "
                "Poisson rate cannot be: rectify the model's output, as by softplus, or use Gaussian noise"
            )
        return _diagonal(gain / response.double().clamp(min=floor), response)


@dataclass(frozen=True)
class Bernoulli:
    """Independent yes-or-no responses whose log odds are the model's output f: W = diag(p (1 - p)), p = sigmoid(f).

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), noise=fo.noise.Bernoulli()) @ torch.ones(2)
    tensor([0.2500, 0.2500])

    References
    ----------
    McCullagh and Nelder (1989), "Generalized linear models", section 4.4.
    """

    def at(self, response: Tensor) -> Precision:
        """Return the precision at a response of shape (m,)."""
        log = torch.nn.functional.logsigmoid
        logits = response.double()
        return _diagonal((log(logits) + log(-logits)).exp(), response)


@dataclass(frozen=True)
class Categorical:
    """One choice among m classes whose logits are the model's output f: W = diag(p) - p p^T, p = softmax(f).

    F is the information of the predicted distribution, whatever the true class. W is never formed: its root is
    ``R = (I - s s^T) diag(s)`` with s the square root of p, a unit vector, so that R^T R = diag(p) - p p^T.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> F = fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), noise=fo.noise.Categorical())
    >>> F @ torch.tensor([1.0, -1.0])
    tensor([ 0.5000, -0.5000])

    References
    ----------
    Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent".
    """

    def at(self, response: Tensor) -> Precision:
        """Return the precision at a response of shape (m,)."""
        scale = (torch.log_softmax(response.double(), 0) / 2).exp()
        return _diagonal_less(scale, scale[None], torch.ones_like(scale[:1]), response)


@dataclass(frozen=True, eq=False)
class Custom:
    """A precision of your own: F = J^T W J for any symmetric positive semidefinite W.

    Where W depends on the response, write a class with the method ``at(response)`` in place of this one.

    Parameters
    ----------
    precision : matrix, LinearOperator or callable
        W, of shape (m, m): a tensor, an array, a sparse matrix, a SciPy LinearOperator, or a function that multiplies
        every row of a (b, m) tensor by it. SciPy's are applied on the host.
    root : matrix, LinearOperator or callable, optional
        R with R^T R = W, of shape (r, m); a function multiplies every row of a (b, m) tensor by the symmetric
        W^(1/2). Without it, a root is computed for a tensor, an array, and anything of m <= 512; for a larger operator
        F is then served without its factor W^(1/2) J, which costs digits of its small eigenvalues.

    Raises
    ------
    TypeError, ValueError
        When the noise meets a response: a wrong size, a precision that is not symmetric positive semidefinite, or a
        root that does not belong to it.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> difference = torch.tensor([[1.0, -1.0]])
    >>> noise = fo.noise.Custom(difference.T @ difference, root=difference)
    >>> fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), noise=noise) @ torch.tensor([1.0, 0.0])
    tensor([ 1., -1.])
    """

    precision: Any
    root: Any = None

    def at(self, response: Tensor) -> Precision:
        """Return the precision at a response of shape (m,)."""
        m = response.numel()
        apply, _ = _products(self.precision, response, "precision", (m, m))
        _check_semidefinite(apply, response)
        if self.root is not None:
            root, root_transpose = _products(self.root, response, "root", (None, m))
            _check_root(apply, root, root_transpose, response)
            return Products(apply, root, root_transpose)
        if isinstance(self.precision, (Tensor, np.ndarray)):
            return _from_dense(dense_columns(self.precision, response), response)
        if m <= DENSE_ORDER:
            return _from_dense(apply(torch.eye(m, dtype=response.dtype, device=response.device)).double(), response)
        return Products(apply, _rootless, _rootless)


def checked_noise(noise: Any) -> Noise:
    """Return the noise that an argument means, Gaussian() for None; refuse what is none."""
    if noise is not None and (isinstance(noise, type) or not callable(getattr(noise, "at", None))):
        raise TypeError(
            "noise must be one of fisherop.noise, made with its arguments as in noise.Gaussian(), or anything with "
            f"a method at(response), not {noise if isinstance(noise, type) else type(noise).__name__}"
        )
    found: Noise = Gaussian() if noise is None else noise
    return found


def precision_at(noise: Noise, response: Tensor) -> tuple[Precision, int | None]:
    """Return the precision at a response, and the length of its root's output, None where there is no root.

    Raises
    ------
    TypeError, ValueError
        For a precision of the user's own that is no symmetric positive semidefinite matrix, or not that of its root.
    """
    found = noise.at(response)
    if not isinstance(found, Products):
        _check_precision(found, response)
    try:
        return found, found.root(torch.zeros_like(response)[None]).shape[1]
    except NotImplementedError:
        return found, None


# ---------------------------------------------------------------------------------------------------------- precisions


@dataclass(frozen=True)
class Products:
    """A precision by three functions of rows."""

    apply: Product
    root: Product
    root_transpose: Product


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _diagonal(weights: Tensor, response: Tensor) -> Precision:
    """Return a diagonal precision, of one weight or of a weight for every response."""
    weights, scale = (_in_range(x, response) for x in (weights, weights.sqrt()))
    return Products(lambda rows: rows * weights, lambda rows: rows * scale, lambda rows: rows * scale)


def _diagonal_less(scale: Tensor, basis: Tensor, less: Tensor, response: Tensor) -> Precision:
    """Return the precision of root R = (I - Q diag(less) Q^T) diag(scale), Q^T = `basis`, of orthonormal rows.

    Weights and scaled copies of Q are kept, so that a product goes through memory as few times as it can: in one step,
    unless what it takes away is nearly all that there is, so that the rest would be the rounding of a difference.
    """
    lost = bool((less > LITTLE_LOST).any())
    weights, scaled, both = scale**2, basis * scale, less * (2 - less)
    scale, basis, less, weights, scaled, both = (
        _in_range(x, response).contiguous() for x in (scale, basis, less, weights, scaled, both)
    )

    def product(rows: Tensor, diagonal: Tensor, right: Tensor, middle: Tensor, left: Tensor) -> Tensor:
        return (rows * diagonal).addmm_((rows @ right.T) * middle, left, alpha=-1)

    def root(rows: Tensor) -> Tensor:
        return product(rows, scale, scaled, less, basis)

    def root_transpose(rows: Tensor) -> Tensor:
        return product(rows, scale, basis, less, scaled)

    if lost:
        return Products(lambda rows: root_transpose(root(rows)), root, root_transpose)
    return Products(lambda rows: product(rows, weights, scaled, both, scaled), root, root_transpose)


def _low_rank(pair: tuple[Any, ...], response: Tensor) -> Precision:
    """Return the precision of C = U U^T + D.

    With V = D^(-1/2) U = Q S P^T, C = D^(1/2) (I + Q S^2 Q^T) D^(1/2), and R = (I - Q (I - (I + S^2)^(-1/2)) Q^T)
    D^(-1/2): the formula of Woodbury (1950), "Inverting modified matrices", in a form that does not lose sign or
    symmetry to rounding.
    """
    if len(pair) != 2:
        raise ValueError(f"a low rank plus diagonal covariance is a pair (U, d), not {len(pair)} things")
    # Their shapes tell them apart, whichever comes first.
    d, U = sorted((_numbers(part, response, "covariance") for part in pair), key=lambda part: part.ndim)
    if U.ndim != 2 or len(U) != response.numel() or d.ndim > 1:
        raise ValueError(
            f"a low rank plus diagonal covariance is a matrix U of shape (m, r) with m = {response.numel()} and a "
            f"number or m numbers d, not of shapes {tuple(U.shape)} and {tuple(d.shape)}"
        )
    variance = _per_response(d, response, "the diagonal of covariance", "one variance")
    if not bool((variance > 0).all()):
        raise ValueError("the diagonal of a low rank plus diagonal covariance must be positive")
    scale = variance.rsqrt().expand(len(U))
    columns, singular, _ = torch.linalg.svd(scale[:, None] * U, full_matrices=False)
    return _diagonal_less(scale, columns.T, 1 - torch.rsqrt(1 + singular**2), response)


def _cholesky(covariance: Tensor, response: Tensor) -> Precision:
    if not _symmetric(covariance):
        raise ValueError("covariance is not symmetric: pass (C + C.T) / 2")
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        least = float(torch.linalg.eigvalsh(covariance)[0])
        raise ValueError(
            f"covariance is not positive definite (its least eigenvalue is {least:.3g}): add a small variance to its "
            "diagonal"
        )
    # Inverted before it is rounded: solving with a rounded factor would lose as many digits as C is ill-conditioned.
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return _from_root(torch.linalg.solve_triangular(factor, identity, upper=False), response)


def _from_dense(precision: Tensor, response: Tensor) -> Precision:
    """Return a dense precision with a root: Cholesky's where it exists, else that of the eigenvalues above rounding."""
    if not _symmetric(precision):
        raise ValueError("precision is not symmetric: pass (W + W.T) / 2")
    precision = (precision + precision.T) / 2
    lower, failed = torch.linalg.cholesky_ex(precision)
    root = lower.T
    if failed:
        values, vectors = torch.linalg.eigh(precision)
        rounding = 1e2 * torch.finfo(response.dtype).eps * max(float(values.abs().max()), 0.0)
        if float(values[0]) < -rounding:
            raise ValueError(f"precision is not positive semidefinite: its least eigenvalue is {float(values[0]):.3g}")
        kept = values > rounding
        root = values[kept].sqrt()[:, None] * vectors[:, kept].T
    return Products(row_products(precision, response)[0], *row_products(root, response))


def _from_root(root: Tensor, response: Tensor) -> Precision:
    """Return the precision R^T R of a dense R."""
    _in_range((root**2).sum(0), response)
    multiply, transposed = row_products(root, response)
    return Products(lambda rows: transposed(multiply(rows)), multiply, transposed)


def _rootless(rows: Tensor) -> Tensor:
    raise NotImplementedError("this precision is an operator without a root: pass root= to noise.Custom")


# ------------------------------------------------------------------------------------------------------------ checking


def _numbers(x: Any, response: Tensor, name: str) -> Tensor:
    """Return finite real numbers in float64 on the response's device."""
    numbers = real(x, name).to(response.device)
    if not torch.isfinite(numbers).all():
        raise ValueError(f"{name} must be positive and finite")
    return numbers


def _in_range(x: Tensor, response: Tensor) -> Tensor:
    """Bring a precision to the response's dtype, where it must not overflow."""
    found = x.to(response.dtype)
    if not torch.isfinite(found).all():
        raise ValueError(
            f"a precision of up to {float(x.abs().max()):.2g} is beyond {response.dtype}: take larger units of the "
            "response, or a float64 image and model"
        )
    return found


def _per_response(numbers: Tensor, response: Tensor, name: str, one: str) -> Tensor:
    """Return one number, or a vector of as many as there are responses."""
    if numbers.ndim == 0:
        return numbers
    if numbers.numel() != response.numel():
        raise ValueError(
            f"{name} of shape {tuple(numbers.shape)} has {numbers.numel()} entries and the response "
            f"{response.numel()}: give one number, or {one} for every response"
        )
    return numbers.reshape(-1)


def _symmetric(matrix: Tensor) -> bool:
    return bool((matrix - matrix.T).abs().max() <= 1e-5 * matrix.abs().max())


def _products(matrix: Any, response: Tensor, name: str, shape: tuple[int | None, int]) -> tuple[Product, Product]:
    """Return products of rows with a matrix and its transpose; a function is taken to be symmetric."""
    if is_matrix(matrix):
        if matrix.shape[1] != shape[1] or shape[0] not in (None, matrix.shape[0]):
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}, and the response {response.numel()} entries")
        return row_products(matrix, response)
    if callable(matrix):
        return _checked_function(matrix, name), _checked_function(matrix, name)
    raise TypeError(
        f"{name} must be a matrix with two dimensions, a LinearOperator or a function of rows, "
        f"not {type(matrix).__name__}"
    )


def _checked_function(function: Callable[[Tensor], Any], name: str) -> Product:
    def product(rows: Tensor) -> Tensor:
        result = function(rows)
        if not isinstance(result, Tensor) or result.shape != rows.shape:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"{name} must turn rows of shape {tuple(rows.shape)} into as many, not {shape}")
        return result.to(rows)

    return product


def _probes(response: Tensor) -> tuple[Tensor, float]:
    """Return two Gaussian rows, always the same, and what rounding may do relative to their products."""
    source = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(2, response.numel(), generator=source, dtype=torch.float64, device="cpu")
    return rows.to(response), noise_floor(response.dtype)


def _check_precision(precision: Precision, response: Tensor) -> None:
    """Check a precision that is none of this module's."""
    names = "apply", "root", "root_transpose"
    missing = [name for name in names if not callable(getattr(precision, name, None))]
    if missing:
        raise TypeError(
            f"noise.at(response) returned {type(precision).__name__} without {missing[0]}(rows): a precision has the "
            "methods apply, root and root_transpose, and root raises NotImplementedError where none is known"
        )
    apply, root, root_transpose = (getattr(precision, name) for name in names)
    _check_semidefinite(_checked_function(apply, "apply"), response)
    with suppress(NotImplementedError):
        _check_root(apply, root, root_transpose, response)


def _check_semidefinite(apply: Product, response: Tensor) -> None:
    """Compare <u, W v> with <v, W u>, and look for a negative <v, W v>."""
    rows, tolerance = _probes(response)
    products = apply(rows)
    if not torch.isfinite(products).all():
        raise ValueError("a product with precision holds NaN or infinity")
    gram = rows.double() @ products.double().T
    rounding = tolerance * rows.double().norm() * products.double().norm()
    if (gram[0, 1] - gram[1, 0]).abs() > rounding:
        raise ValueError("precision is not symmetric: pass its symmetric part")
    if gram.diagonal().min() < -rounding:
        raise ValueError("precision is not positive semidefinite: v'Wv is negative for some v")


def _check_root(apply: Product, root: Product, root_transpose: Product, response: Tensor) -> None:
    """Compare R^T R v with W v."""
    rows, tolerance = _probes(response)
    expected, got = apply(rows).double(), root_transpose(root(rows)).double()
    if not bool((got - expected).norm() <= tolerance * expected.norm()):
        raise ValueError(
            "root does not belong to precision: R^T R must be W, and a root given as one function symmetric "
            f"(they differ by {float((got - expected).norm() / expected.norm()):.2g} of precision's norm)"
        )
