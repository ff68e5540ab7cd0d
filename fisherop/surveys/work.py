"""One cell, computed: what a worker does, in whatever process it lives.

A worker keeps the models that it built. What goes to it and comes back are bytes, numbers and words.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import platform
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fisherop.eigen import eigendistortions
from fisherop.models import Layer
from fisherop.operators import FisherOperator
from fisherop.rows import RowOperator
from fisherop.solvers import exact
from fisherop.spectrum.moments import eigenvalues
from fisherop.surveys.cells import Cell, Settings, build, seed_of, weights_of

TUNING = {"block": 8, "others": "cheapest"}
"""How products are computed, by rules: an operator that measures what is fastest rounds otherwise the next time."""

MODELS_KEPT = 4
SPECTRUM_ORDER = 2048
"""The largest dense problem that is solved for the whole spectrum."""

SPECTRUM_POINTS = 200


@dataclass(frozen=True)
class Task:
    """A cell with all that its computation needs.

    Attributes
    ----------
    cell : Cell
    settings : Settings or bytes
        As they are, or pickled for another process.
    source : object or bytes
        The model or what makes it, likewise.
    identity : str
        What a worker knows a source by, to build its model once.
    image : ndarray
    threads : int
        Threads of torch while it is computed.
    attempt : str
        Different at every call: Dask takes equal tasks for one, and would answer with the error of an earlier one.
    """

    cell: Cell
    settings: Settings | bytes
    source: Any
    identity: str
    image: NDArray[Any]
    threads: int
    attempt: str


@dataclass(frozen=True)
class Outcome:
    """A computed cell: the bytes of its `.npz`, and the facts that go into its sidecar."""

    data: bytes
    facts: dict[str, Any]


class CellError(Exception):
    """An error in one cell, in words that need no class of the worker's to be read.

    The arguments are the error's type, its message and its traceback.
    """

    @property
    def facts(self) -> dict[str, str]:
        """Return what a sidecar says of it."""
        kind, message, trace = self.args
        return {"type": kind, "message": message, "traceback": trace}

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)

    @classmethod
    def of(cls, error: BaseException) -> CellError:
        """Put an error into words."""
        trace = "".join(traceback.format_exception(error))
        return cls(type(error).__name__, str(error).strip() or "no message", trace)


_one_at_a_time = threading.Lock()


def compute(task: Task) -> Outcome:
    """Compute a cell; raise CellError for whatever goes wrong in it.

    In one thread of a process at a time: recording a model and the filters of warnings belong to the whole process.
    """
    with _one_at_a_time, one_setting_of_threads(task.threads):
        try:
            settings = _unpacked(task.settings)
            return _computed(task, settings)
        except (Exception, SystemExit) as error:  # a model may raise anything, and leave
            raise CellError.of(error) from None


def works() -> bool:
    """Tell that a worker lives and has this package, by answering."""
    return True


@contextmanager
def one_setting_of_threads(count: int) -> Iterator[None]:
    """Give torch so many threads, and later as many as it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _computed(task: Task, settings: Settings) -> Outcome:
    cell = task.cell
    started = time.perf_counter()
    model, weights, note = _kept_model(task, seed_of(settings.seed, cell.model))
    built = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        layer = model if cell.reach is None else Layer(model, cell.reach)  # type: ignore[arg-type]
        op = FisherOperator(layer, _placed(task.image, model), noise=settings.noise, tuning=TUNING)
        linearized = time.perf_counter()
        seed = seed_of(settings.seed, *cell.name)
        k, which, method = settings.k, settings.which, settings.method
        result = eigendistortions(op, k, which, method, tol=settings.tol, maxiter=settings.maxiter, rng=seed)
        solved = time.perf_counter()
        spectrum = _whole_spectrum(op) if settings.spectrum else None
    buffer = io.BytesIO()
    result.write(buffer)
    lists = ("eigenvalues", "index", "residuals", "converged", "clusters", "eigenvalue_bounds")
    facts: dict[str, Any] = {
        "seed": seed,
        "result": {name: getattr(result, name).tolist() for name in lists}
        | {name: getattr(result, name) for name in ("n_matvec", "method", "tol", "message", "nullity", "lambda_max")}
        | {"shape": list(result.eigendistortions.shape), "dtype": str(op.torch_dtype).removeprefix("torch.")}
        | {"n": op.shape[0], "m": op.response.numel()},
        "model": {"weights": weights, "note": note, "strategy": op.strategy, "tuning": op.tuning},
        "warnings": [str(warning.message) for warning in said],
        "seconds": {
            "model": built - started,
            "operator": linearized - built,
            "solver": solved - linearized,
            "all": time.perf_counter() - started,
        },
        "worker": _worker(op.device),
    }
    return Outcome(buffer.getvalue(), facts | ({"spectrum": spectrum} if spectrum else {}))


def _placed(image: NDArray[Any], model: Any) -> Tensor:
    """Return the image where the model's weights are, and in their precision."""
    tensor = torch.from_numpy(np.ascontiguousarray(image))
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    weight = next((weight for weight in weights if weight.dtype in (torch.float32, torch.float64)), None)
    return tensor.clone() if weight is None else tensor.to(weight)


def _unpacked(x: Any) -> Any:
    return pickle.loads(x) if isinstance(x, bytes) else x


# -------------------------------------------------------------------------------------------------------------- models

_Kept = tuple[Callable[[Tensor], Any], str, str | None]
_models: dict[tuple[str, int], _Kept] = {}
"""The models kept, the one used last at the end."""


def _kept_model(task: Task, seed: int) -> _Kept:
    """Return a model, the fingerprint of what was built, and a note on its weights: built once, and kept."""
    key = task.identity, seed
    kept = _models.pop(key, None)  # in one step, for another thread may forget it
    if kept is None:
        model, note = build(_unpacked(task.source), seed)
        kept = model, weights_of(model, task.cell.model_fingerprint), note
    _models[key] = kept
    for old in list(_models)[:-MODELS_KEPT]:
        _models.pop(old, None)
    return kept


def forget_models(call: str) -> None:
    """Let go of the models that this process keeps for one call, which no other call finds."""
    for key in list(_models):
        if key[0].startswith(call):
            _models.pop(key, None)


# ------------------------------------------------------------------------------------------------------------ spectrum


def _whole_spectrum(op: FisherOperator) -> dict[str, Any]:
    """Return the spectrum at up to 200 indices, its sum and effective dimension, where a dense problem is feasible."""
    rows = RowOperator(op)
    order = exact.size(rows)
    if order > SPECTRUM_ORDER:
        return {"message": f"not computed: a dense problem of order {order} is beyond {SPECTRUM_ORDER}"}
    values = eigenvalues(rows)[::-1]
    places = np.unique(np.geomspace(1, order, SPECTRUM_POINTS).round().astype(int) - 1)
    total, squares = float(values.sum()), float((values**2).sum())
    return {
        "index": places.tolist(),
        "eigenvalues": values[places].tolist(),
        "trace": total,
        "effective_dimension": total**2 / squares if squares else 0.0,
    }


# -------------------------------------------------------------------------------------------------------------- worker


def _worker(device: torch.device) -> dict[str, Any]:
    return _machine() | {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


@functools.cache
def _machine() -> dict[str, Any]:
    from fisherop import __version__

    return {
        "host": platform.node(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "fisherop": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
    }
