"""Several ways to compute the same convolution, timed against each other on the tensors at hand.

A convolution with a large kernel, and the transpose of one with a stride, cost up to ten times what they need on some
machines. The result differs by rounding alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherop.linearize.program import Program, aten, shape_of

SPECTRUM_BYTES = 1 << 26
SPECTRUM_TAPS = 49
"""Kernels with fewer taps, 1 by 7 say, never gain from a Fourier transform, and making theirs takes long."""

REPEATS = 3

DEAR_FFT = 3
"""What one operation of a Fourier transform costs, in operations of a direct convolution."""

_MATRIX_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)

Step = Callable[[Tensor], object]
Choices = dict[str, str]


def choose(program: Program, name: str, pinned: Choices | None, device: torch.device) -> Choices:
    """Replace convolutions of a program by their fastest variants.

    Parameters
    ----------
    program : Program
        Changed in place.
    name : str
        The program's name, which opens every key of the choices.
    pinned : dict or None
        Choices made before, to be taken as they are; None to measure. With ``{"others": "cheapest"}`` in it, what it
        does not name is chosen by counting arithmetic, which gives the same answer at every time and place.

    Returns
    -------
    dict
        The variant taken for every convolution that has several.
    """
    choices: Choices = {}
    measured: dict[tuple[Any, ...], str] = {}
    node: Any
    for node in list(program.graph.nodes):
        if node.target is not aten.convolution.default or program.constant(node.args[1]) is None:
            continue
        kernel = program.constant(node.args[1])
        assert kernel is not None
        variants = dict(_variants(shape_of(node.args[0]), shape_of(node), kernel, *node.args[2:]))
        if not variants:
            continue
        key = f"{name}.{node.name}"
        if pinned is not None:
            counted = pinned.get("others") == "cheapest"
            best = pinned.get(key) or (_cheapest(node, kernel, variants) if counted else "direct")
        else:
            signature = (shape_of(node.args[0]), tuple(kernel.shape), str(node.args[3:]))
            if signature not in measured:
                measured[signature] = _fastest(node, kernel, variants, device)
            best = measured[signature]
        choices[key] = best
        if best != "direct":
            function, constant = variants[best]()
            program.replace(node, program.insert(node, function, node.args[0], constant))
    program.sweep()
    return choices


def channels_last(programs: dict[str, Program]) -> dict[str, Program] | None:
    """Return programs that keep images as (b, H, W, C) in memory, for convolutions are often faster so.

    Operations hand the layout of their constants on to their results, so only constants change. None where matrix
    products, which do not care, outnumber convolutions.
    """
    targets = [node.target for program in programs.values() for node in program.graph.nodes]
    convolutions, *products = (targets.count(target) for target in (aten.convolution.default, *_MATRIX_PRODUCTS))
    if convolutions <= sum(products):
        return None
    turned: dict[Any, Tensor] = {}  # programs share constants

    def turn(constant: Tensor) -> Tensor:
        if constant.layout is not torch.strided or constant.ndim != 4 or constant.is_complex():
            return constant
        if 0 in constant.stride():  # one number, say, in the place of many
            return constant
        key = constant.data_ptr(), constant.shape, constant.stride(), constant.dtype
        if key not in turned:
            turned[key] = constant.contiguous(memory_format=torch.channels_last)
        return turned[key]

    return {
        name: Program(program.graph, {key: turn(constant) for key, constant in program.constants.items()})
        for name, program in programs.items()
    }


def _fastest(node: Any, kernel: Tensor, variants: dict[str, Any], device: torch.device) -> str:
    x = torch.ones(shape_of(node.args[0]), dtype=kernel.dtype, device=device)
    steps: dict[str, Step] = {"direct": lambda x: aten.convolution.default(x, kernel, *node.args[2:])}
    for label, make in variants.items():
        function, constant = make()
        steps[label] = lambda x, f=function, c=constant: f(x, c)  # type: ignore[misc]
    best = dict.fromkeys(steps, math.inf)
    for _ in range(REPEATS):  # in turns, so that a disturbance does not fall on one of them alone
        for label, step in steps.items():
            best[label] = min(best[label], seconds(step, x))
    return min(best, key=best.__getitem__)


def _cheapest(node: Any, kernel: Tensor, variants: dict[str, Any]) -> str:
    """Return the variant of least arithmetic, where the least is far less: a direct step comes nearer to its count."""
    source, result = shape_of(node.args[0]), shape_of(node)
    transposed, groups = node.args[6], node.args[8]
    if "fft" in variants:
        size = math.prod(_fast_length(source[2 + i] + kernel.shape[2 + i]) for i in (0, 1))
        maps = source[1] + result[1]
        fourier = 2.5 * size * math.log2(size) * maps + 4 * size * source[1] * result[1] / groups
        direct = 2 * math.prod((source if transposed else result)[2:]) * kernel.numel()
        if DEAR_FFT * fourier < direct:
            return "fft"
    strided = next((label for label in ("phases", "flipped") if label in variants), "direct")
    return strided if max(kernel.shape[2:]) >= 5 or groups > 1 else "direct"


def seconds(step: Step, x: Tensor) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    step(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


Made = tuple[Callable[[Tensor, Tensor], Tensor], Tensor]


def _variants(
    source: tuple[int, ...],
    result: tuple[int, ...],
    kernel: Tensor,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Yield the variants worth timing, each as a function that makes it."""
    if bias is not None or kernel.ndim != 4 or any(d != 1 for d in dilation) or len(set(stride)) != 1:
        return
    size, s = tuple(kernel.shape[2:]), stride[0]
    if s == 1 and math.prod(size) >= SPECTRUM_TAPS and _spectrum_bytes(source, kernel, padding) <= SPECTRUM_BYTES:
        make = _transposed_by_fft if transposed else _by_fft
        yield "fft", lambda: make(source, result, kernel, padding, groups)
    if transposed and s == 1 and (max(size) >= 5 or groups > 1):
        yield "flipped", lambda: _flipped(kernel, padding, groups)
    if transposed and s > 1 and groups == 1:
        yield "phases", lambda: _phases(result, kernel, s, padding)


