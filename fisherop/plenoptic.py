"""The class `Eigendistortion` of plenoptic, with its names, shapes and warnings, on this package's solvers.

In a script written for plenoptic, one name changes: ``import fisherop.plenoptic as po``.

>>> import torch
>>> import fisherop.plenoptic as po
>>> model = torch.nn.Conv2d(1, 2, 3, bias=False).eval()
>>> eig = po.Eigendistortion(torch.rand(1, 1, 8, 8), model)
>>> eig.synthesize()
>>> eig.eigendistortions.shape, eig.eigenindex
(torch.Size([2, 1, 8, 8]), tensor([ 0, 63]))

The interface is that of releases 1.x and 2.x: https://docs.plenoptic.org. What differs, and why:

- ``"power"`` runs `fisherop.eigendistortions` with ``method="auto"``, which is exact for small problems and Lanczos for
  others. `stop_criterion` bounds residuals relative to the largest eigenvalue, not the change of an eigenvalue from one
  step to the next. Pairs that did not converge are told by a `fisherop.ConvergenceWarning`.
- ``"randomized_svd"`` is a block Krylov iteration that goes on until residuals are small. `p` and `q`, which set the
  accuracy there, are accepted and have no effect; no error estimate is given as a warning.
- All values descend, the k smallest too; `eigenvalues` is 1-D for every k; `k` has to fit the image.
- Vectors have a fixed sign, their entry of largest magnitude being positive, and no global random state is used.
- Models may have weights that require gradients, and may return a tuple, list or dict of tensors. Complex and half
  precision images are refused, and models that in training mode write their buffers. A Jacobian of zeros is allowed.
- The model is linearized when the object is made. Weights written later are noticed, and `synthesize` then raises
  RuntimeError; `Eigendistortion.to` linearizes again.
- `Eigendistortion.result` has residuals, bounds and what was done; nothing is printed.
- Files are this package's own: neither package reads the other's.
- In a figure all images share one grey scale, and distortions alone are scaled to be seen; the scale stands below them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from fisherop.eigen import eigendistortions
from fisherop.linearize.checks import buffers_kept, checked_image
from fisherop.maps import number, real, whole
from fisherop.operators import FisherOperator
from fisherop.result import Eigendistortions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Eigendistortion",
    "LoadWarning",
    "display_eigendistortion",
    "display_eigendistortion_all",
    "eigendistortion_imshow_all",
    "imshow",
    "remove_grad",
]

METHODS = ["power", "exact", "randomized_svd"]
FORMAT = "fisherop.plenoptic.Eigendistortion 1"
ENTRIES = {"format", "image", "model", "response", "jacobian", "result"}
Process = Callable[[Tensor], Tensor]


class LoadWarning(UserWarning):
    """A saved object differs from the one that loads it, which was told to go on all the same.

    Examples
    --------
    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warnings.warn("the models differ", LoadWarning)
    >>> caught[0].category.__name__
    'LoadWarning'
    """


class Eigendistortion:
    """The distortions of one image that a model notices most and least, by plenoptic's names.

    Parameters
    ----------
    image : Tensor
        float32 or float64; 1-D, or with a first dimension of 1. It is copied.
    model : callable
        An ``nn.Module`` or any function of one tensor. It is not copied.

    Raises
    ------
    TypeError
        If the image is not float32 or float64, or the model answers in another precision.
    ValueError
        If there is a batch of images, the model's answer is not made of tensors, or autograd cannot follow it.
    RuntimeError
        If the model answers on another device.

    Warns
    -----
    UserWarning
        If the image is not 4-D or leaves [0, 1], or the model is in training mode.

    Examples
    --------
    >>> eig = Eigendistortion(torch.rand(1, 1, 4, 4), torch.nn.AvgPool2d(2).eval())
    >>> eig.synthesize("exact")
    >>> eig.eigenvalues[[0, -1]], eig.jacobian.shape
    (tensor([0.2500, 0.0000]), torch.Size([4, 16]))
    """

    def __init__(self, image: Tensor, model: Callable[[Tensor], Any]) -> None:
        if isinstance(image, Tensor) and image.ndim > 1 and image.shape[0] != 1:
            raise ValueError("input_tensor batch dimension must be 1.")
        self._model = model
        self._operator = _linearized(model, image)
        self._jacobian: Tensor | None = None
        self._result: Eigendistortions | None = None
        _warn_of_unusual(self._operator.image, model)

    @property
    def image(self) -> Tensor:
        """The image."""
        return self._operator.image

    @property
    def model(self) -> Callable[[Tensor], Any]:
        """The model."""
        return self._model

    @property
    def jacobian(self) -> Tensor | None:
        """Derivatives of the flattened response, ``(m, n)``; None before "exact" or `compute_jacobian`."""
        return self._jacobian

    @property
    def eigendistortions(self) -> Tensor | None:
        """Eigenvectors in image shape, ``(N, *image.shape[1:])``, of unit norm, by descending eigenvalue."""
        if self._result is None:
            return None
        vectors: Tensor = self._result.eigendistortions
        return vectors.reshape(-1, *(self.image.shape if self.image.ndim == 1 else self.image.shape[1:]))

    @property
    def eigenvalues(self) -> Tensor | None:
        """Eigenvalues, ``(N,)``, descending, in the image's dtype."""
        if self._result is None:
            return None
        return torch.tensor(self._result.eigenvalues, dtype=self.image.dtype, device=self.image.device)

    @property
    def eigenindex(self) -> Tensor | None:
        """Positions in the whole spectrum, ``(N,)`` of int64: 0 the largest, n - 1 the smallest."""
        return None if self._result is None else torch.tensor(self._result.index, device=self.image.device)

    @property
    def result(self) -> Eigendistortions | None:
        """The full result, with residuals, bounds and a message: what plenoptic has no name for."""
        return self._result

    def synthesize(
        self,
        method: str = "power",
        k: int = 1,
        max_iter: int = 1000,
        p: int = 5,
        q: int = 2,
        stop_criterion: float = 1e-7,
        *,
        rng: Any = 0,
    ) -> None:
        """Find eigendistortions, and keep them in `eigendistortions`, `eigenvalues` and `eigenindex`.

        Parameters
        ----------
        method : {"power", "exact", "randomized_svd"}, optional
            "power" finds the k largest and the k smallest, "randomized_svd" the k largest, "exact" all n, with the
            Jacobian in memory.
        k : int, optional
            How many, for "power" from each end. Has no meaning for "exact".
        max_iter : int, optional
            Most steps of "power", a step being one product of the Fisher matrix with a block of vectors.
        p, q : int, optional
            Without effect: "randomized_svd" goes on until it has converged.
        stop_criterion : float, optional
            A pair is converged when ``||F v - lambda v|| <= stop_criterion * lambda_max``; what the image's dtype
            cannot reach is taken as 100 of its rounding units, 1.2e-5 in float32. Has no meaning for "exact".
        rng : optional
            Anything `numpy.random.default_rng` takes. The same number gives the same answer; None a new one each time.

        Raises
        ------
        ValueError
            For another method, or a k that does not fit the image.
        AssertionError
            If max_iter is not positive, for "power".
        RuntimeError
            If the model's weights were written since the object was made.

        Warns
        -----
        ConvergenceWarning
            Where pairs did not converge; the best are kept all the same.
        UserWarning
            For "exact" with a Jacobian of more than 1e6 entries, or more than 1e4 pixels.

        Examples
        --------
        >>> eig = Eigendistortion(torch.rand(1, 1, 8, 8), torch.nn.AvgPool2d(4).eval())
        >>> eig.synthesize(k=2)
        >>> eig.eigenindex
        tensor([ 0,  1, 62, 63])
        """
        if method not in METHODS:
            raise ValueError(f"method must be in {METHODS}, not {method!r}")
        if method == "power" and max_iter <= 0:
            raise AssertionError(f"max_iter must be greater than zero, not {max_iter}")
        n = self.image.numel()
        if method == "exact":
            self._warn_of_large_jacobian()
            jacobian = self.compute_jacobian()
            # The Jacobian is in memory: products with it cost less than those of the model.
            dense = FisherOperator(lambda x: jacobian @ x.flatten(), self.image)
            self._result = eigendistortions(dense, n, "LM", "exact", rng=rng)
            return
        k, most = whole(k, "k"), n // 2 if method == "power" else n
        if not 1 <= k <= most:
            raise ValueError(f"{method!r} at an image of {n} values finds k = 1 to {most} eigendistortions, not {k}")
        tol = max(stop_criterion, 100 * torch.finfo(self.image.dtype).eps)
        if method == "power":
            self._result = eigendistortions(self._operator, 2 * k, "BE", tol=tol, maxiter=max_iter, rng=rng)
        else:
            self._result = eigendistortions(self._operator, k, "LM", method, tol=tol, rng=rng)

    def compute_jacobian(self) -> Tensor:
        """Compute the Jacobian, keep it in `jacobian`, and return it.

        Returns
        -------
        Tensor
            ``(m, n)``, of the flattened response by the flattened image.

        Warns
        -----
        UserWarning
            If the image has more than 1e4 values.

        Examples
        --------
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> Eigendistortion(x, lambda x: x**2).compute_jacobian()
        tensor([[1., 0.],
                [0., 1.]])
        """
        if self._jacobian is None:
            at = self._operator.linearization
            m, n = at.shape
            if n > 1e4:
                warnings.warn(f"the Jacobian at {n} pixels may take too long: other methods need none", stacklevel=2)
            unit = torch.eye(min(m, n), dtype=at.dtype, device=at.device)
            self._jacobian = at.vjp(unit) if m <= n else at.jvp(unit).T.contiguous()
        return self._jacobian

    def save(self, file_path: str | os.PathLike[str]) -> None:
        """Write the image and all that was found to a file of tensors and plain data; of the model only its name.

        Parameters
        ----------
        file_path : path
            Where to write; by habit it ends in ``.pt``.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "eig.pt"
        >>> image, model = torch.rand(1, 1, 4, 4), torch.nn.AvgPool2d(2).eval()
        >>> eig = Eigendistortion(image, model)
        >>> eig.synthesize()
        >>> eig.save(path)
        >>> again = Eigendistortion(image, model)
        >>> again.load(path)
        >>> torch.equal(again.eigendistortions, eig.eigendistortions)
        True
        """
        state = {
            "format": FORMAT,
            "image": self.image,
            "model": _name(self._model),
            "response": self._operator.response,
            "jacobian": self._jacobian,
            "result": None if self._result is None else _packed(self._result),
        }
        torch.save(state, file_path)

    def load(
        self,
        file_path: str | os.PathLike[str],
        map_location: Any = None,
        raise_on_checks: bool = True,
        tensor_equality_atol: float = 1e-8,
        tensor_equality_rtol: float = 1e-5,
        **pickle_load_args: Any,
    ) -> None:
        """Read what `save` wrote into an object that was made from the same image and model, and not used yet.

        Parameters
        ----------
        file_path : path
            The file.
        map_location : optional
            Where tensors go, as in `torch.load`.
        raise_on_checks : bool, optional
            If False, warn of another image or model instead of raising; the saved image is taken, and this model.
        tensor_equality_atol, tensor_equality_rtol : float, optional
            How far the saved image and response may differ from this object's, as in `torch.allclose`.
        **pickle_load_args
            Passed to `torch.load`.

        Raises
        ------
        ValueError
            If this object was used, the file is not of this class, or image, response or model's name differ; a
            differing dtype or device raises whatever `raise_on_checks` is.

        Warns
        -----
        LoadWarning
            In place of these errors, with ``raise_on_checks=False``.
        """
        if self._result is not None:
            raise ValueError("load can only be called with a just-initialized Eigendistortion object")
        try:
            state = torch.load(file_path, map_location=map_location, **pickle_load_args)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            if "map_location" in str(error):  # of a device that is not here
                raise
            raise ValueError(f"{file_path} is not a file of tensors and plain data, or is damaged") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"the object saved at {file_path} is not an Eigendistortion of fisherop")

        if missing := ENTRIES - state.keys():
            raise ValueError(f"the file {file_path} lacks {', '.join(sorted(missing))}")
        if extra := state.keys() - ENTRIES:
            _complain(f"the file has entries of no use to this version: {', '.join(sorted(extra))}", raise_on_checks)
        operator, tolerance = self._operator, {"atol": tensor_equality_atol, "rtol": tensor_equality_rtol}
        difference = _difference(state["image"], self.image, **tolerance)
        if difference:
            fatal = raise_on_checks or difference.startswith(("different dtype", "different device"))
            _complain(f"Saved and initialized image have {difference}", fatal)
            operator = _linearized(self._model, state["image"])
        difference = _difference(state["response"], operator.response, **tolerance)
        if difference:
            _complain(f"Saved and initialized model output have {difference}", raise_on_checks)
        if state["model"] != _name(self._model):
            names = f"{state['model']} and {_name(self._model)}"
            _complain(f"Saved and initialized model have different names: {names}", raise_on_checks)
        result = state["result"]
        try:
            self._result = None if result is None else _unpacked(result, operator.image)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the result saved at {file_path} lacks an entry, or has one too many: {error}") from error
        self._operator, self._jacobian = operator, state["jacobian"]

    def to(self, *args: Any, **kwargs: Any) -> None:
        """Move or cast image, model and all that was found, and linearize again. The model changes in place.

        Parameters
        ----------
        *args, **kwargs
            As for `torch.nn.Module.to`: a device, a dtype (float32 or float64), both, or a tensor that has them.

        Raises
        ------
        TypeError
            For another dtype.

        Warns
        -----
        UserWarning
            If the model has no method ``to``; it is left as it is.

        Examples
        --------
        >>> eig = Eigendistortion(torch.rand(1, 1, 4, 4), torch.nn.AvgPool2d(2).eval())
        >>> eig.to(torch.float64)
        >>> eig.synthesize()
        >>> eig.eigendistortions.dtype
        torch.float64
        """
        image = self.image.to(*args, **kwargs)
        if image.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"an Eigendistortion is float32 or float64, not {image.dtype}")
        if hasattr(self._model, "to"):
            self._model = self._model.to(*args, **kwargs)
        else:
            warnings.warn("Unable to call model.to(), so we leave it as is.", stacklevel=2)
        self._operator = _linearized(self._model, image)
        if self._jacobian is not None:
            self._jacobian = self._jacobian.to(image)
        if self._result is not None:
            vectors = self._result.eigendistortions.to(image)
            self._result = dataclasses.replace(self._result, eigendistortions=vectors, image=self.image)

    def __repr__(self) -> str:
        model = getattr(self._model, "__name__", None) or repr(self._model).replace("\n", "\n  ")
        return f"Eigendistortion(\n  image = {self.image.shape} ({self.image.dtype}),\n  model = {model},\n)"

    def _warn_of_large_jacobian(self) -> None:
        m, n = self._operator.linearization.shape
        if m * n > 1e6:
            warnings.warn(
                f"Jacobian > 1e6 elements ({m} x {n}) and may cause out-of-memory: use method='power'", stacklevel=3
            )

    def _distortion(self, eigenindex: int) -> Tensor:
        """Return the eigendistortion of this index, in the image's shape; -1 is the last of the spectrum."""
        if self._result is None or self.eigendistortions is None:
            raise ValueError("no eigendistortions synthesized: call synthesize() first")
        n = self.image.numel()
        index = list(self._result.index)
        place = eigenindex + n if eigenindex < 0 else eigenindex
        if place not in index:
            known = ", ".join(map(str, index[:6] + (["..."] if len(index) > 6 else [])))
            raise ValueError(f"eigenindex must be the index of one of the vectors ({known}), not {eigenindex}")
        return self.eigendistortions[index.index(place)].reshape(self.image.shape)


