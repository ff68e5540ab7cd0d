"""The call that computes a survey: what is missing in the store, here or on an executor."""

from __future__ import annotations

import hashlib
import sys
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fisherop.eigen import WHICH
from fisherop.maps import whole
from fisherop.noise import Noise, checked_noise
from fisherop.solvers import BACKENDS
from fisherop.solvers.contract import tolerance
from fisherop.surveys.cells import Cell, Grid, Settings, packed, root_seed
from fisherop.surveys.opened import Survey
from fisherop.surveys.store import DONE, FAILED, Store
from fisherop.surveys.work import CellError, Outcome, Task, compute, forget_models, works

Layers = Sequence[str | int | None] | Mapping[str, Sequence[str | int | None]]

MOST_LOSSES = 25
"""How often a cell's worker may die before the cell is given up: whoever kills workers at random must not be blamed on
it, and a cell that runs out of memory must not kill them for ever."""

MOST_RENEWALS = 25
"""How many executors in a row may break at a task that does nothing, before the survey ends: as many, likewise."""

UNKNOWN_WORKERS = 256


def survey(
    models: Mapping[str, Any],
    images: Mapping[str, Any],
    layers: Layers | None = None,
    *,
    k: int = 2,
    which: str = "BE",
    method: str = "auto",
    noise: Noise | None = None,
    store: str | Path,
    executor: Executor | Callable[[], Executor] | None = None,
    rng: Any = None,
    progress: bool = True,
    spectrum: bool = False,
    tol: float | None = None,
    maxiter: int | None = None,
    threads: int = 1,
    retry_failed: bool = False,
) -> Survey:
    """Find the eigendistortions of every model's layers at every image, and keep each in a folder as it is found.

    What the folder has already is not computed again: a survey that was stopped, by whatever, goes on from there. A
    cell that fails is recorded, with its error, and the others go on.

    Parameters
    ----------
    models : dict of names to models
        A Module or another function of an image; a function without arguments that makes one, such as a class; a name,
        as ``"torchvision:resnet18"`` or ``"package.module:function"``; or a file of `torch.export.save` (``.pt2``), or
        of `torch.save` of a whole Module, which is a pickle. A worker builds a model once, where its weights are to be,
        and images follow them there: prefer what makes a model to a large Module, which travels with every cell.
    images : dict of names to images
        A float32 or float64 tensor or array of the shape that the models take; a file, ``.npy`` or what Pillow reads;
        or a function without arguments that returns one of these.
    layers : sequence, or dict of names of models to sequences, optional
        Layers by name or number, as `Layer` takes them, None for a model's own response; by default that alone.
    k, which, method, tol, maxiter : optional
        As for `eigendistortions`.
    noise : optional
        The noise of the responses, as for `FisherOperator`.
    store : path
        The folder. Several processes may share it; none of them waits for another.
    executor : concurrent.futures.Executor, or function that makes one, optional
        Where cells are computed, one task a cell; by default here, one after another. For a cluster,
        ``client.get_executor(resources=..., retries=...)`` of a `dask.distributed.Client`. Where a worker's death
        breaks a whole pool, as it does processes, a function is called again for a new one; for a
        `ProcessPoolExecutor` that is done unasked.
    rng : optional
        The whole number that all seeds are made from, with the names of model, layer and image; 0 by default. Anything
        else `numpy.random.default_rng` takes gives a number.
    progress : bool, optional
        Show cells done, failed and left on a terminal, where tqdm is installed.
    spectrum : bool, optional
        Keep the whole spectrum as well, where the smaller of n and m is at most 2048: a dense problem.
    threads : int, optional
        Threads of torch for a cell, in every worker; those of this process are restored. The default of 1 gives the
        same numbers everywhere, and the shortest time for many cells on all cores.
    retry_failed : bool, optional
        Compute cells again that failed before.

    Returns
    -------
    Survey
        The cells asked for, as `Survey.open` would give them.

    Raises
    ------
    TypeError, ValueError
        For arguments that make no sense.
    OSError
        Where the store cannot be written; what it has is safe.
    RuntimeError
        Where the executor broke and there is no other that works; what was finished is safe.

    Notes
    -----
    The result of a cell depends on neither order nor worker: its seeds come from its names, and the variants of
    convolutions are chosen by a rule, not by a stopwatch. On one kind of processor, with one thread, it is the same to
    the bit. A cell is known by the content of image, noise and model; a function or a name that stands for a model or
    makes one, and the methods of a class, by that name: give a model another name in the dict when you change these.

    Examples
    --------
    >>> import tempfile, torch, fisherop as fo
    >>> images = {"light": torch.full((1, 1, 24, 24), 0.8), "dark": torch.full((1, 1, 24, 24), 0.2)}
    >>> s = fo.survey({"LN": fo.LN, "LG": fo.LG}, images, k=2, store=tempfile.mkdtemp())
    >>> s
    <Survey of 4 cells: 4 done, 0 failed>
    >>> s.result("dark", "output", "LN").converged
    array([ True,  True])
    """
    settings = _checked_settings(k, which, method, tol, maxiter, noise, spectrum, rng)
    threads = whole(threads, "threads", 1)
    _check_executor(executor)
    grid = Grid(models, images, layers, settings)
    cells = grid.cells()
    folder = Store(store)
    states = {cell.key: folder.state(cell.key) for cell in cells}
    finished = {DONE} if retry_failed else {DONE, FAILED}
    missing = [cell for cell in cells if states[cell.key] not in finished]
    if missing:
        folder.prepare()
        counts = Counter(state for state in states.values() if state in finished)
        with _Ledger(folder, grid, len(cells), counts, progress) as ledger:
            if executor is None:
                _in_process(missing, _Tasks(grid, threads, packs=False), ledger)
            else:
                packs = not isinstance(executor, ThreadPoolExecutor)
                _on_executor(missing, _Tasks(grid, threads, packs=packs), ledger, executor)
    return Survey.of_cells(folder, [cell.key for cell in cells])


