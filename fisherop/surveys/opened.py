"""A store, opened: its cells as a table, as labelled arrays, as results, side by side, and as a page to look at."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fisherop.maps import whole
from fisherop.result import Eigendistortions
from fisherop.surveys.cells import OUTPUT
from fisherop.surveys.store import DONE, Damaged, Sidecar, Store

if TYPE_CHECKING:
    import pandas
    import xarray

    from fisherop.noise import Noise
    from fisherop.surveys.comparison import Comparison

_NUMBERS = ("eigenvalues", "index", "residuals", "converged", "clusters")
_FACTS = ("n_matvec", "method", "tol", "nullity", "lambda_max", "n", "m", "message")


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What is known of a cell without reading its arrays.

    `pairs` is (k, 7): eigenvalue, index, residual, converged, cluster, and the two bounds. `settings` and `versions`
    are JSON, equal for equal settings.
    """

    key: str
    state: str
    image: str
    layer: str
    model: str
    place: tuple[int, int, int]
    settings: str
    finished: float
    pairs: NDArray[np.float64] | None = None
    facts: tuple[Any, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = ""
    seconds: float = 0.0
    weights: str = ""
    versions: str = ""
    notes: tuple[str, ...] = ()
    spectrum: dict[str, Any] | None = None
    error: tuple[str, str, str] | None = None

    @property
    def done(self) -> bool:
        """Tell whether the cell is finished."""
        return self.state == DONE

    @property
    def name(self) -> tuple[str, str, str]:
        """Image, layer and model."""
        return self.image, self.layer, self.model

    def fact(self, name: str) -> Any:
        """Return one of the result's facts: "n_matvec", "method", "tol", "nullity", "lambda_max", "n", "m"."""
        return self.facts[_FACTS.index(name)]

    @property
    def thresholds(self) -> NDArray[np.float64]:
        """Sizes at which pairs are noticed with d' = 1: infinite where F is zero, or zero to the certificate."""
        assert self.pairs is not None
        seen = (self.pairs[:, 0] > 0) & (self.pairs[:, 1] < self.fact("n") - self.fact("nullity"))
        return np.where(seen, 1 / np.sqrt(np.where(seen, self.pairs[:, 0], 1.0)), np.inf)

    @classmethod
    def of(cls, sidecar: Sidecar) -> Record:
        """Read a sidecar; what many share is kept once."""
        cell = sidecar["cell"]
        common: dict[str, Any] = {
            "key": sidecar["key"],
            "state": sys.intern(sidecar["state"]),
            "image": sys.intern(cell["image"]),
            "layer": sys.intern(cell["layer"]),
            "model": sys.intern(cell["model"]),
            "place": tuple(cell["place"]),
            "settings": _shared(sidecar["settings"]),
            "finished": sidecar["finished"],
        }
        if sidecar["state"] != DONE:
            error = sidecar["error"]
            return cls(**common, error=(error["type"], error["message"], error["traceback"]))
        result, model = sidecar["result"], sidecar["model"]
        bounds = np.reshape(result["eigenvalue_bounds"], (-1, 2))
        note = [model["note"]] if model["note"] else []
        return cls(
            **common,
            pairs=np.column_stack([*(result[name] for name in _NUMBERS), bounds]).astype(float),
            facts=tuple(_interned(result[name]) for name in _FACTS),
            shape=tuple(result["shape"]),
            dtype=sys.intern(result["dtype"]),
            seconds=sidecar["seconds"]["all"],
            weights=sys.intern(model["weights"]),
            versions=_shared(sidecar["worker"]["versions"]),
            notes=tuple(_interned(text) for text in [*note, *sidecar["warnings"]]),
            spectrum=sidecar.get("spectrum"),
        )


def _shared(facts: Mapping[str, Any]) -> str:
    return sys.intern(json.dumps(facts, sort_keys=True))


def _interned(x: Any) -> Any:
    return sys.intern(x) if isinstance(x, str) else x


@dataclass(frozen=True)
class Failure:
    """A cell that failed, and why."""

    image: str
    layer: str
    model: str
    error: str
    message: str
    traceback: str

    def __str__(self) -> str:
        where = "" if self.layer == OUTPUT else f", {self.layer}"
        return f"{self.model}{where} at {self.image}: {self.error}: {self.message}"


class Survey:
    """The cells of a store: results of models' layers at images, as tables, labelled arrays, and a page.

    Made by `survey`, and by ``Survey.open(store)``. Of several cells of one name and the same settings, as when an
    image was replaced, the latest counts.

    Attributes
    ----------
    images, layers, models : tuple of str
        The names met, in the order that they were given in; among layers a model's own response is the last.

    Examples
    --------
    >>> import tempfile, torch, fisherop as fo
    >>> store = tempfile.mkdtemp()
    >>> s = fo.survey({"net": torch.nn.Conv2d(1, 4, 3)}, {"noise": torch.rand(1, 1, 8, 8)}, store=store)
    >>> fo.Survey.open(store)
    <Survey of 1 cells: 1 done, 0 failed>
    >>> fo.Survey.open(store).result("noise").eigendistortions.shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, store: Store, records: Iterable[Record]) -> None:
        latest: dict[tuple[tuple[str, str, str], str], Record] = {}
        for record in records:
            name = record.name, record.settings
            if name not in latest or latest[name].finished <= record.finished:
                latest[name] = record
        self._store = store
        self._records = sorted(latest.values(), key=lambda record: (record.place[::-1], record.name, record.settings))
        self.images = _in_order((record.place[0], record.image) for record in self._records)
        self.layers = _in_depth(_in_order((record.place[1], record.layer) for record in self._records))
        self.models = _in_order((record.place[2], record.model) for record in self._records)

    @classmethod
    def open(cls, store: str | os.PathLike[str]) -> Survey:
        """Open a store, of one survey or of several.

        Parameters
        ----------
        store : path
            The folder. It is only read.

        Raises
        ------
        FileNotFoundError
            If there is no store.

        Warns
        -----
        UserWarning
            Where one model's cells were computed with different weights, and where cells cannot be read.
        """
        folder = Store(store)
        if not folder.cells.is_dir():
            raise FileNotFoundError(f"there is no store of a survey at {str(folder.path)!r}")
        return cls(folder, map(Record.of, folder.sidecars()))._checked()

    @classmethod
    def of_cells(cls, store: Store, keys: Iterable[str]) -> Survey:
        """Open those cells of a store that have these keys.

        Parameters
        ----------
        store : Store
            The folder, opened.
        keys : iterable of str
            Of the cells wanted; what the store lacks is left out.

        Returns
        -------
        Survey
            Those cells.
        """
        sidecars = (store.sidecar(key) for key in keys)
        return cls(store, [Record.of(sidecar) for sidecar in sidecars if sidecar is not None])._checked()

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        done = sum(record.done for record in self._records)
        return f"<Survey of {len(self)} cells: {done} done, {len(self) - done} failed>"

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._store.path

    @property
    def records(self) -> list[Record]:
        """What is known of every cell without reading its arrays: models in order, their images, their layers."""
        return list(self._records)

    # ------------------------------------------------------------------------------------------------------- choosing

    def select(self, **wanted: Any) -> Survey:
        """Return the survey of some cells.

        Parameters
        ----------
        **wanted
            ``image``, ``layer``, ``model``, and settings such as ``k``, ``which``, ``method``, ``noise`` (its kind),
            ``seed``: a value, or a list of values.

        Examples
        --------
        >>> import tempfile, torch, fisherop as fo
        >>> images = {"a": torch.rand(1, 1, 8, 8), "b": torch.rand(1, 1, 8, 8)}
        >>> s = fo.survey({"net": torch.nn.Conv2d(1, 4, 3)}, images, store=tempfile.mkdtemp())
        >>> s.select(image="a", k=2)
        <Survey of 1 cells: 1 done, 0 failed>
        """
        known = {"image", "layer", "model"}.union(*(json.loads(text) for text in self._settings()))
        if set(wanted) - known:
            raise ValueError(f"cells are chosen by {', '.join(sorted(known))}, not by {', '.join(set(wanted) - known)}")
        values = {name: list(x) if isinstance(x, (list, tuple, set)) else [x] for name, x in wanted.items()}
        settings = {text: json.loads(text) for text in self._settings()}

        def fits(record: Record) -> bool:
            own = settings[record.settings]
            return all(
                (getattr(record, name) if name in ("image", "layer", "model") else own[name]) in accepted
                for name, accepted in values.items()
            )

        return Survey(self._store, filter(fits, self._records))

    def _settings(self) -> list[str]:
        return sorted({record.settings for record in self._records})

    def settings(self) -> dict[str, Any]:
        """Return what was asked of the cells.

        Raises
        ------
        ValueError
            Where the cells have different settings; the message says how to choose.
        """
        several = [json.loads(text) for text in self._settings()]
        if len(several) == 1:
            return dict(several[0])
        differing = (
            {
                name: [own[name] for own in several]
                for name in several[0]
                if len({str(own[name]) for own in several}) > 1
            }
            if several
            else {}
        )
        words = "; ".join(f"{name}: {', '.join(map(str, dict.fromkeys(values)))}" for name, values in differing.items())
        example = next(iter(differing.items()), ("k", [2]))
        raise ValueError(
            f"the cells of {str(self.path)!r} have different settings ({words}): choose, as by "
            f".select({example[0]}={example[1][0]!r})"
            if several
            else f"the store {str(self.path)!r} has no cell yet"
        )

    # ------------------------------------------------------------------------------------------------------- contents

    def result(self, image: str | None = None, layer: str | None = None, model: str | None = None) -> Eigendistortions:
        """Return a cell's result; a name may be left out where there is only one.

        Parameters
        ----------
        image, layer, model : str, optional
            The cell's names.

        Returns
        -------
        Eigendistortions
            As it was computed, on the CPU.

        Raises
        ------
        KeyError
            If there is no such cell, or it failed.
        ValueError
            If several cells fit, or the cell's file is damaged.
        """
        wanted = {"image": image, "layer": layer, "model": model}
        found = [
            record
            for record in self._records
            if all(name is None or getattr(record, kind) == name for kind, name in wanted.items())
        ]
        words = ", ".join(f"{kind} {name!r}" for kind, name in wanted.items() if name is not None)
        if not found:
            raise KeyError(f"no cell has {words or 'a name'}")
        if len(found) > 1:
            raise ValueError(f"{len(found)} cells have {words or 'a name'}: name image, layer and model, or select()")
        if found[0].error is not None:
            raise KeyError(f"the cell of {words} failed: {found[0].error[0]}: {found[0].error[1]}")
        return self.read(found[0])

    def read(self, record: Record) -> Eigendistortions:
        """Return the result of a finished cell, its file checked."""
        try:
            sidecar = self._store.sidecar(record.key)
            if sidecar is None:
                raise Damaged(f"the sidecar of cell {record.key} is missing")
            return Eigendistortions.load(self._store.data(sidecar))
        except Damaged as error:
            raise Damaged(f"{error}: run the survey again, which computes that cell anew") from None

    def failures(self) -> list[Failure]:
        """Return the cells that failed, with their errors; ``survey(..., retry_failed=True)`` computes them again."""
        return [Failure(*record.name, *record.error) for record in self._records if record.error is not None]

    def table(self) -> pandas.DataFrame:
        """Return a table, a row for every eigenpair.

        Returns
        -------
        pandas.DataFrame
            With the columns image, layer, model, pair; eigenvalue, lower, upper (its bounds), index, residual,
            converged, cluster, threshold (the size at which d' = 1); n, m, lambda_max, nullity, method, tol, n_matvec,
            seconds, weights (a fingerprint); and the settings where they differ.
        """
        pandas = _imported("pandas")
        done = [record for record in self._records if record.pairs is not None]
        sizes = [len(record.pairs) for record in done if record.pairs is not None]

        def column(value: Callable[[Record], Any]) -> NDArray[Any]:
            values = [value(record) for record in done]
            # As objects, texts are shared by rows; an array of texts would hold each at full width.
            shared = any(isinstance(x, str) for x in values)
            return np.repeat(np.array(values, dtype=object if shared else None), sizes)

        pairs = np.concatenate([record.pairs for record in done if record.pairs is not None] or [np.zeros((0, 7))])
        columns: dict[str, Any] = {
            "image": column(lambda record: record.image),
            "layer": column(lambda record: record.layer),
            "model": column(lambda record: record.model),
            "pair": np.concatenate([np.arange(size) for size in sizes] or [np.arange(0)]),
            "eigenvalue": pairs[:, 0],
            "lower": pairs[:, 5],
            "upper": pairs[:, 6],
            "index": pairs[:, 1].astype(int),
            "residual": pairs[:, 2],
            "converged": pairs[:, 3].astype(bool),
            "cluster": pairs[:, 4].astype(int),
            "threshold": np.concatenate([record.thresholds for record in done] or [np.zeros(0)]),
        }
        for name in ("n", "m", "lambda_max", "nullity", "method", "tol", "n_matvec"):
            columns[name] = column(lambda record, name=name: record.fact(name))  # type: ignore[misc]
        columns |= {"seconds": column(lambda record: record.seconds), "weights": column(lambda record: record.weights)}
        several = {text: json.loads(text) for text in self._settings()}
        for name in next(iter(several.values()), {}):
            if len({str(own[name]) for own in several.values()}) > 1:
                columns[f"{name} asked" if name in columns else name] = column(
                    lambda record, name=name: several[record.settings][name]  # type: ignore[misc]
                )
        return pandas.DataFrame(columns)

    def to_xarray(self, *, distortions: bool = False) -> xarray.Dataset:
        """Return labelled arrays over image, layer, model and pair; NaN, -1 or False where there is no such cell.

        Parameters
        ----------
        distortions : bool, optional
            Load the eigendistortions as well, and the images, in memory; all of one shape.

        Returns
        -------
        xarray.Dataset
            eigenvalue, lower, upper, residual, index, converged, threshold over (image, layer, model, pair);
            lambda_max, n_matvec, seconds, done over (image, layer, model); with `distortions` also distortion, and
            picture over image. What was asked is in its ``attrs``.

        Raises
        ------
        ValueError
            Where cells have different settings: choose with `select`.
        """
        make = _imported("xarray").Dataset
        settings = self.settings()
        shape = len(self.images), len(self.layers), len(self.models)
        k = max((len(record.pairs) for record in self._records if record.pairs is not None), default=0)
        places = list(self._places())
        dims = ("image", "layer", "model")

        def filled(missing: Any, value: Callable[[Record], Any], *more: int) -> NDArray[Any]:
            array = np.full((*shape, *more), missing)
            for place, record in places:
                found = value(record)
                array[(*place, slice(len(found)))[: array.ndim]] = found
            return array

        def pairs(column: int) -> Callable[[Record], Any]:
            return lambda record: record.pairs[:, column]  # type: ignore[index]

        variables: dict[str, Any] = {
            "eigenvalue": ((*dims, "pair"), filled(np.nan, pairs(0), k)),
            "lower": ((*dims, "pair"), filled(np.nan, pairs(5), k)),
            "upper": ((*dims, "pair"), filled(np.nan, pairs(6), k)),
            "residual": ((*dims, "pair"), filled(np.nan, pairs(2), k)),
            "index": ((*dims, "pair"), filled(-1, pairs(1), k)),
            "converged": ((*dims, "pair"), filled(False, pairs(3), k)),
            "threshold": ((*dims, "pair"), filled(np.nan, lambda record: record.thresholds, k)),
        }
        single: dict[str, tuple[Any, Callable[[Record], Any]]] = {
            "lambda_max": (np.nan, lambda record: record.fact("lambda_max")),
            "n_matvec": (-1, lambda record: record.fact("n_matvec")),
            "seconds": (np.nan, lambda record: record.seconds),
            "done": (False, lambda record: True),
        }
        for name, (missing, value) in single.items():
            array = np.full(shape, missing)
            for place, record in places:
                array[place] = value(record)
            variables[name] = dims, array
        if distortions:
            variables |= self._pictures(places, shape, k)
        names = {"image": list(self.images), "layer": list(self.layers), "model": list(self.models)}
        attributes = {name: "default" if value is None else value for name, value in settings.items()}
        attributes = {name: int(value) if isinstance(value, bool) else value for name, value in attributes.items()}
        dataset: xarray.Dataset = make(variables, coords=names | {"pair": np.arange(k)}, attrs=attributes)
        return dataset

    def _places(self) -> Iterator[tuple[tuple[int, int, int], Record]]:
        """Yield the finished cells with where they go in an array."""
        order = [{name: i for i, name in enumerate(names)} for names in (self.images, self.layers, self.models)]
        for record in self._records:
            if record.done:
                i, j, m = (own[name] for own, name in zip(order, record.name, strict=True))
                yield (i, j, m), record

    def _pictures(self, places: Any, shape: tuple[int, ...], k: int) -> dict[str, Any]:
        shapes = {record.shape[1:] for _, record in places}
        if len(shapes) != 1:
            raise ValueError(f"distortions have different shapes, {sorted(shapes)}: choose cells with select() first")
        [inner] = shapes
        names = ("channel", "row", "column")[-len(inner) :]
        if len(inner) > 3:
            names = tuple(f"axis{i}" for i in range(len(inner)))
        whole: NDArray[Any] = np.full((*shape, k, *inner), np.nan, np.float32)
        pictures: NDArray[Any] = np.full((shape[0], *inner), np.nan, np.float32)
        for (i, j, m), record in places:
            result = self.read(record)
            if record.dtype == "float64" and whole.dtype != np.float64:
                whole, pictures = whole.astype(float), pictures.astype(float)
            whole[i, j, m, : len(result)] = np.asarray(result.eigendistortions)
            pictures[i] = np.asarray(result.image).reshape(inner)
        return {
            "distortion": (("image", "layer", "model", "pair", *names), whole),
            "picture": (("image", *names), pictures),
        }

    # ------------------------------------------------------------------------------------------------------ comparing

    def compare(self, models: Mapping[str, Any] | None = None, *, noise: Noise | None = None) -> Comparison:
        """Put models and layers side by side: D, angles between their distortions, and curves over layers.

        Parameters
        ----------
        models : dict, optional
            The models, as `survey` was given them, to be tested on each other's distortions; without them D is known
            only of every model for its own.
        noise : optional
            The noise of the survey, where that was not the default.

        Returns
        -------
        Comparison
            With the tables ``D``, ``angles`` and ``curves``.

        Raises
        ------
        ValueError
            Where cells have different settings, and where models or noise are other than those of the survey.
        """
        from fisherop.surveys.comparison import compare

        return compare(self, models, noise)

    def report(self, path: str | os.PathLike[str], *, title: str | None = None, pictures: int = 6) -> None:
        """Write a page to look at: what was asked, curves over layers, spectra, pictures, a table, and failures.

        Parameters
        ----------
        path : path
            The file, ``.html``. It has all in it: no other file and no network is needed to read it.
        title : str, optional
            By default the store's name.
        pictures : int, optional
            How many of the images are shown with their distortions.

        Raises
        ------
        OSError
            Where the file cannot be written.
        """
        from fisherop.surveys.report import write

        write(self, Path(path), title or f"Survey {self.path.name}", whole(pictures, "pictures", 0))

    def _checked(self) -> Survey:
        """Warn of models whose cells were computed with different weights."""
        weights: dict[tuple[str, str], set[str]] = {}
        for record in self._records:
            if record.done:
                weights.setdefault((record.model, record.settings), set()).add(record.weights)
        mixed = sorted({model for (model, _), found in weights.items() if len(found) > 1})
        if mixed:
            warnings.warn(
                f"cells of {', '.join(mixed)} have different weights: see the column 'weights' of table()",
                stacklevel=3,
            )
        return self


def _in_order(places: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    last: dict[str, int] = {}  # a layer that several models have goes where the one with the most layers has it
    for place, name in places:
        last[name] = max(place, last.get(name, place))
    return tuple(sorted(last, key=lambda name: (last[name], name)))


def _in_depth(layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(layers, key=lambda name: name == OUTPUT))  # a model's own response is beyond all of its layers


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'this needs {name}: pip install "fisherop[survey]"') from error
