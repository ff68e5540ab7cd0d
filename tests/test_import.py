"""What `import fisherop` costs and brings along, in a fresh process, where torch and scipy.sparse.linalg are there."""

import ast
import subprocess
import sys

import pytest

OPTIONAL = {"matplotlib", "cupy", "torchvision", "dask", "distributed", "skimage", "tqdm", "PIL", "plenoptic", "pandas"}
LIMIT = 0.1  # seconds of processor time
RUNS = 3

LISTED = """
import sys, torch, scipy.sparse.linalg
before = set(sys.modules)
for stream in (sys.stdout, sys.stderr):
    print("--", file=stream)
import fisherop
for stream in (sys.stdout, sys.stderr):
    print("--", file=stream)
print({name.partition(".")[0] for name in set(sys.modules) - before})
print({name for name in fisherop.__all__ if name not in vars(fisherop)} ^ set(fisherop._LOADED_WHEN_NAMED))
"""

# Bytecode is kept, as that of an installed package is, wherever this runs.
TIMED = """
import sys, time
import torch, scipy.sparse.linalg
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
start = time.process_time()
import fisherop
print(time.process_time() - start)
"""


# What torch does once in a process, and may warn of, is done for each of these here.
USED = """
import warnings
import numpy, torch, scipy.sparse.linalg, fisherop as fo
warnings.simplefilter("error")
torch.manual_seed(0)
for model in (fo.OnOff(), torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()), lambda x: x.sort().values):
    F = fo.FisherOperator(model, torch.rand(1, 1, 16, 16))
    F @ numpy.ones((256, 3))
    fo.eigendistortions(F, k=2, which="BE", rng=0)
warnings.filterwarnings("ignore", "Implicitly cleaning up")  # at exit, of a folder that torch 2.6 leaves
"""


def fresh(code, *arguments):
    """Return what a new process of Python prints on this."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def printed():
    return fresh(LISTED)


def test_importing_brings_no_optional_package(printed):
    brought = ast.literal_eval(printed.stdout.splitlines()[-2])
    assert "fisherop" in brought
    assert brought & OPTIONAL == set()


def test_importing_is_silent(printed):
    for stream in (printed.stdout, printed.stderr):
        assert stream.split("--\n")[1] == ""


def test_every_public_name_is_there_but_those_loaded_when_named(printed):
    assert printed.stdout.splitlines()[-1] == "set()"


def test_importing_adds_less_than_a_tenth_of_a_second(record_property, tmp_path):
    # The least of several: what else goes on only adds to a run, and the first one compiles.
    spent = min(float(fresh(TIMED, str(tmp_path)).stdout) for _ in range(RUNS))
    record_property("seconds", spent)
    assert spent < LIMIT


def test_the_first_operators_of_a_process_warn_of_nothing():
    used = fresh(USED)
    assert (used.stdout, used.stderr) == ("", "")
