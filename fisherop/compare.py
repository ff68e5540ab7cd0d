"""Several models at one image: what one makes of another's distortions, and which it sees so much better.

>>> import numpy as np, fisherop as fo
>>> A, B = np.diag([4.0, 1.0, 1.0]), np.diag([1.0, 1.0, 9.0])
>>> fo.generalized_eigendistortions(A, B, k=1).eigendistortions
array([[1., 0., 0.]])
>>> fo.discriminability(A, np.eye(3))
array([2., 1., 1.])
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import eye_array, issparse
from torch import Tensor

from fisherop.algebra import TensorOperator, check_spaces
from fisherop.eigen import eigendistortions
from fisherop.maps import number, real
from fisherop.metric import check_images
from fisherop.operators import InformationOperator
from fisherop.result import Eigendistortions
from fisherop.rows import RowOperator, unit
from fisherop.solvers import Progress

DELTA = 1e-3
"""The floor under a model's Fisher matrix, relative to its largest eigenvalue."""
OUTSIDE = 1e-4
"""Part of a distortion's norm that may lie outside a restriction: more than rounding in float32 leaves there."""


def generalized_eigendistortions(
    F_A: Any,
    F_B: Any,
    k: int = 2,
    which: str = "BE",
    method: str = "auto",
    *,
    delta: float = DELTA,
    tol: float | None = None,
    maxiter: int | None = None,
    v0: Tensor | NDArray[Any] | None = None,
    rng: Any = None,
    callback: Callable[[Progress], object] | None = None,
) -> Eigendistortions:
    """Find the distortions that one model notices most, or least, relative to another: F_A v = lambda M v.

    M = F_B + delta * lambda_max(F_B) * I: lambda is the ratio of squared sensitivities, where B's counts as no less
    than a part delta of its greatest, so that what B does not notice at all makes no infinite ratio.

    Parameters
    ----------
    F_A, F_B : FisherOperator, LinearOperator, sparse or dense matrix
        The Fisher matrices of two models at the same image, n x n.
    k, which, method, tol, maxiter, v0, rng, callback : optional
        As for `eigendistortions`: "LM" is what A notices most relative to B, "SM" what it notices least, "BE" both.
    delta : float, optional
        The floor relative to the largest eigenvalue of F_B, by default 1e-3: a sensitivity of B below a thirtieth of
        its greatest counts as that. Larger is faster, smaller tells models further apart.

    Returns
    -------
    Eigendistortions
        In order of descending ratio, as of ``eigendistortions(F_A, M=M)``.

    Raises
    ------
    TypeError, ValueError
        For operators at different images, of different size, restriction, precision or device, and as
        `eigendistortions` does.

    References
    ----------
    Feather, Lipshutz, Harvey, Williams and Simoncelli (2025), "Discriminating image representations with principal
    distortions", arXiv 2410.15433, where the extreme ones are the principal distortions of two models.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> A, B = np.diag([4.0, 1.0, 1.0]), np.diag([1.0, 1.0, 9.0])
    >>> fo.generalized_eigendistortions(A, B, delta=1e-9).eigenvalues.round(3)
    array([4.   , 0.111])
    """
    delta = number(delta, "delta")
    if not 0 < delta < 1:
        raise ValueError(f"delta is relative to the largest eigenvalue of F_B: between 0 and 1, not {delta}")
    checked([F_A, F_B], ("F_A", "F_B"))
    with warnings.catch_warnings():  # of F_B = 0, which is an error here
        warnings.simplefilter("ignore")
        top = eigendistortions(F_B, 1, "LM", rng=0).lambda_max
    if top <= 0:
        raise ValueError("F_B is zero at this image: B notices nothing, and there is nothing to compare A with")
    return eigendistortions(
        F_A,
        k,
        which,
        method,
        M=_lifted(F_B, delta * top),
        tol=tol,
        maxiter=maxiter,
        v0=v0,
        rng=rng,
        callback=callback,
    )


