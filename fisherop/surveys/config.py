"""A survey in a file: what `fisherop survey` reads.

A TOML file; paths in it are absolute, or relative to its folder. ::

    store = "first-survey"
    k = 4                               # and which, method, tol, maxiter, seed, spectrum, threads: as in survey()
    layers = ["layer1.0", "layer2.0"]   # or a table [layers] of model = [...]

    [models]
    resnet18 = "torchvision:resnet18"
    own = "my_package.networks:build"

    [images]
    files = ["photographs/*.png"]
    photographs = ["chelsea", "coffee"] # of scikit-image
    size = 128                          # pixels a side; without it, as they are
    grey = false
    dtype = "float32"

    [noise]                             # optional
    kind = "Poisson"
    floor = 0.1

    [run]                               # optional
    workers = 4                         # processes of this machine
    dask = "tcp://10.0.0.1:8786"        # or a cluster's scheduler, with
    resources = { GPU = 1 }
    retries = 2
"""

from __future__ import annotations

import glob
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from fisherop import images, noise
from fisherop.surveys.fingerprints import MODEL_FILES

_SETTINGS = ("k", "which", "method", "tol", "maxiter", "spectrum", "threads")
_TOP = {*_SETTINGS, "store", "layers", "seed", "models", "images", "noise", "run"}
_IMAGES = {"files", "photographs", "size", "grey", "dtype"}
_RUN = {"workers": int, "dask": str, "resources": dict, "retries": int}

Made = Executor | Callable[[], Executor] | None


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `survey` that a file stands for, and its table ``run``.

    Raises
    ------
    ValueError
        For a file that is no TOML, and for names and values in it that mean nothing; the message begins with the path.
    """
    with open(path, "rb") as file:
        try:
            config = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TOML: {error}") from error
    try:
        return _arguments(config, path.absolute().parent)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _arguments(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    _known(config, _TOP, "the file")
    for name in ("store", "models", "images"):
        if name not in config:
            raise ValueError(f"{name!r} is missing")
    if _typed(config, "seed", int, 0) < 0:
        raise ValueError(f"seed must be at least 0, not {config['seed']}")
    if not _typed(config, "store", str):
        raise ValueError('store must name a folder, such as "runs"')
    arguments = {name: config[name] for name in _SETTINGS if name in config}
    _typed(config, "spectrum", bool)
    arguments |= {
        "models": {name: _model(source, folder) for name, source in _typed(config, "models", dict).items()},
        "images": _images(_typed(config, "images", dict), folder),
        "layers": _layers(config),
        "noise": _noise(_typed(config, "noise", dict)),
        "rng": config.get("seed"),
        "store": folder / config["store"],
    }
    run = _typed(config, "run", dict, {})
    _known(run, _RUN, "run")
    for name, kind in _RUN.items():
        _typed(run, name, kind, where="run.")
    if min(run.get("workers", 0), run.get("retries", 0)) < 0:
        raise ValueError("run.workers and run.retries must not be negative")
    return arguments, run


_WORDS = {bool: "true or false", int: "a whole number", str: "text", list: "a list", dict: "a table"}


def _typed(table: dict[str, Any], name: str, kind: type, default: Any = None, where: str = "") -> Any:
    """Return an entry of a table, or the default; refuse one of another kind."""
    found = table.get(name, default)
    if name in table and (not isinstance(found, kind) or (kind is int and isinstance(found, bool))):
        raise ValueError(f"{where}{name} must be {_WORDS[kind]}, not {found!r:.60}")
    return found


def _texts(table: dict[str, Any], name: str, where: str) -> list[str]:
    found: list[str] = _typed(table, name, list, [], where)
    for item in found:
        if not isinstance(item, str):
            raise ValueError(f"{where}{name} must be a list of texts, and has {item!r:.60}")
    return found


def _known(table: dict[str, Any], names: Iterable[str], where: str) -> None:
    unknown = set(table) - set(names)
    if unknown:
        raise ValueError(f"{where} has {', '.join(sorted(unknown))}; known are {', '.join(sorted(names))}")


def _model(source: Any, folder: Path) -> Any:
    if not isinstance(source, str):
        raise ValueError(f"a model is named by text, such as 'torchvision:resnet18', not {source!r}")
    return folder / source if source.endswith(MODEL_FILES) else source


def _layers(config: dict[str, Any]) -> Any:
    layers = config.get("layers")
    if isinstance(layers, dict):
        return {model: _typed(layers, model, list, where="layers.") for model in layers}
    if layers is not None and not isinstance(layers, list):
        raise ValueError(f"layers must be a list, or a table [layers] of model = [...], not {layers!r:.60}")
    return layers


def _images(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    _known(table, _IMAGES, "images")
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(_typed(table, "dtype", str, "float32", "images."))
    if dtype is None:
        raise ValueError(f"images.dtype must be float32 or float64, not {table['dtype']!r}")
    size, grey = _typed(table, "size", int, None, "images."), _typed(table, "grey", bool, False, "images.")
    if size is not None and size < 1:
        raise ValueError(f"images.size is in pixels and must be at least 1, not {size}: leave it out for whole images")
    options = {"size": size, "grey": grey, "dtype": dtype}
    found: dict[str, Any] = {}
    for label, path in _labelled(_texts(table, "files", "images."), folder).items():
        found[label] = partial(_in_colour, partial(images.load, path, **options), grey)
    for name in _texts(table, "photographs", "images."):
        if name not in images.PHOTOGRAPHS:
            raise ValueError(f"images.photographs has {name!r}; there are {', '.join(images.PHOTOGRAPHS)}")
        if name in found:
            raise ValueError(f"two images are called {name!r}: rename the file, or leave out the photograph")
        found[name] = partial(_in_colour, partial(images.photograph, name, **options), grey)
    if not found:
        raise ValueError("images names none: give files, photographs or both")
    return found


def _labelled(patterns: list[str], folder: Path) -> dict[str, str]:
    """Return the files that fit, once each, by their names; by their paths from the folder where names are taken."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        fitting = glob.glob(os.path.join(glob.escape(str(folder)), pattern), recursive=True)
        if not any(map(os.path.isfile, fitting)):
            raise ValueError(f"no file fits {pattern!r} in {str(folder)!r}")
        paths |= dict.fromkeys(os.path.normpath(path) for path in sorted(fitting) if os.path.isfile(path))
    found: dict[str, str] = {}
    for path in paths:
        name = Path(path).stem
        label = os.path.relpath(path, folder) if name in found else name
        if label in found:
            raise ValueError(f"two images are called {label!r}: rename one of {found[label]!r} and {path!r}")
        found[label] = path
    return found


