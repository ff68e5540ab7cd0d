"""A model at an image, as its Jacobian's two products. Autograd lives in this package and nowhere else.

>>> import torch
>>> from fisherop.linearize import Linearization
>>> at = Linearization(torch.nn.Linear(3, 2, bias=False), torch.ones(3))
>>> at.shape
(2, 3)
>>> torch.allclose(at.jvp(torch.eye(3)).T, at.vjp(torch.eye(2)))
True
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherop.linearize import variants
from fisherop.linearize.autodiff import (
    Product,
    cotangent_for,
    differentiable,
    double_backward,
    exact_arithmetic,
    forward_mode,
    free_memory,
    random_like,
    reverse_mode,
)
from fisherop.linearize.capture import Captured
from fisherop.linearize.checks import (
    adjoint,
    buffers_kept,
    check_precision,
    check_same_twice,
    checked_image,
    close,
    flat_response,
    outside,
    settled,
    weights,
)
from fisherop.linearize.modes import Verdict, judged
from fisherop.linearize.program import Program, bound, bytes_of, code, memory_key
from fisherop.linearize.record import RecordError, record
from fisherop.linearize.watch import Watch

__all__ = ["Linearization", "Product", "exact_arithmetic"]

BLOCK_BYTES = 1 << 29
"""Memory on the host that the intermediate values of one block of vectors may take."""

BLOCK_SHARE = 4
"""Part, as 1 in so many, of a CUDA device's free memory that they may take there."""

LARGEST_BLOCK = 64
TRIED_BLOCKS = (4, 16)
TRIAL_SECONDS = 0.03
"""Products that take longer are not repeated at construction to find the best block size."""

DEAR_SECONDS = 0.25
"""Products that take longer are not even compared with blocks, which are checked at first use."""