def _linearized(model: Callable[[Tensor], Any], image: Tensor) -> FisherOperator:
    """Return the Fisher matrix; refuse what plenoptic refuses by the exceptions that it raises."""
    image = checked_image(model, image)
    with buffers_kept(model), torch.no_grad():
        response = model(image.clone())
    if not isinstance(response, (Tensor, tuple, list, dict)):
        raise ValueError(f"model does not return a torch.Tensor object but {type(response).__name__}")
    if isinstance(response, Tensor) and response.device != image.device:
        raise RuntimeError(f"model changes device of input, from {image.device} to {response.device}")
    if isinstance(response, Tensor) and response.dtype.to_real() != image.dtype:
        raise TypeError(f"model changes precision of input, from {image.dtype} to {response.dtype}")
    try:
        return FisherOperator(model, image)
    except RuntimeError as error:
        raise ValueError(f"model cannot be differentiated at this image, or casts it to NumPy: {error}") from error


def _warn_of_unusual(image: Tensor, model: Any) -> None:
    if image.ndim != 4:
        warnings.warn(f"an image usually has 4 dimensions (1, channel, height, width), not {image.ndim}", stacklevel=3)
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        warnings.warn(f"input_tensor range is {(low, high)}; images usually lie within [0, 1]", stacklevel=3)
    if getattr(model, "training", False):
        warnings.warn("model is in training mode, you probably want to call eval()", stacklevel=3)


