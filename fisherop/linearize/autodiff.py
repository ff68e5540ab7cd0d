"""Autograd itself: the switches under which it is exact, and products where nothing could be recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Product = Callable[[Tensor], Tensor]


_SWITCHES = threading.RLock()
"""Held while torch's switches, and its one level of forward mode, are in use: they belong to the whole process."""


@contextmanager
def differentiable() -> Iterator[None]:
    """Hold torch's switches where products are exact and differentiable; put them back as they were.

    The fused attention paths have no forward-mode derivative.
    """
    from torch.utils.checkpoint import CheckpointFunction  # here, for torch 2.6 imports sympy with it

    with _SWITCHES, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(exact_arithmetic())
        if "apply" not in vars(CheckpointFunction):
            # A checkpoint is the function it wraps; torch.autograd.grad refuses the reentrant kind.
            CheckpointFunction.apply = staticmethod(lambda function, _, *args: function(*args))
            stack.callback(delattr, CheckpointFunction, "apply")
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Hold off whatever rounds to fewer bits than the operands have: TF32 on CUDA devices, and autocast."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.cuda.is_available():
            backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
            for backend in backends:
                stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                backend.allow_tf32 = False
        yield


def reverse_mode(leaf: Tensor, response: Tensor) -> Product:
    """Return the transpose of J by reverse mode over the graph of one forward pass."""

    def product(cotangent: Tensor) -> Tensor:
        (rows,) = torch.autograd.grad(response, leaf, cotangent, retain_graph=True, materialize_grads=True)
        return rows.reshape(-1)

    return product


def forward_mode(respond: Product, image: Tensor, m: int) -> Product:
    """Return J by forward-mode differentiation of the whole model at every product."""

    def product(tangent: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(image, tangent.view_as(image))
            change = forward_ad.unpack_dual(respond(dual)).tangent
        return tangent.new_zeros(m) if change is None else change

    return product


def double_backward(leaf: Tensor, response: Tensor) -> Product:
    """Return J as the derivative of u -> J^T u, which is linear: twice reverse mode where forward mode fails."""
    cotangent = torch.zeros_like(response, requires_grad=True)
    (rows,) = torch.autograd.grad(response, leaf, cotangent, create_graph=True, materialize_grads=True)

    def product(tangent: Tensor) -> Tensor:
        (change,) = torch.autograd.grad(
            rows, cotangent, tangent.view_as(rows), retain_graph=True, materialize_grads=True
        )
        return change

    return product


def random_like(*tensors: Tensor) -> list[Tensor]:
    """Return Gaussian tensors of given shapes: the vectors that products are tested with, the same every time.

    All from one source: were tangent and cotangent equal, J in place of its transpose would pass the adjoint test.
    """
    source = torch.Generator("cpu").manual_seed(0)
    return [torch.randn(t.shape, generator=source, dtype=t.dtype, device="cpu").to(t.device) for t in tensors]
