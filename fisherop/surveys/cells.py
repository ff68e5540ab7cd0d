"""What a survey is made of: models and images by name, and the cells of the grid, each with a key that says all of it.

The key of a cell is a hash of everything that its numbers depend on: what is asked, the image's bytes, the model's
weights or the name of the function that makes it, the layer, the noise, the seed.

>>> from fisherop.surveys.cells import fingerprint
>>> fingerprint({"k": 2, "noise": None}) == fingerprint({"noise": None, "k": 2})
True
"""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from torch import Tensor, nn

from fisherop import images as image_files
from fisherop import models as named_models
from fisherop.models import is_factory
from fisherop.rows import generator

OUTPUT = "output"
"""The name, among layers, of a model's own response."""

CALLED_OUTPUT = "output (layer)"
"""The name of a layer that a model itself calls so."""

MODEL_FILES = (".pt", ".pth", ".pt2")


@dataclass(frozen=True)
class Settings:
    """What is asked of every cell, in the words of `eigendistortions`, and the noise of the responses."""

    k: int
    which: str
    method: str
    tol: float | None
    maxiter: int | None
    noise: Any
    spectrum: bool
    seed: int

    def facts(self) -> dict[str, Any]:
        """Return what a sidecar says of them; the noise by its kind and its fingerprint."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        noise = type(self.noise).__name__ if self.noise is not None else "Gaussian"
        return facts | {"noise": noise, "noise_fingerprint": fingerprint(self.noise)}


@dataclass(frozen=True)
class Cell:
    """One model's layer at one image.

    Attributes
    ----------
    image, layer, model : str
        Names; the layer's is `OUTPUT` for the model's own response, and `CALLED_OUTPUT` for a layer of that name.
    reach : str, int or None
        The layer as `Layer` takes it; None for the model's own response.
    key : str
        The hash of all that the numbers depend on.
    image_fingerprint, model_fingerprint : str
        Parts of it.
    """

    image: str
    layer: str
    model: str
    reach: str | int | None
    key: str
    image_fingerprint: str
    model_fingerprint: str

    @property
    def name(self) -> tuple[str, str, str]:
        """Image, layer and model."""
        return self.image, self.layer, self.model


class Grid:
    """All cells of a survey, checked, in the order in which they are computed.

    Models come one after another, so that a worker need not hold all of them, and the layers of an image together.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        images: Mapping[str, Any],
        layers: Sequence[str | int | None] | Mapping[str, Sequence[str | int | None]] | None,
        settings: Settings,
    ) -> None:
        self.models = _named(models, "models")
        self.images = _named(images, "images")
        self.layers = {name: _layers_of(name, layers) for name in self.models}
        self.settings = settings
        for name, source in self.models.items():
            _check_model(name, source)
        if isinstance(layers, Mapping) and set(layers) - set(models):
            raise ValueError(f"layers are given for models that there are not: {', '.join(set(layers) - set(models))}")
        self._loaded: tuple[str, NDArray[Any] | None] = ("", None)

    def cells(self) -> list[Cell]:
        """Return the cells; every image is read once for its fingerprint."""
        asked = _told(self.settings, "noise")
        of_images = {name: self._image_fingerprint(name) for name in self.images}
        found = []
        for model, source in self.models.items():
            of_model = _told(source, f"models[{model!r}]", named=True)
            for image, of_image in of_images.items():
                for label, reach in self.layers[model].items():
                    key = fingerprint((asked, of_image, of_model, reach, image, label, model))
                    found.append(Cell(image, label, model, reach, key, of_image, of_model))
        return found

    def image(self, name: str) -> NDArray[Any]:
        """Return an image as an array, (1, C, H, W) or of any shape that the models take.

        An array, for a tensor would travel to a process through shared memory that outlives a killed one.
        """
        last, array = self._loaded
        if last != name or array is None:
            array = _image(self.images[name])
            self._loaded = (name, array)
        return array

    def _image_fingerprint(self, name: str) -> str:
        try:
            return fingerprint(self.image(name))
        except (Exception, SystemExit) as error:  # Pillow's are of many kinds: its cells will fail, and be recorded
            return f"unreadable: {fingerprint(str(error))}"


def _told(x: Any, what: str, *, named: bool = False) -> str:
    """Return a fingerprint; say whose it is that there is none."""
    try:
        return fingerprint(x, named=named)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise TypeError(
            f"{what} cannot be told from others by its content, which no pickle takes ({error}): give a function of an "
            "importable module that makes it, or a Module"
        ) from error


def _named(sources: Any, what: str) -> dict[str, Any]:
    if not isinstance(sources, Mapping) or not sources or not all(isinstance(name, str) and name for name in sources):
        raise TypeError(f"{what} must be a dict of names to {what}, with one at least, not {sources!r:.60}")
    return {str(name): source for name, source in sources.items()}  # not a NumPy text, which has a key of its own


def _layers_of(model: str, layers: Any) -> dict[str, str | int | None]:
    if isinstance(layers, Mapping):
        layers = layers.get(model)
    if layers is not None and (isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable)):
        raise TypeError(f"layers must be a list of layers, or a dict of such lists for models, not {layers!r}")
    listed = [None] if layers is None else [_plain_layer(layer) for layer in layers]
    labels = {_label(layer): layer for layer in listed}
    if not listed or len(labels) != len(listed):
        raise ValueError(f"layers of {model!r} must be one or more, each named once, not {listed}")
    return labels


