"""Four models of early vision that Berardino and colleagues fitted to human judgments of distortion.

>>> import torch
>>> LGG()(torch.rand(1, 1, 32, 32)).shape
torch.Size([1, 1, 32, 32])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LG", "LGG", "LN", "OnOff"]


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
            raise ValueError(f"padding must be one of {', '.join(map(repr, _SMALLEST_IMAGE))}, not {padding!r}")
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
