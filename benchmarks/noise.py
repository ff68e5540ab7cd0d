"""The cost of response noise, restrictions and metrics: products with F, in products with F of unit noise.

Every figure is a median of ratios over rounds; a round times everything in turn, so that a disturbance falls on all
alike.

    python benchmarks/noise.py                 every model, as a table
    python benchmarks/noise.py resnet18        some of them
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fisherop as fo
from fisherop.compare import Lifted
from fisherop.metric import Metric, generalized
from fisherop.rows import RowOperator

Product = Callable[[Tensor], Any]


class Rates(nn.Module):
    """A model whose response is made positive, as a Poisson rate has to be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Rectify the model's response."""
        return nn.functional.softplus(self.model(x))


def resnet18(layer: str) -> nn.Module:
    """Return a layer of torchvision's network with random weights, the same every time."""
    import torchvision

    torch.manual_seed(0)
    return fo.Layer(torchvision.models.resnet18(weights=None).eval(), layer)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LN": (fo.LN, (1, 1, 64, 64)),
    "OnOff": (fo.OnOff, (1, 1, 64, 64)),
    "resnet18": (lambda: resnet18("fc"), (1, 3, 128, 128)),
    "resnet18:layer2.0": (lambda: resnet18("layer2.0"), (1, 3, 128, 128)),
    "resnet18:maxpool": (lambda: resnet18("maxpool"), (1, 3, 128, 128)),
}


def noises(m: int) -> dict[str, Any]:
    """Return every noise that costs O(m) a product."""
    factor = torch.randn(m, 8, generator=torch.Generator().manual_seed(0))
    return {
        "variances": fo.noise.Gaussian(torch.linspace(0.5, 2, m)),
        "low rank 8": fo.noise.Gaussian((factor, 1.0)),
        "Poisson": fo.noise.Poisson(),
        "Bernoulli": fo.noise.Bernoulli(),
        "Categorical": fo.noise.Categorical(),
    }


def restrictions(image: Tensor) -> dict[str, Any]:
    """Return a mask of the left half, and a band."""
    return {"mask": torch.arange(image.shape[-1]) < image.shape[-1] // 2, "band": fo.restrict.Band(0.0, 0.25)}


def metrics(op: fo.FisherOperator) -> dict[str, Product]:
    """Return what a solver multiplies by for F v = lambda M v: M a diagonal, or F of the same cost and a floor."""
    diagonal = generalized(RowOperator(op), torch.linspace(0.5, 2, op.shape[0]))
    metric = Metric(RowOperator(op), Lifted(RowOperator(op), 0.1))
    return {"M diagonal": diagonal.rows, "M = F + floor": lambda rows: (op.rows(rows), metric.rows(rows))}


def ratios(name: str, rounds: int, block: int) -> dict[str, float]:
    """Return the cost of a product under every noise, restriction and metric, over that of a plain one."""
    make, shape = MODELS[name]
    model = Rates(make()).requires_grad_(False)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    plain = fo.FisherOperator(model, image)
    tuning = plain.tuning
    ops = {"plain": plain, "plain again": fo.FisherOperator(model, image, tuning=tuning)}
    for kind, noise in noises(len(plain.response)).items():
        ops[kind] = fo.FisherOperator(model, image, noise, tuning=tuning)
    for kind, within in restrictions(image).items():
        ops[kind] = fo.FisherOperator(model, image, within=within, tuning=tuning)
    products: dict[str, Product] = {kind: op.rows for kind, op in ops.items()} | metrics(plain)
    vectors = {kind: torch.randn(block, ops.get(kind, plain).shape[0]) for kind in products}
    times: list[dict[str, float]] = []
    for i in range(rounds + 1):
        took = {kind: min(seconds(product, vectors[kind]) for _ in range(2)) for kind, product in products.items()}
        if i:  # the first round warms up
            times.append(took)
    return {
        kind: statistics.median(took[kind] / took["plain"] for took in times) for kind in products if kind != "plain"
    }


def seconds(product: Product, rows: Tensor) -> float:
    """Return the wall time of one product."""
    start = time.perf_counter()
    product(rows)
    return time.perf_counter() - start


def main() -> None:
    """Measure the models named, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--rounds", type=int, default=15, help="rounds over which medians are taken")
    parser.add_argument("--block", type=int, default=1, help="vectors in a product")
    args = parser.parse_args()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; known are {', '.join(MODELS)}")
    for i, name in enumerate(args.models or MODELS):
        row = ratios(name, args.rounds, args.block)
        if i == 0:
            print("  ".join([f"{'model':<18}", *row]))
        print("  ".join([f"{name:<18}", *(f"{ratio:>{len(kind)}.2f}" for kind, ratio in row.items())]), flush=True)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, float32, blocks of {args.block}")


if __name__ == "__main__":
    main()
