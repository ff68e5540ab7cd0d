"""Models of surveys in tests, where workers can import them."""

import os
import time

import torch
from torch import nn


def small() -> nn.Module:
    """Return a network with random weights, which the caller has seeded."""
    return nn.Sequential(nn.Conv2d(3, 6, 5), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3))


def resnet18() -> nn.Module:
    """Return ResNet18 with random weights."""
    import torchvision

    return torchvision.models.resnet18(weights=None)


class Slow(nn.Module):
    """A model that takes a while."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return torch.tanh(x.sum(1))


class Grey(nn.Module):
    """A model that takes one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(x))


class Flaky(nn.Module):
    """A model that fails as long as a file named in the environment exists."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.path.exists(os.environ.get("SURVEY_FLAKY", "")):
            raise RuntimeError("it rains")
        return torch.tanh(x[:, :, ::2])


class Deadly(nn.Module):
    """A model that takes its process with it at images brighter than a half."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.mean()) > 0.5:
            os._exit(1)
        return torch.tanh(x[:, :, ::2])