def discriminability(op: Any, distortion: Any) -> Any:
    """Tell how well a model's responses tell an image from the distorted one: sqrt(d'Fd), d' per unit of distortion.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        The model's Fisher matrix, n x n.
    distortion : Tensor or ndarray
        One distortion (n entries, in any shape) or k of them, along the first axis. Not normalized: twice the
        distortion is twice as discriminable.

    Returns
    -------
    float or ndarray of float64, shape (k,)
        For one distortion a number.

    Raises
    ------
    ValueError
        Where the distortion's entries are no multiple of n, or not finite, or it goes beyond those that the operator is
        restricted to.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> fo.discriminability(np.diag([4.0, 1.0]), np.array([1.0, 0.0]))
    2.0
    """
    operator = op if isinstance(op, RowOperator) else RowOperator(op)
    rows = _distortion_rows(operator, distortion)
    values = squared_sensitivity(operator, rows).sqrt().cpu().numpy()
    return float(values[0]) if len(values) == 1 else values


def thresholds(result: Eigendistortions, *, d_prime: float = 1.0) -> NDArray[np.float64]:
    """Return how large each eigendistortion must be to be noticed: d' / sqrt(lambda), infinite in the null space.

    Parameters
    ----------
    result : Eigendistortions
        Eigenpairs of a Fisher matrix F. Of a generalized problem, sizes are those that M measures.
    d_prime : float, optional
        The discriminability at threshold: 1 for 76 % correct in a two-alternative forced choice.

    Returns
    -------
    ndarray of float64, shape (k,)
        Euclidean norm of the distortion at threshold, in units of the image.

    Raises
    ------
    TypeError, ValueError
        If `result` is no such result, or `d_prime` not positive and finite.

    References
    ----------
    Berardino, Laparra, Balle, Simoncelli (2017), "Eigen-distortions of hierarchical representations".

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> fo.thresholds(fo.eigendistortions(np.diag([4.0, 1.0, 0.0]), k=3))
    array([0.5, 1. , inf])
    """
    if not isinstance(result, Eigendistortions):
        raise TypeError(f"result must be what eigendistortions returns, not {type(result).__name__}")
    d_prime = number(d_prime, "d_prime")
    if not 0 < d_prime < math.inf:
        raise ValueError(f"d_prime must be positive and finite, not {d_prime}")
    seen = (result.eigenvalues > 0) & (result.index < result.n - result.nullity)
    return np.where(seen, d_prime / np.sqrt(np.where(seen, result.eigenvalues, 1.0)), np.inf)


@dataclass(frozen=True, eq=False)
class ThresholdTable:
    """What every model makes of the most and the least noticeable distortion of every set.

    Attributes
    ----------
    models, sets : tuple of str
        Names: N models (or observers), P sets of distortions.
    most, least : ndarray of float64, shape (N, P)
        Thresholds 1 / sqrt(d'F_i d) of a set's most (first) and least (last) noticeable unit distortion; infinite where
        d'F_i d is zero to rounding, next to the model's largest of all sets.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> F = np.diag([4.0, 1.0])
    >>> table = fo.threshold_table({"model": F}, {"its own": fo.eigendistortions(F, k=2)})
    >>> table.most, table.least, table.D.round(3)
    (array([[0.5]]), array([[1.]]), array([[0.693]]))
    """

    models: tuple[str, ...]
    sets: tuple[str, ...]
    most: NDArray[np.float64]
    least: NDArray[np.float64]

    @property
    def D(self) -> NDArray[np.float64]:
        """Difference of log thresholds, least minus most noticeable, shape (N, P).

        Natural logarithm. Large where model i agrees with whoever made set j, 0 where it has no opinion, infinite
        where it does not notice the least noticeable one at all, NaN where it notices neither. Berardino, Laparra,
        Balle, Simoncelli (2017), "Eigen-distortions of hierarchical representations".
        """
        with np.errstate(invalid="ignore"):
            return np.log(self.least) - np.log(self.most)

    def __str__(self) -> str:
        # What is below 1e-12 is rounding of the logarithms; adding zero makes zero of its negative.
        cells = [[f"{round(value, 12) + 0.0:.3g}" for value in values] for values in self.D.tolist()]
        width = max(8, *(len(cell) + 2 for row in (self.sets, *cells) for cell in row))
        first = max(len(name) for name in self.models)
        lines = [" " * first + "".join(f"{name:>{width}}" for name in self.sets)]
        for name, row in zip(self.models, cells, strict=True):
            lines.append(f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell in row))
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw D as bars, a group for every set of distortions and a colour for every model.

        In place of a bar that is infinite stands ∞, and a question mark where there is none.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw, by default the axes of a new figure.

        Returns
        -------
        matplotlib Axes
            What was drawn on.
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure().add_subplot()
        width = 0.8 / len(self.models)
        place = np.arange(len(self.sets))
        for i, (name, values) in enumerate(zip(self.models, self.D, strict=True)):
            offset = (i - (len(self.models) - 1) / 2) * width
            ax.bar(place + offset, np.where(np.isfinite(values), values, 0.0), width, color=f"C{i % 10}", label=name)
            for x, value in zip(place + offset, values.tolist(), strict=True):
                if not math.isfinite(value):
                    words, side = ("-∞", "top") if value < 0 else ("?" if math.isnan(value) else "∞", "bottom")
                    ax.text(x, 0, words, ha="center", va=side, color=f"C{i % 10}")
        ax.set_xticks(place, self.sets)
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.set_xlabel("distortions of")
        ax.set_ylabel("log threshold, least less most noticeable")
        ax.legend(title="seen by", frameon=False)
        return ax