def _label(layer: str | int | None) -> str:
    return {None: OUTPUT, OUTPUT: CALLED_OUTPUT}.get(layer, str(layer))  # type: ignore[arg-type]


def _plain_layer(layer: Any) -> str | int | None:
    if layer is None or isinstance(layer, str):
        return None if layer is None else str(layer)
    if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
        raise TypeError(f"a layer is a name, a number, or None for a model's own response, not {layer!r}")
    return int(layer)


def _check_model(name: str, source: Any) -> None:
    if not isinstance(source, (str, os.PathLike)) and not callable(source):
        raise TypeError(
            f"models[{name!r}] must be a Module, a function of an image, a function without arguments that makes one "
            f"of them, a name such as 'torchvision:resnet18', or a file, not {type(source).__name__}"
        )
    if _is_model_file(source) and not os.path.isfile(source):
        raise ValueError(f"models[{name!r}] is a file {os.fspath(source)!r} that does not exist")


# ------------------------------------------------------------------------------------------------------------- sources


def build(source: Any, seed: int) -> tuple[Callable[[Tensor], Any], str | None]:
    """Return the model that a source stands for, and what its user should know of its weights.

    Random weights are drawn with the seed; torch's own random state stays as it was.
    """
    if _is_model_file(source):
        model, note = _from_file(Path(source)), None
    elif isinstance(source, str):
        model, note = named_models.load(source.removeprefix("torchvision:"), seed=seed)
    elif is_factory(source):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, note = source(), None
        if not callable(model):
            raise TypeError(f"the function that makes the model returned {type(model).__name__}, which is none")
    else:
        return source, None
    return (model.eval() if isinstance(model, nn.Module) and not _is_model_file(source) else model), note


def weights_of(model: Any, source: str) -> str:
    """Return the fingerprint of a model that was built, or, where that is no Module, of what it was built from."""
    return fingerprint(model) if isinstance(model, nn.Module) else source


def _is_model_file(source: Any) -> bool:
    return isinstance(source, os.PathLike) or (isinstance(source, str) and source.endswith(MODEL_FILES))


def _from_file(path: Path) -> Callable[[Tensor], Any]:
    """Return the model in a file of `torch.export.save`, or of `torch.save` of a whole Module, which is a pickle."""
    if path.suffix == ".pt2":
        model = torch.export.load(path).module()
    else:
        model = torch.load(path, map_location="cpu", weights_only=False)
        if isinstance(model, nn.Module):
            model = model.eval()
    if not callable(model):
        raise TypeError(f"{str(path)!r} holds no model but {type(model).__name__}: give a function that loads it")
    return model


def _image(source: Any) -> NDArray[Any]:
    made = source() if is_factory(source) else source
    if isinstance(made, (str, os.PathLike)):
        name = os.fspath(made)
        made = np.load(name, allow_pickle=False) if name.endswith(".npy") else image_files.load(name)
    array = made.detach().cpu().numpy() if isinstance(made, Tensor) else np.asarray(made)
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"an image must have float32 or float64 values, not {array.dtype}: divide bytes by 255")
    return array


# --------------------------------------------------------------------------------------------------------- fingerprint


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


def _parts(x: Any, *, named: bool = False) -> Iterator[Any]:
    """Yield bytes that tell a value from all others."""
    if x is None or isinstance(x, (bool, int, float, complex, str, bytes)):
        is_file = isinstance(x, str) and _is_model_file(x) and os.path.isfile(x)  # a name may look like one
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


# ----------------------------------------------------------------------------------------------- fingerprint: functions

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


# ---------------------------------------------------------------------------------------------------------------- seeds


def root_seed(rng: Any) -> int:
    """Return the number that all seeds of a survey come from: 0 for None, for else a rerun would find nothing."""
    if isinstance(rng, (bool, np.bool_)):
        raise TypeError(f"rng must be a whole number or a numpy.random.Generator, not {rng}")
    if rng is None or isinstance(rng, (int, np.integer)):
        if rng is not None and rng < 0:
            raise ValueError(f"rng must be a whole number of at least 0, not {rng}")
        return int(rng or 0)
    return int(generator(rng).integers(2**63))


def seed_of(root: int, *names: str) -> int:
    """Return the seed of what has these names: neither order nor worker has a part in it."""
    words = hashlib.sha256(json.dumps([root, *names]).encode()).digest()
    return int.from_bytes(words[:6], "little")  # JSON keeps whole numbers up to 2**53


# ---------------------------------------------------------------------------------------------------------- travelling


def packed(x: Any, what: str) -> bytes:
    """Return an object as bytes that any Python process turns back.

    cloudpickle, which comes with Dask and loky, also takes functions of the main script and lambdas.
    """
    buffer = io.BytesIO()
    try:
        try:
            from cloudpickle import dump
        except ImportError:
            from pickle import dump
        dump(x, buffer)
    except Exception as error:  # picklers raise all kinds
        raise TypeError(
            f"{what} cannot be sent to other processes ({error}): give a name such as 'package.module:function', or a "
            "function of an importable module that makes it"
        ) from error
    return buffer.getvalue()
