"""What a survey costs beside what it computes: one table.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/survey.py
    python benchmarks/survey.py --images 4 --size 24 --sidecars 10000 --rounds 1    # small

Overhead: a survey in process against a loop of bare calls of the same operators and solver, in turns, one thread each.
Processes: two against one, pools that are warm, models built. Sidecars: a store of so many cells written by the store
itself, and opened in a fresh process, whose peak memory includes that of the import.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
import unittest.mock
import warnings
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

import torch

import fisherop as fo
from fisherop.surveys.store import Store
from fisherop.surveys.work import TUNING

LAYERS = ["maxpool", "layer1.0", "layer2.0"]
OPEN = """
import resource, sys, time, fisherop as fo
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
survey = fo.Survey.open(sys.argv[1])
seconds = time.perf_counter() - start
opened = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = len(survey.table())
table = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(survey), seconds, time.perf_counter() - start, *(peak / 2**20 for peak in (before, opened, table)))
"""


def resnet18() -> torch.nn.Module:
    import torchvision

    return torchvision.models.resnet18(weights=None)


def pictures(count: int, size: int) -> dict[str, torch.Tensor]:
    names = fo.images.PHOTOGRAPHS[:count]
    return {name: fo.images.photograph(name, size).expand(-1, 3, -1, -1).contiguous() for name in names}


def overhead(images: dict[str, torch.Tensor], rounds: int) -> tuple[float, float]:
    """Return the seconds of bare calls and of the survey, the least of the rounds."""
    model = resnet18().eval()

    def bare() -> None:
        for image in images.values():
            for layer in LAYERS:
                op = fo.FisherOperator(fo.Layer(model, layer), image, tuning=TUNING)
                fo.eigendistortions(op, k=4, tol=1e-3, rng=0)

    def survey() -> None:
        with tempfile.TemporaryDirectory() as store:
            fo.survey({"resnet18": model}, images, LAYERS, k=4, tol=1e-3, store=store, progress=False)

    least = [float("inf")] * 2
    for _ in range(rounds):
        for i, step in enumerate((bare, survey)):
            start = time.perf_counter()
            step()
            least[i] = min(least[i], time.perf_counter() - start)
    return least[0], least[1]


def on_processes(count: int, images: dict[str, torch.Tensor], rounds: int) -> float:
    """Return the seconds of a survey on so many warm processes, the least of the rounds."""
    least = float("inf")
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        wait([pool.submit(time.sleep, 0.5) for _ in range(count)])
        for i in range(rounds + 1):  # the first builds models
            with tempfile.TemporaryDirectory() as store:
                start = time.perf_counter()
                fo.survey({"m": resnet18}, images, LAYERS, k=4, tol=1e-3, store=store, executor=pool, progress=False)
                least = min(least, time.perf_counter() - start) if i else least
    return least


def opened(count: int) -> list[float]:
    """Return what was opened, the seconds for it and with the table, and GiB at the peak before, after, and with it."""
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder, "one")
        fo.survey({"m": torch.nn.Conv2d(3, 4, 3)}, {"x": torch.rand(1, 3, 8, 8)}, store=one, k=10, progress=False)
        [sidecar] = Store(one).sidecars()
        store = Store(Path(folder, "many"))
        store.prepare()
        with unittest.mock.patch("os.fsync"):  # reading has no part in how long the disk takes
            for i in range(count):
                image, layer, model = place = [i // 40, i // 5 % 8, i % 5]
                names = {"image": f"image {image}", "layer": f"layer {layer}", "model": f"model {model}"}
                facts = {name: value for name, value in sidecar.items() if name not in ("key", "state", "finished")}
                store._write_sidecar(
                    f"{i * 2654435761 % 2**32:08x}{i:024x}", "done", facts | {"cell": names | {"place": place}}
                )
        command = [sys.executable, "-W", "ignore", "-c", OPEN, str(store.path)]
        return [float(x) for x in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--sidecars", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    images = pictures(chosen.images, chosen.size)
    print(f"{'what':<44}{'measured':>12}{'aim':>10}", flush=True)
    bare, survey = overhead(images, chosen.rounds)
    print(f"{'survey over bare solver calls':<44}{100 * (survey / bare - 1):>10.1f} %{'3 %':>10}", flush=True)
    one, two = (on_processes(count, images, chosen.rounds) for count in (1, 2))
    print(f"{'two processes against one':<44}{one / two:>12.2f}{'1.7':>10}", flush=True)
    count, seconds, table, before, peak, with_table = opened(chosen.sidecars)
    print(f"{f'opening {count:.0f} sidecars, s':<44}{seconds:>12.1f}{'20':>10}")
    print(f"{'and making the table, s':<44}{table:>12.1f}{'-':>10}")
    print(f"{f'peak memory, GiB ({before:.2f} by import)':<44}{peak:>12.2f}{'1':>10}")
    print(f"{'and with the table':<44}{with_table:>12.2f}{'-':>10}")


if __name__ == "__main__":
    main()