def _checked_settings(
    k: int, which: str, method: str, tol: float | None, maxiter: int | None, noise: Any, spectrum: bool, rng: Any
) -> Settings:
    """Return the settings as Python's own numbers and texts, which JSON and the key of a cell know."""
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}, not {which!r}")
    if method not in ("auto", *BACKENDS):
        raise ValueError(f"method must be one of auto, {', '.join(BACKENDS)}, not {method!r}")
    checked_noise(noise)
    if not isinstance(spectrum, (bool, np.bool_)):
        raise TypeError(f"spectrum must be True or False, not {spectrum!r}")
    return Settings(
        whole(k, "k", 1),
        str(which),
        str(method),
        None if tol is None else tolerance(tol),
        None if maxiter is None else whole(maxiter, "maxiter", 1),
        noise,
        bool(spectrum),
        root_seed(rng),
    )


def _check_executor(executor: Any) -> None:
    if executor is None or isinstance(executor, Executor) or callable(executor):
        return
    hint = ": pass client.get_executor()" if hasattr(executor, "get_executor") else ""
    raise TypeError(
        f"executor must be a concurrent.futures.Executor or a function that makes one, not {type(executor).__name__}"
        f"{hint}"
    )


# -------------------------------------------------------------------------------------------------------------- ledger


