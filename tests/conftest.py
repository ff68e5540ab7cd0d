"""One thread, for the small models here gain nothing from more, and Hypothesis profiles."""

import os
from importlib.util import find_spec

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from fisherop.testing import strategies

strategies.register_profiles()

EXAMPLES_NEED = {"fisherop.images": "skimage", "fisherop.plenoptic": "matplotlib"}
"""Modules whose examples draw or show a photograph, and the package that does it."""


def pytest_addoption(parser):
    """Add an option for machines that have a GPU, where a skipped test would look like a passed one."""
    parser.addoption("--require-gpu", action="store_true", help="fail tests marked gpu where they would be skipped")


def pytest_collection_modifyitems(items):
    """Skip what needs a CUDA device where there is none, and examples that need a package that is not installed."""
    absent = {module: package for module, package in EXAMPLES_NEED.items() if not find_spec(package)}
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for module in absent:
            if isinstance(item, pytest.DoctestItem) and item.name.startswith(f"{module}."):
                item.add_marker(pytest.mark.skip(reason=f"needs {absent[module]}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn the skip of a test that needs a GPU, or CuPy, into a failure where that was asked for."""
    report = (yield).get_result()
    if report.skipped and item.get_closest_marker("gpu") and item.config.getoption("--require-gpu"):
        report.outcome = "failed"
        report.longrepr = f"--require-gpu was given: {report.longrepr[-1]}"