def _difference(saved: Tensor, mine: Tensor, atol: float, rtol: float) -> str:
    for part in ("dtype", "device", "shape"):
        a, b = getattr(saved, part), getattr(mine, part)
        if a != b:
            return f"different {part}: {a} and {b}"
    if not torch.allclose(saved, mine, atol=atol, rtol=rtol):
        return f"different values: by up to {(saved - mine).abs().max():.2g}"
    return ""


def _complain(words: str, fatal: bool) -> None:
    if fatal:
        raise ValueError(words)
    warnings.warn(words, LoadWarning, stacklevel=3)


def _name(model: Any) -> str:
    return str(getattr(model, "__name__", type(model).__name__))


def _packed(result: Eigendistortions) -> dict[str, Any]:
    """Return a result as tensors and plain data; its image is kept elsewhere."""
    entries = {name: value for name, value in vars(result).items() if name != "image"}
    return {
        name: torch.tensor(value, device="cpu") if isinstance(value, np.ndarray) else value
        for name, value in entries.items()
    }


def _unpacked(entries: dict[str, Any], image: Tensor) -> Eigendistortions:
    arrays = {
        name: value.cpu().numpy()
        for name, value in entries.items()
        if isinstance(value, Tensor) and name != "eigendistortions"
    }
    return Eigendistortions(**(entries | arrays), image=image)


