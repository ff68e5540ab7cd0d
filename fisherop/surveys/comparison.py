"""Models and layers of a survey side by side: what they make of each other's distortions, and how these turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.compare import threshold_table
from fisherop.models import Layer
from fisherop.noise import Gaussian, Noise
from fisherop.operators import FisherOperator
from fisherop.surveys.cells import CALLED_OUTPUT, OUTPUT, build, seed_of, weights_of
from fisherop.surveys.fingerprints import fingerprint
from fisherop.surveys.opened import Record, Survey, _imported
from fisherop.surveys.work import TUNING

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Comparison:
    """Tables of a survey's models and layers side by side.

    Attributes
    ----------
    D : pandas.DataFrame
        A row for every image, observer (columns model, layer) and set of distortions (of_model, of_layer): D, the
        difference of the log thresholds of the set's least and most noticeable distortion, natural logarithm. Infinite
        where the observer does not notice the least noticeable one at all. Berardino, Laparra, Balle, Simoncelli
        (2017), "Eigen-distortions of hierarchical representations".
    angles : pandas.DataFrame
        A row for every image and pair of observers, with the largest principal angle, in radians, between the spaces
        of their most noticeable distortions, ``most``, and of their least noticeable ones, ``least``; NaN where a
        survey has no such end. The null space of a model with fewer responses than pixels has no particular "least"
        ones, and an angle to it says nothing.
    curves : pandas.DataFrame
        A row for every model, layer and quantity, in the order of the layers: mean across images, its standard error,
        and the number of images it is of. Quantities are log10 of the largest and the smallest eigenvalue found,
        ``log10_most``, ``log10_least``, and ``D``; infinite values are left out.
    """

    D: pandas.DataFrame
    angles: pandas.DataFrame
    curves: pandas.DataFrame

    def mean_D(self) -> pandas.DataFrame:
        """Return D averaged across images: observers in rows, whose distortions in columns."""
        names = self.D.assign(observer=_label(self.D, ""), of=_label(self.D, "of_"))
        mean = names.groupby(["observer", "of"], sort=False)["D"].mean().unstack("of")
        observers = list(dict.fromkeys(names["observer"]))
        return mean.reindex(index=observers, columns=[name for name in dict.fromkeys(names["of"]) if name in mean])


def _label(table: pandas.DataFrame, prefix: str) -> list[str]:
    pairs = zip(table[f"{prefix}model"], table[f"{prefix}layer"], strict=True)
    return [model if layer == OUTPUT else f"{model} {layer}" for model, layer in pairs]


def compare(
    survey: Survey, models: Mapping[str, Any] | None, noise: Noise | None, *, angles: bool = True
) -> Comparison:
    """Make the tables of `Survey.compare`; the angles, which need all distortions read, only if asked."""
    pandas = _imported("pandas")
    settings = survey.settings()
    done = [record for record in survey.records if record.done]
    own = _own_D(done)
    if models is None:
        rows = [(*_names(record), record.model, record.layer, D) for record, D in own.items()]
    else:
        rows = list(_cross_D(survey, own, _builder(models, settings["seed"]), noise))
    columns = ["image", "model", "layer", "of_model", "of_layer", "D"]
    angle_columns = ["image", "model", "layer", "of_model", "of_layer", "most", "least"]
    return Comparison(
        pandas.DataFrame(rows, columns=columns),
        pandas.DataFrame(list(_angles(survey, done, settings)) if angles else [], columns=angle_columns),
        pandas.DataFrame(
            list(_curves(survey, done, own)), columns=["model", "layer", "quantity", "mean", "error", "images"]
        ),
    )


def _names(record: Record) -> tuple[str, str, str]:
    return record.image, record.model, record.layer


def _own_D(done: list[Record]) -> dict[Record, float]:
    """Return D of every cell for its own distortions; there is none where they are all of one end."""
    found = {}
    for record in done:
        thresholds = record.thresholds
        if len(thresholds) > 1 and np.isfinite(thresholds[0]):
            found[record] = float(np.log(thresholds[-1]) - np.log(thresholds[0]))
    return found


def _by_image(done: list[Record]) -> Iterator[tuple[str, list[Record]]]:
    for image, records in itertools.groupby(sorted(done, key=lambda record: record.place[0]), lambda r: r.image):
        yield image, list(records)


# ------------------------------------------------------------------------------------------------------------------- D


SAME = 1e-4
"""How far an eigenvalue may be from the stored one, next to the largest, if what is given is that of the survey: other
machines and strategies of products round otherwise, and not by as much."""


def _builder(models: Mapping[str, Any], seed: int) -> Callable[[str], tuple[Any, str]]:
    """Return what gives a model by its name, and the fingerprint that cells have of what was built."""
    kept: dict[str, tuple[Any, str]] = {}

    def built(name: str) -> tuple[Any, str]:
        if name not in kept:
            if name not in models:
                raise ValueError(f"models lacks {name!r}, which the survey has: pass those that it was given")
            model, _ = build(models[name], seed_of(seed, name))
            kept[name] = model, weights_of(model, fingerprint(models[name], named=True))
        return kept[name]

    return built


def _cross_D(
    survey: Survey, own: dict[Record, float], built: Callable[[str], tuple[Any, str]], noise: Noise | None
) -> Iterator[Any]:
    """Yield D of every model and layer for the distortions of every one, at every image.

    A cell's own is that of its certificate, which knows what of F is zero.
    """
    for image, records in _by_image([record for record in survey.records if record.done]):
        results = {record: survey.read(record) for record in records}
        ops = {}
        for record, result in results.items():
            model, _ = built(record.model)
            layer = model if record.layer == OUTPUT else Layer(model, _reach(model, record.layer))
            ops[record] = FisherOperator(layer, result.image, noise=noise, tuning=TUNING)  # type: ignore[arg-type]
        table = threshold_table(ops, results)  # type: ignore[arg-type]
        for i, record in enumerate(ops):
            _check_same(survey, record, built, noise, [1 / table.most[i, i] ** 2, 1 / table.least[i, i] ** 2])
            for j, other in enumerate(results):
                D = own[record] if other is record and record in own else float(table.D[i, j])
                yield image, record.model, record.layer, other.model, other.layer, D


def _check_same(
    survey: Survey, record: Record, built: Callable[[str], tuple[Any, str]], noise: Noise | None, found: list[float]
) -> None:
    """Refuse a noise or a model that is known as another than the survey's, and finds other eigenvalues.

    What has another name, as a class in a script that was run and is now imported, may compute the same.
    """
    assert record.pairs is not None
    same_noise = {fingerprint(None), fingerprint(Gaussian())}
    asked, given = survey.settings()["noise_fingerprint"], fingerprint(noise)
    differing = [] if asked == given or {asked, given} <= same_noise else ["noise"]
    if built(record.model)[1] != record.weights:
        differing.append(f"models[{record.model!r}]")
    stored = record.pairs[[0, -1], 0]
    if differing and (np.abs(stored - found) > SAME * record.fact("lambda_max")).any():
        raise ValueError(
            f"{' and '.join(differing)} must be what the survey was given, and is not: at {record.image!r} eigenvalues "
            f"{stored[0]:.3g} and {stored[1]:.3g} of {record.model!r} are {found[0]:.3g} and {found[1]:.3g} by it"
        )


def _reach(model: Any, layer: str) -> str | int:
    if layer == CALLED_OUTPUT:
        return OUTPUT
    return layer if layer in dict(model.named_modules()) or not layer.isdecimal() else int(layer)


# -------------------------------------------------------------------------------------------------------------- angles


def _angles(survey: Survey, done: list[Record], settings: dict[str, Any]) -> Iterator[Any]:
    k = settings["k"]
    smallest = {"L": 0, "S": k, "B": k // 2}[settings["which"][0]]
    ends = slice(0, k - smallest), slice(k - smallest, k)
    for image, records in _by_image(done):
        rows = [_rows(survey.read(record).eigendistortions) for record in records]
        angles = [_largest_angles([own[end] for own in rows]) for end in ends]
        for i, j in itertools.combinations(range(len(records)), 2):
            one, other = records[i], records[j]
            yield image, one.model, one.layer, other.model, other.layer, angles[0][i, j], angles[1][i, j]


def _rows(distortions: Any) -> Tensor:
    return torch.as_tensor(distortions, device="cpu").reshape(len(distortions), -1).double()


def _largest_angles(spaces: list[Tensor]) -> NDArray[np.float64]:
    """Return the largest principal angle between every two row spaces, NaN where they have no common size.

    By sines, for a cosine loses half the digits of a small angle. Bjorck and Golub (1973), "Numerical methods for
    computing angles between linear subspaces".
    """
    count = len(spaces)
    angles = np.full((count, count), np.nan)
    bases = [torch.linalg.qr(space.T)[0] for space in spaces]
    for i, j in itertools.combinations(range(count), 2):
        a, b = bases[i], bases[j]
        if a.shape != b.shape or not a.shape[1]:
            continue
        cosines = a.T @ b
        sines = torch.linalg.svdvals(b - a @ cosines)
        angles[i, j] = angles[j, i] = float(torch.atan2(sines[0], torch.linalg.svdvals(cosines)[-1]))
    return angles


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(survey: Survey, done: list[Record], own: dict[Record, float]) -> Iterator[Any]:
    """Yield mean and standard error across images, of every layer of every model."""
    for model, layer in itertools.product(survey.models, survey.layers):
        cells = [record for record in done if (record.model, record.layer) == (model, layer)]
        if not cells:
            continue
        pairs = [record.pairs for record in cells if record.pairs is not None]
        values = {
            "log10_most": [_log10(own_pairs[0, 0]) for own_pairs in pairs],
            "log10_least": [_log10(own_pairs[-1, 0]) for own_pairs in pairs],
            "D": [own[record] for record in cells if record in own],
        }
        for quantity, all_images in values.items():
            finite = np.array([value for value in all_images if np.isfinite(value)])
            mean = float(finite.mean()) if len(finite) else np.nan
            error = float(finite.std(ddof=1) / np.sqrt(len(finite))) if len(finite) > 1 else np.nan
            yield model, layer, quantity, mean, error, len(finite)


def _log10(value: float) -> float:
    return float(np.log10(value)) if value > 0 else -np.inf