class _Ledger:
    """Writes what cells come to into the store, and shows how many are done, failed and left."""

    def __init__(self, store: Store, grid: Grid, total: int, counts: Mapping[str, int], progress: bool) -> None:
        self.store = store
        self.done, self.failed, self.total = counts[DONE], counts[FAILED], total
        self._settings = grid.settings.facts()
        self._places = {
            (image, layer, model): [i, j, m]
            for m, (model, layers) in enumerate(grid.layers.items())
            for i, image in enumerate(grid.images)
            for j, layer in enumerate(layers)
        }
        self._bar = _progress_bar(total, self.done + self.failed) if progress else None

    def __enter__(self) -> _Ledger:
        self._show(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def finish(self, cell: Cell, outcome: Outcome | CellError | None) -> None:
        """Keep a computed cell, or its error; None for one that somebody else finished."""
        facts = {
            "cell": {"image": cell.image, "layer": cell.layer, "model": cell.model, "place": self._places[cell.name]},
            "settings": self._settings,
            "content": {"image": cell.image_fingerprint, "model": cell.model_fingerprint},
        }
        if isinstance(outcome, CellError):
            self.store.put_failure(cell.key, facts | {"error": outcome.facts})
            self.failed += 1
        else:
            if outcome is not None:
                self.store.put(cell.key, facts | outcome.facts, outcome.data)
            self.done += 1
        self._show(1)

    def _show(self, steps: int) -> None:
        if self._bar is not None:
            left = self.total - self.done - self.failed
            self._bar.set_postfix_str(f"{self.done} done, {self.failed} failed, {left} left", refresh=not steps)
            self._bar.update(steps)


def _progress_bar(total: int, initial: int) -> Any:
    """Return a bar on a terminal's standard error, or None."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    layout = "survey: {percentage:3.0f}%|{bar:20}|{postfix}, {elapsed} gone, {remaining} to go"
    return tqdm(total=total, initial=initial, bar_format=layout, disable=None, file=sys.stderr, smoothing=0.1)


# ----------------------------------------------------------------------------------------------------------- computing


class _Tasks:
    """Makes the tasks of cells; for other processes, models and settings are pickled once."""

    def __init__(self, grid: Grid, threads: int, *, packs: bool) -> None:
        self.grid, self.threads = grid, threads
        self.call = uuid.uuid4().hex
        self.settings: Any = packed(grid.settings, "noise") if packs else grid.settings
        self.sources: dict[str, Any] = dict(grid.models)
        if packs:
            self.sources = {name: packed(source, f"models[{name!r}]") for name, source in grid.models.items()}
            self.checksums = {name: hashlib.sha256(source).hexdigest() for name, source in self.sources.items()}
        self.packs = packs

    def __call__(self, cell: Cell, losses: int = 0) -> Task:
        """Return the task of a cell whose worker died so many times; raise CellError where its image cannot be read."""
        try:
            image = self.grid.image(cell.image)
        except (Exception, SystemExit) as error:  # files and functions may raise anything
            raise CellError.of(error) from None
        return Task(
            cell,
            self.settings,
            self.sources[cell.model],
            self._identity(cell),
            image,
            self.threads,
            f"{self.call} {losses}",
        )

    def _identity(self, cell: Cell) -> str:
        """Return what tells a cell's model from all that a worker may keep, of whatever survey.

        Bytes tell it to later calls as well, but for files that they only name; an object is its name in this call.
        """
        if not self.packs:
            return f"{self.call} {cell.model}"
        return f"{cell.model_fingerprint} {self.checksums[cell.model]}"


def _in_process(cells: list[Cell], task: _Tasks, ledger: _Ledger) -> None:
    """Compute cells here, one after another; images of one shape could go through a model together in this place."""
    try:
        for cell in cells:
            outcome: Outcome | CellError | None = None
            if not ledger.store.is_done(cell.key):
                try:
                    outcome = compute(task(cell))
                except CellError as error:
                    outcome = error
            ledger.finish(cell, outcome)
    finally:
        forget_models(task.call)


def _on_executor(cells: list[Cell], task: _Tasks, ledger: _Ledger, given: Executor | Callable[[], Executor]) -> None:
    """Compute cells on an executor, no more at a time than keep its workers busy, and on a new one when it breaks."""
    executor = given if isinstance(given, Executor) else _made(given)
    own = executor is not given
    counted = -1  # cells that were done or failed when an executor broke last
    waiting = deque(cells)
    losses: Counter[str] = Counter()
    flying: dict[Future[Outcome], Cell] = {}
    try:
        while waiting or flying:
            broken: BaseException | None = None
            while waiting and not broken and len(flying) < 2 * _workers(executor):
                cell = waiting.popleft()
                try:
                    if ledger.store.is_done(cell.key):
                        ledger.finish(cell, None)
                    else:
                        flying[executor.submit(compute, task(cell, losses[cell.key]))] = cell
                except CellError as error:
                    ledger.finish(cell, error)
                except BrokenExecutor as error:
                    waiting.appendleft(cell)
                    broken = error
            # The futures of a broken executor are all done, or soon will be.
            ready, _ = wait(flying, return_when="ALL_COMPLETED" if broken else FIRST_COMPLETED)
            for future in ready:
                cell = flying.pop(future)
                found = _outcome(future)
                if isinstance(found, (Outcome, CellError)):
                    ledger.finish(cell, found)
                    continue
                losses[cell.key] += 1
                if losses[cell.key] >= MOST_LOSSES:
                    ledger.finish(cell, CellError.of(found))
                else:
                    waiting.append(cell)  # behind those that are not suspected
                if isinstance(found, (BrokenExecutor, CancelledError)):
                    broken = found
            if broken is not None and (waiting or flying):
                for future, cell in _drained(flying):
                    found = _outcome(future)
                    if isinstance(found, (Outcome, CellError)):
                        ledger.finish(cell, found)
                    else:
                        waiting.append(cell)
                stuck, counted = counted == ledger.done + ledger.failed, ledger.done + ledger.failed
                executor, own = _another(given, executor, broken, ledger, stuck), True
    except BaseException:
        for future in flying:
            future.cancel()
        for future, cell in flying.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                with suppress(OSError):  # what is finished is kept, if it can be
                    ledger.finish(cell, future.result())
        raise
    finally:
        if own:
            _shut(executor, wait=sys.exc_info()[0] is None)
        forget_models(task.call)


def _workers(executor: Executor) -> int:
    """Return how many workers an executor has; many, where it does not say or has none yet."""
    count: int = getattr(executor, "_max_workers", None) or UNKNOWN_WORKERS
    return count


def _outcome(future: Future[Outcome]) -> Outcome | CellError | BaseException:
    """Return what a cell came to, or the death of its worker."""
    try:
        return future.result()
    except CellError as error:
        return error
    except (BrokenExecutor, CancelledError) as error:
        return error
    except (Exception, SystemExit) as error:
        # Dask's word for a task whose workers died; a class that need not be installed.
        return error if type(error).__name__ == "KilledWorker" else CellError.of(error)


def _drained(flying: dict[Future[Outcome], Cell]) -> list[tuple[Future[Outcome], Cell]]:
    """Wait for what a broken executor still has in the air, and take it down."""
    wait(flying)
    landed = list(flying.items())
    flying.clear()
    return landed


def _another(given: Any, broken: Executor, cause: BaseException, ledger: _Ledger, stuck: bool) -> Executor:
    """Return an executor in place of a broken one; where the last finished nothing, one that has proved to work.

    A cell may break one executor after another until it is given up. That executors break whatever they are given is
    another matter, and no cell is to be blamed for it.
    """
    for _ in range(MOST_RENEWALS):
        _shut(broken, wait=False)
        made = _renewed(given)
        if made is None:
            break
        try:
            if stuck or made is broken:
                made.submit(works).result()
            return made
        except (RuntimeError, CancelledError) as error:  # broken, or shut down already
            broken, cause = made, error
    _shut(broken, wait=False)
    done = f"({type(cause).__name__}: {cause}); {ledger.done} of {ledger.total} cells are done and safe"
    if made is None:
        raise RuntimeError(
            f"the executor's workers died {done}: call again with a new executor, or pass a function that makes one, "
            "to have that done for you"
        ) from cause
    raise RuntimeError(
        f"{MOST_RENEWALS} executors in a row broke before they did anything {done}: see what ends workers as they "
        "start (memory, an initializer, a script without `if __name__ == '__main__'`), or whether the function makes a "
        "new executor every time, and call again"
    ) from cause


def _renewed(given: Any) -> Executor | None:
    """Return a new executor like one that broke, or None where nobody knows how."""
    if not isinstance(given, Executor):
        return _made(given)
    if type(given) is ProcessPoolExecutor:
        pool: Any = given
        with suppress(AttributeError):  # a Python that names them otherwise
            return ProcessPoolExecutor(pool._max_workers, pool._mp_context, pool._initializer, pool._initargs)
    return None


def _made(make: Callable[[], Executor]) -> Executor:
    made = make()
    if not isinstance(made, Executor):
        raise TypeError(f"executor must be a function that makes a concurrent.futures.Executor, not {made!r:.60}")
    return made


def _shut(executor: Executor, *, wait: bool) -> None:
    try:
        executor.shutdown(wait=wait, cancel_futures=True)
    except TypeError:  # loky's and Dask's know no cancel_futures
        executor.shutdown(wait=wait)
