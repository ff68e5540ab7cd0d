"""What a model reads, and whether that has been written since it was linearized; and what it draws."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from fisherop.linearize.program import memory_key


class Watch(TorchDispatchMode):
    """Watch what operations read while the mode is active, wherever the model keeps it.

    A weight may be a module's, or a function's by its closure, its arguments or a global name: operations see them all.
    Tensors are noted weakly, so that only those that outlive the model's call remain.

    Parameters
    ----------
    tensors : iterable of Tensor
        Watched from the start.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.add(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.add(_tensors((*args, *kwargs.values())))
        return func(*args, **kwargs)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors, and how often they have been written so far."""
        for tensor in tensors:
            known, _ = self._seen.get(id(tensor), (None, 0))
            if (known is None or known() is not tensor) and not tensor.is_inference():
                self._seen[id(tensor)] = weakref.ref(tensor), tensor._version

    def parameters(self) -> Iterable[Tensor]:
        """Iterate over the parameters among them."""
        return (tensor for tensor, _ in self._alive() if isinstance(tensor, Parameter))

    def written(self) -> set[int]:
        """Return the memory of those that have been written: by the model itself, while nobody else could."""
        return {memory_key(tensor) for tensor, version in self._alive() if tensor._version != version}

    def settle(self) -> None:
        """Watch no longer what the model itself writes, its counters say, and what has gone."""
        self._seen = {id(t): (weakref.ref(t), version) for t, version in self._alive() if t._version == version}

    def check(self) -> None:
        """Refuse to go on where a tensor has been written."""
        if any(tensor._version != version for tensor, version in self._alive()):
            raise RuntimeError(
                "the model's weights were written after it was linearized: make a new operator, or call refresh()"
            )

    def _alive(self) -> Iterable[tuple[Tensor, int]]:
        return ((tensor, version) for ref, version in self._seen.values() if (tensor := ref()) is not None)


class Draws(TorchDispatchMode):
    """Note whether operations of this thread draw random numbers from torch's own generators."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        return func(*args, **kwargs)


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Iterate over the tensors among an operation's arguments, or in lists there."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
