"""A model at an image, as its Jacobian's two products. Autograd lives in this module and nowhere else.

>>> import torch
>>> from fisherop.linearize import Linearization
>>> at = Linearization(torch.nn.Linear(3, 2, bias=False), torch.ones(3))
>>> at.shape
(2, 3)
>>> torch.allclose(at.jvp(torch.eye(3)).T, at.vjp(torch.eye(2)))
True
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Product = Callable[[Tensor], Tensor]

BLOCK_BYTES = 1 << 29
"""Memory that one block of vectors may take while it passes through the model."""


class Linearization:
    """The linear map that a model is near an image, as products with blocks of vectors.

    Parameters
    ----------
    model : callable
        An ``nn.Module`` or any function of one tensor. It returns a real or complex tensor, or a tuple, list or
        dict of them; they are flattened and concatenated to a response of ``m`` real numbers, a complex number
        as the pair (real, imaginary).
    image : Tensor
        The point of linearization: float32 or float64, any shape, ``n`` entries. A 4-D image has a batch
        dimension of 1.

    Attributes
    ----------
    image : Tensor
        A copy of the image.
    response : Tensor
        The model's response to it, shape ``(m,)``.
    shape : tuple of int
        ``(m, n)``.
    strategy : str
        How the products are computed: ``"forward-mode"`` or ``"double-backward"``.
    n_jvp, n_vjp : int
        Vectors multiplied so far by J and by its transpose.

    Raises
    ------
    TypeError, ValueError
        Where the image or the response cannot be linearized; the message says why and what to do.
    """

    def __init__(self, model: Callable[[Tensor], Any], image: Tensor) -> None:
        self.image = _checked_image(model, image)
        self.model = model
        self.dtype, self.device = self.image.dtype, self.image.device
        with _differentiable(), _buffers_kept(model):
            first = self._respond(self.image)
            leaf = self.image.clone().requires_grad_()
            with torch.enable_grad():
                response = self._respond(leaf)
        _check_same_twice(first, response.detach())
        self.response = response.detach()
        self.shape = (self.response.numel(), self.image.numel())
        self.n_jvp = self.n_vjp = 0
        self._count = threading.Lock()
        self.strategy, self._jvp, self._vjp = self._products(leaf, response)
        # A vector's way through the model takes about as many numbers as its two ends, times the model's depth.
        self.block_size = max(1, min(64, BLOCK_BYTES // (16 * sum(self.shape) * self.image.element_size())))

    def jvp(self, tangents: Tensor) -> Tensor:
        """Multiply rows by J: tangents of shape (b, n) to changes of the response, (b, m)."""
        with self._count:
            self.n_jvp += len(tangents)
        return self._in_blocks(self._jvp, tangents, self.shape[0])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Multiply rows by the transpose of J: cotangents of shape (b, m) to rows of shape (b, n)."""
        with self._count:
            self.n_vjp += len(cotangents)
        return self._in_blocks(self._vjp, cotangents, self.shape[1])

    def _in_blocks(self, product: Product, rows: Tensor, width: int) -> Tensor:
        if len(rows) == 0:
            return rows.new_zeros(0, width)
        with _differentiable():
            blocks = [product(block) for block in rows.split(self.block_size)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _respond(self, x: Tensor) -> Tensor:
        return flat_response(self.model(x), self.image)

    def _products(self, leaf: Tensor, response: Tensor) -> tuple[str, Product, Product]:
        """Return the first strategy that passes the adjoint test, with its two products."""
        if not response.requires_grad:
            self._warn_of_constant_response()
            m, n = self.shape
            return "constant", lambda t: t.new_zeros(len(t), m), lambda u: u.new_zeros(len(u), n)
        transpose = _rowwise(_transpose_product(leaf, response), self.response)
        failures = []
        for name, build in (("forward-mode", self._forward_mode), ("double-backward", _double_backward)):
            try:
                with _differentiable():
                    product = _rowwise(build(leaf, response), self.image)
                    _check_adjoint(product, transpose, self.response, self.image)
            except (RuntimeError, NotImplementedError) as error:
                failures.append(f"{name}: {_first_line(error)}")
            else:
                return name, product, transpose
        raise ValueError("this model cannot be linearized; " + "; ".join(failures))

    def _forward_mode(self, leaf: Tensor, response: Tensor) -> Product:
        def product(tangent: Tensor) -> Tensor:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(self.image, tangent.view_as(self.image))
                change = forward_ad.unpack_dual(self._respond(dual)).tangent
            return tangent.new_zeros(self.shape[0]) if change is None else change

        return product

    def _warn_of_constant_response(self) -> None:
        """Tell a response that ignores the image from one that autograd cannot follow."""
        probe = self.image + 0.1 * torch.rand(self.image.shape, generator=_generator(), dtype=self.dtype).to(
            self.device
        )
        with torch.no_grad(), _differentiable():
            moved = not torch.equal(self._respond(probe), self.response)
        if moved:
            raise ValueError(
                "the response changes with the image, but autograd cannot see how: remove .detach(), torch.no_grad() "
                "and NumPy calls from the model, or write a torch.autograd.Function for that step"
            )
        warnings.warn("the response does not depend on the image: its Fisher matrix is zero", stacklevel=5)


def flat_response(output: Any, image: Tensor) -> Tensor:
    """Flatten a model's output, of whatever structure, to one real vector in the image's dtype."""
    leaves = list(_leaves(output))
    if not leaves:
        raise ValueError(f"the model returned no tensor but {type(output).__name__}: return the response as a tensor")
    parts = []
    for leaf in leaves:
        if leaf.device != image.device:
            raise ValueError(f"the response is on {leaf.device} and the image on {image.device}: move one to the other")
        if leaf.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
            raise TypeError(
                f"the response holds {leaf.dtype}; return only float32, float64 or complex tensors"
                + (" (call .float() on the model)" if leaf.dtype in (torch.float16, torch.bfloat16) else "")
            )
        real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        parts.append(real.reshape(-1).to(image.dtype))
    response = parts[0] if len(parts) == 1 else torch.cat(parts)
    if response.numel() == 0:
        raise ValueError("the response is empty: return at least one number")
    if not torch.isfinite(response.detach()).all():
        raise ValueError("the response holds NaN or infinity: check the model's weights and the image's range")
    return response


def _leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for part in output.values():
            yield from _leaves(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _leaves(part)
    elif output is not None:
        raise TypeError(
            f"the model returned {type(output).__name__}; return a tensor, or a tuple, list or dict of tensors"
        )


def _checked_image(model: Callable[[Tensor], Any], image: Tensor) -> Tensor:
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a function of one tensor, not {type(model).__name__}")
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a torch.Tensor, not {type(image).__name__}: use torch.from_numpy or as_tensor")
    if image.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"image must be float32 or float64, not {image.dtype}: convert it with image.float()")
    if image.numel() == 0:
        raise ValueError(f"image of shape {tuple(image.shape)} is empty")
    if image.ndim == 4 and len(image) != 1:
        raise ValueError(
            f"image has a batch dimension of {len(image)}, and an operator belongs to one image: pass image[i : i + 1]"
        )
    if not torch.isfinite(image).all():
        raise ValueError("image holds NaN or infinity: replace these pixels first")
    for name, weight in _weights(model):
        if weight.device != image.device:
            raise ValueError(
                f"the image is on {image.device} and the model's {name} on {weight.device}: "
                "call image.to(...) or model.to(...) so that both are on one device"
            )
        if weight.dtype.is_floating_point and weight.dtype != image.dtype and isinstance(weight, torch.nn.Parameter):
            raise TypeError(
                f"the image is {image.dtype} and the model's {name} {weight.dtype}: "
                "call image.to(...) or model.to(...) so that both have one dtype"
            )
    with torch.inference_mode(False):
        return image.detach().clone(memory_format=torch.contiguous_format)


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, torch.nn.Module):
        yield from model.named_parameters()
        yield from model.named_buffers()


