"""Eigendistortions of many images at once: one solver for each, one product for all of them.

>>> import torch, fisherop as fo
>>> results = fo.eigendistortions_many(fo.OnOff(), torch.rand(3, 1, 16, 16), k=2)
>>> [r.eigendistortions.shape for r in results]
[torch.Size([2, 1, 16, 16]), torch.Size([2, 1, 16, 16]), torch.Size([2, 1, 16, 16])]
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fisherop import certificate
from fisherop.eigen import NOTHING_NOTICED, advice, checked_request, choose, known
from fisherop.linearize import Linearization, exact_arithmetic
from fisherop.linearize.autodiff import bytes_written, differentiable, free_memory
from fisherop.linearize.checks import as_pairs, buffers_kept, checked_image, close, flat_response, leaves
from fisherop.maps import whole
from fisherop.noise import Custom, Gaussian, Noise, checked_noise, precision_at
from fisherop.operators import InformationOperator
from fisherop.restrict import subspace
from fisherop.result import ConvergenceWarning, Eigendistortions
from fisherop.rows import RowOperator, finite, generator
from fisherop.solvers import BACKENDS, Control, Progress, Request, Steps
from fisherop.solvers.contract import Ask
from fisherop.solvers.space import absorb, shelves

Answer = TypeVar("Answer")

MEMORY = 1 << 30
"""Bytes on the host that a batch may take for its products, and again for its search spaces."""

HELD_PASSES = 4
"""Bytes that recorded products need while they are made, in those that one pass through the model writes."""

ROWS_EACH = 200
"""Rows of a search space that every image should have room for."""

ORDER = (absorb, "unchecked", "rows", shelves, "factor", "factor_adjoint")
"""What is done first where images ask for several things. Who is done with a search waits until all are: the next one,
and the proofs, are then shared too."""

ONE_FOR_ALL = (Gaussian, Custom)
"""Noise whose precision does not depend on the response, so that one is that of every image. Not so for subclasses."""

SLACK = 1.25
"""A larger batch is preferred where an image costs no more than this many times what it costs in the best one."""


def eigendistortions_many(
    model: Callable[[Tensor], Any],
    images: Tensor | Sequence[Tensor],
    k: int = 2,
    which: str = "BE",
    method: str = "auto",
    *,
    noise: Noise | None = None,
    within: Any = None,
    tol: float | None = None,
    maxiter: int | None = None,
    v0: Sequence[Any] | None = None,
    rng: Any = None,
    callback: Callable[[int, Progress], object] | None = None,
    certify: str = "residuals",
    batch: int | None = None,
) -> list[Eigendistortions]:
    """Find the distortions that a model notices most and least, for many images of one shape at once.

    Every image has a solver of its own, which stops when its pairs have converged; the solvers run side by side, and
    each step is one product for all of them. On a GPU this is what fills the card.

    Parameters
    ----------
    model : callable
        An ``nn.Module`` in evaluation mode or any function that takes a batch of images, (B, ...), and treats each
        by itself. It returns a tensor, or a tuple, list or dict of tensors, with a leading dimension of B.
    images : Tensor or sequence of Tensor
        float32 or float64 images of one shape: a tensor (B, ...), or a list of tensors (1, ...), each as
        `FisherOperator` takes it, or without that leading 1; three dimensions are always (C, H, W).
    k, which, tol, maxiter, certify : optional
        As in `eigendistortions`, for every image.
    method : {"auto", "lanczos", "exact"}, optional
        As in `eigendistortions`; "auto" is "exact" where the dense problem is small, else "lanczos".
    noise, within : optional
        As in `FisherOperator`. The precision of a noise that depends on the response is each image's own.
    v0 : sequence, optional
        For every image what `eigendistortions` takes: the eigendistortions of earlier results, say.
    rng : optional
        Anything `numpy.random.default_rng` takes; image i draws from ``default_rng(rng).spawn(len(images))[i]``.
    callback : callable, optional
        Called with an image's number and its `Progress` after each of its steps; returning True stops this image.
    batch : int, optional
        Images to take at once. By default as many as memory has room for and the model takes without slowing down,
        which is measured; results of different batches differ by rounding.

    Returns
    -------
    list of Eigendistortions
        One for every image, in their order: what ``eigendistortions(FisherOperator(model, images[i : i + 1]), ...)``
        returns, up to rounding.

    Raises
    ------
    TypeError, ValueError
        For images of several shapes, a model that mixes images or cannot take a batch, and for whatever
        `FisherOperator` and `eigendistortions` refuse; the message says what to change, and at which image.
        All but the derivatives is checked before any image is solved.

    Warns
    -----
    ConvergenceWarning
        Once, where pairs of some images have not converged.
    UserWarning
        Once, where a model notices nothing at some images.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> images = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    >>> [r.eigenvalues for r in fo.eigendistortions_many(torch.square, images)]
    [array([16.,  4.]), array([64., 36.])]
    """
    stacked = _stacked(images)
    count = len(stacked)
    _check_arguments(method, maxiter, certify, batch, v0, count)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of an image's number and its Progress, not {callback!r}")
    noise, streams = checked_noise(noise), _streams(rng, count)
    checked_image(model, stacked[:1])
    with buffers_kept(model):
        _check_each(model, stacked, noise)
        size = min(count, batch or _batch_size(model, stacked))
    answers: list[tuple[Eigendistortions, str]] = []
    tuning: dict[str, Any] | None = None
    while len(answers) < count:
        places = range(len(answers), min(len(answers) + size, count))
        try:
            together = _batch(model, stacked, places, noise, within, tuning)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size, tuning = -(-size // 2), None
            continue
        tuning = together.linearization.tuning
        steps = []
        for i, op in zip(places, together.ops, strict=True):
            request = checked_request(op, k, which, tol, None if v0 is None else v0[i], streams[i])
            report = None if callback is None else partial(callback, i)
            steps.append(_solved(op, request, method, maxiter, report, certify == "probe"))
        with exact_arithmetic():
            answers += _side_by_side(together, steps)
    results, complaints = [result for result, _ in answers], {i: text for i, (_, text) in enumerate(answers) if text}
    unseen = [i for i, result in enumerate(results) if result.lambda_max == 0 and i not in complaints]
    if unseen:
        warnings.warn(f"image {', '.join(map(str, unseen))}: {NOTHING_NOTICED}", stacklevel=2)
    if complaints:
        first, *others = complaints
        more = f", and {len(others)} more of {count} images have not all their pairs" if others else ""
        warnings.warn(f"image {first}: {complaints[first]}{more}", ConvergenceWarning, stacklevel=2)
    return results


ABLE = tuple(name for name, backend in BACKENDS.items() if backend.steps)
"""Methods that ask for their products, and so can share them."""


def _solved(
    op: RowOperator,
    request: Request,
    method: str,
    maxiter: int | None,
    report: Callable[[Progress], object] | None,
    probe: bool,
) -> Steps[tuple[Eigendistortions, str]]:
    """Solve for one image; return its certified result, and what the user should know if that is not all asked for."""
    name, reason = choose(op, request) if method == "auto" else (method, "")
    if name not in ABLE:
        name, reason = "lanczos", "chosen because images share its products"
    backend = BACKENDS[name]
    assert backend.steps is not None
    control = Control(op, maxiter or backend.maxiter, report)
    found = yield from backend.steps(op, request, control)
    result = yield from certificate.certify_steps(op, request, found, name, reason, probe=probe)
    wanting = bool(found.doubt) or (result.lambda_max > 0 and not result.converged.all())
    return result, advice(result, control, name, found.doubt, found.note) if wanting else ""


def _side_by_side(together: FisherBatch, steps: Sequence[Steps[Answer]]) -> list[Answer]:
    """Do for all solvers at once what they ask for, one thing after another, until the last has its answer."""
    answers: dict[int, Answer] = {}
    asked: dict[int, Ask] = {}

    def advance(i: int, outcome: Any) -> None:
        try:
            asked[i] = steps[i].send(outcome)
        except StopIteration as end:
            answers[i] = end.value

    for i in range(len(steps)):
        advance(i, None)
    while asked:
        what = min((what for what, _ in asked.values()), key=ORDER.index)
        served = [i for i in sorted(asked) if asked[i][0] == what]
        given = [asked.pop(i)[1] for i in served]
        if callable(what):
            outcomes = what(given)
        else:
            outcomes = together.multiply(what, dict(zip(served, given, strict=True)))
            for i, rows in zip(served, given, strict=True):
                together.ops[i].count(what, len(rows))
        for i, outcome in zip(served, outcomes, strict=True):
            advance(i, outcome)
    return [answers[i] for i in range(len(steps))]


class FisherBatch:
    """Fisher matrices of one model at several images: one product multiplies vectors of every image by its own matrix.

    The model is linearized at the batch, as a function of all images together. Its Jacobian is block diagonal, for it
    treats images one by one, so that a vector made of one tangent for each image is multiplied by all blocks at once.

    Attributes
    ----------
    linearization : Linearization
        Of the model at the batch: ``(B * m, B * n)``.
    ops : list of RowOperator
        The matrices of the images, as solvers see them.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        images: Tensor,
        noise: Noise,
        within: Any = None,
        tuning: Mapping[str, Any] | None = None,
    ) -> None:
        self.count = len(images)
        with buffers_kept(model):
            _check_apart(model, images)
        self.linearization = Linearization(_Together(model, self.count), images[None], tuning)
        self._check_blocks()
        self.subspace = subspace(within, self.linearization.image[0, :1])
        responses = self.linearization.response.reshape(self.count, -1)
        found = [precision_at(noise, row) for row in responses[: 1 if type(noise) in ONE_FOR_ALL else None]]
        self.precisions, self.factor_size = [precision for precision, _ in found], found[0][1]
        self.ops = [RowOperator(_Member(self, i)) for i in range(self.count)]
        for op in self.ops:
            op.sharers = self.count

    def multiply(self, kind: str, asked: Mapping[int, Tensor]) -> list[Tensor]:
        """Multiply the rows that images ask for by F, its factor or the transpose: what `RowOperator` calls `kind`.

        Images that ask for less than others, or for nothing, are filled up with zeros.
        """
        most = max(asked.values(), key=len)
        nothing = torch.zeros_like(most)
        given = [asked.get(i, nothing) for i in range(self.count)]
        if any(len(rows) < len(most) for rows in given):
            given = [torch.cat([rows, nothing[len(rows) :]]) for rows in given]
        block = torch.stack(given, dim=1)
        if kind != "factor_adjoint":
            block = self._jvp(block)
            block = self._weighted("root" if kind == "factor" else "apply", block)
        else:
            block = self._weighted("root_transpose", block)
        if kind != "factor":
            block = self._vjp(block)
        if kind != "unchecked":
            block = finite(block)
        return [block[: len(rows), i].contiguous() for i, rows in asked.items()]

    def _jvp(self, block: Tensor) -> Tensor:
        images = self.subspace.expand(block.flatten(0, 1))
        return self.linearization.jvp(images.reshape(len(block), -1)).reshape(*block.shape[:2], -1)

    def _vjp(self, block: Tensor) -> Tensor:
        images = self.linearization.vjp(block.reshape(len(block), -1))
        return self.subspace.project(images.reshape(len(block) * self.count, -1)).reshape(*block.shape[:2], -1)

    def _weighted(self, name: str, block: Tensor) -> Tensor:
        if len(self.precisions) == 1:
            weighted: Tensor = getattr(self.precisions[0], name)(block.flatten(0, 1))
            return weighted.reshape(*block.shape[:2], -1)
        parts = [getattr(p, name)(block[:, i].contiguous()) for i, p in enumerate(self.precisions)]
        return torch.stack(parts, dim=1)

    def _check_blocks(self) -> None:
        """Refuse a Jacobian in which a change of some images changes the responses to others."""
        image = self.linearization.image
        source = torch.Generator("cpu").manual_seed(0)
        shape = 2, self.count, image[0, 0].numel()
        tangents = torch.randn(shape, generator=source, dtype=torch.float64, device="cpu").to(image)
        for parity in (0, 1):
            tangents[parity, parity::2] = 0
        change = self.linearization.jvp(tangents.reshape(2, -1)).reshape(2, self.count, -1)
        stray = torch.stack([change[parity, parity::2].norm() for parity in (0, 1)]).max()
        if stray > 1e3 * torch.finfo(image.dtype).eps * change.norm():
            raise ValueError(_MIXED)


