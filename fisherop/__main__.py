"""The command `fisherop`: a picture and a proof for an image file, without writing Python.

``fisherop demo`` shows what this is about; ``fisherop eigendistortions photo.jpg --model resnet18 --layer layer2.0``
does it for an image and a model of one's own, ``fisherop survey config.toml`` for many of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import fisherop as fo
from fisherop import images, models
from fisherop.eigen import WHICH
from fisherop.solvers import BACKENDS, Progress
from fisherop.surveys import config
from fisherop.surveys.fingerprints import fingerprint

CONVERGED, NOT_CONVERGED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
exit status:
  0    every pair converged
  1    some pair did not, or a cell of a survey failed: the rest is written all the same
  2    a mistake in the call, said in one sentence
  130  stopped by Ctrl-C: the best pairs so far are written
"""


def main(argv: list[str] | None = None) -> int:
    r"""Run the command.

    Parameters
    ----------
    argv : list of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        The exit status, as ``fisherop --help`` lists them.

    Examples
    --------
    >>> import contextlib, io
    >>> with contextlib.redirect_stderr(io.StringIO()) as said:
    ...     status = main(["eigendistortions", "nothing.png"])
    >>> status, said.getvalue()
    (2, "fisherop: there is no image file 'nothing.png'\n")
    """
    options = _parser().parse_args(argv)
    with _short_warnings(), _any_text():
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            _say("stopped, with nothing written of what was under way")
            return INTERRUPTED
        except OSError as error:
            _say(f"{error.filename}: {error.strerror}" if error.strerror else str(error))
            return MISTAKE
        except (ValueError, TypeError, ImportError) as error:
            _say(str(error))
            return MISTAKE


