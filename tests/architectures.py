"""Architectures that are recorded without fallback: networks, recurrence, transformers, and ways to write a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import GainControl
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Model = Callable[[Tensor], Any]


def network(name: str) -> nn.Module:
    """Return a torchvision network with random weights."""
    torchvision = pytest.importorskip("torchvision")
    extra = {"transform_input": False, "init_weights": False} if name == "inception_v3" else {}
    if name == "vit_b_16":
        extra = {"image_size": 64}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **extra)
    if name == "vit_b_16":  # torchvision starts its head at zero, and so the whole Jacobian
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


NETWORKS: dict[str, int] = {  # and the side of the image
    "resnet18": 64,
    "vgg16": 32,
    "densenet121": 64,
    "inception_v3": 75,
    "efficientnet_b0": 64,
    "mobilenet_v3_small": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "vit_b_16": 64,
}


class Recurrent(nn.Module):
    """A recurrent network over the rows of the image."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.cell = kind(8, 5, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.flatten(1, -2))[0]  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention among the rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(1, -2)
        return self.layer(rows, rows, rows)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Two transformer layers over the rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1, -2))  # type: ignore[no-any-return]


class Texture(nn.Module):
    """A pyramid of oriented bands in the Fourier domain; their energies and the correlations of their moduli."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-1]
        fy, fx = torch.meshgrid(*[torch.fft.fftfreq(size, dtype=x.dtype)] * 2, indexing="ij")
        radius, angle = torch.hypot(fy, fx), torch.atan2(fy, fx)
        spectrum = torch.fft.fft2(x)
        bands = []
        for scale in (0.35, 0.15):
            for k in range(3):
                ring = torch.exp(-((radius / scale).clamp_min(1e-6).log() ** 2))
                lobe = torch.cos(angle - k * torch.pi / 3).clamp_min(0) ** 2
                bands.append(torch.fft.ifft2(spectrum * ring * lobe * 1j**k))
        moduli = torch.cat(bands, 1).abs().flatten(2)
        return {"energy": moduli.mean(2), "correlation": moduli @ moduli.mT, "phase": bands[0] * bands[1].conj()}


class Loop(nn.Module):
    """A list of layers, run as often as the image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            if x.mean().item() > -10:
                found.append(x)
        return found


class CachedFilter(nn.Module):
    """A filter made at the first call and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is None:
            self.filter = torch.linspace(-1, 1, 18, dtype=x.dtype).view(1, 2, 3, 3)
        return F.conv2d(x, self.filter) ** 2


class Cubed(torch.autograd.Function):
    """The third power, without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, u):  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * u


class CubedForward(Cubed):
    """The third power, with one."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def jvp(ctx, t):  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * t


class Checkpointed(nn.Module):
    """A convolution whose intermediate values are computed again on the way back."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- writes in place


def _input_written(x: Tensor) -> Tensor:
    return x.sub_(0.3).relu_() ** 2


def _column_set(x: Tensor) -> Tensor:
    y = x.sin()
    y[:, 0] = 2 * y[:, 1]
    y[..., -1].mul_(3)
    return y * x


def _transposed_written(x: Tensor) -> Tensor:
    y = 2 * x
    y.transpose(-1, -2)[..., 0].add_(x[..., 1], alpha=2)
    return y.mT * y


def _fresh_filled(x: Tensor) -> Tensor:
    y = torch.empty(1, 2, 6, 6, dtype=x.dtype).to(memory_format=torch.channels_last)
    y.copy_(x[..., :6, :6])
    y[:, 1].zero_()
    return y.softmax(-1)


def _two_views(x: Tensor) -> Tensor:
    buffer = torch.zeros(x.numel(), dtype=x.dtype)
    board = buffer.view(x.shape)
    board.copy_(x)
    buffer[-8:].mul_(board.flatten()[:8].clone())
    return board * buffer.view(x.shape).flip(-1)


def _strided_view(x: Tensor) -> Tensor:
    y = x * 2
    y.as_strided((3, 2), (8, 1), 5).cos_()
    return torch.cat([y.flatten(), y[:, :, ::2].flatten()]) ** 2


def _indices_put(x: Tensor) -> Tensor:
    y = x.flatten().clone()
    y[torch.tensor([0, 3])] = x.flatten()[4:6] ** 2
    y.index_put_((torch.tensor([1, 1]),), x.flatten()[:2], accumulate=True)
    y.scatter_add_(0, torch.tensor([5, 6]), x.flatten()[:2])
    return y.masked_fill_(y > 0.9, 0.0).sin()


def _complex_written(x: Tensor) -> Tensor:
    z = torch.fft.fft(x)
    z.real.mul_(2)
    torch.view_as_real(z)[..., 1].add_(x)
    return z.mul_(1 + 2j).conj() * z


