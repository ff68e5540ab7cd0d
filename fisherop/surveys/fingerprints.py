"""What tells a value from all others: a hash of its content, the same in every process and on every machine.

>>> from fisherop.surveys.fingerprints import fingerprint
>>> fingerprint({"k": 2, "noise": None}) == fingerprint({"noise": None, "k": 2})
True
"""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import io
import os
import pickle
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor, nn

MODEL_FILES = (".pt", ".pth", ".pt2")


def fingerprint(x: Any, *, named: bool = False) -> str:
    """Return a hash of a value: the same for equal content, in every process and on every machine.

    Numbers, text, containers, arrays, tensors, Modules (their architecture in words, their weights, all buffers and
    public attributes), files of models, dataclasses, partial functions and functions in Python are known by their
    content; classes, and functions of the libraries beneath, by their names. So is, if `named`, a function that is the
    value itself.
    """
    digest = hashlib.sha256()
    for part in _parts(x, named=named):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def is_model_file(source: Any) -> bool:
    """Tell whether something names a file of a model, by its ending."""
    return isinstance(source, os.PathLike) or (isinstance(source, str) and source.endswith(MODEL_FILES))


def _parts(x: Any, *, named: bool = False) -> Iterator[Any]:
    """Yield bytes that tell a value from all others."""
    if x is None or isinstance(x, (bool, int, float, complex, str, bytes)):
        is_file = isinstance(x, str) and is_model_file(x) and os.path.isfile(x)  # a name may look like one
        yield b"file " + _file_digest(x) if is_file else f"{type(x).__name__} {x!r}".encode()
    elif isinstance(x, os.PathLike):
        yield b"file " + _file_digest(x)
    elif isinstance(x, Tensor):
        yield from _tensor_parts(x.detach().cpu().resolve_conj().resolve_neg())
    elif isinstance(x, np.ndarray) and x.dtype != object:
        yield f"array {x.dtype.str} {x.shape}".encode()
        yield np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
    elif isinstance(x, (np.generic, torch.dtype, torch.device, torch.Size)):
        yield f"{type(x).__name__} {x}".encode()
    elif isinstance(x, nn.Module):
        yield f"module {_path(type(x))} {x!r}".encode()
        yield from _parts(dict(x.state_dict()))
        yield from _parts(_beyond_weights(x, {}))
    elif isinstance(x, Mapping):
        yield f"mapping {len(x)}".encode()
        for key in sorted(x, key=str):
            yield from _parts(key)
            yield from _parts(x[key])
    elif isinstance(x, (list, tuple)):
        yield f"sequence {len(x)}".encode()
        for item in x:
            yield from _parts(item)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        yield f"dataclass {_path(type(x))}".encode()
        yield from _parts({field.name: getattr(x, field.name) for field in dataclasses.fields(x)})
    elif isinstance(x, partial):
        yield b"partial"
        yield b"sequence 3"
        yield from _parts(x.func, named=named)
        yield from _parts(x.args)
        yield from _parts(x.keywords)
    elif issparse(x):
        yield from _parts(("sparse", x.shape, *_sorted_coordinates(x)))
    elif hasattr(x, "__qualname__"):
        yield f"name {_path(x)}".encode()
        if getattr(x, "__self__", None) is not None and not isinstance(x.__self__, type(os)):
            yield from _parts(x.__self__)
        if not named and _is_read(x):
            yield from _parts(_read(x, {}))
    else:
        yield f"object {_path(type(x))}".encode()
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=4).dump(x)
        yield buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles an object for its fingerprint: functions by what they do, where a pickle has their names."""

    def persistent_id(self, x: Any) -> str | None:
        return fingerprint(x) if isinstance(x, FunctionType) and _is_read(x) else None


def _tensor_parts(x: Tensor) -> Iterator[Any]:
    if x.layout != torch.strided:
        yield f"layout {x.layout}".encode()
        x = x.to_dense()
    try:
        yield from _parts(x.numpy())
    except TypeError:  # NumPy has no bfloat16
        yield f"tensor {x.dtype} {tuple(x.shape)}".encode()
        yield from _parts(x.reshape(-1).view(torch.uint8).numpy())


def _beyond_weights(model: nn.Module, known: dict[int, str]) -> list[Any]:
    """Return what a Module computes with and neither its words nor its state tell, in plain data, by submodule.

    Buffers that are not persistent, modes, and public attributes: private ones are a Module's own bookkeeping and
    caches. `known` has the submodules met, for they may refer to each other.
    """
    parts = list(model.named_modules())
    known |= {id(part): name for name, part in parts if id(part) not in known}
    return [
        (
            name,
            _path(type(part)),
            dict(part.named_buffers(recurse=False)),
            part.code if isinstance(part, torch.fx.GraphModule) else "",
            {key: _plain(value, known) for key, value in vars(part).items() if not key.startswith("_")},
        )
        for name, part in parts
    ]


def _plain(x: Any, known: dict[int, str], depth: int = 2) -> Any:
    """Return an attribute's value as plain data; an object of a class unknown here as its own public attributes."""
    if isinstance(x, MethodType) and _is_read(x):
        return _plain(x.__func__, known, depth), _plain(x.__self__, known, depth)
    if _is_read(x):
        return known[id(x)] if id(x) in known else (_path(x), *_read(x, known))
    if isinstance(x, CodeType):
        return _instructions(x, known)
    if isinstance(x, ModuleType):
        return x.__name__
    if isinstance(x, (slice, range)):
        return repr(x)
    if isinstance(x, (str, os.PathLike)):
        return repr(os.fspath(x))  # text, also where it names a file: what was in that is in the weights
    if isinstance(x, Mapping):
        return {str(key): _plain(value, known, depth) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(item, known, depth) for item in x]
    if isinstance(x, (set, frozenset)):
        return sorted(fingerprint(_plain(item, known, depth)) for item in x)
    if x is None or isinstance(x, _PLAIN) or (isinstance(x, np.ndarray) and x.dtype != object):
        return x
    if isinstance(x, nn.Module):
        return known[id(x)] if id(x) in known else (dict(x.state_dict()), _beyond_weights(x, known))
    if isinstance(x, partial):
        return [_plain(part, known, depth) for part in (x.func, x.args, x.keywords)]
    if hasattr(x, "__qualname__"):
        return _path(x)
    kind = _path(type(x))
    if isinstance(x, Enum):
        return kind, x.name
    if not depth or kind.startswith("torch.") or not hasattr(x, "__dict__"):
        return kind
    public = {key: value for key, value in vars(x).items() if not key.startswith("_")}
    return kind, _plain(public, known, depth - 1)


