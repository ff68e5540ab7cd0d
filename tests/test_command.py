"""The command, from its arguments to files, words and exit status."""

from __future__ import annotations

import io
import signal
import sys
import time

import numpy as np
import pytest
import torch

import fisherop as fo
from fisherop import __main__ as command
from fisherop import images, models
from fisherop.__main__ import main

mpl = pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

ERRORS = """
import torch

class Shy:
    def __call__(self, x):
        return x.detach()

shy = Shy()

def asserts(x):
    assert x.shape[1] == 7

def indexes(x):
    return [x][1]

def misses(x):
    return {}["weights"]

def unpacks(x):
    a, b = x.shape
    return x

def long(x):
    raise RuntimeError("first line\\nsecond line")

def build():
    raise LookupError("no weights here")
"""

NETWORK = """
import torch

network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Tanh(), torch.nn.Flatten())

def red(x):
    return torch.tanh(x[:, 0] ** 2)

def any_number_of_channels(x):
    return x.mean() * torch.arange(1.0, 4.0)
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Have a photograph, some models and no network."""

    def no_network(*_, **__):
        raise OSError("no network here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(models, "urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    Image.fromarray(pixels[..., 0]).save("grey.png")
    (tmp_path / "my_networks.py").write_text(NETWORK)
    (tmp_path / "my_errors.py").write_text(ERRORS)
    (tmp_path / "note.txt").write_text("no image")
    (tmp_path / "my_syntax.py").write_text("def build(:")
    np.savez("other.npz", a=np.ones(3))
    Image.new("1", (2000, 2000)).save("bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    yield
    for name in ("my_networks", "my_errors"):
        sys.modules.pop(name, None)


def run(arguments: str) -> int:
    return main(["eigendistortions", *arguments.split()])


# ---------------------------------------------------------------------------------------------------------------- demo


def test_demo_shows_three_models_and_writes_their_pictures_and_results(tmp_path, capsys):
    pytest.importorskip("skimage")
    pytest.importorskip("torchvision")
    assert main(["demo", "--size", "16"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("random weights") == 1
    for name in ("onoff", "resnet18-maxpool", "resnet18-layer2.0"):
        result = fo.Eigendistortions.load(tmp_path / "fisherop-demo" / f"{name}.npz")
        assert result.converged.all()
        assert list(result.index) == [0, result.image.numel() - 1]
        assert str(result) in said.out
        picture = tmp_path / "fisherop-demo" / f"{name}.png"
        with Image.open(picture) as opened:
            assert min(opened.size) > 256
        assert picture.name in said.out


def test_demo_without_torchvision_shows_one_model_and_names_the_extra(monkeypatch, capsys, tmp_path):
    pytest.importorskip("skimage")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(["demo", "--size", "16", "--out", "here"]) == 0
    assert "fisherop[vision]" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["onoff.npz", "onoff.png"]


# ------------------------------------------------------------------------------------------------------- an image file


def test_result_is_the_librarys(capsys):
    assert run("photo.png --size 16 --k 3 --which LM --seed 5 --tol 1e-3 --out out") == 0
    written = fo.Eigendistortions.load("out/photo-OnOff.npz")
    F = fo.FisherOperator(models.OnOff(), images.to_grey(images.load("photo.png", 16)))
    expected = fo.eigendistortions(F, k=3, which="LM", rng=5, tol=1e-3)
    # Not to the bit: each operator measures which of its variants are fastest.
    torch.testing.assert_close(written.eigendistortions, expected.eigendistortions, rtol=0, atol=1e-4)
    assert (written.tol, written.n_matvec) == (1e-3, expected.n_matvec)
    assert str(written) in capsys.readouterr().out


def test_fitted_models_get_one_channel_and_others_three_unless_told():
    for file, options, channels in [
        ("photo.png", "--model lg", 1),
        ("photo.png", "--model my_networks:any_number_of_channels", 3),
        ("grey.png", "--model my_networks:any_number_of_channels", 3),
        ("photo.png", "--model my_networks:any_number_of_channels --grey --force", 1),
    ]:
        assert run(f"{file} {options} --size 16 --which LM --k 1 --out out") == 0
        name = options.split()[1].replace(":", "-")
        result = fo.Eigendistortions.load(f"out/{file[:-4]}-{name}.npz")
        assert result.image.shape == (1, channels, 16, 16)


def test_image_is_taken_as_it_is_for_size_0():
    assert run("photo.png --model my_networks:red --size 0 --which LM --dtype float64") == 0
    result = fo.Eigendistortions.load("photo-my_networks-red.npz")
    torch.testing.assert_close(result.image, images.load("photo.png", dtype=torch.float64), rtol=0, atol=0)
    assert result.eigendistortions.dtype == torch.float64


def test_layer_is_a_name_or_a_number(tmp_path):
    pytest.importorskip("torchvision")
    assert run("photo.png --model my_networks:network --layer 0 --size 12") == 0
    assert run("photo.png --model resnet18 --layer 3 --size 16 --k 1") == 0
    assert run("photo.png --model resnet18 --layer maxpool --size 16 --k 1") == 0
    by_name, by_number = (fo.Eigendistortions.load(f"photo-resnet18-{x}.npz") for x in ("maxpool", "3"))
    torch.testing.assert_close(by_name.eigenvalues, by_number.eigenvalues)
    assert (tmp_path / "photo-my_networks-network-0.png").exists()


def test_what_did_not_converge_is_written_said_in_one_line_and_can_be_resumed(capsys):
    options = "photo.png --size 20 --method lobpcg"
    assert run(f"{options} --maxiter 4") == 1
    said = capsys.readouterr()
    assert "raise maxiter" in said.err
    assert said.err.startswith("fisherop: ")
    assert said.err.count("\n") == 1
    assert "add --resume photo-OnOff.npz" in said.out
    first = fo.Eigendistortions.load("photo-OnOff.npz")
    assert run(f"{options} --resume photo-OnOff.npz --maxiter 1000") == 0
    second = fo.Eigendistortions.load("photo-OnOff.npz")
    assert not first.converged.all()
    assert second.converged.all()


def test_result_of_other_settings_is_not_written_over_unless_told(monkeypatch, capsys, tmp_path):
    base = "photo.png --size 16 --model lg --which LM"
    assert run(f"{base} --k 1") == 0
    assert run(f"{base} --k 1") == 0  # the same is no loss
    files = {path.name: path.read_bytes() for path in tmp_path.glob("photo-lg.*")}
    assert sorted(files) == ["photo-lg.npz", "photo-lg.png"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(fo, "eigendistortions", lambda *_, **__: pytest.fail("worked"))
        for other in ("--k 2 --seed 3", "--k 1 --maxiter 50"):
            assert run(f"{base} {other}") == 2
            said = capsys.readouterr().err
            assert "photo-lg.npz holds a result of other settings" in said
            assert "--force" in said
        Image.open("grey.png").save("kept.png")
        Image.open("grey.png").save("photo.png")
        assert run(f"{base} --k 1") == 2
        assert "(another image)" in capsys.readouterr().err
        (tmp_path / "kept-lg.png").write_bytes(b"mine")
        assert run("kept.png --size 16 --model lg") == 2
        assert "kept-lg.png is there already" in capsys.readouterr().err
        fo.Eigendistortions.load("photo-lg.npz").save("grey-lg.npz")
        assert run("grey.png --size 16 --model lg") == 2
        assert "grey-lg.npz is there already" in capsys.readouterr().err
    assert files == {path.name: path.read_bytes() for path in tmp_path.glob("photo-lg.*")}
    assert run(f"{base} --k 2 --resume photo-lg.npz") == 0
    assert run(f"{base} --k 3 --force") == 0
    assert len(fo.Eigendistortions.load("photo-lg.npz")) == 3


def test_demo_of_another_size_is_not_written_over_unless_told(monkeypatch, capsys):
    pytest.importorskip("skimage")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(["demo", "--size", "16"]) == 0
    assert main(["demo", "--size", "17"]) == 2
    assert "(--size 16, not 17)" in capsys.readouterr().err
    assert main(["demo", "--size", "17", "--force"]) == 0


def test_interrupt_keeps_the_best_pairs_so_far(monkeypatch, capsys):
    watch = command._Watch.__call__

    def interrupted(self, progress):
        if progress.iteration == 3:
            signal.raise_signal(signal.SIGINT)
        return watch(self, progress)

    monkeypatch.setattr(command._Watch, "__call__", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert run("photo.png --size 20 --method lobpcg") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    said = capsys.readouterr()
    assert "Ctrl-C again leaves at once" in said.err
    assert "add --resume" in said.out
    assert len(fo.Eigendistortions.load("photo-OnOff.npz")) == 2


def test_interrupt_before_there_is_anything_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "load", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        assert run("photo.png --out out") == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "nothing written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- words


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    run("photo.png --size 16 --model lg --which LM")
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run("photo.png --size 16 --model lg --which LM --method lobpcg --tol 1e-2 --force")
    assert "photo-lg: 00:00" in terminal.getvalue()
    assert "steps" in terminal.getvalue()


def test_progress_line_counts_steps_and_products_and_shows_the_worst_residual(monkeypatch):
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with command._Watch("name") as watch:
        time.sleep(0.15)  # tqdm writes ten times a second
        watch(fo.solvers.Progress(7, 12, np.array([1e-3, 2e-2])))
    assert "7 steps, 12 products, worst residual 2.0e-02" in terminal.getvalue()


def test_command_runs_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run("photo.png --size 16 --model lg") == 0


def test_pyplot_and_the_users_backend_are_left_alone():
    mpl.use("svg")
    from matplotlib import pyplot as plt

    before, figures = dict(mpl.rcParams), plt.get_fignums()
    try:
        assert run("photo.png --size 16 --model lg") == 0
        assert dict(mpl.rcParams) == before
        assert plt.get_fignums() == figures
    finally:
        mpl.use("Agg")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("nothing.png", "there is no image file 'nothing.png'"),
        ("note.txt", "no image"),
        ("photo.png --model OnOf", "did you mean 'onoff'"),
        ("photo.png --model my_network:network", "no module 'my_network'"),
        ("photo.png --model my_networks:net", "has no 'net': did you mean 'network'"),
        ("photo.png --model my_networks:network --layer 7", "numbers in a torchvision ResNet or VGG only"),
        ("photo.png --model my_networks:network --layer tanh", "has no layer 'tanh'"),
        ("photo.png --model my_networks:red --layer 0", "to have layers"),
        ("photo.png --model my_networks:network --grey", "cannot take an image of shape (1, 1, 128, 128)"),
        ("photo.png --model my_errors:shy", "autograd cannot see how"),
        ("photo.png --size 8", "at least 16x16"),
        ("photo.png --size 8 --model my_errors:asserts", "cannot take an image of shape (1, 3, 8, 8): AssertionError"),
        ("photo.png --size 8 --model my_errors:indexes", "(1, 3, 8, 8): IndexError: list index out of range"),
        ("photo.png --size 8 --model my_errors:misses", "(1, 3, 8, 8): KeyError: 'weights'"),
        ("photo.png --size 8 --model my_errors:unpacks", "(1, 3, 8, 8): ValueError: too many values to unpack"),
        ("photo.png --size 8 --model my_errors:long", "(1, 3, 8, 8): first line\n"),
        ("photo.png --model my_errors:build", "'my_errors:build' cannot be made: LookupError: no weights here"),
        ("photo.png --model my_syntax:build", "'my_syntax:build' cannot be made: SyntaxError"),
        ("bomb.png", "'bomb.png' cannot be read: DecompressionBombError"),
        ("photo.png --size -8", "at least 1"),
        ("photo.png --size 16 --k 0", "k must lie between 1 and n = 256"),
        ("photo.png --size 16 --tol 2", "tol"),
        ("photo.png --size 16 --maxiter 0", "maxiter"),
        ("photo.png --size 16 --resume other.npz", "other.npz is not a result of fisherop"),
        ("photo.png --size 16 --resume gone.npz", "gone.npz: No such file"),
        ("photo.png --size 16 --device abacus", "device 'abacus' cannot be used"),
        ("photo.png --size 16 --out note.txt", "note.txt: File exists"),
    ],
)
def test_mistake_is_said_in_one_sentence(arguments, sentence, capsys):
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_folder_that_cannot_be_written_is_said_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr(fo, "eigendistortions", lambda *_, **__: pytest.fail("worked"))
    assert run("photo.png --size 16 --out out") == 2
    assert capsys.readouterr().err == "fisherop: out: nothing can be written there\n"


def test_missing_matplotlib_is_said_before_the_work(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fisherop.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("worked"))
    assert run("photo.png") == 2
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.count('pip install "fisherop[plot]"') == 2


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["eigendistortions"], ["eigendistortions", "x.png", "--which=XX"]]
)
def test_call_that_is_no_call_exits_with_2_and_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: fisherop" in capsys.readouterr().err


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fisherop {fo.__version__}\n"


def test_help_tells_the_exit_status(capsys):
    for arguments in (["--help"], ["demo", "--help"], ["eigendistortions", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "some pair did not" in capsys.readouterr().out
