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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisherop.linearize.checks import close

SIZES = 8
"""Block sizes that graphs are kept for, the latest ones."""
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"}
WAITING |= {"_unique", "_unique2", "unique_dim", "unique_consecutive"}
"""Operations whose result, or its shape, the host must know."""

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
                with suppress(RuntimeError):
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
    """Return a graph for tensors like x, and what the function itself makes of x.

    In the calls before, libraries choose their algorithms and allocate what they keep: on the stream of the capture,
    for they keep it for each stream, and outside the memory of the graphs.
    """
    source, current = x.clone(), torch.cuda.current_stream()
    shared.stream.wait_stream(current)
    with torch.cuda.stream(shared.stream):
        function(source)
        with NoWaits():
            expected = function(source)
    current.wait_stream(shared.stream)
    expected = expected.clone()
    shared.keep()
    graph, result = shared.captured(lambda: function(source))
    return _Graph(graph, source, result), expected


class NoWaits(TorchDispatchMode):
    """Refuse operations of this thread for which the host waits for a device, which no graph can hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = {x.device.type for x in tensors} - {"cpu"}
        name = func._schema.name.removeprefix("aten::")
        if places and (name in WAITING or _sought(name, args)):
            raise RuntimeError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and len({x.device.type for x in (*tensors, result)}) > 1:
            raise RuntimeError(f"{name} waits for the device")
        return result


def _sought(name: str, args: Any) -> bool:
    """Tell whether this looks for the places where a mask is true."""
    masks = tree_leaves(args[1]) if name in ("index", "index_put_", "index_put") else []
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in masks)


class _Shared:
    """What the graphs of a device share: a stream to capture on, memory, and the order of their replays."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()
        self.lock = threading.RLock()
        self.latest = torch.cuda.Event()
        self._kept: list[Any] = []

    def captured(self, work: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        """Return a graph of what is launched, and the tensor that it writes."""
        graph = torch.cuda.CUDAGraph()
        try:
            return graph, self._record(graph, work)
        except RuntimeError:
            self._mend(graph)
            raise

    def keep(self) -> None:
        """Keep one graph for good: memory whose last graph is gone cannot be used for another."""
        if not self._kept:
            self._kept.append(self.captured(self._something)[0])

    def _record(self, graph: Any, work: Callable[[], Tensor]) -> Tensor:
        with warnings.catch_warnings(), torch.cuda.stream(self.stream):
            warnings.simplefilter("ignore")  # of a graph that is empty, for a function that only reshapes
            # Other threads may allocate, or launch on streams of their own, meanwhile.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                return work()
            finally:
                graph.capture_end()

    def _mend(self, failed: Any) -> None:
        """Leave torch as it was before a capture that failed: not every version does all of that itself."""
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with suppress(RuntimeError):
            self._record(graph, self._something)
        self._kept += [failed, graph]

    def _something(self) -> Tensor:
        return torch.zeros(1, device=self.stream.device)


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
