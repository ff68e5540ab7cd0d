"""A device that is none: its tensors keep their values on the host but refuse to meet the host's, and are counted.

What runs here runs on an accelerator as far as the place of every tensor goes, on a machine that has none. And it can
be told how often an operation is launched, and how often the host waits for the device, of which no clock tells. The
tensors are on torch's device "meta", for which torch itself needs nothing.

>>> with Elsewhere() as device:
...     total = float((torch.ones(2).to(PLACE) * 2).sum())
>>> total, device.launches["mul"], device.waits["_local_scalar_dense"]
(4.0, 1, 1)
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PLACE = torch.device("meta")
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_")
VALUES = ("_local_scalar_dense", "equal", "is_nonzero")
"""Operations that return a value to the host."""
FACTORIZATIONS = ("_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_cholesky_ex")
VIEWS = """
alias as_strided detach diagonal expand lift_fresh permute reshape select slice split split_with_sizes squeeze t
transpose unbind unsqueeze view _reshape_alias _unsafe_view
"""


class Elsewhere(TorchDispatchMode):
    """Serve tensors on the device; ``launches`` and ``waits`` count by the name of the operation."""

    def __init__(self):
        super().__init__()
        self.launches, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation on the values, and put the result where the operation would."""
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        away = any(isinstance(x, Away) for x in tensors)
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if target == PLACE:
            kwargs["device"] = torch.device("cpu")
        there = target == PLACE if target is not None else away
        self._check(name, tensors, args, away)
        self._count(name, args, kwargs, away, there)
        result = func(*_values(args), **_values(kwargs))
        if name.endswith("_") and away and isinstance(args[0], Away) and args[0].shape == result.shape:
            return args[0]
        if name == "copy_" and not isinstance(args[0], Away):
            return args[0]
        return tree_map_only(torch.Tensor, Away, result) if there else result

    def _check(self, name, tensors, args, away):
        for x in tensors:
            if x.device == PLACE and not isinstance(x, Away):
                raise RuntimeError(f"{name} meets a tensor that torch made there by itself, without values")
        places = tree_leaves(args[1]) if name in INDEXING else []  # an index may come from the host
        if away and name not in COPIES:
            for x in tensors:
                if not isinstance(x, Away) and x.ndim and not any(x is place for place in places):
                    raise RuntimeError(f"{name} mixes tensors of the device with tensors of the host")

    def _count(self, name, args, kwargs, away, there):
        if (away or there) and name not in VIEWS.split():
            self.launches[name] += 1
        sides = {isinstance(x, Away) for x in tree_leaves(args) if isinstance(x, torch.Tensor)} | {there}
        sent = there and (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        moved = name in COPIES and len(sides) > 1 and not sent
        places = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)] if name in INDEXING and away else []
        sought = any(x.dtype == torch.bool or not isinstance(x, Away) for x in places)
        if moved or sought or (away and name in (*VALUES, *FACTORIZATIONS, "nonzero")):
            self.waits[name] += 1


class Away(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, values):
        """Return a tensor of the same shape and strides."""
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, device=PLACE, **layout)

    def __init__(self, values):
        self.values = values

    def __repr__(self):
        return f"Away({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} was called outside `with Elsewhere()`")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Do by hand what torch's own code does to such tensors without asking."""
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):  # a list would become an index without values
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(_indices(i) if isinstance(i, list) else i for i in index), *args[2:]
        with torch._C.DisableTorchFunctionSubclass():
            if (
                func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
                and args[0].ndim < args[1].ndim == 2
            ):
                return (args[0][None] @ args[1])[0]
            if func is torch.Tensor.tolist:
                return args[0].cpu().tolist()
            return func(*args, **kwargs)


def _indices(numbers):
    return torch.tensor(numbers, device="cpu", dtype=None if numbers else torch.int64)


def _values(arguments):
    return tree_map_only(Away, lambda x: x.values, arguments)