def threshold_table(ops: Mapping[str, Any], results: Mapping[str, Any]) -> ThresholdTable:
    """Test models on distortions that other models made: D of every model for every set of distortions.

    Parameters
    ----------
    ops : mapping of names to operators
        The Fisher matrices of N models at one image.
    results : mapping of names to Eigendistortions, PrincipalDistortions, Tensor or ndarray
        P sets of two distortions or more, the most noticeable first and the least noticeable last.

    Returns
    -------
    ThresholdTable
        Prints as a table of D; `plot` draws it.

    Raises
    ------
    TypeError, ValueError
        For operators that do not belong together, sets without two distortions, and distortions beyond those that the
        operators are restricted to.

    Examples
    --------
    >>> import numpy as np, fisherop as fo
    >>> ops = {"A": np.diag([4.0, 1.0, 1.0]), "B": np.diag([1.0, 1.0, 9.0])}
    >>> table = fo.threshold_table(ops, {name: fo.eigendistortions(op, k=3) for name, op in ops.items()})
    >>> print(table)
            A       B
    A   0.693       0
    B    -1.1     1.1
    """
    for name, given in (("ops", ops), ("results", results)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} must be a dict of names, as in {{'model': F}}, not {type(given).__name__}")
    rows = checked(list(ops.values()), tuple(ops))
    if not rows or not results:
        raise ValueError("a table needs at least one model and one set of distortions")
    squares = np.empty((len(rows), len(results), 2))
    for j, (name, result) in enumerate(results.items()):
        distortions = getattr(result, "eigendistortions", getattr(result, "distortions", result))
        block = _distortion_rows(rows[0], distortions)
        if len(block) < 2:
            raise ValueError(f"results[{name!r}] holds one distortion: pass the most and the least noticeable one")
        if not bool(block[[0, -1]].any(dim=1).all()):
            raise ValueError(f"results[{name!r}] holds a distortion of zero, which has no threshold: leave it out")
        ends = unit(block[[0, -1]])
        for i, op in enumerate(rows):
            squares[i, j] = squared_sensitivity(op, ends).cpu().numpy()
    for op, values in zip(rows, squares, strict=True):
        eps = torch.finfo(op.dtype).eps
        # What rounding of a distortion, and of the product where there is no factor, leaves of a square that is zero.
        values[values <= ((16 * eps) ** 2 if op.factored else 4 * eps) * values.max()] = 0.0
    with np.errstate(divide="ignore"):
        most, least = np.moveaxis(1 / np.sqrt(squares), 2, 0)
    return ThresholdTable(tuple(ops), tuple(results), most, least)