def _check_same_twice(first: Tensor, second: Tensor) -> None:
    same = first.shape == second.shape and _close(first, second, first.norm())
    if not same:
        raise ValueError(
            "the model answers differently to the same image twice: call model.eval(), or fix the seed of its noise"
        )


@contextmanager
def _buffers_kept(model: Any) -> Iterator[None]:
    """Undo, and refuse, the running averages that a normalization in training mode would write."""
    training = isinstance(model, torch.nn.Module) and any(part.training for part in model.modules())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()} if training else {}
    try:
        yield
    finally:
        written = [name for name, old in before.items() if not torch.equal(model.get_buffer(name), old)]
        with torch.no_grad():
            for name in written:
                model.get_buffer(name).copy_(before[name])
    if written:
        raise ValueError(f"the model is in training mode and writes {written[0]} at each call: call model.eval()")


@contextmanager
def _differentiable() -> Iterator[None]:
    """Hold torch's switches where products are exact and differentiable; put them back as they were.

    The fused attention paths have no forward-mode derivative, autocast and TF32 round to 10 bits.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if torch.cuda.is_available():
            for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
                stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                backend.allow_tf32 = False
        yield


def _transpose_product(leaf: Tensor, response: Tensor) -> Product:
    def product(cotangent: Tensor) -> Tensor:
        (rows,) = torch.autograd.grad(response, leaf, cotangent, retain_graph=True, materialize_grads=True)
        return rows.reshape(-1)

    return product


def _double_backward(leaf: Tensor, response: Tensor) -> Product:
    """Return J as the derivative of u -> J^T u, which is linear: twice reverse mode where forward mode fails."""
    cotangent = torch.zeros_like(response, requires_grad=True)
    (rows,) = torch.autograd.grad(response, leaf, cotangent, create_graph=True, materialize_grads=True)

    def product(tangent: Tensor) -> Tensor:
        (change,) = torch.autograd.grad(
            rows, cotangent, tangent.view_as(rows), retain_graph=True, materialize_grads=True
        )
        return change

    return product


def _rowwise(product: Product, like: Tensor) -> Product:
    """Apply a product of one vector to every row: by vmap where that works and agrees, else one by one."""

    def looped(rows: Tensor) -> Tensor:
        return torch.stack([product(row).detach() for row in rows])

    def mapped(rows: Tensor) -> Tensor:
        return torch.vmap(product)(rows).detach()

    rows = torch.randn(2, like.numel(), generator=_generator(), dtype=like.dtype).to(like.device)
    expected = looped(rows)
    try:
        agrees = _close(mapped(rows), expected, expected.norm())
    except (RuntimeError, NotImplementedError):
        agrees = False
    return mapped if agrees else looped


def _check_adjoint(jvp: Product, vjp: Product, response: Tensor, image: Tensor) -> None:
    """Refuse a pair of products that are not each other's transpose: <Jv, u> = <v, J^T u>."""
    generator = _generator()
    v = torch.randn(1, image.numel(), generator=generator, dtype=image.dtype).to(image.device)
    u = torch.randn(1, response.numel(), generator=generator, dtype=image.dtype).to(image.device)
    jv, jtu = jvp(v), vjp(u)
    left, right = (jv.double() * u).sum(), (v.double() * jtu).sum()
    if not (torch.isfinite(jv).all() and torch.isfinite(jtu).all()):
        raise ValueError("the derivative of the response holds NaN or infinity at this image: is a square root at 0?")
    if not _close(left, right, jv.norm() * u.norm() + v.norm() * jtu.norm()):
        raise RuntimeError(f"the adjoint test fails: <Jv, u> = {left:.9g}, <v, J'u> = {right:.9g}")


def _close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Tell whether two results of one computation differ by rounding alone."""
    return bool((a - b).norm() <= 1e3 * torch.finfo(scale.dtype).eps * scale)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
