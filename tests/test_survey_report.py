"""The page of a survey in a real browser, and surveys on the command line."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import survey_models
import torch

import fisherop as fo
from fisherop.__main__ import main
from fisherop.surveys import config, report

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

CONFIG = """
store = "runs"
k = 2
tol = 1e-3
layers = ["0", "2"]

[models]
own = "survey_models:small"
flaky = "survey_models:Flaky"

[images]
files = ["*.png"]
size = 12

[noise]
kind = "Gaussian"
covariance = 2.0
"""


@pytest.fixture(autouse=True)
def _no_rain(monkeypatch):
    monkeypatch.setenv("SURVEY_FLAKY", "")


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    images = {name: torch.rand(1, 3, 12, 12) for name in ("<first> & co", "second")}
    models = {"small": survey_models.small, "grey": survey_models.Grey}
    store = tmp_path_factory.mktemp("store")
    return fo.survey(models, images, {"small": ["0", "2"]}, store=store, k=3, tol=1e-3, spectrum=True)


@pytest.fixture(scope="module")
def page(survey, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    survey.report(path, title="A <title> & more")
    return path


class Links(HTMLParser):
    """Collects all that a page would load, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.images = 0

    def handle_starttag(self, tag, attrs):
        self.images += tag == "img"
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]


def test_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.found)
    assert not re.search(r"@import|url\((?!#)|<link|<script src", text)
    assert links.images == 2 * 2 * 4
    assert "<first>" not in text
    assert "&lt;first&gt; &amp; co" in text


