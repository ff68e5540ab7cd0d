"""What a GPU gives, in one run of some minutes: every figure beside its peer, on one card and in one process.

    python benchmarks/gpu.py --json gpu.json             all figures, on the card
    python benchmarks/gpu.py --only many product         some of them
    python benchmarks/gpu.py --device cpu --tiny         the same steps on small problems, to see that they run
    python benchmarks/gpu.py --device cpu --only many --side 32 --images 16

float32, weights random, images random; the first run of everything warms the libraries up and is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import fisherop as fo
from fisherop.linearize.capture import step_by_step
from fisherop.rows import RowOperator

TOL = 1e-5
REPEATS = 20


@dataclass
class Figure:
    """A measured number, and what it is to be: at least or at most `aim`, or `aim` None for what is only told."""

    name: str
    value: float
    unit: str = ""
    aim: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Tell whether the aim is met."""
        return None if self.aim is None else (self.value >= self.aim if self.at_least else self.value <= self.aim)

    def __str__(self) -> str:
        aim = "" if self.aim is None else f"{'at least' if self.at_least else 'at most'} {self.aim:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[self.holds]
        return f"{self.name:<58} {self.value:>10.4g} {self.unit:<4} {aim:<16} {verdict:<7} {self.note}"


@dataclass(frozen=True)
class Sizes:
    """How large the problems are."""

    sides: tuple[int, ...] = (128, 224)
    side: int = 128
    images: int = 64
    singles: int = 6
    large: int = 512
    k: int = 8
    steps: int = 400
    repeats: int = REPEATS


TINY = Sizes(sides=(32,), side=16, images=2, singles=1, large=32, k=1, steps=3, repeats=1)


# ----------------------------------------------------------------------------------------------------------- problems


def resnet(layer: int | str, device: torch.device) -> nn.Module:
    """Return ResNet18 up to a layer, with random weights."""
    torch.manual_seed(0)
    return fo.Layer(torchvision.models.resnet18(weights=None), layer).eval().requires_grad_(False).to(device)


def pictures(count: int, side: int, device: torch.device) -> Tensor:
    """Return random images."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the wall time of a call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of a call, after three that are not counted."""
    for _ in range(3):
        call()
    return statistics.median(seconds(call, device) for _ in range(repeats))


# ------------------------------------------------------------------------------------------------------------ figures


