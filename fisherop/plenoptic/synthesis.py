"""The class `Eigendistortion`: plenoptic's object of one model and one image, and how it is saved and loaded."""

from __future__ import annotations

import dataclasses
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherop.eigen import eigendistortions
from fisherop.linearize.checks import buffers_kept, checked_image
from fisherop.maps import number, whole
from fisherop.operators import FisherOperator
from fisherop.result import Eigendistortions

METHODS = ["power", "exact", "randomized_svd"]
FORMAT = "fisherop.plenoptic.Eigendistortion 1"
ENTRIES = {"format", "image", "model", "response", "jacobian", "result"}


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
        TypeError, ValueError
            For another method, a k that does not fit the image, or a stop_criterion that is none.
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
        if method == "power" and whole(max_iter, "max_iter") <= 0:
            raise AssertionError(f"max_iter must be greater than zero, not {max_iter}")
        stop_criterion = number(stop_criterion, "stop_criterion")
        if not 0 <= stop_criterion < 1:
            raise ValueError(f"stop_criterion is relative to the largest eigenvalue, from 0 to 1, not {stop_criterion}")
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

        Raises
        ------
        RuntimeError
            If the model's weights were written since the object was made.

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
        at = self._operator.linearization
        at.jvp(self.image.new_zeros(0, self.image.numel()))  # a product of nothing, for weights written since
        if self._jacobian is None:
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
        except (EOFError, LookupError, RuntimeError, pickle.UnpicklingError) as error:
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
        before, self._operator = self._operator, _linearized(self._model, image)
        if self._jacobian is not None:
            response = before.linearization.response.to(image)
            same = torch.allclose(self._operator.linearization.response, response, rtol=1e-4, atol=1e-6)
            self._jacobian = self._jacobian.to(image) if same else None  # other weights have another one
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