class _Member(InformationOperator):
    """The Fisher matrix of one image of a batch. Its products cost as much as those of the whole batch."""

    def __init__(self, together: FisherBatch, place: int) -> None:
        at = together.linearization
        super().__init__((together.subspace.size,) * 2, at.dtype, at.device)
        self.together, self.place = together, place
        self.factor_size = together.factor_size

    @property
    def image(self) -> Tensor:
        """The image, with a leading dimension of 1."""
        return self.together.linearization.image[0, self.place : self.place + 1]

    @property
    def image_shape(self) -> torch.Size:
        """The shape of the image."""
        return self.image.shape

    def expand(self, block: Tensor) -> Tensor:
        """Turn coordinates into pixels."""
        return self.together.subspace.expand(block)

    def project(self, block: Tensor) -> Tensor:
        """Turn pixels into coordinates."""
        return self.together.subspace.project(block)

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row by F."""
        return self.together.multiply("rows", {self.place: block})[0]

    def factor_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the factor of F."""
        return self.together.multiply("factor", {self.place: block})[0]

    def factor_adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the transpose of the factor."""
        return self.together.multiply("factor_adjoint", {self.place: block})[0]


class _Together(torch.nn.Module):
    """A model of a batch as one of a single picture (1, B, ...), with a response in which every image has a row."""

    def __init__(self, model: Callable[[Tensor], Any], count: int) -> None:
        super().__init__()
        self.model, self.count = model, count
        self.training = False  # of this module alone: the model's own mode is the user's

    def forward(self, pictures: Tensor) -> Tensor:
        return _rows_of(self.model(pictures.reshape(pictures.shape[1:])), self.count)


_MIXED = (
    "the model's response to an image depends on the others in its batch: call model.eval(), or take images one by one "
    "with eigendistortions"
)


def _rows_of(output: Any, count: int) -> Tensor:
    """Return a model's output for a batch, of whatever structure, as a row for every image."""
    parts, found = [], leaves(output)
    for leaf in found:
        if leaf.ndim == 0 or len(leaf) != count:
            raise ValueError(
                f"the model's response to a batch of {count} images has shape {tuple(leaf.shape)}: it must have a "
                f"leading dimension of {count}; take images one by one with eigendistortions"
            )
        parts.append(as_pairs(leaf, alone=len(found) == 1).reshape(count, -1))
    return torch.cat(parts, dim=1) if len(parts) != 1 else parts[0]


