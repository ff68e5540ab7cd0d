"""What a survey is made of: models and images by name, and the cells of the grid, each with a key that says all of it.

The key of a cell is a hash of everything that its numbers depend on: what is asked, the image's bytes, the model's
weights or the name of the function that makes it, the layer, the noise, the seed.

>>> from fisherop.surveys.cells import seed_of
>>> len({seed_of(0, "photo", model) for model in ("LN", "OnOff")})
2
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fisherop import images as image_files
from fisherop import models as named_models
from fisherop.models import is_factory
from fisherop.rows import generator
from fisherop.surveys.fingerprints import fingerprint, is_model_file

OUTPUT = "output"
"""The name, among layers, of a model's own response."""

CALLED_OUTPUT = "output (layer)"
"""The name of a layer that a model itself calls so."""


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
    if is_model_file(source) and not os.path.isfile(source):
        raise ValueError(f"models[{name!r}] is a file {os.fspath(source)!r} that does not exist")


# ------------------------------------------------------------------------------------------------------------- sources


def build(source: Any, seed: int) -> tuple[Callable[[Tensor], Any], str | None]:
    """Return the model that a source stands for, and what its user should know of its weights.

    Random weights are drawn with the seed; torch's own random state stays as it was.
    """
    if is_model_file(source):
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
    return (model.eval() if isinstance(model, nn.Module) and not is_model_file(source) else model), note


def weights_of(model: Any, source: str) -> str:
    """Return the fingerprint of a model that was built, or, where that is no Module, of what it was built from."""
    return fingerprint(model) if isinstance(model, nn.Module) else source


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
