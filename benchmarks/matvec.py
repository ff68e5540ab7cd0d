"""The cost of a product with F = J^T J, in forward passes, beside plenoptic's product and torch.func's.

Every figure is a median over rounds; a round times everything in turn, so that a disturbance falls on all alike.

    python benchmarks/matvec.py                          every model, as a table
    python benchmarks/matvec.py resnet18 vgg16           some of them
    python benchmarks/matvec.py --markdown --json m.json for docs/performance.md
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherop as fo
from fisherop.models import LG, LGG, LN, Layer, OnOff

BLOCKS = (1, 4, 8, 16)
BEST_OF = 2
"""Calls in succession, of which a round keeps the faster: the first finds the caches full of other data."""
Call = Callable[[], Any]


@dataclass
class Row:
    """What one model costs: seconds of a forward pass, and everything else in forward passes, a vector.

    `peers` holds a number, or the reason why there is none.
    """

    model: str
    forward: float
    construction: float
    memory: int
    strategy: str
    J: float
    Jt: float
    blocks: dict[int, float]
    peers: dict[str, float | str] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------- the models


def network(name: str) -> nn.Module:
    """Return a torchvision network with random weights, the same every time."""
    import torchvision

    extra = {"transform_input": False, "init_weights": False} if name == "inception_v3" else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **extra).eval()
    if name == "vit_b_16":  # torchvision starts its head at zero, and so the whole Jacobian
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def portilla_simoncelli(size: int) -> nn.Module:
    """Return plenoptic's texture statistics."""
    import plenoptic

    return plenoptic.models.PortillaSimoncelli((size, size))


TORCHVISION = (
    "resnet18",
    "vgg16",
    "densenet121",
    "inception_v3",
    "efficientnet_b0",
    "mobilenet_v3_small",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    name: (partial(network, name), (1, 3, *[299 if name == "inception_v3" else 224] * 2)) for name in TORCHVISION
} | {
    "resnet18:maxpool": (lambda: Layer(network("resnet18"), "maxpool"), (1, 3, 128, 128)),
    "resnet18:layer2.0": (lambda: Layer(network("resnet18"), "layer2.0"), (1, 3, 128, 128)),
    "LN": (LN, (1, 1, 64, 64)),
    "LG": (LG, (1, 1, 64, 64)),
    "LGG": (LGG, (1, 1, 64, 64)),
    "OnOff": (OnOff, (1, 1, 64, 64)),
    "PortillaSimoncelli": (partial(portilla_simoncelli, 128), (1, 1, 128, 128)),
}


# --------------------------------------------------------------------------------------------------------- the peers


def plenoptic_product(model: nn.Module, image: Tensor) -> Callable[[Tensor], Tensor]:
    """Return F as `plenoptic.Eigendistortion` multiplies it: double backward through one retained graph."""
    from plenoptic._synthesize.autodiff import _fisher_info_matrix_vector_product

    x = image.flatten()[:, None].requires_grad_()
    y = model(x.view(image.shape)).flatten()[:, None]
    dummy = torch.ones_like(y, requires_grad=True)
    return lambda rows: _fisher_info_matrix_vector_product(y, x, rows.T.contiguous(), dummy)


def torch_func_product(model: nn.Module, image: Tensor) -> Callable[[Tensor], Tensor]:
    """Return F from torch.func: `linearize` for J, `vjp` for its transpose, and `vmap` for a block."""
    _, jvp = torch.func.linearize(model, image)
    _, vjp = torch.func.vjp(model, image)

    def product(row: Tensor) -> Tensor:
        return vjp(jvp(row.view(image.shape)))[0].flatten()

    return lambda rows: product(rows[0]) if len(rows) == 1 else torch.vmap(product)(rows)


PEERS = {"plenoptic": plenoptic_product, "torch.func": torch_func_product}


# --------------------------------------------------------------------------------------------------- the measurement


