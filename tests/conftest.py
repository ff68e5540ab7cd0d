"""One thread, for the small models here gain nothing from more, and Hypothesis profiles."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from fisherop.testing import strategies

strategies.register_profiles()


def pytest_addoption(parser):
    """Add an option for machines that have a GPU, where a skipped test would look like a passed one."""
    parser.addoption("--require-gpu", action="store_true", help="fail tests marked gpu where they would be skipped")


def pytest_collection_modifyitems(items):
    """Skip what needs a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn the skip of a test that needs a GPU, or CuPy, into a failure where that was asked for."""
    report = (yield).get_result()
    if report.skipped and item.get_closest_marker("gpu") and item.config.getoption("--require-gpu"):
        report.outcome = "failed"
        report.longrepr = f"--require-gpu was given: {report.longrepr[-1]}"
