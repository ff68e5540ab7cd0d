"""Torch's default device and dtype are the user's: whatever they are, an operator computes where its image is."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import fisherop as fo

IMAGE = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
VARIANCES = torch.linspace(1, 2, 8)
METHODS = ("auto", "exact", "lanczos", "arpack", "lobpcg", "power", "nullspace")
WITHIN = {
    "mask": IMAGE > 0.3,
    "pixels": fo.restrict.Pixels([(0, 1), (3, 4), (7, 7)]),
    "places": [5, 6, 70],
    "channel": fo.restrict.Channel(0),
    "band": fo.restrict.Band(0.0, 0.3),
    "tensor": torch.linalg.qr(torch.rand(144, 5, generator=torch.Generator().manual_seed(1)))[0],
    "array": np.linalg.qr(np.random.default_rng(1).standard_normal((144, 5)))[0],
}
NOISES = {
    "variances": fo.noise.Gaussian(VARIANCES),
    "numbers": fo.noise.Gaussian(VARIANCES.tolist()),
    "Poisson": fo.noise.Poisson(),
    "precision": fo.noise.Custom(lambda rows: 2 * rows),
}


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 5, stride=2), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 2, 3), nn.Softplus()
    return nn.Sequential(*layers).eval()


NETWORK = network()


def writes(x):
    """Return a response whose program needs the places of views in memory."""
    y = x.clone()
    y[..., ::2] *= 2
    y.transpose(-1, -2)[0].sin_()
    return y.exp(), torch.fft.fft(y)


def operator(**settings):
    return fo.FisherOperator(NETWORK, IMAGE, **settings)


def pairs(op, **settings):
    return fo.eigendistortions(op, rng=0, **settings).eigenvalues


TASKS = {
    "products": lambda: operator() @ np.ones(144, dtype="f"),
    "writes in place": lambda: [fo.FisherOperator(writes, IMAGE).strategy == "recorded"],
    **{method: lambda method=method: pairs(operator(), k=3, which="LM", method=method) for method in METHODS},
    **{f"within {name}": lambda within=within: pairs(operator(within=within)) for name, within in WITHIN.items()},
    **{f"noise {name}": lambda noise=noise: pairs(operator(noise=noise)) for name, noise in NOISES.items()},
    "smallest": lambda: pairs(operator(), k=138, which="SM", method="nullspace")[:3],
    "metric": lambda: pairs(operator(), M=np.diag(np.linspace(1, 2, 144))),
    "metric operator": lambda: pairs(operator(), which="LM", M=fo.FisherOperator(lambda x: [x, x**2], IMAGE)),
    "matrix": lambda: pairs(np.diag(np.arange(1.0, 50.0))),
    "sum": lambda: pairs(fo.sum_fisher([operator(), operator(noise=fo.noise.Poisson())])),
    "many": lambda: [r.eigenvalues for r in fo.eigendistortions_many(NETWORK, [IMAGE, 0.5 * IMAGE], rng=0)],
    "projection": lambda: fo.project_to_null(operator(), IMAGE).image.numpy(),
    "trace": lambda: [fo.trace(operator(), rng=0).value],
    "density": lambda: fo.spectral_density(operator(), rng=0).eigenvalues,
}


@contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore::fisherop.ConvergenceWarning")
@pytest.mark.parametrize("default", [lambda: torch.device("meta"), double_by_default], ids=["meta", "float64"])
@pytest.mark.parametrize("task", TASKS)
def test_results_do_not_depend_on_torchs_default_device_and_dtype(task, default):
    wanted = np.array(TASKS[task]())
    with default():
        found = np.array(TASKS[task]())
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