def browser(*arguments: str, profile: Path) -> subprocess.CompletedProcess[bytes]:
    name = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if name is None:
        pytest.skip("there is no Chromium here")
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    return subprocess.run(
        [name, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={profile}", *arguments],
        capture_output=True,
        timeout=100,
        check=True,
    )


def test_browser_shows_the_page_and_sorts_its_table(page, survey, tmp_path):
    probe = """<script>
    window.addEventListener("load", function () {
      var heads = document.querySelectorAll("th"), wrong = 0;
      heads[4].click();
      var values = Array.from(document.querySelectorAll("tbody tr")).map(r => parseFloat(r.cells[4].textContent));
      document.querySelectorAll("img").forEach(i => { if (!i.complete || !i.naturalWidth) wrong++; });
      var note = document.createElement("div");
      note.id = "probe";
      note.textContent = JSON.stringify({values: values, wrong: wrong,
        loaded: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
        svg: document.querySelectorAll("figure svg").length,
        wide: document.documentElement.scrollWidth <= window.innerWidth});
      document.body.appendChild(note);
    });</script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    dom = browser("--dump-dom", f"file://{probed}", profile=tmp_path / "profile").stdout.decode()
    import json

    found = json.loads(re.search(r'<div id="probe">(.*?)</div>', dom)[1])
    values = survey.table().eigenvalue
    assert len(found["values"]) == len(values)
    np.testing.assert_allclose(found["values"], np.sort(values), rtol=1e-3)
    assert (found["wrong"], found["loaded"], found["svg"], found["wide"]) == (0, 0, 2, True)
    shot = tmp_path / "shot.png"
    browser(f"--screenshot={shot}", "--window-size=1280,1500", f"file://{page}", profile=tmp_path / "profile2")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (1500, 1280, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_page_of_failures_alone_and_of_several_settings(tmp_path):
    bad = fo.survey({"grey": survey_models.Grey}, {"x": torch.rand(1, 3, 9, 9)}, store=tmp_path / "bad")
    bad.report(tmp_path / "bad.html")
    assert "Failed" in (tmp_path / "bad.html").read_text()
    for k in (1, 2):
        fo.survey({"m": survey_models.Flaky}, {"x": torch.rand(1, 1, 9, 1)}, store=tmp_path / "two", k=k)
    fo.Survey.open(tmp_path / "two").report(tmp_path / "two.html")
    assert (tmp_path / "two.html").read_text().count("class=group") == 2


def figures(monkeypatch) -> list:
    """Return the list that figures of later pages go to."""
    drawn: list = []
    write = report._svg
    monkeypatch.setattr(report, "_svg", lambda fig: drawn.append(fig) or write(fig))
    return drawn


def scaled(gain: float, x: torch.Tensor) -> torch.Tensor:
    return gain * torch.sin(x * torch.linspace(0.1, 1, x.shape[-1]))


@pytest.mark.parametrize("spectrum", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_spectra_of_all_models_lie_within_the_axes_and_zeros_move_no_axis(tmp_path, monkeypatch, spectrum, order):
    gains = {"zero": 0.0, "small": 1e-2, "large": 1e2, "tiny": 1e-9}
    models = {name: partial(scaled, gain) for name, gain in list(gains.items())[::order]}
    images = {"x": torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    survey = fo.survey(models, images, store=tmp_path, spectrum=spectrum, progress=False)
    drawn = figures(monkeypatch)
    survey.report(tmp_path / "page.html")
    panels = dict(zip(models, drawn[1].axes, strict=False))
    low, high = panels["large"].get_ylim()
    values = {name: np.concatenate([line.get_ydata() for line in ax.lines]) for name, ax in panels.items()}
    assert all(((low < values[name]) & (values[name] < high)).all() for name in ("small", "large"))
    assert (min(map(len, (values["small"], values["large"]))) > 0) & (high < 1e3 * values["large"].max())
    assert low > 1e-13 * high
    words = {name: [text.get_text() for text in ax.texts] for name, ax in panels.items()}
    assert words == {"zero": ["zero"], "tiny": ["below this range"], "small": [], "large": []}


def test_page_of_what_notices_nothing_says_zero_and_warns_of_nothing(tmp_path, monkeypatch):
    images = {"x": torch.rand(1, 1, 8, 8)}
    for spectrum in (False, True):
        survey = fo.survey({"m": partial(scaled, 0.0)}, images, store=tmp_path, spectrum=spectrum, progress=False)
        drawn = figures(monkeypatch)
        survey.report(tmp_path / "page.html")
        assert [text.get_text() for fig in drawn for ax in fig.axes for text in ax.texts][-1] == "zero"


def shown(page: Path) -> list[np.ndarray]:
    found = re.findall(r"data:image/png;base64,([^\"]+)", page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


@pytest.mark.parametrize(("gain", "offset"), [(255.0, 0.0), (2.0, -1.0), (0.0, 7.0)])
def test_image_beyond_0_and_1_is_drawn_in_its_own_range_which_the_page_says(tmp_path, gain, offset):
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    models = {"m": torch.nn.Conv2d(3, 4, 3)}
    for name, image in {"unit": x, "own": gain * x + offset}.items():
        survey = fo.survey(models, {"x": image}, store=tmp_path / name, k=1, which="LM", progress=False)
        survey.report(tmp_path / f"{name}.html")
    assert "black is" not in (tmp_path / "unit.html").read_text()
    assert (
        f"black is {float((gain * x + offset).min()) - 0.5 * (gain == 0):.3g}, white"
        in (tmp_path / "own.html").read_text()
    )
    [unit, _], [own, _] = shown(tmp_path / "unit.html"), shown(tmp_path / "own.html")
    assert abs(own.mean() - (unit.mean() if gain else 127.5)) < 10


def test_damaged_cell_is_a_line_on_the_page(survey, tmp_path):
    shutil.copytree(survey.path, tmp_path / "store")
    victim = sorted((tmp_path / "store").rglob("*.npz"))[0]
    victim.write_bytes(victim.read_bytes()[:-9])
    fo.Survey.open(tmp_path / "store").report(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert f"{victim.name} is not as it was written: run the survey again" in text
    assert len(shown(tmp_path / "page.html")) == 3 * 4


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (14, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels if i else pixels[..., 0]).save(f"photo{i}.png")
    Path("config.toml").write_text(CONFIG)
    return tmp_path


def test_command_computes_a_survey_resumes_it_and_reports(folder, capsys):
    assert main(["survey", "config.toml"]) == 1  # Flaky has no layers
    said = capsys.readouterr()
    assert "<Survey of 8 cells: 4 done, 4 failed>" in said.out
    assert "has no layer '0'" in said.out
    survey = fo.Survey.open("runs")
    assert (survey.images, survey.models) == (("photo0", "photo1"), ("own", "flaky"))
    assert survey.settings()["noise"] == "Gaussian"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    (folder / "config.toml").write_text(CONFIG.replace('flaky = "survey_models:Flaky"', ""))
    assert main(["survey", "config.toml", "--retry-failed"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == before
    assert main(["report", "runs", "--out", "page.html", "--pictures", "1"]) == 0
    assert "1 more images are in the store" in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("store", "sotre"), "has sotre"),
        (("k = 2", "k = "), "is no TOML"),
        (("*.png", "*.jpg"), "no file fits '*.jpg'"),
        (("Gaussian", "Weird"), "kind of noise must be one of"),
        (("covariance", "gain"), "noise: "),
        (('"survey_models:small"', "3"), "a model is named by text"),
        (('"*.png"]', '"*.png"]\ngrey = "no"'), "images.grey must be true or false, not 'no'"),
        (("k = 2", 'k = 2\nspectrum = "yes"'), "spectrum must be true or false, not 'yes'"),
        (("k = 2", 'k = "2"'), "k must be a whole number"),
        (("k = 2", "seed = true"), "seed must be a whole number"),
        (("k = 2", "seed = -1"), "seed must be at least 0, not -1"),
        (('store = "runs"', 'store = ""'), "store must name a folder"),
        (("size = 12", 'size = "12"'), "images.size must be a whole number"),
        (("size = 12", "size = 0"), "images.size is in pixels"),
        (("size = 12", 'dtype = ["float32"]'), "images.dtype must be text"),
        (('["*.png"]', '"*.png"'), "images.files must be a list, not '*.png'"),
        (('["*.png"]', "[1]"), "images.files must be a list of texts"),
        (('files = ["*.png"]', ""), "images names none"),
        (('files = ["*.png"]', 'photographs = ["chelsee"]'), "images.photographs has 'chelsee'"),
        (('["0", "2"]', '"0"'), "layers must be a list"),
        (('layers = ["0", "2"]', 'layers.own = "0"'), "layers.own must be a list"),
        (('store = "runs"', "store = 3"), "store must be text"),
        (('store = "runs"', ""), "'store' is missing"),
        (("[noise]", '[run]\nworkers = "4"\n[noise]'), "run.workers must be a whole number"),
        (("[noise]", "[run]\nworkers = -1\n[noise]"), "run.workers and run.retries must not be negative"),
        (('[noise]\nkind = "Gaussian"\ncovariance = 2.0', ""), "noise must be a table"),
        (('[models]\nown = "survey_models:small"\nflaky = "survey_models:Flaky"', ""), "models must be a table"),
        (('[models]\nown = "survey_models:small"', '[run]\nworker = 2\n[models]\nown = "x:y"'), "run has worker"),
    ],
)
def test_mistake_in_the_file_is_one_sentence(folder, capsys, change, words):
    text = CONFIG.replace(*change)
    missing = {"models must": 'models = "x"\n', "noise must": 'noise = "Poisson"\n'}  # where there is no such table
    Path("config.toml").write_text(missing.get(words[:11].strip(), "") + text)
    assert main(["survey", "config.toml"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


PARENT = """
import os, time
from fisherop.surveys import config
if __name__ == "__main__":
    with config.executor({"workers": 2}) as make:
        print(make().submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(fo.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", str(tmp_path / "parent.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    try:
        end = time.monotonic() + 30
        while alive(worker):
            assert time.monotonic() < end, "it lives on"
            time.sleep(0.05)
    finally:
        if alive(worker):
            os.kill(worker, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Tell of a process that it has not ended, if perhaps not been buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("report runs --pictures -1", "pictures must be at least 0, not -1"),
        ("report runs --out .", ".: a page is written to a file, and this is a folder"),
        ("report runs --out runs", "runs: a page is written to a file, and this is a folder"),
        ("report runs --out nothing/page.html", "nothing/page.html: No such file or directory"),
        ("report runs --out config.toml/page.html", "config.toml/page.html: Not a directory"),
        ("survey config.toml --workers -1", "--workers must be at least 0, not -1"),
    ],
)
def test_mistake_in_the_call_is_one_sentence_and_leaves_nothing_behind(folder, capsys, arguments, words):
    fo.survey({"m": survey_models.small}, {"x": torch.rand(1, 3, 12, 12)}, store="runs", progress=False)
    before = sorted(folder.rglob("*"))
    assert main(arguments.split()) == 2
    assert capsys.readouterr().err == f"fisherop: {words}\n"
    assert sorted(folder.rglob("*")) == before


def test_page_that_cannot_be_put_in_place_leaves_nothing_behind(survey, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device", "x")))
    with pytest.raises(OSError, match=r"No space left on device: '.*page.html'"):
        survey.report(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_file_that_is_no_text_is_one_sentence(folder, capsys):
    Path("config.toml").write_bytes(b"store = '\xff'")
    assert main(["survey", "config.toml"]) == 2
    assert capsys.readouterr().err.startswith("fisherop: config.toml is no TOML: ")


def test_files_may_lie_anywhere_and_are_taken_once(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    inner = folder / "inner [1]"
    inner.mkdir()
    for path in (other / "photo0.png", folder / "camera.png", inner / "photo2.png", inner / "photo0.png"):
        shutil.copy("photo0.png", path)
    (folder / "folder.png").mkdir()
    text = CONFIG.replace('"*.png"', f'"*.png", "photo1.png", "{other}/*.png", "../{other.name}/photo0.png"')
    (folder / "config.toml").write_text(text)
    arguments, _ = config.read(folder / "config.toml")
    outside = os.path.relpath(other / "photo0.png", folder)
    assert list(arguments["images"]) == ["camera", "photo0", "photo1", outside]
    assert all(load().shape == (1, 3, 12, 12) for load in arguments["images"].values())
    (inner / "config.toml").write_text(CONFIG)
    assert list(config.read(inner / "config.toml")[0]["images"]) == ["photo0", "photo2"]
    (folder / "config.toml").write_text(text.replace("size", 'photographs = ["camera"]\nsize'))
    with pytest.raises(ValueError, match="two images are called 'camera'"):
        config.read(folder / "config.toml")


def test_file_whose_name_is_no_unicode_is_surveyed_and_reported(folder):
    os.rename(b"photo0.png", b"caf\xe9.png")
    code = "import sys; from fisherop.__main__ import main; sys.exit(main(['survey', 'config.toml']))"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(fo.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 1, done.stderr.decode()
    assert b"caf\\udce9: ValueError" in done.stdout
    assert b"caf\\udce9" in Path("runs/report.html").read_bytes()


def test_broken_executor_is_one_sentence(folder, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the executor's workers died; 0 of 8 cells are done and safe: call again")

    monkeypatch.setattr(fo, "survey", broken)
    assert main(["survey", "config.toml"]) == 2
    assert (
        capsys.readouterr().err == "fisherop: the executor's workers died; 0 of 8 cells are done and safe: call again\n"
    )


def test_report_of_no_store_is_one_sentence(folder, capsys):
    assert main(["report", "nothing"]) == 2
    assert "there is no store" in capsys.readouterr().err


def test_bar_tells_done_failed_left_and_time_to_go(folder, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main(["survey", "config.toml"])
    said = capsys.readouterr().err
    assert "0 done, 0 failed, 8 left" in said
    assert "4 done, 4 failed, 0 left" in said
    assert "to go" in said


def test_interrupted_command_says_how_to_go_on(folder, capsys, monkeypatch):
    import fisherop.surveys.run as module

    compute, calls = module.compute, []

    def interrupted(task):
        calls.append(task)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(task)

    monkeypatch.setattr(module, "compute", interrupted)
    assert main(["survey", "config.toml"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert len(fo.Survey.open("runs")) == 2