def _check_each(model: Callable[[Tensor], Any], images: Tensor, noise: Noise) -> None:
    """Refuse an image, a response or its noise by the image's number, before any work is done that would be lost."""
    for i in range(len(images)):
        try:
            if not torch.isfinite(images[i]).all():
                raise ValueError("it holds NaN or infinity: replace these pixels first")
            with differentiable(), torch.no_grad():
                response = flat_response(model(images[i : i + 1].clone()), images)
            if type(noise) not in ONE_FOR_ALL:
                precision_at(noise, response)
        except ValueError as error:
            raise ValueError(f"image {i}: {error}") from error


def _batch(
    model: Callable[[Tensor], Any],
    images: Tensor,
    places: range,
    noise: Noise,
    within: Any,
    tuning: Mapping[str, Any] | None,
) -> FisherBatch:
    """Return the Fisher matrices of some images; where they cannot be had for the sake of one, say which."""
    try:
        return FisherBatch(model, images[places.start : places.stop], noise, within, tuning)
    except ValueError:
        faults: dict[int, ValueError] = {}
        for i in places:
            try:
                FisherBatch(model, images[i : i + 1], noise, within)
            except ValueError as error:
                faults[i] = error
        if len(faults) == len(places) > 1:  # it is not the image's fault
            raise
        for i, fault in faults.items():
            raise ValueError(f"image {i}: {fault}") from fault
        raise