def tutorial(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Both ends of ResNet18 to its third and sixth layer, against plenoptic's power iteration."""
    import plenoptic

    for layer in (3, 6):
        for side in sizes.sides:
            model, image = resnet(layer, device), pictures(1, side, device)

            def ours(model: nn.Module = model, image: Tensor = image) -> fo.Eigendistortions:
                return fo.eigendistortions(fo.FisherOperator(model, image), 2, "BE", "lanczos", tol=TOL, rng=0)

            def theirs(model: nn.Module = model, image: Tensor = image) -> Any:
                peer = plenoptic.Eigendistortion(image, model)
                with open(os.devnull, "w") as bars, contextlib.redirect_stderr(bars):
                    peer.synthesize(method="power", k=1, max_iter=sizes.steps)
                return peer

            found: list[Any] = [ours()]
            took = seconds(lambda found=found, ours=ours: found.append(ours()), device)
            peer = seconds(lambda found=found, theirs=theirs: found.append(theirs()), device)
            rows = found[-1].eigendistortions.detach().reshape(2, -1)
            products = RowOperator(fo.FisherOperator(model, image)).rows(rows)
            values = (rows * products).sum(1, keepdim=True)
            residual = float((products - values * rows).norm(dim=1).max()) / found[1].lambda_max
            name = f"layer {layer}, 3x{side}x{side}, both ends"
            note = f"{took:.2f} s against {peer:.1f} s, whose residual is {residual:.1e}"
            yield Figure(f"{name}: times faster than plenoptic", peer / took, "", 50, note=note)
            yield Figure(f"{name}: residual", float(found[1].residuals.max()), "", TOL, at_least=False)


def product(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Time a single product with ResNet18 to layer2.0, captured and step by step, and blocks of them."""
    F = fo.FisherOperator(resnet("layer2.0", device), pictures(1, sizes.side, device))
    source = torch.Generator().manual_seed(2)
    blocks = {b: torch.randn(b, F.shape[0], generator=source).to(device) for b in (1, 4, 16, 64)}
    times = {b: median(lambda V=V: F.rows(V), device, sizes.repeats) for b, V in blocks.items()}
    with step_by_step():
        launched = median(lambda: F.rows(blocks[1]), device, sizes.repeats)
    note = f"{times[1] * 1e3:.2f} ms against {launched * 1e3:.2f} ms"
    aim = 3.0 if device.type == "cuda" else None
    yield Figure("product of one vector: times faster captured", launched / times[1], "", aim, note=note)
    yield Figure("product of 16 vectors, in products of one", times[16] / times[1], "", 3, at_least=False)
    for b in (4, 64):
        yield Figure(f"product of {b} vectors, in products of one", times[b] / times[1])
    yield Figure("block size chosen", F.tuning["block"], note=F.tuning.get("layout", ""))


def many(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Images a second, all at once against one at a time."""
    model, images = resnet("layer2.0", device), pictures(sizes.images, sizes.side, device)
    results: list[Any] = []

    def together() -> None:
        results[:] = fo.eigendistortions_many(model, images, 2, "BE", "lanczos", tol=TOL, rng=0)

    def apart(count: int) -> None:
        for i in range(count):
            fo.eigendistortions(fo.FisherOperator(model, images[i : i + 1]), 2, "BE", "lanczos", tol=TOL, rng=0)

    apart(1)
    alone = seconds(lambda: apart(sizes.singles), device) / sizes.singles
    together()
    all_at_once = seconds(together, device) / len(images)
    note = f"{1 / all_at_once:.3g} against {1 / alone:.3g} images a second"
    yield Figure(f"{len(images)} images at once: times faster than one by one", alone / all_at_once, "", 10, note=note)
    used = [result.n_matvec for result in results]
    yield Figure("products of an image: the most, in the mean", max(used) / statistics.mean(used))
    yield Figure("images not converged", sum(not r.converged.all() for r in results), "", 0, at_least=False)


def large(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """VGG16's features at a large image: time and memory of several pairs at both ends."""
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None).features.eval().requires_grad_(False).to(device)
    image = pictures(1, sizes.large, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    found: list[fo.Eigendistortions] = []

    def both_ends() -> None:
        found.append(fo.eigendistortions(fo.FisherOperator(model, image), 2 * sizes.k, "BE", "lanczos", tol=TOL, rng=0))

    took = seconds(both_ends, device)
    name = f"VGG16 features, 3x{sizes.large}x{sizes.large}, {sizes.k} pairs at each end"
    yield Figure(f"{name}: time", took, "s", 120, at_least=False, note=found[0].message[:60])
    yield Figure(f"{name}: residual", float(found[0].residuals.max()), "", TOL, at_least=False)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        peak = torch.cuda.max_memory_reserved(device) / 2**30
        yield Figure(f"{name}: memory", peak, "GiB", total, at_least=False)


def truth(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Agreement with dense truth, with the host, and of products with their transposes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3)).eval()
    image = torch.rand(1, 1, 16, 16)
    host = fo.FisherOperator(net, image)
    dense = (host @ torch.eye(256)).double().numpy()
    values = np.linalg.eigvalsh(dense)
    wanted = fo.eigendistortions(host, 4, "BE", "lanczos", tol=TOL, rng=0)
    F = fo.FisherOperator(net.to(device), image.to(device))
    result = fo.eigendistortions(F, 4, "BE", "lanczos", tol=TOL, rng=0)
    gap = float(np.abs(result.eigenvalues - wanted.eigenvalues).max()) / wanted.lambda_max
    yield Figure("eigenvalues here and on the host: difference", gap, "", 2 * TOL, at_least=False)
    J = fo.JacobianOperator(resnet("maxpool", device), pictures(1, sizes.side, device))
    source = torch.Generator().manual_seed(3)
    v, u = (torch.randn(1, n, generator=source).to(device) for n in J.shape[::-1])
    left, right = (float((a.double() * b.double()).sum()) for a, b in ((J.rows(v), u), (v, J.adjoint_rows(u))))
    size = float(J.rows(v).norm() * u.norm())
    yield Figure("adjointness under max-pooling", abs(left - right) / size, "", 1e-6, at_least=False)
    if device.type == "cuda":
        yield from cupyx_truth(F, values)


def cupyx_truth(F: fo.FisherOperator, values: Any) -> Iterator[Figure]:
    """CuPy's own solvers on the CuPy twin, and through `method`."""
    try:
        from fisherop.gpu import import_cupy

        cupy = import_cupy()
    except ImportError as error:
        yield Figure("cupyx", float("nan"), "", 0, note=str(error))
        return
    from cupyx.scipy.sparse.linalg import eigsh, lobpcg

    twin = F.to_cupy()
    start = cupy.random.default_rng(0).standard_normal((len(values), 3), dtype="f4")
    found = {
        "cupyx eigsh": eigsh(twin, k=3, which="LA", tol=TOL * values[-1])[0],
        "cupyx lobpcg": lobpcg(twin, start, tol=TOL * values[-1], maxiter=300)[0],
        "method cupyx": fo.eigendistortions(F, 3, "LM", "cupyx", tol=TOL, rng=0).eigenvalues,
    }
    for name, top in found.items():
        error = float(np.abs(np.sort(cupy.asnumpy(top)) - values[-3:]).max() / values[-1])
        yield Figure(f"{name}: error of three eigenvalues", error, "", 3 * TOL, at_least=False)


SECTIONS = {"product": product, "truth": truth, "many": many, "large": large, "tutorial": tutorial}


def main() -> None:
    """Measure, print a line for every figure, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that it runs")
    parser.add_argument("--tiny", action="store_true", help="small problems, whose figures mean nothing")
    parser.add_argument("--side", type=int, metavar="PIXELS", help="of the images of `product`, `many` and `truth`")
    parser.add_argument("--images", type=int, metavar="COUNT", help="how many images `many` takes")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to a file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is at hand; --device cpu --tiny runs the same steps on the host")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}, float32\n")
    warnings.simplefilter("ignore")
    given = {name: getattr(args, name) for name in ("side", "images") if getattr(args, name) is not None}
    sizes = replace(TINY if args.tiny else Sizes(), **given)
    figures: list[Figure] = []
    start = time.perf_counter()
    for name in args.only:
        try:
            for figure in SECTIONS[name](device, sizes):
                figures.append(figure)
                print(figure, flush=True)
        except Exception as error:  # the other figures are worth having
            figures.append(
                Figure(f"{name}: failed", float("nan"), "", 0, note=f"{type(error).__name__}: {error}"[:200])
            )
            print(figures[-1], flush=True)
    took = time.perf_counter() - start
    print(f"\n{took:.0f} s in all")
    if args.json:
        facts = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "seconds": took}
        rows = [asdict(figure) | {"holds": figure.holds} for figure in figures]
        args.json.write_text(json.dumps(facts | {"figures": rows}, indent=1))


if __name__ == "__main__":
    main()