# ----------------------------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fisherop",
        description="The distortions of an image that a model notices most and least, with proof.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"fisherop {fo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="show what this is about, on photographs that come with scikit-image",
        description="Eigendistortions of a photograph for the fitted model OnOff and, where torchvision is installed, "
        "for two layers of ResNet18.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--out", metavar="DIR", type=Path, default=Path("fisherop-demo"), help="default %(default)s")
    demo.add_argument("--size", metavar="N", type=int, default=128, help="pixels a side, default %(default)s")
    force: dict[str, Any] = {"action": "store_true", "help": "write over files that hold a result of other settings"}
    demo.add_argument("--force", **force)

    one = commands.add_parser(
        "eigendistortions",
        help="the eigendistortions of an image file",
        description="The distortions of an image that a model notices most and least.\n\n"
        "The pixels go to the model as numbers from 0 to 1: put a normalization into a model of your own, and name "
        "it\nas package.module:callable.",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    one.set_defaults(run=_one_image)
    add = one.add_argument
    add("image", metavar="IMAGE", help="an image file")
    add("--model", metavar="NAME", default="OnOff", help="OnOff, LN, LG, LGG, a model of torchvision such as resnet18, "
        "or package.module:callable; default %(default)s")  # fmt: skip
    add(
        "--layer", metavar="LAYER", help="the model's layer, by name or by number, such as layer2.0; default its output"
    )
    add("--k", metavar="K", type=int, default=2, help="pairs in all, default %(default)s")
    add(
        "--which",
        default="BE",
        choices=WHICH,
        help="LM the largest, SM the smallest, BE both ends, default %(default)s",
    )
    add("--method", default="auto", choices=("auto", *BACKENDS), help="default %(default)s")
    add("--tol", type=float, help="residual to reach, relative to the largest eigenvalue; default 1e-6 or what the "
        "precision allows")  # fmt: skip
    add("--maxiter", metavar="N", type=int, help="most steps of the solver")
    add("--seed", metavar="N", type=int, default=0, help="of start vectors and random weights, default %(default)s")
    add("--resume", metavar="FILE", help="go on from the result file of an earlier run")
    add("--size", metavar="N", type=int, default=128, help="cut out a square and resize it to N by N pixels, default "
        "%(default)s; 0 takes the image as it is")  # fmt: skip
    add("--grey", action="store_true", help="give the model one channel; the fitted models get one in any case")
    add("--dtype", default="float32", choices=("float32", "float64"), help="default %(default)s")
    add("--device", default="cpu", help="such as cuda, default %(default)s")
    add("--out", metavar="DIR", type=Path, default=Path("."), help="where the files go, default here")
    add("--force", **force)

    many = commands.add_parser(
        "survey",
        help="many images, layers and models, from a configuration file",
        description=f"Compute what a survey's store lacks, and write its report.html.\n\n{config.__doc__}",
        epilog=EPILOG,
        formatter_class=formatter,
    )
    many.set_defaults(run=_survey)
    many.add_argument("config", metavar="CONFIG", type=Path, help="a TOML file")
    many.add_argument("--workers", metavar="N", type=int, help="processes of this machine, in place of the file's")
    many.add_argument("--retry-failed", action="store_true", help="compute cells again that failed before")

    page = commands.add_parser(
        "report",
        help="a page to look at, of a survey's store",
        description="Write one page, complete in itself, of what a survey's store has.",
        formatter_class=formatter,
    )
    page.set_defaults(run=_report)
    page.add_argument("store", metavar="STORE", type=Path, help="the folder")
    page.add_argument("--out", metavar="FILE", type=Path, help="default report.html in the store")
    page.add_argument("--pictures", metavar="N", type=int, default=6, help="images shown, default %(default)s")
    return parser


# ------------------------------------------------------------------------------------------------------------ commands


def _demo(options: argparse.Namespace) -> int:
    _need_matplotlib()
    network: Any
    model, _ = models.load("OnOff")
    asked = {"size": options.size}
    jobs = [_Job("onoff", model, images.photograph("chelsea", options.size, grey=True), asked)]
    if importlib.util.find_spec("torchvision"):
        photograph = images.photograph("chelsea", options.size)
        network, note = models.load("resnet18")
        print(note or "resnet18 has its trained weights")
        layers = [models.Layer(network, index) for index in (3, 6)]
        jobs += [_Job(f"resnet18-{layer.layer}", layer, photograph, asked) for layer in layers]
    else:
        print('without torchvision the demo shows one model; for ResNet18 as well: pip install "fisherop[vision]"')
    for job in jobs:
        _check_free(job, options.out, force=options.force)
    status = CONVERGED
    for job in jobs:
        status = max(status, _solve(job, options.out))
        if status == INTERRUPTED:
            break
    return status


def _one_image(options: argparse.Namespace) -> int:
    _need_matplotlib()
    model: Any
    device, dtype = _device(options.device), getattr(torch, options.dtype)
    with _told(f"{options.image!r} cannot be read"):
        image = images.load(options.image, options.size or None, dtype=dtype)
    start = {"v0": fo.Eigendistortions.load(options.resume).eigendistortions} if options.resume else {}
    sys.path.insert(0, os.getcwd())  # for a model of the user's own; `python -m` has it there anyway
    with _told(f"model {options.model!r} cannot be made"):
        model, note = models.load(options.model, seed=options.seed)
    if note:
        print(note)
    if options.grey or isinstance(model, (models.LN, models.LG, models.LGG, models.OnOff)):
        image = images.to_grey(image)
    else:
        image = image.expand(-1, 3, -1, -1)
    if options.layer is not None:
        model = models.Layer(model, _layer(model, options.layer))
    if isinstance(model, nn.Module):
        with _told(f"model {options.model!r} cannot be used with {options.dtype} on {options.device!r}"):
            model = model.to(device, dtype)
    settings = {key: getattr(options, key) for key in ("k", "which", "method", "tol", "maxiter")}
    words = [Path(options.image).stem, options.model, options.layer or ""]
    name = "-".join(re.sub(r"[^\w.]+", "-", word) for word in words if word)
    asked = {name: getattr(options, name) for name in ("model", "layer", "seed", "size", "grey", "dtype")}
    asked |= {**settings, "image": fingerprint(image)}
    job = _Job(name, model, image.to(device), asked, {**settings, **start, "rng": options.seed})
    _check_free(job, options.out, force=options.force, resumed=options.resume)
    status = _solve(job, options.out)
    if status != CONVERGED:
        print(f"to go on from here, add --resume {shlex.quote(str(job.path(options.out, '.npz')))}")
    return status


def _survey(options: argparse.Namespace) -> int:
    _need_matplotlib()
    arguments, run = config.read(options.config)
    if options.workers is not None:
        if options.workers < 0:
            raise ValueError(f"--workers must be at least 0, not {options.workers}")
        run = {"workers": options.workers}
    sys.path.insert(0, os.getcwd())  # for models of the user's own
    try:
        with config.executor(run) as executor:
            survey = fo.survey(**arguments, executor=executor, retry_failed=options.retry_failed)
    except KeyboardInterrupt:
        _say(f"stopped; what is finished is safe in {arguments['store']}, and the same command goes on from there")
        return INTERRUPTED
    except RuntimeError as error:  # of the executor; what goes wrong in a cell is a failure of that cell
        _say(str(error))
        return MISTAKE
    for failure in survey.failures():
        print(failure)
    page = Path(arguments["store"]) / "report.html"
    survey.report(page)
    print(survey)
    print(f"wrote {page}")
    short = any(record.pairs is not None and not record.pairs[:, 3].all() for record in survey.records)
    return NOT_CONVERGED if short or survey.failures() else CONVERGED


def _report(options: argparse.Namespace) -> int:
    _need_matplotlib()
    survey = fo.Survey.open(options.store)
    page = options.out or options.store / "report.html"
    survey.report(page, pictures=options.pictures)
    print(survey)
    print(f"wrote {page}")
    return CONVERGED


def _need_matplotlib() -> None:
    """Say that matplotlib is missing before the work, not after it."""
    import fisherop.plot  # noqa: F401


def _device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {_first_line(error)}") from error


def _layer(model: Any, name: str) -> str | int:
    named = isinstance(model, nn.Module) and name in dict(model.named_modules())
    return int(name) if name.isdecimal() and not named else name


# --------------------------------------------------------------------------------------------------------- one solve


@dataclass(frozen=True)
class _Job:
    """A model and an image, what the user asked, what the solver is told, and the name of the files that answer."""

    name: str
    model: Callable[[Tensor], Any]
    image: Tensor
    asked: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=lambda: {"rng": 0})

    def path(self, out: Path, suffix: str) -> Path:
        return out / (self.name + suffix)

    def operator(self) -> fo.FisherOperator:
        words = f"the model cannot take an image of shape {tuple(self.image.shape)}"
        with _told(words, theirs=True), torch.no_grad():
            self.model(self.image.clone())
        with _told(words):
            return fo.FisherOperator(self.model, self.image)