def _check_apart(model: Callable[[Tensor], Any], images: Tensor) -> None:
    """Compare the responses to the batch with those to its images one by one."""
    with differentiable(), torch.no_grad():
        together = _respond(model, images)
        for i, row in enumerate(together):
            alone = flat_response(model(images[i : i + 1].clone()), images)
            if alone.shape != row.shape or not close(alone, row, alone.norm()):
                raise ValueError(_MIXED)


def _respond(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    try:
        output = model(images.clone())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"the model does not take a batch of {len(images)} images ({str(error).splitlines()[0]}): take images one "
            "by one with eigendistortions"
        ) from error
    return _rows_of(output, len(images))


def _check_arguments(
    method: str, maxiter: int | None, certify: str, batch: int | None, v0: Sequence[Any] | None, count: int
) -> None:
    if method in BACKENDS and method not in ABLE:
        raise ValueError(f"method {method!r} takes one image at a time: use 'auto', {', '.join(map(repr, ABLE))}")
    known(method, ("auto", *ABLE), "method")
    known(certify, ("residuals", "probe"), "certify")
    for name, number in (("maxiter", maxiter), ("batch", batch)):
        if number is not None:
            whole(number, name, 1)
    if v0 is not None and not hasattr(v0, "__len__"):
        raise TypeError(f"v0 must hold a start for every image, not {type(v0).__name__}")
    if v0 is not None and len(v0) != count:
        raise ValueError(f"v0 holds starts for {len(v0)} images, and there are {count}: give one for each")