def _in_colour(load: Callable[[], torch.Tensor], grey: bool) -> torch.Tensor:
    """Give a grey photograph three channels, unless one was asked for: models take one number of them."""
    image = load()
    return image if grey else image.expand(-1, 3, -1, -1)


def _noise(table: dict[str, Any] | None) -> Any:
    if table is None:
        return None
    options = dict(table)
    kind = options.pop("kind", None)
    kinds = ("Gaussian", "Poisson", "Bernoulli", "Categorical")
    if kind not in kinds:
        raise ValueError(f"kind of noise must be one of {', '.join(kinds)}, not {kind!r}")
    try:
        return getattr(noise, kind)(**options)
    except TypeError as error:
        raise ValueError(f"noise: {error}") from error


@contextmanager
def executor(run: dict[str, Any]) -> Iterator[Made]:
    """Yield the executor that the table ``run`` asks for."""
    if "dask" in run:
        try:
            from distributed import Client
        except ImportError as error:
            raise ImportError('clusters are reached by Dask: pip install "fisherop[dask]"') from error
        options = {name: run[name] for name in ("resources", "retries") if name in run}
        with Client(run["dask"]) as client:  # type: ignore[no-untyped-call]
            yield client.get_executor(**options)
    elif run.get("workers", 0):
        yield partial(ProcessPoolExecutor, run["workers"], get_context("spawn"), initializer=_end_with_parent)
    else:
        yield None


def _end_with_parent() -> None:
    """End this worker when the process that started it has: one that was killed cannot say so."""
    parent = parent_process()
    if parent is not None:
        Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
