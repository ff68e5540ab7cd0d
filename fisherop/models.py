"""Models to take eigendistortions of: a layer of any network, and four fitted models of early vision.

>>> import torch
>>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
>>> Layer(network, "1")(torch.zeros(1, 1, 8, 8)).shape
torch.Size([1, 4, 6, 6])
>>> LGG()(torch.rand(1, 1, 32, 32)).shape
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
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LG", "LGG", "LN", "Layer", "OnOff", "load"]


# ---------------------------------------------------------------------------------------------- a layer of a network


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


# ------------------------------------------------------------------------------- the front-end models of Berardino 2017


class _FrontEnd(nn.Module):
    """Centre-surround filters, divided by up to two gain controls, then softplus: the classes below say which.

    The kernels are buffers, computed from the parameters in float64 and rounded anew at every change of precision, so
    that ``LN().double()`` has all its digits. They stay out of the ``state_dict``: the parameters say everything.
    """

    filters: Tensor  # (c or 2c, 1, s, s): c centre-surround kernels, then c luminance kernels where there are any
    contrast: Tensor | None  # (c, 1, s, s)
    contrast_scalar: Tensor  # (c, 1, 1), where contrast is

    def __init__(
        self, amplitude: float, kernel_size: int, padding: str, *, signs: Sequence[float] = (1.0,), **fitted: Any
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, for a response of the image's size, not {kernel_size}")
        if padding not in _SMALLEST_IMAGE:
            raise ValueError(f"padding must be one of {_listed(list(_SMALLEST_IMAGE))}, not {padding!r}")
        self.padding = padding
        self._settings = {**fitted, "amplitude": amplitude, "kernel_size": kernel_size, "padding": padding}
        self._channels = len(signs)
        self._exact = self._kernels(signs, **{name: self._column(name, value) for name, value in fitted.items()})
        self.register_buffer("contrast", None, persistent=False)
        for name, exact in self._exact.items():
            rounded = exact.to(torch.get_default_device(), torch.get_default_dtype())
            self.register_buffer(name, rounded, persistent=False)

    def _column(self, name: str, value: float | Sequence[float]) -> Tensor:
        """Return one parameter as a (c, 1, 1, 1) column."""
        column = torch.as_tensor(value, dtype=torch.float64, device="cpu").reshape(-1, 1, 1, 1)
        if len(column) != self._channels:
            raise ValueError(f"{name} must have one value for each of {self._channels} channels, not {value}")
        if not (column.isfinite() & (column >= 0)).all() or (name.endswith("_std") and not column.all()):
            raise ValueError(f"{name} must be {'positive' if name.endswith('_std') else 'at least 0'}, not {value}")
        return column

    def _kernels(self, signs: Sequence[float], **fitted: Tensor) -> dict[str, Tensor]:
        size, amplitude = self._settings["kernel_size"], self._settings["amplitude"]
        sign = torch.tensor(signs, dtype=torch.float64, device="cpu").reshape(-1, 1, 1, 1)
        difference = _gaussian(fitted["center_std"], size) - _gaussian(fitted["surround_std"], size)
        kernels = {"filters": amplitude * sign * difference}
        if "luminance_std" in fitted:
            # One convolution with all kernels takes half the time of two, and they are most of the model.
            luminance = fitted["luminance_scalar"] * _gaussian(fitted["luminance_std"], size)
            kernels["filters"] = torch.cat([kernels["filters"], luminance])
        if "contrast_std" in fitted:
            kernels["contrast"] = _gaussian(fitted["contrast_std"], size)
            kernels["contrast_scalar"] = fitted["contrast_scalar"][..., 0]
        return kernels

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _FrontEnd:
        before = self.filters.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.filters.dtype != before:
            for name, exact in self._exact.items():
                setattr(self, name, exact.to(getattr(self, name)))
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Return the response ``(1, c, H, W)`` to a luminance image ``(1, 1, H, W)`` in [0, 1]."""
        self._check(image)
        response = self._convolve(image, self.filters)
        u = response[:, : self._channels]
        if len(self.filters) > self._channels:
            u = u / (1 + response[:, self._channels :])
        if self.contrast is not None:
            # Berardino's v is sqrt(q) + 1e-6. Where q = 0 (black or flat regions) the root's derivative is infinite and
            # meets u = 0 in a NaN, although u / (1 + βv) itself is smooth there: 1e-20 keeps the derivative finite and
            # right, and moves v by at most 1e-10.
            v = torch.sqrt(self._convolve(u.square(), self.contrast) + 1e-20) + 1e-6
            u = u / (1 + self.contrast_scalar * v)
        return F.softplus(u)

    def _convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        margin = kernels.shape[-1] // 2
        return F.conv2d(F.pad(x, (margin,) * 4, mode=self.padding), kernels, groups=x.shape[1])

    def _check(self, image: Tensor) -> None:
        name = type(self).__name__
        if image.ndim != 4 or image.shape[1] != 1:
            raise ValueError(
                f"{name} takes one luminance image of shape (1, 1, H, W), not {tuple(image.shape)}: "
                "fisherop.images.to_grey makes one of a colour image"
            )
        smallest = _SMALLEST_IMAGE[self.padding](self.filters.shape[-1] // 2)
        if min(image.shape[-2:]) < smallest:
            raise ValueError(
                f"{name} needs an image of at least {smallest}x{smallest} for its {self.padding} padding, not "
                f"{image.shape[-2]}x{image.shape[-1]}: take a larger one, or padding='replicate'"
            )
        if image.dtype != self.filters.dtype:
            raise ValueError(
                f"the image is {image.dtype} and the model {self.filters.dtype}: call model.to({image.dtype}) first"
            )

    def extra_repr(self) -> str:
        """List the parameters."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings.items())


# What torch.nn.functional.pad can do, and the smallest side it can pad by a margin.
_SMALLEST_IMAGE: dict[str, Callable[[int], int]] = {
    "reflect": lambda margin: margin + 1,
    "circular": lambda margin: max(margin, 1),
    "replicate": lambda margin: 1,
    "constant": lambda margin: 1,
}


def _gaussian(std: Tensor, size: int) -> Tensor:
    """Return isotropic Gaussians ``(c, 1, size, size)``, each centred and of sum 1."""
    offset = torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2
    kernel = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * std**2))
    return kernel / kernel.sum((-2, -1), keepdim=True)


class LN(_FrontEnd):
    r"""Linear-nonlinear: a centre-surround filter and a rectifier.

    .. math:: y = \varphi(D * x), \qquad D = a\,(G_c - G_s)

    :math:`G_\sigma` is a Gaussian of sum 1, :math:`\varphi` the softplus, ``*`` a correlation that keeps the image's
    size. The defaults are what Berardino fitted to human judgments of distortion.

    Parameters
    ----------
    center_std, surround_std : float
        Standard deviations c and s of the centre and of the surround, in pixels.
    amplitude : float
        Gain a of the filter.
    kernel_size : int
        Side of the kernels in pixels, odd.
    padding : {"reflect", "replicate", "circular", "constant"}
        How the image goes on past its border, as in :func:`torch.nn.functional.pad`.

    Notes
    -----
    The image is luminance in [0, 1], ``(1, 1, H, W)``, in the precision of the model; ``model.to(torch.float64)``
    changes that one and recomputes the kernels. The response has the image's shape and no unit.

    References
    ----------
    A. Berardino, V. Laparra, J. Ballé, E. P. Simoncelli, "Eigen-distortions of hierarchical representations",
    NeurIPS 2017. Parameters: A. Berardino, "Hierarchically normalized models of visual distortion sensitivity",
    PhD thesis, New York University, 2018, table 2.

    Examples
    --------
    >>> LN()(torch.rand(1, 1, 64, 48)).shape
    torch.Size([1, 1, 64, 48])
    """

    def __init__(
        self,
        center_std: float = 0.5339,
        surround_std: float = 6.148,
        *,
        amplitude: float = 1.25,
        kernel_size: int = 31,
        padding: str = "reflect",
    ) -> None:
        super().__init__(amplitude, kernel_size, padding, center_std=center_std, surround_std=surround_std)


class LG(_FrontEnd):
    r"""Linear filter with luminance gain control.

    .. math:: y = \varphi(u), \qquad u = \frac{D * x}{1 + \alpha\, G_l * x}

    Parameters
    ----------
    center_std, surround_std, luminance_std : float
        Standard deviations c, s and l of the centre, the surround and the luminance pool, in pixels.
    luminance_scalar : float
        Strength α of the luminance gain control.
    amplitude, kernel_size, padding
        As in :class:`LN`, with its notation, image, response and source.

    Examples
    --------
    >>> LG()(torch.rand(1, 1, 64, 48)).shape
    torch.Size([1, 1, 64, 48])
    """

    def __init__(
        self,
        center_std: float = 1.962,
        surround_std: float = 4.235,
        luminance_std: float = 4.235,
        luminance_scalar: float = 14.95,
        *,
        amplitude: float = 1.25,
        kernel_size: int = 31,
        padding: str = "reflect",
    ) -> None:
        super().__init__(
            amplitude,
            kernel_size,
            padding,
            center_std=center_std,
            surround_std=surround_std,
            luminance_std=luminance_std,
            luminance_scalar=luminance_scalar,
        )


class LGG(_FrontEnd):
    r"""Linear filter with luminance, then contrast gain control.

    .. math:: y = \varphi\Bigl(\frac{u}{1 + \beta v}\Bigr), \qquad u = \frac{D * x}{1 + \alpha\, G_l * x},
        \qquad v = \sqrt{G_k * u^2} + 10^{-6}

    Parameters
    ----------
    center_std, surround_std, luminance_std, contrast_std : float
        Standard deviations c, s, l and k of the centre, the surround and the two pools, in pixels.
    luminance_scalar, contrast_scalar : float
        Strengths α and β of the two gain controls.
    amplitude, kernel_size, padding
        As in :class:`LN`, with its notation, image, response and source.

    Examples
    --------
    >>> LGG()(torch.rand(1, 1, 64, 48)).shape
    torch.Size([1, 1, 64, 48])
    """

    def __init__(
        self,
        center_std: float = 0.7363,
        surround_std: float = 48.37,
        luminance_std: float = 170.99,
        luminance_scalar: float = 2.94,
        contrast_std: float = 2.658,
        contrast_scalar: float = 34.03,
        *,
        amplitude: float = 1.25,
        kernel_size: int = 31,
        padding: str = "reflect",
    ) -> None:
        super().__init__(
            amplitude,
            kernel_size,
            padding,
            center_std=center_std,
            surround_std=surround_std,
            luminance_std=luminance_std,
            luminance_scalar=luminance_scalar,
            contrast_std=contrast_std,
            contrast_scalar=contrast_scalar,
        )


class OnOff(_FrontEnd):
    """Two :class:`LGG` channels, on-centre and off-centre: of Berardino's models, the one closest to human judgments.

    Parameters
    ----------
    center_std, surround_std, luminance_std, contrast_std : (float, float)
        Standard deviations in pixels, for the on and for the off channel.
    luminance_scalar, contrast_scalar : (float, float)
        Strengths of the two gain controls, for the on and for the off channel.
    mask : bool
        Multiply the response by a soft disk: 1 up to half of the radius that fits into the image, from there a raised
        cosine down to 0. It keeps distortions off the border, where the padding makes them.
    amplitude, kernel_size, padding
        As in :class:`LN`, with its notation, image and source. The response is ``(1, 2, H, W)``: on, off.

    Examples
    --------
    >>> OnOff()(torch.rand(1, 1, 64, 48)).shape
    torch.Size([1, 2, 64, 48])
    """

    def __init__(
        self,
        center_std: tuple[float, float] = (1.237, 0.3233),
        surround_std: tuple[float, float] = (30.12, 2.184),
        luminance_std: tuple[float, float] = (76.4, 2.184),
        luminance_scalar: tuple[float, float] = (3.2637, 14.3961),
        contrast_std: tuple[float, float] = (7.49, 2.43),
        contrast_scalar: tuple[float, float] = (7.3405, 16.7423),
        *,
        mask: bool = False,
        amplitude: float = 1.25,
        kernel_size: int = 31,
        padding: str = "reflect",
    ) -> None:
        super().__init__(
            amplitude,
            kernel_size,
            padding,
            signs=(1.0, -1.0),
            center_std=center_std,
            surround_std=surround_std,
            luminance_std=luminance_std,
            luminance_scalar=luminance_scalar,
            contrast_std=contrast_std,
            contrast_scalar=contrast_scalar,
        )
        self.mask = mask
        self._settings["mask"] = mask

    def forward(self, image: Tensor) -> Tensor:
        """Return the response ``(1, 2, H, W)`` to a luminance image ``(1, 1, H, W)`` in [0, 1]."""
        response = super().forward(image)
        return response * _soft_disk(response) if self.mask else response


def _soft_disk(like: Tensor) -> Tensor:
    height, width = like.shape[-2:]
    y = torch.arange(height, dtype=like.dtype, device=like.device) - (height - 1) / 2
    x = torch.arange(width, dtype=like.dtype, device=like.device) - (width - 1) / 2
    radius = (min(height, width) - 1) / 2
    fall = (2 * torch.hypot(y[:, None], x) / radius - 1).clamp(0, 1)
    return (1 + torch.cos(torch.pi * fall)) / 2


# ------------------------------------------------------------------------------------------------- a model by its name

_FRONT_ENDS: dict[str, Callable[[], _FrontEnd]] = {"ln": LN, "lg": LG, "lgg": LGG, "onoff": OnOff}


def load(name: str, *, seed: int = 0) -> tuple[Callable[..., Any], str | None]:
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
    model = found() if _is_factory(found) else found
    if isinstance(model, type) or not callable(model):
        raise ValueError(
            f"{name!r} gives no model but {model!r}: name a torch.nn.Module, a function of an image, or a class or "
            "function without required arguments that returns one"
        )
    return model  # type: ignore[no-any-return]


def _is_factory(found: Any) -> bool:
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