def measured(name: str, repeats: int) -> Row:
    """Time one model; whatever fails at a peer is its entry's text."""
    make, shape = MODELS[name]
    model = make().requires_grad_(False)  # as plenoptic asks for
    image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(image)
        model(image)
    start = time.perf_counter()
    op = fo.FisherOperator(model, image)
    construction = time.perf_counter() - start
    m, n = op.linearization.shape
    vectors = {b: torch.randn(b, n) for b in BLOCKS}
    change = torch.randn(1, m)
    calls: dict[str, Call] = {
        "forward": lambda: model(image),
        "J": lambda: op.linearization.jvp(vectors[1]),
        "Jt": lambda: op.linearization.vjp(change),
    }
    calls |= {f"F{b}": partial(op.rows, vectors[b]) for b in BLOCKS}
    peers: dict[str, float | str] = {}
    for peer, build in PEERS.items():
        try:
            product = build(model, image)
            for b in (1, 8):
                product(vectors[b])
                calls[f"{peer} {b}"] = partial(product, vectors[b])
        except Exception as error:  # whatever a peer raises is its result
            missing = [b for b in (1, 8) if f"{peer} {b}" not in calls]
            peers |= {f"{peer} {b}": f"{type(error).__name__}: {error}".splitlines()[0][:120] for b in missing}
    took = medians(calls, repeats)
    forward = took["forward"]
    peers |= {key: took[key] / forward / int(key.split()[1]) for key in calls if key.split()[0] in PEERS}
    return Row(
        name,
        forward,
        construction,
        op.memory,
        op.strategy,
        took["J"] / forward,
        took["Jt"] / forward,
        {b: took[f"F{b}"] / b / forward for b in BLOCKS},
        peers,
    )


def medians(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Return the median seconds of every call, all of them timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            grad = name.startswith(tuple(PEERS))
            with torch.set_grad_enabled(grad):
                best = min(seconds(call) for _ in range(BEST_OF))
            if i:  # the first round warms up
                times[name].append(best)
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(call: Call) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------------- the table

HEAD = ["model", "forward ms", "J", "Jᵀ", "F v"] + [f"F V, {b}" for b in BLOCKS[1:]]
HEAD += ["plenoptic, 1", "8", "torch.func, 1", "8", "construction", "MB held"]


def cells(row: Row) -> list[str]:
    """Return a row of the table; a peer's failure as a dash."""
    ours = [f"{x:.2f}" for x in (row.J, row.Jt, *row.blocks.values())]
    peers = [row.peers[f"{peer} {b}"] for peer in PEERS for b in (1, 8)]
    theirs = ["-" if isinstance(x, str) else f"{x:.1f}" for x in peers]
    name = row.model if row.strategy == "recorded" else f"{row.model} ({row.strategy})"
    made = f"{row.construction:.1f} s, {row.construction / row.forward:.0f} f"
    return [name, f"{row.forward * 1e3:.1f}", *ours, *theirs, made, f"{row.memory / 1e6:.0f}"]


def table(rows: list[Row], markdown: bool) -> str:
    """Return the table, and below it why a peer has no figure."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    edge, gap = ("| ", " | ") if markdown else ("", "  ")
    texts = [edge + gap.join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + edge[::-1] for line in lines]
    if markdown:
        texts.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    reasons = [f"- {row.model}: {key}: {x}" for row in rows for key, x in row.peers.items() if isinstance(x, str)]
    return "\n".join(texts + (["", *reasons] if reasons else []))


def main() -> None:
    """Measure the models named, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9, help="rounds over which medians are taken")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to a file")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; known are {', '.join(MODELS)}")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    rows = []
    for name in args.models or MODELS:
        rows.append(measured(name, args.repeats))
        print("\t".join(cells(rows[-1])), flush=True)
        gc.collect()
    print(f"\ntorch {torch.__version__}, {args.threads} threads, float32; f and ratios in forward passes, a vector\n")
    print(table(rows, args.markdown))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
