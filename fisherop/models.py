"""Models to take eigendistortions of: a layer of any network, and any model by its name.

>>> import torch
>>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
>>> Layer(network, "1")(torch.zeros(1, 1, 8, 8)).shape
torch.Size([1, 4, 6, 6])
>>> model, note = load("LGG")
>>> model(torch.rand(1, 1, 32, 32)).shape
torch.Size([1, 1, 32, 32])
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import os
import re
import threading
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from torch import nn

from fisherop.frontend import LG, LGG, LN, OnOff

__all__ = ["LG", "LGG", "LN", "Layer", "OnOff", "load"]


class Layer(nn.Module):
    """The response of an intermediate layer of a network.

    The forward pass stops at the layer: what comes after costs nothing, and an in-place operation that follows (the
    usual ReLU) never gets to overwrite the response. The network is used as it is, neither copied nor switched to
    ``eval()``, and holds no hook between calls; threads can share it.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    layer : str or int
        The layer's name in ``model.named_modules()``, or its number in the eigendistortion tutorial. In a torchvision
        ResNet, ``conv1, bn1, relu, maxpool``, every block of ``layer1`` to ``layer4``, ``avgpool`` and ``fc`` are
        numbered from 0: 3 is ``"maxpool"``, 6 is ``"layer2.0"``. In a VGG, and wherever else ``features`` is a
        sequence, the number counts in ``model.features``.

    Raises
    ------
    ValueError
        If the model has no such layer.
    RuntimeError
        In a forward pass that never calls the layer.

    Notes
    -----
    The response is the layer's output as it is, a tuple included. Of a layer that is called several times in a forward
    pass, it is the output of the first call, where the pass stops.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
    >>> Layer(network, "0")
    Layer(Sequential, '0')
    >>> Layer(network, "0")(torch.ones(1, 3, 16, 16)).shape
    torch.Size([1, 8, 14, 14])
    """

    def __init__(self, model: nn.Module, layer: str | int) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, to have layers, not {type(model).__name__}")
        self.layer = _known_name(model, layer) if isinstance(layer, str) else _numbered_name(model, layer)
        self.model = model
        self.training = model.training  # a new Module says it is training: report the network's own mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network up to the layer, and return the layer's output."""
        thread, call = threading.get_ident(), object()

        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            if threading.get_ident() == thread:  # another thread may be inside the same network
                raise _Reached(call, output)

        handle = self.model.get_submodule(self.layer).register_forward_hook(stop)
        try:
            self.model(*args, **kwargs)
        except _Reached as reached:
            if reached.call is not call:  # the stop of a Layer around this one
                raise
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError(
            f"the forward pass of {type(self.model).__name__} never called {self.layer!r}: it skips that layer, or "
            "uses its weights without calling it; name a layer around it or after it"
        )

    def __repr__(self) -> str:
        return f"Layer({type(self.model).__name__}, {self.layer!r})"


class _Reached(BaseException):
    """Carries a layer's output out of a forward pass; no Exception, which the network's own code might catch."""

    def __init__(self, call: object, output: Any) -> None:
        super().__init__()
        self.call = call
        self.output = output


def _known_name(model: nn.Module, name: str) -> str:
    names = [known for known, _ in model.named_modules(remove_duplicate=False)]
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=5)
    top_level = [known for known, _ in model.named_children()]
    hint = f"did you mean {_listed(close)}?" if close else f"its top-level layers are {_listed(top_level)}"
    raise ValueError(f"{type(model).__name__} has no layer {name!r}: {hint}")


def _numbered_name(model: nn.Module, index: int) -> str:
    names = _numbered_layers(model)
    index = operator.index(index)
    if not names:
        raise ValueError(
            f"layers have numbers in a torchvision ResNet or VGG only: name the layer of this {type(model).__name__} "
            "as model.named_modules() does"
        )
    if not 0 <= index < len(names):
        raise ValueError(
            f"layer {index} is out of range: the layers of this {type(model).__name__} are 0 to {len(names) - 1}, "
            f"{_listed(names)}"
        )
    return names[index]


