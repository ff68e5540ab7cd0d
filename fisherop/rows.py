"""Any symmetric positive semidefinite operator as solvers see it: products with the rows of a block, counted.

>>> import numpy as np, torch
>>> op = RowOperator(np.diag([2.0, 1.0]))
>>> op.rows(torch.ones(1, 2, dtype=torch.float64)), op.n_matvec
(tensor([[2., 1.]], dtype=torch.float64), 1)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop import gpu
from fisherop.algebra import NUMPY_DTYPE, TensorOperator
from fisherop.linearize import Product
from fisherop.maps import noise_floor, row_products
from fisherop.operators import InformationOperator

if TYPE_CHECKING:
    from fisherop.metric import Metric

OWN = 0xF15E
"""Sets the random numbers of this package apart from those of any other use of a seed."""


class RowOperator:
    """A symmetric positive semidefinite matrix as solvers see it: products with rows of a block, counted.

    Parameters
    ----------
    op : FisherOperator, LinearOperator, sparse or dense matrix
        Any n x n symmetric positive semidefinite operator. Anything but a tensor or a Fisher operator is applied
        through SciPy, on the host.

    Attributes
    ----------
    n : int
    m : int or None
        Length of the factor's output, where F = L^T L is known in factored form.
    dtype, device
        Those of the rows.
    n_matvec : int
        Products so far.
    metric : Metric or None
        The M of a generalized problem F v = lambda M v that only its products are known of; see `fisherop.metric`.
    problem : str
        What else than F v = lambda v is being solved, in words.
    sharers : int
        How many operators are being solved side by side, and share memory.
    """

    metric: Metric | None = None
    problem = ""
    sharers = 1

    def __init__(self, op: Any) -> None:
        if gpu.is_cupys(op):
            op = getattr(op, "op", op)  # what `to_cupy` was called on
        self.source = op
        self.m: int | None = None
        self._half_products = 0
        self.image: Tensor | None = None
        self.device = torch.device("cpu")
        if isinstance(op, InformationOperator):
            self.m, self.image = op.factor_size, op.image
            self.n, self.dtype, self.device = op.shape[0], op.torch_dtype, op.device
            self._product: Product = op.rows
        elif gpu.is_cupys(op):
            self.n, self.dtype = _square(op), _rows_dtype(_numpy_dtype(op))
            self.device, self._product = gpu.row_product(op)
            self._check_symmetric()
        else:
            self.n = _square(op)
            self.dtype, self._product = _foreign_product(op)
            if isinstance(op, (Tensor, TensorOperator)):
                self.device, self.image = op.device, getattr(op, "image", None)
            self._check_symmetric()

    @property
    def n_matvec(self) -> int:
        """Products so far; half a product is rounded up."""
        return (self._half_products + 1) // 2

    @property
    def factored(self) -> bool:
        """Tell whether F = L^T L is known, so that half products are to be had."""
        return self.m is not None

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row by F."""
        return finite(self.unchecked(block))

    def unchecked(self, block: Tensor) -> Tensor:
        """Do so for a caller that will notice NaN and infinity by itself, without waiting for the device."""
        self.count("rows", len(block))
        return self._product(block)

    def factor(self, block: Tensor) -> Tensor:
        """Multiply every row of (b, n) by L."""
        self.count("factor", len(block))
        return finite(self.source.factor_rows(block))

    def factor_adjoint(self, block: Tensor) -> Tensor:
        """Multiply every row of (b, m) by the transpose of L."""
        self.count("factor_adjoint", len(block))
        return finite(self.source.factor_adjoint_rows(block))

    def count(self, kind: str, vectors: int) -> None:
        """Count products with F or its factor ("factor", "factor_adjoint"), also those that were made elsewhere."""
        self._half_products += vectors if kind in ("factor", "factor_adjoint") else 2 * vectors

    def random_rows(self, count: int, rng: np.random.Generator) -> Tensor:
        """Draw Gaussian rows, the same on every device."""
        return self.tensor(rng.standard_normal((count, self.n)))

    def tensor(self, array: NDArray[Any] | Tensor) -> Tensor:
        """Bring an array to the rows' dtype and device."""
        return torch.as_tensor(array, dtype=self.dtype, device=self.device)

    def vectors(self, given: NDArray[Any] | Tensor) -> Tensor:
        """Return vectors as rows: given in image shape, or as rows or columns of length n or of an image's pixels."""
        rows = self.tensor(given)
        rows = rows if rows.ndim else rows[None]
        if not isinstance(self.source, InformationOperator):
            return self._as_rows(rows, (self.n,))
        shape = self.source.image_shape
        inner = shape[1:] if len(shape) > 1 and shape[0] == 1 else shape
        if rows.numel() and rows.shape[rows.ndim - len(inner) :] == inner:
            return self.source.from_image(rows)
        rows = self._as_rows(rows, (self.n, shape.numel()))
        return rows if rows.shape[1] == self.n else self.source.from_image(rows)

    def _as_rows(self, rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
        for block in (rows, rows.T) if rows.ndim == 2 else ():
            if block.shape[1] in lengths and rows.numel():
                return block.contiguous()
        if rows.numel() == lengths[0]:
            return rows.reshape(1, -1)
        if rows.numel() == 0 or rows.numel() % lengths[-1]:
            sizes = " or ".join(map(str, dict.fromkeys(lengths)))
            raise ValueError(f"v0 of shape {tuple(rows.shape)} does not hold vectors of length n = {sizes}")
        return rows.reshape(-1, lengths[-1])

    def in_image_shape(self, rows: Tensor) -> Any:
        """Return rows as the operator's user knows them: images, a tensor, or an array."""
        if isinstance(self.source, InformationOperator):
            return self.source.to_image(rows)
        return rows if isinstance(self.source, Tensor) or gpu.is_cupys(self.source) else rows.cpu().numpy()

    def distortions(self, rows: Tensor) -> Tensor:
        """Return the distortions, of unit norm, that the rows of a solver's answer stand for."""
        return rows if self.metric is None else unit(rows)

    def coordinates(self, distortions: Tensor) -> Tensor:
        """Return the rows that stand for distortions."""
        return distortions

    def _check_symmetric(self) -> None:
        """Compare <u, F v> with <v, F u>, and look for a negative <v, F v>."""
        pair = self.random_rows(2, stream(0))
        product = self.rows(pair).double()
        product = product / (product.abs().max() or 1.0)  # its squares may be beyond any dtype
        self._half_products = 0
        gram = pair.double() @ product.T
        rounding = noise_floor(self.dtype) * pair.double().norm() * product.norm()
        if abs(gram[0, 1] - gram[1, 0]) > rounding:
            raise ValueError("the operator is not symmetric: pass J.T @ J, or the symmetric part of the matrix")
        if gram.diagonal().min() < -rounding:
            raise ValueError(INDEFINITE)


INDEFINITE = "the operator is not positive semidefinite: v'Fv is negative for some v"


def row_norms(rows: Tensor) -> Tensor:
    """Return the rows' norms, in float64: in float32 the squares of small entries are zero, of large ones infinite."""
    sizes: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return sizes


def unit(rows: Tensor) -> Tensor:
    """Return the rows at norm 1; rows of zeros stay."""
    sizes = row_norms(rows)
    return rows / torch.where(sizes > 0, sizes, 1.0)[:, None].to(rows)


def generator(rng: Any) -> np.random.Generator:
    """Return the generator of random numbers that an argument `rng` stands for, or say what it must be."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        least = " of at least 0" if isinstance(error, ValueError) else ""
        raise TypeError(f"rng must be a whole number{least} or a numpy.random.Generator, not {rng!r}") from error


def stream(rng: Any) -> np.random.Generator:
    """Return random numbers of their own for a seed or generator, none of which the caller can have used.

    An operator may have been made from the same seed: the rows of its factor would then be what a solver starts from,
    and have no part in its null space.
    """
    return np.random.default_rng([OWN, *generator(rng).integers(2**63, size=4).tolist()])


def _square(op: Any) -> int:
    shape = getattr(op, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise TypeError(
            "op must be a square symmetric positive semidefinite operator: a FisherOperator, a SciPy LinearOperator, "
            f"or a dense or sparse matrix, not {type(op).__name__}" + (f" of shape {tuple(shape)}" if shape else "")
        )
    return int(shape[0])


def _foreign_product(op: Any) -> tuple[torch.dtype, Product]:
    """Return dtype and row product of a tensor, an array, a sparse matrix or a SciPy operator."""
    if isinstance(op, Tensor):
        matrix = op.detach() if op.dtype in NUMPY_DTYPE else op.detach().double()
        return matrix.dtype, lambda block: block @ matrix.T
    if isinstance(op, TensorOperator):
        return op.torch_dtype, op.rows
    torch_dtype = _rows_dtype(_numpy_dtype(op))
    if isinstance(op, np.ndarray):
        return torch_dtype, _foreign_product(torch.from_numpy(op.astype(NUMPY_DTYPE[torch_dtype])))[1]
    return torch_dtype, row_products(op, torch.empty(0, dtype=torch_dtype, device="cpu"))[0]


def _numpy_dtype(op: Any) -> np.dtype[Any]:
    return np.dtype(getattr(op, "dtype", None) or np.float64)


def _rows_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    if dtype.kind == "c":
        raise TypeError("a complex operator has no place here: write it as real pairs")
    return torch.float32 if dtype in (np.float16, np.float32) else torch.float64


def finite(block: Tensor) -> Tensor:
    """Return products as they are, or refuse them where they hold NaN or infinity."""
    # A finite sum, one pass in place of four, has finite terms; one that is not may be an overflow of its own.
    if not math.isfinite(float(block.sum())) and not torch.isfinite(block).all():
        raise ValueError("a product with the operator holds NaN or infinity: rescale the model's response")
    return block