DEAR_BLOCK = 8
DEAR_BYTES = 1 << 26
"""What the intermediate values of such a block may take: blocks save on reading weights, and lose where these are few
beside the values, which the processor's caches then no longer hold."""


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
    tuning : mapping, optional
        The `tuning` of an earlier linearization, to be used instead of measuring again: then results are the same
        to the bit. Or ``{"block": b, "others": "cheapest"}``, for blocks of at most b vectors and variants of
        convolutions by a rule instead of a measurement.

    Attributes
    ----------
    image : Tensor
        A copy of the image.
    response : Tensor
        The model's response to it, shape ``(m,)``.
    shape : tuple of int
        ``(m, n)``.
    strategy : str
        How the products are computed: ``"recorded"`` programs, ``"forward-mode"`` and a retained graph,
        ``"double-backward"``, or ``"constant"`` where the response does not depend on the image.
    reason : str
        Why nothing better than this strategy served, and whether forward and reverse mode contradict each other, as
        they do where a Function's `backward` is wrong; else empty.
    tuning : dict
        What was measured and chosen: the layout of images in memory, the variant of each large convolution, and the
        block size, which on a device is measured when blocks are first wanted.
    memory : int
        Bytes held for the products, the model's own weights not counted; 0 where autograd holds them.
    n_jvp, n_vjp : int
        Vectors multiplied so far by J and by its transpose.

    Raises
    ------
    TypeError, ValueError
        Where the image or the response cannot be linearized; the message says why and what to do.
    """

    def __init__(self, model: Callable[[Tensor], Any], image: Tensor, tuning: Mapping[str, Any] | None = None) -> None:
        self.image = checked_image(model, image)
        self.model = model
        self.dtype, self.device = self.image.dtype, self.image.device
        self._precision = self.dtype  # of the coarsest step on the model's way
        self.n_jvp = self.n_vjp = 0
        self.memory = 0
        self.reason = ""
        self.tuning: dict[str, Any] = {}
        self._lock = threading.Lock()
        with buffers_kept(model):
            self.response = settled(self.respond, self.image)
        self.shape = (self.response.numel(), self.image.numel())
        self._watch = Watch(weight for _, weight in weights(model))
        self._jvp, self._vjp = self._products(dict(tuning) if tuning is not None else None)
        self._watch.settle()

    def jvp(self, tangents: Tensor) -> Tensor:
        """Multiply rows by J: tangents of shape (b, n) to changes of the response, (b, m)."""
        with self._lock:
            self.n_jvp += len(tangents)
        return self._in_blocks(self._jvp, tangents, self.shape[0])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Multiply rows by the transpose of J: cotangents of shape (b, m) to rows of shape (b, n)."""
        with self._lock:
            self.n_vjp += len(cotangents)
        return self._in_blocks(self._vjp, cotangents, self.shape[1])

    def respond(self, x: Tensor) -> Tensor:
        """Return the model's response to another image, of shape (m,), computed as that to its own was."""
        with differentiable(), torch.no_grad():
            return self._respond(x)

    def _in_blocks(self, product: Product, rows: Tensor, width: int) -> Tensor:
        self._watch.check()
        if len(rows) == 0:
            return rows.new_zeros(0, width)
        rows, size = rows.contiguous(), self._block_size(len(rows))
        result = product(rows) if len(rows) <= size else torch.cat([product(block) for block in rows.split(size)])
        shared = result.untyped_storage()._cdata == rows.untyped_storage()._cdata
        return result.clone() if shared else result

    def _block_size(self, vectors: int) -> int:
        """Return how many vectors to multiply at once; where that was put off, it is measured when several come."""
        with self._lock:
            if "block" not in self.tuning and vectors >= min(TRIED_BLOCKS):
                try:
                    self.tuning["block"] = self._best_block()
                except torch.OutOfMemoryError:  # a search space may have taken what was free
                    self.tuning["block"] = 1
            return int(self.tuning.get("block", 1))

    def _respond(self, x: Tensor) -> Tensor:
        return flat_response(self.model(x.clone()), self.image)

    def _products(self, pinned: dict[str, Any] | None) -> tuple[Product, Product]:
        """Return J and its transpose as products with blocks, by the best strategy that passes its tests."""
        self.reason = ""
        try:
            return self._recorded(pinned)
        except (RuntimeError, NotImplementedError) as error:
            self.reason = f"not recorded: {_first_line(error)}"
        leaf, response = self._followed()
        check_same_twice(self.response, response.detach())
        if not response.requires_grad:
            self._warn_of_constant_response()
            return self._constant()
        transpose = _live(reverse_mode(leaf, response))
        failures, verdict = [self.reason], None
        self.tuning = {"block": 1}  # less what a failed recording had chosen
        for name, build in (
            ("forward-mode", lambda: forward_mode(self._respond, self.image, self.shape[0])),
            ("double-backward", lambda: double_backward(leaf, response)),
        ):
            try:
                with differentiable():
                    product = _live(build())
                self._check_adjoint(product, transpose)
            except (RuntimeError, NotImplementedError) as error:
                failures.append(f"{name}: {_first_line(error)}")
                if isinstance(error, _AdjointError) and name == "forward-mode":
                    verdict = judged(self.respond, self.image, self.response, *error.probes)
            else:
                self.strategy = name
                self._tell(verdict, "reverse")
                return product, transpose
        if self._precision == torch.float64 and all("adjoint test" in failure for failure in failures):
            self._precision = torch.float32
            products = self._products(pinned)
            warnings.warn(
                "the model rounds to float32 on its way: convert all of it for float64 results", stacklevel=outside()
            )
            return products
        raise ValueError("this model cannot be linearized; " + "; ".join(failures))

    def _followed(self) -> tuple[Tensor, Tensor]:
        """Return an image and the model's response to it, with autograd's graph between them."""
        leaf = self.image.clone().requires_grad_()
        try:
            with differentiable(), torch.enable_grad(), self._watch:
                return leaf, self._respond(leaf)
        except RuntimeError as error:
            why = f"the model cannot be differentiated: {_first_line(error)}"
            if "nference tensor" in why:
                why = "the model was made under torch.inference_mode(), where autograd cannot go: make it outside of it"
            raise ValueError(why) from error

    def _recorded(self, pinned: dict[str, Any] | None) -> tuple[Product, Product]:
        with differentiable():
            recording = record(self._respond, self.image, self._watch)
        check_same_twice(self.response, recording.response)
        if recording.jvp is None and recording.vjp is None and not recording.depends:
            self._warn_of_constant_response()
        if recording.jvp is None or recording.vjp is None:
            if (recording.jvp is None) != (recording.vjp is None):
                raise RecordError("forward and reverse mode disagree on whether the response depends on the image")
            self._tell(recording.verdict)
            return self._constant()
        self.strategy = "recorded"
        slopes: dict[Any, tuple[Tensor, list[Tensor]]] = {}
        programs = {"J": recording.jvp, "Jt": recording.vjp}
        written = self._watch.written()
        for program in programs.values():
            program.part_from(written)
            program.simplified(slopes)
            check_precision(program.dtypes(), self.dtype)
        with torch.no_grad(), exact_arithmetic():
            for name, program in programs.items():
                self.tuning |= variants.choose(program, name, pinned, self.device)
            peak = max(program.peak_bytes() for program in programs.values())
            blocks, programs = self._tuned(programs, recording.probes, pinned, peak)
            self._check_adjoint_of(*recording.probes["J"], *recording.probes["Jt"])
        if "block" not in self.tuning:
            self._best_block = lambda: _best_block(blocks, _room(self.device, peak), peak)[1]
        self._hold(programs.values())
        self._tell(recording.verdict)
        return blocks[0], blocks[1]

    def _tuned(
        self,
        programs: dict[str, Program],
        probes: dict[str, tuple[Tensor, Tensor]],
        pinned: dict[str, Any] | None,
        peak: int,
    ) -> tuple[list[_Block], dict[str, Program]]:
        """Return the programs, checked, in the layout of images in memory and the block size that are fastest.

        On a device whatever is tried is captured first, which takes longer than many a search does: there the layout
        stays, for the arithmetic that gains by another one is switched off, and the block size waits until blocks are
        wanted.
        """
        at_once, room = self.device.type == "cpu", _room(self.device, peak)
        codes = {name: code(program) for name, program in programs.items()}
        blocks = [_Block(bound(codes[name], p.constants), *probes[name]) for name, p in programs.items()]
        _replayed(blocks)
        if pinned:
            self.tuning |= {key: pinned[key] for key in ("layout", "block") if key in pinned}
            if at_once or "block" in pinned:
                self.tuning["block"] = min(self.tuning.get("block", 1), room)
        elif at_once:
            cost, self.tuning["block"] = _best_block(blocks, room, peak)
        tried = pinned.get("layout") == "channels_last" if pinned else at_once
        turned = variants.channels_last(programs) if tried else None
        if turned is None:
            return blocks, programs
        turned_blocks = [_Block(bound(codes[name], p.constants), *probes[name]) for name, p in turned.items()]
        try:
            single = min(_replayed(turned_blocks) for _ in range(1 if pinned else 2))
        except RuntimeError:  # an operation that speaks of strides
            return blocks, programs
        if not pinned:
            self.tuning["layout"] = "contiguous"
            turned_cost, block = _best_block(turned_blocks, room, peak) if single < cost else (single, 1)
            if turned_cost >= 0.95 * cost:
                return blocks, programs
            self.tuning |= {"layout": "channels_last", "block": block}
        return turned_blocks, turned

    def _hold(self, programs: Iterable[Program]) -> None:
        """Count the bytes held, and watch the weights that the programs read in place."""
        held = {memory_key(c): c for program in programs for c in program.constants.values()}
        own = {memory_key(w) for w in (*self._watch.parameters(), *(w for _, w in weights(self.model)))}
        self.memory = sum(bytes_of(c) for key, c in held.items() if key not in own)
        self._watch.add(held.values())

    def _constant(self) -> tuple[Product, Product]:
        self.strategy, self.tuning = "constant", {"block": LARGEST_BLOCK}
        m, n = self.shape
        return lambda t: t.new_zeros(len(t), m), lambda u: u.new_zeros(len(u), n)

    def _check_adjoint(self, jvp: Product, vjp: Product) -> None:
        (v,) = random_like(self.image.reshape(1, -1))
        jv = jvp(v)
        u = cotangent_for(v, jv, jv)
        self._check_adjoint_of(v, jv, u, vjp(u))

    def _check_adjoint_of(self, v: Tensor, jv: Tensor, u: Tensor, jtu: Tensor) -> None:
        """Refuse two products that are not each other's transpose: <Jv, u> = <v, J^T u>."""
        if not (torch.isfinite(jv).all() and torch.isfinite(jtu).all()):
            raise ValueError(
                "the derivative of the response holds NaN or infinity at this image: is a square root at 0?"
            )
        if not adjoint(v, jv, u, jtu, self._precision):
            raise _AdjointError(v, jv, u, jtu)

    def _tell(self, verdict: Verdict | None, served: str = "") -> None:
        """Say where forward and reverse mode contradict each other; warn unless what serves is sure to be meant."""
        if verdict is None:
            return
        words = verdict.words(served or ("forward" if verdict.forward else "reverse"))
        self.reason = "; ".join(filter(None, [self.reason, words]))
        if not verdict.reverse:
            warnings.warn(words, stacklevel=outside())

    def _warn_of_constant_response(self) -> None:
        """Tell a response that ignores the image from one that autograd cannot follow."""
        (shift,) = random_like(self.image)
        if not torch.equal(self.respond(self.image + 0.1 * shift), self.response):
            raise ValueError(
                "the response changes with the image, but autograd cannot see how: remove .detach(), torch.no_grad() "
                "and NumPy calls from the model, or write a torch.autograd.Function for that step"
            )
        warnings.warn("the response does not depend on the image: its Fisher matrix is zero", stacklevel=outside())