def _streams(rng: Any, count: int) -> list[np.random.Generator]:
    """Return a source of random numbers for every image, the same whatever the batches are."""
    source = generator(rng)
    try:
        return source.spawn(count)
    except TypeError:  # it does not know its seed, as that of an older RandomState
        seeds = np.random.SeedSequence(source.integers(2**63, size=4).tolist()).spawn(count)
        return [np.random.default_rng(seed) for seed in seeds]


def _stacked(images: Tensor | Sequence[Tensor]) -> Tensor:
    """Return images as one tensor (B, ...)."""
    if isinstance(images, Tensor):
        stacked = images
    else:
        others = [x for x in images if not isinstance(x, Tensor)] if isinstance(images, (list, tuple)) else [images]
        if others:
            kind = type(others[0]).__name__
            raise TypeError(f"images must be a tensor (B, ...) or a list of tensors, not {kind}: use torch.as_tensor")
        shapes = sorted({tuple(image.shape) for image in images})
        kinds = {(image.dtype, image.device) for image in images}
        if len(shapes) > 1 or len(kinds) > 1:
            differ = f"shapes {', '.join(map(str, shapes))}" if len(shapes) > 1 else "dtypes or devices"
            raise ValueError(f"images that share products have one shape, dtype and device, not {differ}: sort them")
        single = bool(images) and images[0].ndim > 1 and images[0].ndim != 3 and len(images[0]) == 1
        stacked = torch.empty(0) if not images else torch.cat(list(images)) if single else torch.stack(list(images))
    if stacked.ndim == 0 or stacked.numel() == 0:
        raise ValueError(f"images of shape {tuple(stacked.shape)} hold no image")
    return stacked.detach()


# ----------------------------------------------------------------------------------------------- how many at once


def _batch_size(model: Callable[[Tensor], Any], images: Tensor) -> int:
    """Return how many images to take at once: what memory has room for, as long as the model takes them no slower."""
    with differentiable(), torch.no_grad():
        held = HELD_PASSES * bytes_written(lambda: _respond(model, images[:1]))
        memory = free_memory(images.device) // 3 if images.is_cuda else MEMORY
        row = images[0].numel() * images.element_size()
        most = min(len(images), memory // max(held, ROWS_EACH * row))
        sizes = [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]
        chosen, best = 1, math.inf
        for size in sizes if most > 1 else ():
            cost = min(_seconds(model, images[:size]) for _ in range(3)) / size
            if cost > SLACK * best:
                break
            chosen, best = size, min(best, cost)
    return -(-len(images) // -(-len(images) // chosen))  # in batches of about one size


def _seconds(model: Callable[[Tensor], Any], images: Tensor) -> float:
    start = time.perf_counter()
    _respond(model, images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
