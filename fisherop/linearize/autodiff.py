"""Autograd itself: the switches under which it is exact, and products where nothing could be recorded."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisherop.linearize.program import bytes_of

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
        stack.enter_context(torch.autograd.set_detect_anomaly(False))  # it reads values of every gradient
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
    """Hold off whatever rounds to fewer bits than the operands have: TF32 and bfloat16 in products, and autocast.

    May be entered again inside itself, and from several threads: the last to leave puts the user's settings back.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        _COARSE.hold_off()
        stack.callback(_COARSE.put_back)
        yield


class _CoarseFloat32:
    """The process-wide settings under which float32 products are rounded to fewer bits."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._before: list[tuple[Any, Any]] = []
        self._name: str
        self._exact: str | bool
        backends: Any = torch.backends
        if hasattr(backends, "fp32_precision"):  # from torch 2.9 on
            convolutions = [part for b in (backends.mkldnn, backends.cudnn) for part in (b.conv, b.rnn)]
            self._owners = [backends.cuda.matmul, backends.mkldnn.matmul, *convolutions]
            self._name, self._exact = "fp32_precision", "ieee"
        else:
            self._owners = [backends.cuda.matmul, backends.cudnn]
            self._name, self._exact = "allow_tf32", False

    def hold_off(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                now = [(owner, getattr(owner, self._name)) for owner in self._owners]
                self._before = [(owner, value) for owner, value in now if value in ("tf32", "bf16", True)]
                for owner, _ in self._before:
                    setattr(owner, self._name, self._exact)

    def put_back(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for owner, value in self._before:
                    setattr(owner, self._name, value)


_COARSE = _CoarseFloat32()


def reverse_mode(leaf: Tensor, response: Tensor) -> Product:
    """Return the transpose of J by reverse mode over the graph of one forward pass."""

    def product(cotangent: Tensor) -> Tensor:
        (rows,) = torch.autograd.grad(response, leaf, cotangent, retain_graph=True, materialize_grads=True)
        return rows.reshape(-1)

    return product


@contextmanager
def dual_level() -> Iterator[None]:
    """Enter torch's one level of forward mode, where `torch.no_grad` holds values constant as in reverse mode."""
    with forward_ad.dual_level(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _HeldConstant():
        _load_rules_of_forward_mode()
        yield


class _HeldConstant(TorchFunctionMode):
    """Switch forward mode off and on with reverse mode: torch itself does so for a Function alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(*args)
        return result


@cache
def _load_rules_of_forward_mode() -> None:
    """Let torch load its rules, in the course of which it warns of its own use of torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(*torch.zeros(2, device="cpu"))


def forward_mode(respond: Product, image: Tensor, m: int) -> Product:
    """Return J by forward-mode differentiation of the whole model at every product."""

    def product(tangent: Tensor) -> Tensor:
        with dual_level():
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


def cotangent_for(image: Tensor, response: Tensor, change: Tensor | None) -> Tensor:
    """Return a random vector to multiply by the transpose of J; it points the way of a change of the response.

    Then <change, cotangent> is a sum of mostly positive terms, at least half as large as without signs: an error of one
    of the two products cannot cancel in it, as it can in a sum of random signs.
    """
    _, source = random_like(image, response)
    length = 0.0 if change is None else float(change.detach().double().norm())
    if change is None or not 0 < length < math.inf:
        return source
    return change.detach() / (length / change.numel() ** 0.5) + source.sign() / 2


def bytes_written(call: Callable[[], object]) -> int:
    """Return how many bytes the operations of a call write."""
    with _Footprint() as footprint:
        call()
    return footprint.n_bytes


def free_memory(device: torch.device) -> int:
    """Return the bytes to be had on a CUDA device: those that are free, and those that torch holds without use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


class _Footprint(TorchDispatchMode):
    """Count the bytes that operations write."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.n_bytes += sum(t.nbytes if t.layout is torch.strided else bytes_of(t) for t in tensors)
        return output