class _AdjointError(RuntimeError):
    """Two products that are not each other's transpose, with the vectors that show it."""

    def __init__(self, *probes: Tensor) -> None:
        v, jv, u, jtu = (part.double().flatten() for part in probes)
        super().__init__(f"the adjoint test fails: <Jv, u> = {jv @ u:.9g}, <v, J'u> = {v @ jtu:.9g}")
        self.probes = probes


class _Block:
    """A recorded program on blocks: by vmap, once that has been seen to agree with single vectors, else one by one."""

    def __init__(self, function: Product, vector: Tensor, expected: Tensor) -> None:
        self.function = function
        self.launched = Captured(function)
        self.vector, self.expected = vector, expected
        self.mapped: Product | None = None
        self.checked = False
        self.single = math.inf

    def __call__(self, rows: Tensor) -> Tensor:
        with torch.no_grad(), exact_arithmetic():
            if len(rows) > 1 and not self.checked:
                self._check()
            if len(rows) > 1 and self.mapped is not None:
                return self.mapped(rows.view(len(rows), *self.vector.shape)).reshape(len(rows), -1)
            single = [self.launched(row.view_as(self.vector)).reshape(1, -1) for row in _apart(rows)]
            return single[0].contiguous() if len(rows) == 1 else torch.cat(single)

    def _check(self) -> None:
        mapped = torch.vmap(self.function)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # An operation that vmap loops over is no faster for it, and would warn at every product.
                warnings.filterwarnings("error", ".*performance drop")
                pair = mapped(torch.stack([self.vector, -0.5 * self.vector]))
            expected = torch.stack([self.expected, -0.5 * self.expected]).reshape_as(pair)
            if close(pair, expected, expected.norm()):
                self.mapped = Captured(mapped)
        except (RuntimeError, NotImplementedError, UserWarning):
            pass
        self.checked = True

    def replay(self) -> float:
        """Return the wall time of one vector; refuse a program that is not linear, for it missed what depends on it."""
        rows = -0.5 * self.vector.reshape(1, -1)
        result: list[Tensor] = []
        if rows.is_cuda:  # libraries choose their algorithms in the first call
            self(rows)
        seconds = variants.seconds(lambda x: result.append(self(x)), rows)
        if not close(result[0].reshape(-1), -0.5 * self.expected.reshape(-1), self.expected.norm()):
            raise RecordError("the recorded program is not linear: part of the derivative leaves torch's operations")
        self.single = min(self.single, seconds)
        return seconds

    def seconds_of_pair(self) -> float:
        """Return the wall time of a block of two; infinite where vmap does not serve."""
        with torch.no_grad(), exact_arithmetic():
            self._check()
        return self.seconds(2) if self.mapped is not None else math.inf

    def seconds(self, size: int) -> float:
        """Return the wall time of a block."""
        return variants.seconds(self, self.vector.reshape(1, -1).repeat(size, 1))