def remove_grad(model: torch.nn.Module) -> None:
    """Tell autograd that a model's weights are constants. It is done in place, and of no need to this package.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Examples
    --------
    >>> model = torch.nn.Linear(2, 2)
    >>> remove_grad(model)
    >>> model.weight.requires_grad
    False
    """
    for weight in (*model.parameters(), *model.buffers()):
        if weight.requires_grad:
            weight.detach_()


# ------------------------------------------------------------------------------------------------------------- figures


def imshow(
    image: Tensor | Sequence[Tensor],
    *,
    vrange: tuple[float, float] | None = None,
    zoom: float | None = None,
    title: str | Sequence[str] | None = "",
    ax: Axes | None = None,
    channel_idx: int | None = None,
    as_rgb: bool = False,
) -> Figure:
    """Draw images side by side, pixel by pixel.

    Parameters
    ----------
    image : Tensor or list of Tensor
        ``(B, C, H, W)``, all of one height and width; leading dimensions may lack.
    vrange : (float, float), optional
        The values of black and white, to which others are clipped; by default (0, 1) for images within, else each
        image's smallest and largest value.
    zoom : float, optional
        Side of a pixel in pixels of the figure: a whole number, or 1 over one. By default the smallest for which
        panels span 2.56 inches.
    title : str or list of str, optional
        Of all panels, or of each.
    ax : Axes, optional
        Where to draw a single panel, in the size that the axes have.
    channel_idx : int, optional
        Draw this channel alone.
    as_rgb : bool, optional
        Draw channels as one panel in colour, else each in grey.

    Returns
    -------
    Figure
        With one panel a channel, or one an image.

    Raises
    ------
    ValueError
        If titles are not as many as panels, or panels are several for one `ax`.

    Examples
    --------
    >>> fig = imshow(torch.rand(1, 3, 8, 8), as_rgb=True, zoom=3)
    >>> fig.axes[0].images[0].get_array().shape
    (8, 8, 3)
    """
    from fisherop import plot

    images = [image] if isinstance(image, Tensor) else image
    parts = [part for one in images for part in _parts(one, channel_idx, as_rgb)]
    titles = [title or ""] * len(parts) if title is None or isinstance(title, str) else list(title)
    if len(titles) != len(parts):
        raise ValueError(f"{len(titles)} titles for {len(parts)} panels: give as many, or one")
    if ax is not None and len(parts) != 1:
        raise ValueError(f"{len(parts)} panels do not fit one ax: pass as_rgb=True, or channel_idx")
    grid = _grid(parts[0], 1, len(parts), zoom) if ax is None else [ax]
    for place, part, words in zip(grid, parts, titles, strict=True):
        plot.show_image(place, part, vrange=vrange or _range(part))
        place.set_title(words, **_TITLE)
    return cast("Figure", grid[0].figure)


