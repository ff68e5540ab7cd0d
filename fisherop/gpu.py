"""CuPy's side of the house: operators for `cupyx.scipy.sparse.linalg`, on the same memory as torch.

CuPy is imported when it is asked for, and only then. Arrays and tensors change hands by DLPack, without a copy. Each
library frees memory in the order of the stream that it was allocated on, so both work on one stream while they share
memory: within a product torch follows CuPy's current stream, and where a solver of CuPy's is called from here, CuPy
follows torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fisherop.linearize import Product

if TYPE_CHECKING:
    from fisherop.algebra import TensorOperator


def import_cupy() -> ModuleType:
    """Return CuPy; raise ImportError with what to install where there is none."""
    try:
        import cupy
        import cupyx.scipy.sparse.linalg  # noqa: F401  (it loads libraries that cupy alone does not)
    except ImportError as error:
        raise ImportError(
            f'CuPy cannot be imported ({error}): pip install "fisherop[gpu]", or the CuPy package of your CUDA version'
        ) from error
    module: ModuleType = cupy
    return module


def to_cupy(op: TensorOperator) -> Any:
    """Return an operator's twin: a `cupyx.scipy.sparse.linalg.LinearOperator` that multiplies CuPy arrays by it.

    Parameters
    ----------
    op : FisherOperator, JacobianOperator, or any operator made of them
        On a CUDA device.

    Raises
    ------
    ValueError
        For an operator on the host.
    ImportError
        Where CuPy is missing.
    """
    if op.device.type != "cuda":
        raise ValueError(
            f"the operator is on {op.device}, and CuPy works on CUDA devices: make it of a model and an image there"
        )
    return _twin_class()(op)


@cache
def _twin_class() -> type:
    cupy = import_cupy()
    from cupyx.scipy.sparse.linalg import LinearOperator

    class CupyOperator(LinearOperator):  # type: ignore[misc]
        """An operator on CuPy arrays; `op` is the one that it stands for."""

        def __init__(self, op: TensorOperator) -> None:
            super().__init__(op.dtype, op.shape)
            self.op = op

        def _matmat(self, X: Any) -> Any:
            return self._multiplied(X, self.op.rows)

        def _rmatmat(self, X: Any) -> Any:
            return self._multiplied(X, self.op.adjoint_rows)

        def _matvec(self, x: Any) -> Any:
            return self._matmat(x.reshape(-1, 1)).reshape(-1)

        def _rmatvec(self, x: Any) -> Any:
            return self._rmatmat(x.reshape(-1, 1)).reshape(-1)

        def _adjoint(self) -> Any:
            adjoint = self.op._adjoint()
            return self if adjoint is self.op else type(self)(adjoint)

        def _transpose(self) -> Any:
            return self._adjoint()

        def _multiplied(self, columns: Any, product: Product) -> Any:
            with on_cupys_stream(self.op.device):
                return multiplied(columns, product, self.dtype, cupy)

    return CupyOperator


def multiplied(columns: Any, product: Product, dtype: Any, library: Any) -> Any:
    """Multiply the columns of an array of CuPy, or of NumPy on the host, by a product with rows of tensors.

    Parameters
    ----------
    columns : array, shape (n, b)
        Not copied where its columns are contiguous and of the dtype.
    product : callable
        (b, n) tensor to (b, m) tensor.
    dtype : dtype
        What the product takes.
    library : module
        cupy or numpy.

    Returns
    -------
    array, shape (m, b)
        On the memory of the product's result.
    """
    if library.iscomplexobj(columns):
        real, imag = (multiplied(part, product, dtype, library) for part in (columns.real, columns.imag))
        return real + 1j * imag
    rows = from_dlpack(library.ascontiguousarray(columns.T, dtype=dtype))
    return library.from_dlpack(product(rows)).T


def is_cupys(thing: Any) -> bool:
    """Tell whether this is an array, a sparse matrix or an operator of CuPy's."""
    return any(kind.__module__.partition(".")[0] in ("cupy", "cupyx") for kind in type(thing).__mro__)


def row_product(matrix: Any) -> tuple[torch.device, Product]:
    """Return the device of a matrix or operator of CuPy's, and its product with the rows of tensors there."""
    cupy = import_cupy()
    device = torch.device("cuda", int(getattr(matrix, "device", cupy.cuda.Device()).id))

    def product(rows: Tensor) -> Tensor:
        with on_torchs_stream(device):
            result = matrix @ cupy.from_dlpack(rows).T
            own: Tensor = from_dlpack(cupy.ascontiguousarray(result.T))
            return own.to(rows.dtype, copy=True)

    return device, product


@contextmanager
def on_cupys_stream(device: torch.device) -> Iterator[None]:
    """Let torch work on CuPy's current stream, after all that torch has in hand."""
    cupy = import_cupy()
    with cupy.cuda.Device(device.index), torch.cuda.device(device):
        current = torch.cuda.current_stream()
        pointer = cupy.cuda.get_current_stream().ptr
        if pointer == current.cuda_stream:
            yield
            return
        external: Any = torch.cuda.ExternalStream
        stream = external(pointer, device) if pointer else torch.cuda.default_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield


@contextmanager
def on_torchs_stream(device: torch.device) -> Iterator[None]:
    """Let CuPy work on torch's current stream."""
    cupy = import_cupy()
    make: Callable[..., Any] = getattr(cupy.cuda.Stream, "from_external", None) or _external
    with torch.cuda.device(device), cupy.cuda.Device(device.index):
        stream = torch.cuda.current_stream()
        with make(stream) if stream.cuda_stream else cupy.cuda.Stream.null:
            yield


def _external(stream: torch.cuda.Stream) -> Any:
    """Return torch's stream as CuPy's, before CuPy 14."""
    return import_cupy().cuda.ExternalStream(stream.cuda_stream, stream.device_index)
