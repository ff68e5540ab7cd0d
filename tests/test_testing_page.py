"""The examples of docs/testing.md are tests that pass, as they stand on the page."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "testing.md"


def test_the_page_s_examples_run_under_pytest(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (conftest,) = (block for block in blocks if block.startswith("# conftest.py"))
    blocks.remove(conftest)
    (tmp_path / "conftest.py").write_text(conftest, encoding="utf-8")
    (tmp_path / "test_page.py").write_text("\n".join(blocks), encoding="utf-8")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True, cwd=PAGE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