def _flipped(kernel: Tensor, padding: list[int], groups: int) -> Made:
    """Write a transposed convolution of stride 1 as a convolution with the kernel turned round."""
    outputs, inputs, height, width = kernel.shape
    grouped = kernel.reshape(groups, outputs // groups, inputs, height, width).transpose(1, 2)
    turned = grouped.reshape(groups * inputs, outputs // groups, height, width).flip(2, 3).contiguous()
    margin = [height - 1 - padding[0], width - 1 - padding[1]]
    crop = [max(0, -m) for m in margin]
    pad = [max(0, m) for m in margin]

    def step(x: Tensor, turned: Tensor) -> Tensor:
        x = x[..., crop[0] : x.shape[-2] - crop[0], crop[1] : x.shape[-1] - crop[1]]
        return aten.convolution.default(x, turned, None, [1, 1], pad, [1, 1], False, [0, 0], groups)

    return step, turned


def _phases(result: tuple[int, ...], kernel: Tensor, s: int, padding: list[int]) -> Made:
    """Write a transposed convolution of stride s as s * s small convolutions, one for every phase of the result.

    Position s a + r of the full result gets sum_q x[a - q] w[s q + r]: a convolution of stride 1 for every r.
    """
    outputs, inputs, height, width = kernel.shape
    taps = (-(-height // s), -(-width // s))
    padded = F.pad(kernel, (0, taps[1] * s - width, 0, taps[0] * s - height))
    split = padded.reshape(outputs, inputs, taps[0], s, taps[1], s).permute(1, 3, 5, 0, 2, 4)
    phases = split.reshape(inputs * s * s, outputs, *taps).flip(2, 3).contiguous()
    rows, columns = result[2:]

    def step(x: Tensor, phases: Tensor) -> Tensor:
        margin = [taps[0] - 1, taps[1] - 1]
        parts = aten.convolution.default(x, phases, None, [1, 1], margin, [1, 1], False, [0, 0], 1)
        full = F.pixel_shuffle(parts, s)
        missing = (padding[0] + rows - full.shape[-2], padding[1] + columns - full.shape[-1])
        if max(missing) > 0:
            full = F.pad(full, (0, max(0, missing[1]), 0, max(0, missing[0])))
        return full[..., padding[0] : padding[0] + rows, padding[1] : padding[1] + columns]

    return step, phases


def _fast_length(size: int) -> int:
    """Return the least length, not below `size`, that a real Fourier transform is fast for."""
    from scipy.fft import next_fast_len  # here, for it brings all of scipy.special, and few models come this way

    return int(next_fast_len(size, real=True))


def _by_fft(source: tuple[int, ...], result: tuple[int, ...], kernel: Tensor, padding: list[int], groups: int) -> Made:
    """Write a convolution of stride 1 as a product of Fourier transforms."""
    size = [_fast_length(source[2 + i] + 2 * padding[i]) for i in (0, 1)]
    outputs, inputs = kernel.shape[:2]
    spectrum = (
        torch.fft.rfft2(kernel, s=size).conj().resolve_conj().reshape(groups, outputs // groups, inputs, size[0], -1)
    )
    margin = [padding[1], padding[1], padding[0], padding[0]]

    def step(x: Tensor, spectrum: Tensor) -> Tensor:
        x = F.pad(x, margin) if any(margin) else x
        return _product(x, spectrum, size)[..., : result[2], : result[3]]

    return step, spectrum


def _transposed_by_fft(
    source: tuple[int, ...], result: tuple[int, ...], kernel: Tensor, padding: list[int], groups: int
) -> Made:
    """Write the transpose of a convolution of stride 1 as a product of Fourier transforms."""
    outputs, inputs, height, width = kernel.shape
    size = [_fast_length(source[2] + height - 1), _fast_length(source[3] + width - 1)]
    grouped = kernel.reshape(groups, outputs // groups, inputs, height, width).transpose(1, 2)
    spectrum = torch.fft.rfft2(grouped, s=size).contiguous()

    def step(x: Tensor, spectrum: Tensor) -> Tensor:
        full = _product(x, spectrum, size)
        return full[..., padding[0] : padding[0] + result[2], padding[1] : padding[1] + result[3]]

    return step, spectrum


def _product(x: Tensor, spectrum: Tensor, size: list[int]) -> Tensor:
    """Multiply the transform of (b, groups * inputs, H, W) by (groups, outputs, inputs, H, W') and transform back."""
    groups, outputs, inputs = spectrum.shape[:3]
    transform = torch.fft.rfft2(x, s=size)
    transform = transform.reshape(len(x), groups, 1, inputs, *transform.shape[-2:])
    product = transform[:, :, :, 0] * spectrum[:, :, 0] if inputs == 1 else (transform * spectrum).sum(3)
    return torch.fft.irfft2(product.reshape(len(x), groups * outputs, *product.shape[-2:]), s=size)


def _spectrum_bytes(source: tuple[int, ...], kernel: Tensor, padding: list[int]) -> int:
    reach = [source[2 + i] + 2 * padding[i] + kernel.shape[2 + i] for i in (0, 1)]
    return kernel.shape[0] * kernel.shape[1] * reach[0] * reach[1] * kernel.element_size()