def _numbered_layers(model: nn.Module) -> list[str]:
    """Names in the order of the tutorial's NthLayer; known by their parts, so that torchvision need not be there."""
    features = getattr(model, "features", None)
    if isinstance(features, nn.Sequential):
        return [f"features.{name}" for name, _ in features.named_children()]
    children = dict(model.named_children())
    stages = ["layer1", "layer2", "layer3", "layer4"]
    if not children.keys() >= {"conv1", "bn1", "relu", "maxpool", *stages, "avgpool", "fc"}:
        return []
    blocks = [f"{stage}.{name}" for stage in stages for name, _ in children[stage].named_children()]
    return ["conv1", "bn1", "relu", "maxpool", *blocks, "avgpool", "fc"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


_FRONT_ENDS: dict[str, Callable[[], nn.Module]] = {"ln": LN, "lg": LG, "lgg": LGG, "onoff": OnOff}


def load(name: str, *, seed: int = 0) -> tuple[Any, str | None]:
    """Find a model by its name.

    Parameters
    ----------
    name : str
        One of

        - ``LN``, ``LG``, ``LGG``, ``OnOff``, in any case;
        - the name of a torchvision model, ``resnet18`` for one, with its trained weights if they are on disk (where
          torchvision keeps them, see ``TORCH_HOME``) or can be fetched, else with random ones;
        - ``package.module:name``, your own. A :class:`torch.nn.Module` is the model; a class, or a function that can be
          called without arguments, is called and returns the model; any other callable is the model itself.
    seed : int
        Of the random weights, wherever the model draws any. torch's own random state stays as it was.

    Returns
    -------
    model : callable
        The model, in evaluation mode if it is a Module.
    note : str or None
        What the user should know: that the weights are random, and why.

    Raises
    ------
    ValueError
        If there is no such model.
    ImportError
        If the model needs torchvision and it is not installed.

    Examples
    --------
    >>> model, note = load("lgg")
    >>> model(torch.rand(1, 1, 32, 32)).shape, note
    (torch.Size([1, 1, 32, 32]), None)
    >>> model, note = load("torch:sigmoid")
    >>> model(torch.zeros(1))
    tensor([0.5000])
    """
    note = None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        if ":" in name:
            model = _imported(name)
        elif name.lower() in _FRONT_ENDS:
            model = _FRONT_ENDS[name.lower()]()
        else:
            model, note = _from_torchvision(name.lower(), seed)
    return (model.eval() if isinstance(model, nn.Module) else model), note


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise ValueError(f"there is no module {error.name!r}, for {name!r}, on the Python path") from None
    try:
        found = operator.attrgetter(attribute)(module)
    except AttributeError:
        close = difflib.get_close_matches(attribute, dir(module))
        hint = f"did you mean {_listed(close)}?" if close else "write package.module:name"
        raise ValueError(f"module {module_name!r} has no {attribute!r}: {hint}") from None
    model = found() if is_factory(found) else found
    if isinstance(model, type) or not callable(model):
        raise ValueError(
            f"{name!r} gives no model but {model!r}: name a torch.nn.Module, a function of an image, or a class or "
            "function without required arguments that returns one"
        )
    return model  # type: ignore[no-any-return]


def is_factory(found: Any) -> bool:
    """Tell whether something is called without arguments to make a model or an image, rather than being one."""
    if isinstance(found, nn.Module) or not callable(found):
        return False
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError):  # it has required arguments; or is built in and says nothing of its arguments
        return False
    return True


def _from_torchvision(name: str, seed: int) -> tuple[nn.Module, str | None]:
    front_ends = ["LN", "LG", "LGG", "OnOff"]
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"{name!r} is none of {_listed(front_ends)}, and torchvision, which has more, cannot be imported: "
            'pip install "fisherop[vision]"'
        ) from error
    known = models.list_models(exclude="quantized_*")  # integer arithmetic has no derivative
    if name not in known:
        close = difflib.get_close_matches(name, [*_FRONT_ENDS, *known], n=5)
        hint = f"did you mean {_listed(close)}? " if close else ""
        raise ValueError(
            f"unknown model {name!r}: {hint}Known are {_listed(front_ends)}, the models of torchvision, and your own "
            "as package.module:name"
        )
    weights = models.get_model_weights(name).DEFAULT
    try:
        _fetch(weights.url)
    except (OSError, HTTPException, RuntimeError) as error:
        note = (
            f"{name} has random weights (seed {seed}): {weights} could not be fetched ({error}); to use them, put "
            f"{weights.url} into {_checkpoints()}"
        )
        return models.get_model(name, weights=None, **_without_weights(models.get_model_builder(name))), note
    return models.get_model(name, weights=weights, progress=False), None


def _without_weights(builder: Callable[..., Any]) -> dict[str, Any]:
    """Return options that keep a torchvision builder from fetching a trained backbone, and from warning."""
    options: dict[str, Any] = {}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if builder.__name__ in {"googlenet", "inception_v3"}:
        options["init_weights"] = True
    return options


def _checkpoints() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


def _fetch(url: str) -> None:
    """Have a checkpoint where torchvision looks for it, silently; OSError and its kin if it cannot be had."""
    path = _checkpoints() / os.path.basename(urlparse(url).path)
    if path.exists():
        return
    # torch's download has no timeout: a firewall that drops packets would hold it for minutes. Knock first.
    with urlopen(Request(url, method="HEAD"), timeout=10):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