def display_eigendistortion(
    eigendistortion: Eigendistortion,
    eigenindex: int = 0,
    alpha: float = 5.0,
    process_image: Process | None = None,
    ax: Axes | None = None,
    plot_complex: str = "rectangular",
    as_rgb: bool = False,
    zoom: float | None = None,
    title: str | None = None,
    **kwargs: Any,
) -> Figure:
    """Draw the image with one eigendistortion added, clipped to [0, 1]: the figure of plenoptic 1.x.

    Parameters
    ----------
    eigendistortion : Eigendistortion
        With eigendistortions synthesized.
    eigenindex : int, optional
        Which, by its index in the spectrum: 0 is noticed most, -1 least.
    alpha : float, optional
        What it is multiplied by.
    process_image : callable, optional
        Applied to the sum before it is clipped.
    plot_complex : str, optional
        Without effect: images here are real.
    ax, as_rgb, zoom, title, **kwargs
        As in `imshow`.

    Returns
    -------
    Figure
        With one panel, or one a channel.

    Raises
    ------
    ValueError
        If there is no eigendistortion of this index.

    Examples
    --------
    >>> eig = Eigendistortion(torch.rand(1, 1, 8, 8), torch.nn.AvgPool2d(2).eval())
    >>> eig.synthesize()
    >>> display_eigendistortion(eig, -1, zoom=4).axes[0].get_title()
    'image + 5 * eigendistortion[-1]'
    """
    eigenindex, alpha = whole(eigenindex, "eigenindex"), number(alpha, "alpha")
    distorted = eigendistortion.image + alpha * eigendistortion._distortion(eigenindex)
    distorted = distorted if process_image is None else process_image(distorted)
    title = f"image + {alpha:g} * eigendistortion[{eigenindex}]" if title is None else title
    options = {"vrange": (0.0, 1.0), "ax": ax, "as_rgb": as_rgb, "zoom": zoom, "title": title} | kwargs
    return imshow(distorted, **options)


