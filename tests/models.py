"""Ten small models, one for every kind of response and every relation of m to n, and their images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Any]


class GainControl(nn.Module):
    """Divisive normalization whose padding depends on a value of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, 4, 3, bias=False)
        self.pool = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        nn.init.uniform_(self.pool.weight, 0.1, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        pad = 1 if x.mean() < 10 else 2
        drive = self.filters(nn.functional.pad(x, (pad,) * 4, mode="reflect")) ** 2
        return drive / (0.1 + nn.functional.conv2d(drive, self.pool.weight, groups=4, padding=1))


class Attention(nn.Module):
    """A transformer layer over the rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, -2))


class Spectrum(nn.Module):
    """Log power of the image's Fourier transform."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.fft.rfft2(x).abs() ** 2 + 0.1)


class Parts(nn.Module):
    """A dictionary of responses, one of them a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.tanh(self.conv(x))
        return {"local": y, "summary": (y.mean((2, 3)), x.std()), "absent": None}


def _linear(n: int, m: int) -> Callable[[], Model]:
    return lambda: nn.Linear(n, m, bias=False)


MODELS: dict[str, tuple[Callable[[], Model], tuple[int, ...]]] = {
    "linear m<n": (_linear(25, 10), (1, 1, 1, 25)),
    "linear m=n": (_linear(12, 12), (12,)),
    "linear m>n": (_linear(9, 30), (1, 1, 9)),
    "conv relu pool": (
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3)),
        (1, 1, 12, 12),
    ),
    "gain control": (GainControl, (1, 1, 9, 9)),
    "attention": (Attention, (1, 1, 6, 8)),
    "fourier": (Spectrum, (1, 1, 8, 8)),
    "tuple": (lambda: lambda x: (x.cumsum(-1).sin(), [x.prod(-1), x[..., :3] ** 2]), (2, 7)),
    "dict": (Parts, (1, 2, 6, 5)),
    "complex": (lambda: lambda x: torch.fft.fft(x * torch.tanh(x))[..., ::2], (1, 1, 16)),
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Model, Tensor]:
    """Return a model in evaluation mode and an image for it, the same for the same seed."""
    make, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        image = torch.rand(shape, dtype=torch.float64).to(dtype)
    return (model.to(dtype).eval() if isinstance(model, nn.Module) else model), image


def dense_jacobian(model: Model, image: Tensor) -> Tensor:
    """Return the Jacobian by plain reverse-mode autograd, entry by entry, independent of the package."""

    def flat(x: Tensor) -> Tensor:
        return torch.cat([real(part).flatten() for part in parts(model(x))])

    return torch.autograd.functional.jacobian(flat, image).reshape(-1, image.numel())


def parts(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output
    return [leaf for item in items if item is not None for leaf in parts(item)]


def real(x: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones."""
    return torch.view_as_real(x) if x.is_complex() else x
