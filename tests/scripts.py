"""Run a script of the documentation as a reader would, without a display and without a network."""

import os
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fisherop import models


@contextmanager
def run(script: Path, folder: Path) -> Iterator[tuple[dict[str, Any], list[Any], list[Path]]]:
    """Run it from an empty folder; yield its names, its figures, and the files that it left there."""
    mpl = pytest.importorskip("matplotlib")
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    def unreachable(url):
        raise OSError("no network here")

    start = Path.cwd()
    plt.close("all")
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
            patch.setattr(models, "_fetch", unreachable)
            names = runpy.run_path(str(script))
        yield names, [plt.figure(number) for number in plt.get_fignums()], list(folder.iterdir())
    finally:
        os.chdir(start)
        plt.close("all")