def _solve(job: _Job, out: Path) -> int:
    """Solve, print the table, write the files; return the exit status."""
    from matplotlib.figure import Figure

    from fisherop import plot

    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):  # to find that out after the work would throw it away
        raise PermissionError(f"{out}: nothing can be written there")
    operator = job.operator()
    print(f"\n{job.name}: n = {operator.shape[0]} pixel values, m = {operator.response.numel()} responses", flush=True)
    with _Watch(job.name) as watch:
        result = fo.eigendistortions(operator, callback=watch, **job.settings)
    print(result)
    print(result.message)
    _save(result, job.path(out, ".npz"), job.asked)
    # A figure without pyplot: neither a window nor a backend of the user's has a part in it.
    plot.eigendistortions(result, fig=Figure()).savefig(job.path(out, ".png"))
    print(f"wrote {job.path(out, '.png')} and {job.path(out, '.npz')}")
    if watch.stopped:
        return INTERRUPTED
    return CONVERGED if result.converged.all() else NOT_CONVERGED


def _save(result: fo.Eigendistortions, path: Path, asked: dict[str, Any]) -> None:
    """Write a result, and what was asked as the archive's comment: another call may find the file in its way."""
    buffer = io.BytesIO()
    result.write(buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = json.dumps(asked).encode()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, path)


def _check_free(job: _Job, out: Path, *, force: bool, resumed: str | None = None) -> None:
    """Refuse to write over the result of other settings, unless the user goes on from it."""
    path, picture = job.path(out, ".npz"), job.path(out, ".png")
    if force or (resumed is not None and path.exists() and os.path.samefile(path, resumed)):
        return
    if not path.exists():
        if picture.exists():
            raise ValueError(f"{picture} is there already, and no result beside it: give another --out, or --force")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.comment)
    except (zipfile.BadZipFile, ValueError):  # of the library's, or anybody's
        raise ValueError(
            f"{path} is there already, not written by this command: give another --out, or --force"
        ) from None
    names = [name for name in job.asked if found.get(name) != job.asked[name]]
    if names:
        differing = ", ".join(
            "another image" if name == "image" else f"--{name} {found.get(name)}, not {job.asked[name]}"
            for name in names
        )
        raise ValueError(
            f"{path} holds a result of other settings ({differing}): give another --out, --resume {path} to go on from "
            "it, or --force to write over it"
        )


class _Watch:
    """Shows a solver's progress, and turns Ctrl-C into its request to stop, so that what was found is kept."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = False

    def __enter__(self) -> _Watch:
        self._bar = _progress_bar(self.name)
        self._in_main_thread = threading.current_thread() is threading.main_thread()  # signals come to no other
        if self._in_main_thread:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._handler)
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> bool:
        if self._bar is not None:
            worst = f", worst residual {progress.residuals.max():.1e}" if progress.residuals.size else ""
            self._bar.set_postfix_str(f"{progress.n_matvec} products{worst}", refresh=False)
            self._bar.update(progress.iteration - self._bar.n)
        return self.stopped

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _say("stopping after this step; Ctrl-C again leaves at once, and drops what was found")


def _progress_bar(name: str) -> Any:
    """Return a line on a terminal's standard error, or None."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    layout = "{desc}: {elapsed}, {n_fmt} steps{postfix}"
    return tqdm(desc=name, bar_format=layout, leave=False, disable=None, file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ messages


def _say(words: str) -> None:
    tqdm = sys.modules.get("tqdm")  # it writes above the line of progress, where there is one
    (tqdm.tqdm.write if tqdm else print)(f"fisherop: {words}", file=sys.stderr)


@contextmanager
def _told(words: str, *, theirs: bool = False) -> Iterator[None]:
    """Say of errors what could not be done; those of kinds that this library words itself only where they are not."""
    try:
        yield
    except Exception as error:
        if not theirs and isinstance(error, (OSError, ValueError, TypeError, ImportError)):
            raise
        # A RuntimeError is torch's way to say what does not fit.
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        raise ValueError(f"{words}: {kind}{_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _any_text() -> Iterator[None]:
    """Print names of files that are no valid Unicode, spelled out."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    before = out.errors
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        out.reconfigure(errors=before)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show a warning as one line of text, and those for programmers not at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _say(str(message))
        yield


if __name__ == "__main__":
    sys.exit(main())
