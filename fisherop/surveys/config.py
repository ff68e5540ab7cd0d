"""A survey in a file: what `fisherop survey` reads.

A TOML file; paths in it are relative to its folder. ::

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
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fisherop import images, noise
from fisherop.surveys.cells import MODEL_FILES

_SETTINGS = ("k", "which", "method", "tol", "maxiter", "spectrum", "threads")
_TOP = {*_SETTINGS, "store", "layers", "seed", "models", "images", "noise", "run"}
_IMAGES = {"files", "photographs", "size", "grey", "dtype"}
_RUN = {"workers", "dask", "resources", "retries"}

Made = Executor | Callable[[], Executor] | None


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `survey` that a file stands for, and its table ``run``.

    Raises
    ------
    ValueError
        For a file that is no TOML, and names in it that mean nothing.
    """
    try:
        with open(path, "rb") as file:
            config = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    _known(config, _TOP, str(path))
    for name in ("store", "models", "images"):
        if name not in config:
            raise ValueError(f"{path} lacks {name!r}")
    folder = path.absolute().parent
    arguments = {name: config[name] for name in _SETTINGS if name in config}
    arguments |= {
        "models": {name: _model(source, folder) for name, source in config["models"].items()},
        "images": _images(config["images"], folder),
        "layers": config.get("layers"),
        "noise": _noise(config.get("noise")),
        "rng": config.get("seed"),
        "store": folder / config["store"],
    }
    run = dict(config.get("run", {}))
    _known(run, _RUN, "run")
    return arguments, run


def _known(table: dict[str, Any], names: set[str], where: str) -> None:
    unknown = set(table) - names
    if unknown:
        raise ValueError(f"{where} has {', '.join(sorted(unknown))}; known are {', '.join(sorted(names))}")


def _model(source: Any, folder: Path) -> Any:
    if not isinstance(source, str):
        raise ValueError(f"a model is named by text, such as 'torchvision:resnet18', not {source!r}")
    return folder / source if source.endswith(MODEL_FILES) else source


def _images(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    _known(table, _IMAGES, "images")
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(table.get("dtype", "float32"))
    if dtype is None:
        raise ValueError(f"dtype of images must be float32 or float64, not {table['dtype']!r}")
    options = {"size": table.get("size"), "grey": table.get("grey", False), "dtype": dtype}
    found: dict[str, Any] = {}
    for pattern in table.get("files", []):
        paths = sorted(glob.glob(str(folder / pattern), recursive=True))
        if not paths:
            raise ValueError(f"no file fits {pattern!r} in {str(folder)!r}")
        for name in paths:
            label = Path(name).stem if Path(name).stem not in found else str(Path(name).relative_to(folder))
            found[label] = partial(_in_colour, partial(images.load, name, **options), bool(options["grey"]))
    for name in table.get("photographs", []):
        found[name] = partial(_in_colour, partial(images.photograph, name, **options), bool(options["grey"]))
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
        yield partial(ProcessPoolExecutor, run["workers"], get_context("spawn"))
    else:
        yield None