class Lifted(TensorOperator):
    """F + shift * I, on F's device; products with F are counted where they always are."""

    def __init__(self, op: RowOperator, shift: float) -> None:
        super().__init__((op.n, op.n), op.dtype, op.device)
        self.op, self.shift, self.image = op, shift, op.image

    @property
    def space(self) -> InformationOperator | None:
        """That of F."""
        return self.op.source.space if isinstance(self.op.source, TensorOperator) else None

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row."""
        return torch.add(self.op.rows(block), block, alpha=self.shift)

    def adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the transpose, which is the same."""
        return self.rows(block)


def checked(ops: Sequence[Any], names: tuple[str, ...]) -> list[RowOperator]:
    """Return the operators as solvers see them, or say which two do not fit each other."""
    rows = []
    for op, name in zip(ops, names, strict=True):
        try:
            rows.append(RowOperator(op))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    for (one, name), (other, its_name) in itertools.combinations(zip(rows, names, strict=True), 2):
        both = f"{name} and {its_name}"
        if one.n != other.n:
            raise ValueError(f"{both} have {one.n} and {other.n} pixels: take all models at the same image")
        if (one.dtype, one.device) != (other.dtype, other.device):
            raise ValueError(
                f"{both} are {one.dtype} on {one.device} and {other.dtype} on {other.device}: convert or move one"
            )
        if one.image is not None and other.image is not None:
            check_images(one.image, other.image, both)
        check_spaces(one.source, other.source, both)
    return rows


def _lifted(op: Any, shift: float) -> Any:
    """Return F + shift * I, by its entries where F has them."""
    if isinstance(op, Tensor) and op.is_floating_point():
        return op.detach() + shift * torch.eye(len(op), dtype=op.dtype, device=op.device)
    if isinstance(op, np.ndarray):
        return op + shift * np.eye(len(op), dtype=op.dtype)
    if issparse(op):
        return op + shift * eye_array(op.shape[0], dtype=op.dtype)
    return Lifted(RowOperator(op), shift)


def _distortion_rows(op: RowOperator, distortion: Any) -> Tensor:
    rows = op.tensor(distortion.detach() if isinstance(distortion, Tensor) else real(distortion, "the distortion"))
    if not torch.isfinite(rows).all():
        raise ValueError("the distortion holds NaN or infinity")
    if isinstance(op.source, InformationOperator) and _are_images(rows, op.source):
        rows = _coordinates(op.source, rows)
    if rows.numel() == 0 or rows.numel() % op.n:
        raise ValueError(
            f"distortions of shape {tuple(rows.shape)} do not fit n = {op.n} pixels: pass one in the image's shape, or "
            "several along the first axis"
        )
    return rows.reshape(-1, op.n)


def _are_images(rows: Tensor, op: InformationOperator) -> bool:
    """Tell images, in whatever shape, from a block of coordinates that has as many entries."""
    shape = op.image_shape[1:] if op.image_shape[:1] == (1,) else op.image_shape
    block = rows.ndim == 2 and rows.shape[1] == op.shape[0] and rows.shape[-len(shape) :] != shape
    return not block and rows.numel() % op.image_shape.numel() == 0


def _coordinates(op: InformationOperator, images: Tensor) -> Tensor:
    """Return images as vectors of the operator's space, or say that a restriction leaves out a part of them."""
    pixels = images.reshape(-1, op.image_shape.numel())
    rows = op.from_image(pixels)
    lost = (pixels - op.expand(rows)).norm(dim=1)
    if bool((lost > OUTSIDE * pixels.norm(dim=1)).any()):
        raise ValueError(
            "the distortion goes beyond those that the operator is restricted to: take an operator without "
            "within=, or the part that is within, op.to_image(op.from_image(distortion))"
        )
    return rows


def squared_sensitivity(op: RowOperator, rows: Tensor) -> Tensor:
    """Return d'Fd of every row in float64, by the factor of F where that is known, for it keeps more digits."""
    if op.factored:
        return (op.factor(rows).double() ** 2).sum(1)
    return (rows.double() * op.rows(rows).double()).sum(1).clamp(min=0)