def _scaled_constants(x: Tensor) -> Tensor:
    other = torch.linspace(0, 1, x.numel(), dtype=x.dtype).view(x.shape)
    y = torch.add(x**2, other, alpha=3)
    return y.add_(other, alpha=-2).flatten(0, 1).sub(other[0], alpha=0.5)


# ------------------------------------------------------------------------------------------------------ operations


def _orders(x: Tensor) -> list[Tensor]:
    values, places = x.flatten().sort()
    top = x.topk(3).values
    return [values.cumsum(0), x.flatten().gather(0, places.flip(0)[:5]), top, x.logcumsumexp(-1), x.cummax(-1).values]


def _resized(x: Tensor) -> list[Tensor]:
    grid = torch.tanh(x.permute(0, 2, 3, 1))
    modes = [F.interpolate(x, scale_factor=1.5, mode=mode) for mode in ("nearest", "bilinear", "bicubic", "area")]
    return [*modes, F.grid_sample(x, grid, align_corners=False), F.pixel_shuffle(x.view(1, 8, 4, 4) ** 2, 2)]


def _pooled(x: Tensor) -> tuple[Tensor, ...]:
    pools = F.adaptive_avg_pool2d(x**2, 3), F.adaptive_max_pool2d(x, 3), F.lp_pool2d(x, 2.0, 2), F.max_pool2d(x, 3, 2)
    return *pools, F.fold(F.unfold(x, 3, padding=1).sin(), (8, 8), 3, padding=1)


def _normalized(x: Tensor) -> tuple[Tensor, ...]:
    norms = F.layer_norm(x, x.shape[1:]), F.group_norm(x, 2), F.instance_norm(x), F.normalize(x, dim=1)
    return *norms, x.softmax(1), x.log_softmax(-1), x.logsumexp((2, 3))


def _branches(x: Tensor) -> Tensor:
    pad = max(int(x.sum()) % 3, 1)
    y = F.pad(x, (pad,) * 4, mode="circular")
    return y[y > y.median()].sin() if x.max().item() > 0.5 else y


def _statistic_held(x: Tensor) -> Tensor:
    with torch.no_grad():
        spread = x.std()
    return (x - x.mean()) / spread


SMALL: dict[str, Callable[[], Model]] = {
    "lstm": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "transformer": Transformer,
    "texture": Texture,
    "gain control": lambda: nn.Sequential(nn.Conv2d(2, 1, 1), GainControl()),
    "loop over layers": Loop,
    "cached buffer": CachedFilter,
    "function without jvp": lambda: lambda x: Cubed.apply(x).sin(),
    "function with jvp": lambda: lambda x: CubedForward.apply(x).sin(),
    "checkpoint": lambda: Checkpointed(reentrant=False),
    "reentrant checkpoint": lambda: Checkpointed(reentrant=True),
    "input written": lambda: _input_written,
    "column set": lambda: _column_set,
    "transposed view written": lambda: _transposed_written,
    "fresh buffer filled": lambda: _fresh_filled,
    "written through one view, read through another": lambda: _two_views,
    "strided view written": lambda: _strided_view,
    "indices put": lambda: _indices_put,
    "complex parts written": lambda: _complex_written,
    "constants added with a factor": lambda: _scaled_constants,
    "channels last": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2)).to(
        memory_format=torch.channels_last  # type: ignore[call-overload]
    ),
    "orders": lambda: _orders,
    "resized": lambda: _resized,
    "pooled": lambda: _pooled,
    "normalized": lambda: _normalized,
    "einsum": lambda: lambda x: torch.einsum("bchw,bdhw,bdij->bcij", x, x.sin(), x),
    "branches on values": lambda: _branches,
    "statistic held": lambda: _statistic_held,
    "complex exponential": lambda: lambda x: torch.exp(1j * x),
    "tuple in dict": lambda: lambda x: {"a": (x.sin(), x.prod(-1)), "b": [x.std(), None]},
    "gradient inside": lambda: torch.func.grad(lambda x: (x.sin() * x.exp()).sum()),
    "sparse matrix": lambda: lambda x: torch.eye(128, dtype=x.dtype)[::3].to_sparse() @ x.reshape(128, 1).sin(),
}


def small(name: str, dtype: torch.dtype) -> tuple[Model, Tensor]:
    """Return a small model in evaluation mode and its image of shape (1, 2, 8, 8)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SMALL[name]()
        image = torch.rand(1, 2, 8, 8, dtype=torch.float64).to(dtype)
    return (model.to(dtype).eval() if isinstance(model, nn.Module) else model), image


def large(name: str) -> tuple[nn.Module, Tensor]:
    """Return a torchvision network in evaluation mode and a float32 image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network(name).eval(), torch.rand(1, 3, NETWORKS[name], NETWORKS[name])