# ----------------------------------------------------------------------------------------------------------- functions

_LIBRARIES = ("torch", "torchvision", "numpy", "scipy")
"""The packages whose functions are known by name: another version of them is no other model."""

_HOLDERS = ("builtins", "collections", "types", "argparse")
"""The packages whose objects may hold what a function reads; those of others, as a logger, have a life of their own."""


def _is_read(x: Any) -> bool:
    """Tell whether something is a function in Python, or a method, that is known by what it does."""
    if not isinstance(x, (FunctionType, MethodType)) or not hasattr(x, "__code__"):
        return False
    said = str(x.__module__ or "").partition(".")[0]  # of a wrapper, that of what it wraps
    return said not in _LIBRARIES or _package(x) not in _LIBRARIES


def _package(x: Any) -> str:
    return str(x.__globals__.get("__name__", "")).partition(".")[0]


def _read(x: Any, known: dict[int, str]) -> list[Any]:
    """Return what a function computes with, in plain data: instructions, defaults, and variables from around it.

    Of global variables only those that it reads count: values, but for private ones, for a cache is no part of what a
    function does; and functions, by what they do where they are of its own package. `known` has the functions met, for
    they may call each other.
    """
    known[id(x)] = f"function {len(known)}"
    cells = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
    names = sorted(name for name in _global_names(x.__code__) if name in x.__globals__)
    return [
        _plain(x.__code__, known),
        _plain([x.__defaults__, x.__kwdefaults__], known),
        {name: _plain(cell.cell_contents, known) for name, cell in cells if cell != CellType()},
        {name: _global(x, name, known) for name in names},
    ]


def _global(x: Any, name: str, known: dict[int, str]) -> Any:
    value = x.__globals__[name]
    if isinstance(value, FunctionType):
        return _plain(value, known) if _package(value) == _package(x) else _path(value)
    own = type(value).__module__.partition(".")[0] in (_package(x), *_HOLDERS)
    return "" if name.startswith("_") else _plain(value, known, 2 if own else 0)


def _global_names(code: CodeType) -> set[str]:
    """Return the names of global variables that code reads, with that of the functions within it."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*map(_global_names, inner))


def _instructions(code: CodeType, known: dict[int, str]) -> Any:
    """Return what a function's code does, in plain data; not where it stands."""
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    steps = code.co_code, getattr(code, "co_exceptiontable", b"")
    return [counts, steps, _plain(names, known), _plain(code.co_consts, known)]


_PLAIN = (bool, int, float, complex, bytes, np.generic, Tensor, torch.dtype, torch.device)


def _path(x: Any) -> str:
    module = str(getattr(x, "__module__", ""))
    # A process that was spawned knows the script of the one that spawned it by another name.
    return f"{'__main__' if module == '__mp_main__' else module}:{x.__qualname__}"


def _sorted_coordinates(x: Any) -> tuple[Any, ...]:
    coordinates = x.tocsr().tocoo()
    return coordinates.row, coordinates.col, coordinates.data


def _file_digest(path: Any) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()
