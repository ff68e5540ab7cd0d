"""What a model and an image must be before they are linearized, and what their response must be."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherop.linearize.watch import Draws

PACKAGE = str(Path(__file__).parents[1]) + os.sep
DIFFERS = "the model answers differently to the same image twice: call model.eval(), or fix the seed of its noise"


def flat_response(output: Any, image: Tensor) -> Tensor:
    """Flatten a model's output, of whatever structure, to one real vector in the image's dtype."""
    parts, found = [], leaves(output)
    for leaf in found:
        if leaf.device != image.device:
            raise ValueError(f"the response is on {leaf.device} and the image on {image.device}: move one to the other")
        if leaf.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
            raise TypeError(
                f"the response holds {leaf.dtype}; return only float32, float64 or complex tensors"
                + (" (call .float() on the model)" if leaf.dtype in (torch.float16, torch.bfloat16) else "")
            )
        parts.append(as_pairs(leaf, alone=len(found) == 1).reshape(-1).to(image.dtype))
    response = parts[0] if len(parts) == 1 else torch.cat(parts)
    if response.numel() == 0:
        raise ValueError("the response is empty: return at least one number")
    if not torch.isfinite(response.detach()).all():
        raise ValueError("the response holds NaN or infinity: check the model's weights and the image's range")
    return response


def leaves(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, of whatever structure: one at least."""
    found = list(_leaves(output))
    if not found:
        raise ValueError(f"the model returned no tensor but {type(output).__name__}: return the response as a tensor")
    return found


def as_pairs(leaf: Tensor, *, alone: bool) -> Tensor:
    """Return a complex tensor as pairs of real numbers, and any other as it is.

    Pairs are a view where the tensor is the whole response. Beside others its cotangent may begin at an odd place,
    where it cannot be viewed as complex numbers.
    """
    if not leaf.is_complex():
        return leaf
    return torch.view_as_real(leaf.resolve_conj()) if alone else torch.stack((leaf.real, leaf.imag), dim=-1)


def _leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.layout is not torch.strided:
            raise TypeError("the model returned a sparse tensor: call .to_dense() on it")
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


def checked_image(model: Callable[[Tensor], Any], image: Tensor) -> Tensor:
    """Return a copy of the image; refuse what cannot be linearized."""
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a function of one tensor, not {type(model).__name__}")
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a torch.Tensor, not {type(image).__name__}: use torch.from_numpy or as_tensor")
    if image.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"image must be float32 or float64, not {image.dtype}: convert it with image.float()")
    if image.layout is not torch.strided:
        raise TypeError(f"image is sparse ({image.layout}): convert it with image.to_dense()")
    if image.numel() == 0:
        raise ValueError(f"image of shape {tuple(image.shape)} is empty")
    if image.ndim == 4 and len(image) != 1:
        raise ValueError(
            f"image has a batch dimension of {len(image)}, and an operator belongs to one image: pass image[i : i + 1]"
        )
    try:
        finite = bool(torch.isfinite(image).all())
    except (NotImplementedError, RuntimeError) as error:
        if not image.is_meta:
            raise
        raise ValueError("image is on the meta device, which holds no values: make it on the model's") from error
    if not finite:
        raise ValueError("image holds NaN or infinity: replace these pixels first")
    for name, weight in weights(model):
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


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over a model's parameters and buffers by name."""
    if isinstance(model, torch.nn.Module):
        yield from model.named_parameters()
        yield from model.named_buffers()


def check_precision(dtypes: Iterable[torch.dtype], wanted: torch.dtype) -> None:
    """Refuse derivatives that are computed in fewer bits than float32 has: J and its transpose round differently."""
    for dtype in dtypes:
        if dtype.is_floating_point and dtype.itemsize < 4:
            raise ValueError(f"the model computes in {dtype}: run all of it in {wanted}, and switch autocast off")


def check_same_twice(first: Tensor, second: Tensor) -> None:
    """Refuse a model that draws random numbers, where that shows."""
    same = first.shape == second.shape and close(first, second, first.norm())
    if not same:
        raise ValueError(DIFFERS)


def settled(respond: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Return the response; refuse a model that draws random numbers from torch's generators, and leave these as found.

    A rare dropout need not show in two responses. A model that seeds a generator itself is none of these: it leaves it
    in the same state at every call.
    """
    before = _generators(image.device)
    response = respond(image)
    after = _generators(image.device)
    if not _differ(before, after):
        return response
    with Draws() as draws:
        respond(image)
    if draws.seen and _differ(after, _generators(image.device)):  # and not another thread alone
        torch.set_rng_state(before[0])
        if image.is_cuda:
            torch.cuda.set_rng_state(before[1], image.device)
        raise ValueError(DIFFERS)
    return response


def _generators(device: torch.device) -> list[Tensor]:
    """Return the states of torch's generators that a model on a device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    return not all(map(torch.equal, before, after))


@contextmanager
def buffers_kept(model: Any) -> Iterator[None]:
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


def outside() -> int:
    """Return the stacklevel at which a warning of the caller's names the first frame outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


def close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Tell whether two results of one computation differ by rounding alone."""
    return bool((a - b).norm() <= 1e3 * torch.finfo(scale.dtype).eps * scale)


def adjoint(
    v: Tensor, jv: Tensor, u: Tensor, jtu: Tensor, dtype: torch.dtype | None = None, slack: float = 1e3
) -> bool:
    """Tell whether <Jv, u> = <v, J'u> up to rounding, in their own dtype by default.

    Each term's rounding is taken as independent of the others', but for a small part that all may have in common, that
    of a normalization say.
    """
    left, right = jv.double().flatten() * u.double().flatten(), v.double().flatten() * jtu.double().flatten()
    rounding = left.norm() + right.norm() + 0.1 * (left.sum().abs() + right.sum().abs())
    return bool((left.sum() - right.sum()).abs() <= slack * torch.finfo(dtype or jv.dtype).eps * rounding)