def display_eigendistortion_all(
    eigendistortion: Eigendistortion,
    eigenindex: int | Sequence[int] = (0, -1),
    alpha: float | Sequence[float] = 5.0,
    process_image: Process | None = None,
    plot_complex: str = "rectangular",
    as_rgb: bool = False,
    **kwargs: Any,
) -> Figure:
    """Draw the image, eigendistortions, and the image with each added, clipped to [0, 1]: plenoptic 1.3's figure.

    Parameters
    ----------
    eigendistortion, eigenindex, process_image, **kwargs
        As in `eigendistortion_imshow_all`.
    alpha : float or list of float, optional
        What each is multiplied by.
    plot_complex, as_rgb : optional
        Without effect: images here are real, and colour is drawn as colour.

    Returns
    -------
    Figure
        As of `eigendistortion_imshow_all`.

    Examples
    --------
    >>> eig = Eigendistortion(torch.rand(1, 1, 8, 8), torch.nn.AvgPool2d(2).eval())
    >>> eig.synthesize()
    >>> len(display_eigendistortion_all(eig).axes)
    6
    """

    def clipped(x: Tensor) -> Tensor:
        return (x if process_image is None else process_image(x)).clamp(0, 1)

    options = {"distortion_scale": alpha, "process_image": clipped} | kwargs
    return eigendistortion_imshow_all(eigendistortion, eigenindex, **options)


