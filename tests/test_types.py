"""The package as a wheel, and what mypy makes of scripts that use it installed."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
import typed_user

TESTS = Path(__file__).parent
ROOT = TESTS.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel from a copy of what a wheel is made of."""
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / "fisherop").is_dir():
        pytest.skip("the package is installed, and its source is not here")
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "fisherop", copy / "fisherop", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist"]
    subprocess.run(command, cwd=copy, capture_output=True, check=True)
    (found,) = (copy / "dist").glob("*.whl")
    return found


def test_the_wheel_holds_every_module_and_the_marker_of_types_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fisherop").rglob("*.py")}
    assert modules | {"fisherop/py.typed"} <= held
    assert all(name.startswith("fisherop/") for name in held)


@pytest.fixture(scope="module")
def found(wheel, tmp_path_factory):
    """Return mypy's errors in two scripts, as (file, line, code), where the wheel is installed."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("user")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    (packages / "user.pth").write_text(f"{folder / 'site'}\n{sysconfig.get_path('purelib')}\n")
    scripts = [shutil.copy(TESTS / name, folder) for name in ("typed_user.py", "typed_mistakes.py")]
    options = ["--strict", "--config-file=", f"--python-executable={folder / 'venv' / 'bin' / 'python'}"]
    cache = f"--cache-dir={ROOT / '.mypy_cache' / 'user'}"  # kept, for the types of torch take most of the time
    said = subprocess.run(
        [sys.executable, "-m", "mypy", *options, cache, *map(str, scripts)], cwd=folder, capture_output=True, text=True
    )
    assert said.returncode in (0, 1), said.stderr
    return re.findall(r"^(?:.*/)?(\w+\.py):(\d+): error: .*\[([a-z-]+)\]$", said.stdout, re.MULTILINE), said.stdout


@pytest.mark.slow
def test_a_typed_script_passes_mypy_strict_against_the_installed_package(found):
    errors, said = found
    assert [error for error in errors if error[0] == "typed_user.py"] == [], said


@pytest.mark.slow
def test_mistakes_are_refused_where_they_are_and_nowhere_else(found):
    errors, said = found
    lines = (TESTS / "typed_mistakes.py").read_text().splitlines()
    expected = [(i + 1, line.split("  # ")[1]) for i, line in enumerate(lines) if "  # " in line]
    assert [(int(line), code) for name, line, code in errors if name == "typed_mistakes.py"] == expected, said
    assert {name for name, _, _ in errors} == {"typed_mistakes.py"}, said


def test_the_typed_script_runs(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Softplus()).eval() for _ in range(2)]
        image = torch.rand(1, 1, 12, 12, dtype=torch.float32)
    result = typed_user.most_and_least(models[0], image, "1")
    values, first = typed_user.summary(result, tmp_path)
    assert values.shape == (2,)
    assert first.shape == (1, 12, 12)
    largest, hidden = typed_user.compared(models, image)
    assert largest > 0
    assert isinstance(hidden, bool)
