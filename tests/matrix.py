"""Test against several versions of Python, SciPy, NumPy and torch, and print what passed with which, as a table.

    python tests/matrix.py [--folder FOLDER] [NAME ...]

Each set of versions gets a fresh environment in FOLDER, by default a temporary one; where its environment is already
there, it is used again. Pythons are found as ``python3.11`` and so on; pyenv shows several with
``PYENV_VERSION=3.11.7:3.13.0``. PRIMME is built from source, for which Debian needs liblapack-dev, libopenblas-dev and
gfortran; where it cannot be built, its tests are skipped, and the table says so.

A plain script, for each set is one list of requirements and one command: there is nothing here for nox to add.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
SETS = {
    "oldest": ("3.11", ["scipy==1.15.*", "numpy==2.0.*", "torch==2.6.*"]),
    "middle": ("3.11", ["scipy==1.17.*", "torch==2.13.*"]),
    "newest": ("3.13", ["scipy>=1.18", "numpy", "torch"]),
}
TOOLS = ["pytest", "pytest-xdist", "hypothesis", "mypy", "setuptools>=77"]
PACKAGES = ["python", "scipy", "numpy", "torch", "primme", "pylops", "scikit-learn", "joblib", "cloudpickle"]
FILES = "davidson eigen elsewhere faults import interop lanczos linearize noise nullspace operators recorded sums types"
TESTS = [f"tests/test_{name}.py" for name in FILES.split()]
KINDS = ("passed", "skipped", "failure", "error")
VERSIONS = """
import importlib.metadata as m, json, platform, sys
found = {d.metadata["name"].lower(): d.version for d in m.distributions()}
print(json.dumps({p: platform.python_version() if p == "python" else found.get(p, "") for p in sys.argv[1:]}))
"""


def main(argv: list[str] | None = None) -> int:
    """Run the sets named, print the table, and return 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SETS)}; by default all")
    parser.add_argument("--folder", type=Path, help="where environments and reports are kept")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="matrix-"))
    reports = [run(name, folder.resolve() / name) for name in arguments.names or SETS]
    print(table(reports))
    return int(any(report["rc"] for report in reports))


def run(name: str, folder: Path) -> dict:
    """Install one set and test with it: returns versions, the exit status, and outcomes by what was tried."""
    version, requirements = SETS[name]
    python = folder / "bin" / "python"
    if not python.exists():
        call([f"python{version}", "-m", "venv", folder])
        call([python, "-m", "pip", "install", "-q", *requirements, f"{ROOT}[interop]", *TOOLS])
        if call([python, "-m", "pip", "install", "-q", "primme"], check=False):
            print(f"{name}: primme could not be built; its tests are skipped", file=sys.stderr)
    shown = subprocess.run([python, "-c", VERSIONS, *PACKAGES], capture_output=True, text=True, check=True)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    rc = call([python, "-m", "pytest", "-q", "-n", "1", f"--junit-xml={report}", *TESTS], check=False)
    return {"name": name, "rc": rc, "versions": json.loads(shown.stdout), "outcomes": outcomes(report)}


def call(command: list, *, check: bool = True) -> int:
    """Run a command in the checkout, on one thread."""
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | quiet, check=check).returncode


def outcomes(report: Path) -> dict[str, Counter]:
    """Count passed, failed and skipped tests by the package and part that they try, or by their file."""
    found: dict[str, Counter] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tried = [p.get("value", "") for p in case.iter("property") if p.get("name") == "checks"]
        kind = next((kind for kind in KINDS if case.find(kind) is not None), "passed")
        for key in tried or [f"`{case.get('classname', '').replace('.', '/')}.py`"]:
            found.setdefault(key, Counter())[kind] += 1
    return found


def table(reports: list[dict]) -> str:
    """Return the table in Markdown: a column for each set of versions, a row for each thing tried."""
    lines = ["| | " + " | ".join(report["name"] for report in reports) + " |", "|---" * (len(reports) + 1) + "|"]
    for package in PACKAGES:
        lines.append(f"| {package} | " + " | ".join(report["versions"][package] or "none" for report in reports) + " |")
    rows = sorted({key for report in reports for key in report["outcomes"]}, key=lambda key: (key[0] == "`", key))
    for key in rows:
        cells = []
        for report in reports:
            counts = report["outcomes"].get(key, Counter())
            cells.append(", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]))
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