def eigendistortion_imshow_all(
    eigendistortion: Eigendistortion,
    eigenindex: int | Sequence[int] = (0, -1),
    channel_idx: int | None = None,
    distortion_scale: float | Sequence[float] = 5.0,
    process_image: Process | None = None,
    process_distortion: Process | None = None,
    suptitle: str = "Eigendistortions",
    suptitle_kwargs: dict[str, Any] | None = None,
    *,
    vrange: tuple[float, float] | None = None,
    zoom: float | None = None,
) -> Figure:
    """Draw the image, eigendistortions alone, and below each the image with it added: the figure of plenoptic 2.x.

    Parameters
    ----------
    eigendistortion : Eigendistortion
        With eigendistortions synthesized.
    eigenindex : int or list of int, optional
        Which, by their indices in the spectrum: 0 is noticed most, -1 least.
    channel_idx : int, optional
        Draw this channel alone; by default all, in colour.
    distortion_scale : float or list of float, optional
        What each is multiplied by.
    process_image, process_distortion : callable, optional
        Applied before drawing to the images, and to the distortions alone. Without the latter, a distortion is scaled
        so that zero is mid-grey and its largest entry black, white or a full colour; the scale stands below it.
    suptitle, suptitle_kwargs : optional
        Title of the figure, and arguments for `Figure.suptitle`.
    vrange : (float, float), optional
        The values of black and white in all images; by default (0, 1) if the image lies within, else its range.
    zoom : float, optional
        As in `imshow`.

    Returns
    -------
    Figure
        Its axes are a grid of two rows, the first of which is blank: distortions above, images below.

    Raises
    ------
    ValueError
        If there is no eigendistortion of an index, or scales are not as many.

    Examples
    --------
    >>> eig = Eigendistortion(torch.rand(1, 1, 8, 8), torch.nn.AvgPool2d(2).eval())
    >>> eig.synthesize()
    >>> fig = eigendistortion_imshow_all(eig, distortion_scale=[2, 4], zoom=8)
    >>> [ax.get_title() for ax in fig.axes[3:]]
    ['image', 'image + 2 * eigendistortion[0]', 'image + 4 * eigendistortion[-1]']
    """
    from fisherop import plot

    several: Any = eigenindex if np.ndim(eigenindex) else [eigenindex]
    indices = [whole(i, "eigenindex") for i in several]
    given = real(distortion_scale, "scales")
    scales = given.tolist() if given.ndim else [float(given)] * len(indices)
    if len(scales) != len(indices):
        raise ValueError(f"{len(scales)} scales for {len(indices)} values of eigenindex: give as many, or one")
    vectors = [eigendistortion._distortion(index) for index in indices]
    moved = [("image", eigendistortion.image)]
    for index, scale, v in zip(indices, scales, vectors, strict=True):
        moved.append((f"image + {scale:g} * eigendistortion[{index}]", eigendistortion.image + scale * v))
    images = [(title, image if process_image is None else process_image(image)) for title, image in moved]
    [original] = _parts(images[0][1], channel_idx, True)
    grid = _grid(original, 2, len(images), zoom, head=0.4 if suptitle else 0.0)
    above, below = grid[1 : len(images)], grid[len(images) :]
    grid[0].set_visible(False)
    for ax, index, v in zip(above, indices, vectors, strict=True):
        ax.set_title(f"eigendistortion[{index}]", **_TITLE)
        [part] = _parts(v if process_distortion is None else process_distortion(v), channel_idx, True)
        if process_distortion is None:
            plot.show_distortion(ax, part)
        else:
            plot.show_image(ax, part, vrange=_range(part))
    for ax, (title, image) in zip(below, images, strict=True):
        ax.set_title(title, **_TITLE)
        [part] = _parts(image, channel_idx, True)
        plot.show_image(ax, part, vrange=vrange or _range(original))
        if part.ndim == 2 and ax.images:
            ax.images[0].set_data(part.numpy())  # the numbers themselves, which the grey scale alone clips
    fig = cast("Figure", grid[0].figure)
    fig.suptitle(suptitle, **({"y": 1 - 0.1 / fig.get_figheight(), "va": "top"} | (suptitle_kwargs or {})))
    return fig


