"""SciPy operators that take tensors as they take arrays, and the algebra of them.

>>> import torch
>>> class Doubling(TensorOperator):
...     def rows(self, block):
...         return 2 * block
>>> op = Doubling((2, 2), torch.float64, torch.device("cpu"))
>>> (op @ op - op) @ torch.ones(2, dtype=torch.float64)
tensor([2., 2.], dtype=torch.float64)
"""

from __future__ import annotations

import functools
import numbers
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from fisherop import gpu
from fisherop.linearize import Product, exact_arithmetic

if TYPE_CHECKING:
    from fisherop.operators import InformationOperator

NUMPY_DTYPE: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


class TensorOperator(LinearOperator):  # type: ignore[misc]
    """A SciPy operator made of two products with the rows of a torch block.

    NumPy arrays in, NumPy arrays out; tensors in, tensors out, on the device they came from; always in the
    operator's dtype. Vectors, columns, adjoint and transpose follow SciPy's conventions.

    So does algebra: ``A + B``, ``A - B``, ``A @ B``, ``A**p``, ``-A``, ``2 * A`` and ``A / 2`` are operators that take
    tensors as A does; with an operator of SciPy's, or of another dtype or device, they are SciPy's own and take arrays.
    A number, of whatever type, leaves the precision as it is.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(NUMPY_DTYPE[dtype], shape)
        self.torch_dtype = dtype
        self.device = device

    @property
    def space(self) -> InformationOperator | None:
        """The Fisher operator that knows which images this operator's vectors are, where that is known."""
        return None

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row of a (b, n) tensor on the operator's device: returns (b, m)."""
        raise TypeError(f"{type(self).__name__} does not say how it multiplies rows")

    def adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row of a (b, m) tensor by the transpose: returns (b, n)."""
        raise TypeError(f"{type(self).__name__} does not say how its transpose multiplies rows")

    def to_cupy(self) -> Any:
        """Return this operator as a `cupyx.scipy.sparse.linalg.LinearOperator`, for an operator on a CUDA device.

        CuPy arrays are multiplied where they lie, and products come as CuPy arrays, without a copy either way.

        Raises
        ------
        ValueError
            For an operator on the host.
        ImportError
            Where CuPy is missing; the message says what to install.
        """
        return gpu.to_cupy(self)

    def matvec(self, x: Any) -> Any:
        """Multiply a vector of shape (n,)."""
        return self._on_tensor(x, adjoint=False) if isinstance(x, Tensor) else super().matvec(x)

    def matmat(self, X: Any) -> Any:
        """Multiply the columns of an (n, b) matrix."""
        return self._on_tensor(X, adjoint=False) if isinstance(X, Tensor) else super().matmat(_dense(X))

    def rmatvec(self, x: Any) -> Any:
        """Multiply a vector of shape (m,) by the transpose."""
        return self._on_tensor(x, adjoint=True) if isinstance(x, Tensor) else super().rmatvec(x)

    def rmatmat(self, X: Any) -> Any:
        """Multiply the columns of an (m, b) matrix by the transpose."""
        return self._on_tensor(X, adjoint=True) if isinstance(X, Tensor) else super().rmatmat(_dense(X))

    def dot(self, x: Any) -> Any:
        """Multiply a vector, the columns of a matrix, a number or another operator."""
        if _is_number(x):
            return self._scaled(x)
        if isinstance(x, Tensor):
            return self._on_tensor(x, adjoint=False)
        check_spaces(self, x, "the factors of this product")
        return ProductOperator(self, x) if self._is_like(x) else super().dot(_operator(_dense(x)))

    def __rmul__(self, x: Any) -> Any:
        if _is_number(x):
            return self._scaled(x)
        if isinstance(x, Tensor):
            return self.T.dot(x) if x.ndim == 1 else self.T.dot(x.mT).mT
        return super().__rmul__(x)

    def __truediv__(self, x: Any) -> LinearOperator:
        return self._scaled(1 / x) if _is_number(x) else super().__truediv__(x)

    def __neg__(self) -> LinearOperator:
        return self._scaled(-1)

    def __pow__(self, p: Any) -> LinearOperator:
        if isinstance(p, (int, np.integer)) and p > 0:
            return functools.reduce(ProductOperator, [self] * int(p))
        return super().__pow__(p)

    def __add__(self, x: Any) -> LinearOperator:
        if _is_array(x):
            _refuse_to_add(self)
        check_spaces(self, x, "the terms of this sum")
        return SumOperator(self, x) if self._is_like(x) else super().__add__(_operator(x))

    def __sub__(self, x: Any) -> LinearOperator:
        return self + -x

    def __radd__(self, x: Any) -> LinearOperator:
        # What Python's sum starts from.
        return self if _is_number(x) and x == 0 else self.__rsub__(x)

    def __rsub__(self, x: Any) -> LinearOperator:
        if _is_array(x):
            _refuse_to_add(self)
        return NotImplemented

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        """Refuse to become an array: NumPy would wrap the operator as one object, and its entries may be too many."""
        raise TypeError(
            f"a {type(self).__name__} knows its products, not its entries: multiply, op @ x, or compute the entries by "
            f"op @ numpy.eye({self.shape[1]}); wrap a sparse matrix, aslinearoperator(matrix) @ op"
        )

    def _is_like(self, other: Any) -> bool:
        """Tell whether this is an operator that can take what this one takes and gives."""
        if not isinstance(other, TensorOperator):
            return False
        return bool(other.torch_dtype == self.torch_dtype and other.device == self.device)

    def _scaled(self, number: Any) -> LinearOperator:
        if isinstance(number, Tensor):
            number = number.item()
        if np.iscomplexobj(number):
            return super().dot(np.result_type(self.dtype, np.complex64).type(number))
        return ScaledOperator(self, float(number))

    def _matvec(self, x: NDArray[Any]) -> NDArray[Any]:
        return self._on_vectors(x, adjoint=False)

    def _rmatvec(self, x: NDArray[Any]) -> NDArray[Any]:
        return self._on_vectors(x, adjoint=True)

    def _matmat(self, X: NDArray[Any]) -> NDArray[Any]:
        return self._on_columns(X, adjoint=False)

    def _rmatmat(self, X: NDArray[Any]) -> NDArray[Any]:
        return self._on_columns(X, adjoint=True)

    def _adjoint(self) -> LinearOperator:
        return Adjoint(self)

    def _transpose(self) -> LinearOperator:
        return Adjoint(self)

    def _on_vectors(self, x: NDArray[Any], *, adjoint: bool) -> NDArray[Any]:
        inner = self.shape[0 if adjoint else 1]
        batch = x.shape[:-1] if x.shape[-1] == inner else ()
        result = self._on_rows(x.reshape(-1, inner), adjoint=adjoint)
        return result.reshape(*batch, result.shape[-1])

    def _on_columns(self, X: NDArray[Any], *, adjoint: bool) -> NDArray[Any]:
        rows = np.swapaxes(X, -1, -2)
        result = self._on_rows(rows.reshape(-1, rows.shape[-1]), adjoint=adjoint)
        return np.swapaxes(result.reshape(*rows.shape[:-1], result.shape[-1]), -1, -2)

    @exact_arithmetic()
    def _on_rows(self, rows: NDArray[Any], *, adjoint: bool) -> NDArray[Any]:
        if np.iscomplexobj(rows):
            real, imag = (self._on_rows(part, adjoint=adjoint) for part in (rows.real, rows.imag))
            return real + 1j * imag
        # A copy: solvers pass views of their workspace, and a product may return what it was given.
        own = torch.from_numpy(np.array(rows, dtype=self.dtype, order="C")).to(self.device)
        return self._product(adjoint)(own).cpu().numpy()

    @exact_arithmetic()
    def _on_tensor(self, x: Tensor, *, adjoint: bool) -> Tensor:
        inner = self.shape[0 if adjoint else 1]
        if x.ndim not in (1, 2) or len(x) != inner:
            raise ValueError(f"this product takes a tensor of shape ({inner},) or ({inner}, b), not {tuple(x.shape)}")
        if x.is_complex():
            return torch.complex(self._on_tensor(x.real, adjoint=adjoint), self._on_tensor(x.imag, adjoint=adjoint))
        own = x.detach().reshape(inner, -1).T.to(self.device, self.torch_dtype, copy=True).contiguous()
        result = self._product(adjoint)(own).to(x.device)
        return result[0] if x.ndim == 1 else result.T

    def _product(self, adjoint: bool) -> Product:
        return self.adjoint_rows if adjoint else self.rows


class Adjoint(TensorOperator):
    """The transpose of a real operator."""

    def __init__(self, op: TensorOperator) -> None:
        super().__init__((op.shape[1], op.shape[0]), op.torch_dtype, op.device)
        self.args = (op,)

    @property
    def space(self) -> InformationOperator | None:
        """That of the operator."""
        return self.args[0].space

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the transpose."""
        return self.args[0].adjoint_rows(block)

    def adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the operator itself."""
        return self.args[0].rows(block)

    def _adjoint(self) -> LinearOperator:
        return self.args[0]

    def _transpose(self) -> LinearOperator:
        return self.args[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return Adjoint, self.args


class SumOperator(TensorOperator):
    """The sum of two operators."""

    def __init__(self, a: TensorOperator, b: TensorOperator) -> None:
        if a.shape != b.shape:
            raise ValueError(f"operators that are added have one shape, and these have {a.shape} and {b.shape}")
        super().__init__(a.shape, a.torch_dtype, a.device)
        self.args = (a, b)

    @property
    def space(self) -> InformationOperator | None:
        """That of either term."""
        return self.args[0].space or self.args[1].space

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the sum."""
        return self.args[0].rows(block) + self.args[1].rows(block)

    def adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the transpose of the sum."""
        return self.args[0].adjoint_rows(block) + self.args[1].adjoint_rows(block)

    def __reduce__(self) -> tuple[Any, ...]:
        return SumOperator, self.args


class ProductOperator(TensorOperator):
    """The product of two operators: the second is applied first."""

    def __init__(self, a: TensorOperator, b: TensorOperator) -> None:
        if a.shape[1] != b.shape[0]:
            raise ValueError(f"operators of shape {a.shape} and {b.shape} have no product: the inner sizes differ")
        super().__init__((a.shape[0], b.shape[1]), a.torch_dtype, a.device)
        self.args = (a, b)

    @property
    def space(self) -> InformationOperator | None:
        """That of both factors."""
        return self.args[0].space and self.args[1].space

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the product."""
        return self.args[0].rows(self.args[1].rows(block))

    def adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the transpose of the product."""
        return self.args[1].adjoint_rows(self.args[0].adjoint_rows(block))

    def __reduce__(self) -> tuple[Any, ...]:
        return ProductOperator, self.args


class ScaledOperator(TensorOperator):
    """An operator times a real number, in the operator's precision."""

    def __init__(self, op: TensorOperator, factor: float) -> None:
        super().__init__(op.shape, op.torch_dtype, op.device)
        self.args = (op, factor)

    @property
    def space(self) -> InformationOperator | None:
        """That of the operator."""
        return self.args[0].space

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the operator, and by the number."""
        return self.args[0].rows(block) * self.args[1]

    def adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the transpose, and by the number."""
        return self.args[0].adjoint_rows(block) * self.args[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return ScaledOperator, self.args


def check_spaces(a: Any, b: Any, names: str) -> None:
    """Refuse operators whose vectors are known to be different images: of another shape, or otherwise restricted.

    Coordinates in different subspaces of one dimension fit each other in size, and mean nothing to each other.
    """
    one, other = (op.space if isinstance(op, TensorOperator) else None for op in (a, b))
    if one is None or other is None or one is other or one.shape != other.shape:
        return
    if one.image_shape != other.image_shape:
        raise ValueError(
            f"{names} take images of different shape, {tuple(one.image_shape)} and {tuple(other.image_shape)}: make "
            "both at images of one shape"
        )
    # What a Gaussian vector of coordinates means to both.
    source = torch.Generator("cpu").manual_seed(0)
    probe = torch.randn(1, one.shape[0], generator=source, dtype=torch.float64, device="cpu")
    eps = max(torch.finfo(op.torch_dtype).eps for op in (one, other))
    expected, got = (op.expand(probe.to(op.device, op.torch_dtype)).cpu().double() for op in (one, other))
    if (got - expected).norm() > 1e3 * eps * expected.norm():
        raise ValueError(f"{names} are restricted to different distortions: pass the same within= to both")


def _dense(x: Any) -> Any:
    return x.toarray() if issparse(x) else x


def _operator(x: Any) -> Any:
    """Return another package's operator, as PyLops's, as one of SciPy's; anything else as it is."""
    return aslinearoperator(x) if hasattr(x, "matvec") else x


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Number) or (isinstance(x, (np.generic, np.ndarray, Tensor)) and x.ndim == 0)


def _is_array(x: Any) -> bool:
    return isinstance(x, (np.ndarray, Tensor, list, tuple)) or _is_number(x) or issparse(x)


def _refuse_to_add(op: TensorOperator) -> NoReturn:
    raise TypeError(
        "an operator is added to an operator: wrap a matrix by scipy.sparse.linalg.aslinearoperator, and a shift as "
        f"aslinearoperator(shift * scipy.sparse.eye_array({op.shape[0]}, dtype=op.dtype))"
    )
