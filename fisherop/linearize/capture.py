"""Linear functions on a CUDA device, captured as graphs of kernels: one launch in place of one for every operation.

Launching a small kernel takes the host longer than the kernel takes the card, so that a program of hundreds of
operations on one vector waits for the host all the time. A graph is captured the second time that a block size is met,
for capturing costs several products. Where it fails, because a step of the program waits for the host, or where a
replay is not what the function says, the function is called step by step as everywhere else.

Graphs of one device share the memory of their intermediate values. A replay overwrites those of the graph before,
wherever that ran: replays are ordered by a lock on the host and by an event on the device, and results are copied out.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherop.linearize.checks import close

SIZES = 8
"""Block sizes that graphs are kept for, the latest ones."""
WARM_UP = 2
"""Calls before a capture, in which libraries choose their algorithms and allocate what they keep."""

_enabled = True


@contextmanager
def step_by_step() -> Iterator[None]:
    """Launch every operation by itself, for comparison and to find a fault; for the whole process."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


class Captured:
    """A linear function of one tensor that runs as a CUDA graph where it can, for the shapes that it meets.

    Parameters
    ----------
    function : callable
        Linear, made of tensor operations alone. Settings such as TF32 are those at the time of capture.

    Attributes
    ----------
    failure : str
        Why it could not be captured; empty as long as it was not tried, or succeeded.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.failure = ""
        self._graphs: OrderedDict[tuple[int, ...], _Graph | None] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function's value: by a graph, once one has been captured for this shape."""
        if not x.is_cuda or not _enabled or self.failure or torch.cuda.is_current_stream_capturing():
            return self.function(x)
        with torch.cuda.device(x.device), _shared(x.device) as shared:
            graph = self._graph(x, shared)
            return self.function(x) if graph is None else graph(x)

    def _graph(self, x: Tensor, shared: _Shared) -> _Graph | None:
        """Return the graph for a shape; None the first time that it is met."""
        shape = tuple(x.shape)
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            if self._graphs[shape] is None:
                self._graphs[shape] = self._captured(x, shared)
        else:
            self._graphs[shape] = None
            if len(self._graphs) > SIZES:
                self._graphs.popitem(last=False)
        return self._graphs[shape]

    def _captured(self, x: Tensor, shared: _Shared) -> _Graph | None:
        try:
            graph, expected = _capture(self.function, x, shared)
            scaled = graph(-0.5 * x)  # what did not enter the graph would not change
            if close(scaled, -0.5 * expected, expected.norm()):
                return graph
            self.failure = "a replay differs from the function"
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            self.failure = (str(error) or type(error).__name__).splitlines()[0]
        self._graphs.clear()
        return None


@dataclass
class _Graph:
    """A captured graph, and the memory that it reads and writes."""

    graph: Any
    source: Tensor
    result: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return a copy of the result, which the next replay would overwrite."""
        self.source.copy_(x)
        self.graph.replay()
        return self.result.clone()


def _capture(function: Callable[[Tensor], Tensor], x: Tensor, shared: _Shared) -> tuple[_Graph, Tensor]:
    """Return a graph for tensors like x, and what the function itself makes of x."""
    source = x.clone()
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            expected = function(source)
    current.wait_stream(aside)
    expected = expected.clone()
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a graph that is empty, for a function that only reshapes
        # Other threads may allocate, or launch on streams of their own, meanwhile.
        with torch.cuda.graph(graph, pool=shared.pool, capture_error_mode="thread_local"):
            result = function(source)
    return _Graph(graph, source, result), expected


class _Shared:
    """What the graphs of a device share: memory, and the order of their replays."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.lock = threading.RLock()
        self.latest = torch.cuda.Event()


_SHARED: dict[torch.device, _Shared] = {}
_SHARED_LOCK = threading.Lock()


@contextmanager
def _shared(device: torch.device) -> Iterator[_Shared]:
    """Enter the one place at a time where graphs of a device are captured and replayed, after all that went before."""
    with _SHARED_LOCK:
        if device not in _SHARED:
            _SHARED[device] = _Shared()
        shared = _SHARED[device]
    with shared.lock:
        torch.cuda.current_stream().wait_event(shared.latest)
        try:
            yield shared
        finally:
            torch.cuda.current_stream().record_event(shared.latest)