_TITLE: dict[str, Any] = {"fontsize": 9, "pad": 4}


def _grid(part: Tensor, rows: int, columns: int, zoom: float | None, head: float = 0.0) -> list[Axes]:
    """Return axes of whole pixels for panels like this one, row by row; `head` inches are left free above."""
    from matplotlib import pyplot

    zoom = None if zoom is None else number(zoom, "zoom")
    if zoom is not None and not (zoom > 0 and (zoom if zoom >= 1 else 1 / zoom) % 1 == 0):
        raise ValueError(f"zoom must be a whole number, or 1 over one, not {zoom}")
    fig = pyplot.figure(layout="none")
    signal = _is_signal(part)
    zoom = zoom or math.ceil(2.56 * fig.dpi / max(part.shape[-2:]))
    height, width = (180, 320) if signal else (round(length * zoom) for length in part.shape[-2:])
    top, title, caption, gap = (round(inches * fig.dpi) for inches in (head, 0.3, 0.3, 0.5 if signal else 0.15))
    cell = max(width, round(2.3 * fig.dpi)) + gap
    # A hundredth of a pixel more: a canvas has the whole pixels of its size, and rounding must not take one.
    whole = columns * cell + gap + 0.01, top + rows * (title + height + caption) + 0.01
    fig.set_size_inches(whole[0] / fig.dpi, whole[1] / fig.dpi)
    left, down = gap + (cell - gap - width) // 2, title + height + caption
    return [
        fig.add_axes((x / whole[0], 1 - (y + height) / whole[1], width / whole[0], height / whole[1]))
        for y in (top + title + row * down for row in range(rows))
        for x in (left + column * cell for column in range(columns))
    ]


def _parts(image: Tensor, channel_idx: int | None, as_rgb: bool) -> list[Tensor]:
    """Return what is drawn side by side: of each image one channel, all in colour, or each in grey."""
    image = image.detach().cpu()
    if image.ndim < 3:
        return [image]
    images = image.reshape(-1, *image.shape[-3:])
    if channel_idx is not None:
        return list(images[:, whole(channel_idx, "channel_idx")])
    if as_rgb and images.shape[1] > 1:
        return list(images)
    return list(images.flatten(0, 1))


def _is_signal(part: Tensor) -> bool:
    return part.ndim < 2 or 1 in part.shape[-2:]


def _range(image: Tensor) -> tuple[float, float] | None:
    if _is_signal(image):
        return None
    low, high = float(image.min()), float(image.max())
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high if high > low else low + 1)