def _best_block(products: list[_Block], room: int, peak: int) -> tuple[float, int]:
    """Return the seconds a vector and the block size with the highest throughput; dear products are tried less."""
    single = min(sum(p.single for p in products), _replayed(products))
    if single > DEAR_SECONDS:
        return single, max(1, min(room, DEAR_BLOCK, DEAR_BYTES // peak))
    if single > TRIAL_SECONDS:
        pair = sum(p.seconds_of_pair() for p in products)
        return (pair / 2, min(room, DEAR_BLOCK)) if pair < 1.9 * single else (single, 1)
    cost = {1: single}
    for size in TRIED_BLOCKS:
        if size <= room:
            cost[size] = min(sum(p.seconds(size) for p in products) for _ in range(3)) / size
    best = min(cost, key=cost.__getitem__)
    return cost[best], room if best == TRIED_BLOCKS[-1] else best


def _replayed(blocks: list[_Block]) -> float:
    """Return the wall time of one vector through all programs, checked."""
    return sum(block.replay() for block in blocks)


def _room(device: torch.device, peak: int) -> int:
    """Return how many vectors of so many bytes of intermediate values a block may have."""
    allowed = free_memory(device) // BLOCK_SHARE if device.type == "cuda" else BLOCK_BYTES
    return max(1, min(LARGEST_BLOCK, allowed // peak))


def _apart(rows: Tensor) -> list[Tensor]:
    """Return rows each at the start of its own memory: at an odd place it cannot be viewed as complex numbers."""
    return [rows[0]] if len(rows) == 1 and not rows.storage_offset() % 2 else [row.clone() for row in rows]


def _live(product: Product) -> Product:
    """Let a product of one vector by live autograd serve rows."""

    def rows_product(rows: Tensor) -> Tensor:
        with differentiable():
            return torch.stack([product(row).detach() for row in _apart(rows)])

    return rows_product


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
