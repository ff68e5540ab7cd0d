"""A survey in process: what a cell is, what the store keeps, and what is read from it."""

from __future__ import annotations

import copy
import enum
import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import survey_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherop as fo
from fisherop.surveys.cells import seed_of
from fisherop.surveys.fingerprints import fingerprint
from fisherop.surveys.store import Store
from fisherop.surveys.work import TUNING

pandas = pytest.importorskip("pandas")
pytest.importorskip("xarray")

MODELS = {"small": survey_models.small, "grey mean": survey_models.Slow}
LAYERS = {"small": ["0", "2", None], "grey mean": [None]}


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def picture(seed: int, shape: tuple[int, ...] = (1, 3, 12, 12), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pictures(count: int) -> dict[str, torch.Tensor]:
    return {f"image {i}": picture(i) for i in range(count)}


def run(store: Path, models=MODELS, images=None, layers=LAYERS, **options) -> fo.Survey:
    return fo.survey(models, images or pictures(2), layers, store=store, **options)


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def same(a: fo.Eigendistortions, b: fo.Eigendistortions) -> bool:
    arrays = ("eigenvalues", "index", "residuals", "converged", "eigenvalue_bounds")
    return torch.equal(a.eigendistortions, b.eigendistortions) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays
    )


# --------------------------------------------------------------------------------------------------------------- cells


def test_cell_is_what_the_bare_call_returns(tmp_path):
    model = survey_models.small().eval()
    survey = run(tmp_path, {"net": model}, None, ["2"], k=3, noise=fo.noise.Gaussian(4.0), rng=5)
    F = fo.FisherOperator(fo.Layer(model, "2"), pictures(2)["image 1"], noise=fo.noise.Gaussian(4.0))
    expected = fo.eigendistortions(F, k=3)
    found = survey.result("image 1")
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-4, atol=1e-4 * found.lambda_max)
    assert found.converged.all()
    torch.testing.assert_close(found.image, pictures(2)["image 1"], rtol=0, atol=0)


def test_result_depends_on_neither_order_nor_company(tmp_path):
    whole = run(tmp_path / "whole")
    images = dict(reversed(pictures(3).items()))
    part = run(tmp_path / "part", {"small": survey_models.small}, images, [None, "2"])
    for image in pictures(2):
        for layer in ("2", "output"):
            assert same(whole.result(image, layer, "small"), part.result(image, layer, "small"))


def test_settings_and_layers_may_be_numbers_and_texts_of_numpy(tmp_path):
    numbers = {
        "k": np.int64(1),
        "tol": np.float32(0.25),
        "maxiter": np.int64(9),
        "spectrum": np.True_,
        "rng": np.uint8(1),
    }
    texts = {"which": np.str_("LM"), "method": np.str_("lobpcg")}
    names = {np.str_(name): image for name, image in pictures(1).items()}
    survey = run(tmp_path, images=names, layers=[np.str_("0")], **numbers, **texts)
    assert survey.settings()["maxiter"] == 9
    plain = {"k": 1, "tol": 0.25, "maxiter": 9, "spectrum": True, "rng": 1, "which": "LM", "method": "lobpcg"}
    run(tmp_path, images=pictures(1), layers=["0"], **plain)
    assert len(list(tmp_path.rglob("*.json"))) == len(survey) == 2


@pytest.mark.parametrize(
    "name", ["\ud800", "caf\udce9", "a\0b", "line\nbreak", "<&\"'>", "\N{DRAGON}", "_$x_$", "../up", "a" * 300]
)
def test_names_may_be_any_text(tmp_path, name):
    models = {name: torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Tanh()), "b": survey_models.small}
    survey = run(tmp_path, models, {name: picture(0), "bad": tmp_path}, {name: [None, "1"]}, k=1, which="LM")
    assert len(survey.failures()) == 3
    survey = fo.Survey.open(tmp_path)
    assert survey.result(name, "1", name).converged.all()
    assert name in set(survey.table().model)
    assert name in survey.to_xarray(distortions=True).model
    survey.report(tmp_path / "page.html")


def test_other_seed_gives_other_random_weights_and_the_same_one_the_same(tmp_path):
    one, same_seed, other = (
        run(tmp_path / str(i), {"small": survey_models.small}, None, ["0"], rng=seed).result("image 0")
        for i, seed in enumerate((3, np.int64(3), 4))
    )
    assert same(one, same_seed)
    assert not np.allclose(one.eigenvalues, other.eigenvalues)


def test_global_random_state_and_threads_are_as_before(tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    torch.set_num_threads(threads + 1)
    try:
        run(tmp_path)
        assert torch.get_num_threads() == threads + 1
        assert torch.equal(torch.rand(3), expected)
    finally:
        torch.set_num_threads(threads)


def test_images_follow_the_model_to_its_precision(tmp_path):
    survey = run(tmp_path, {"wide": survey_models.small().double().eval()}, None, ["0"])
    assert survey.result("image 0").image.dtype == torch.float64


@pytest.mark.parametrize("source", ["file", "array file", "function", "array"])
def test_images_are_files_functions_or_arrays(tmp_path, source):
    x = (picture(0) * 255).round() / 255
    np.save(tmp_path / "x.npy", x.numpy())
    if source == "file":
        image = pytest.importorskip("PIL.Image")
        image.fromarray((x[0].movedim(0, -1) * 255).round().byte().numpy()).save(tmp_path / "x.png")
    made = {
        "file": str(tmp_path / "x.png"),
        "array file": tmp_path / "x.npy",
        "function": partial(np.load, tmp_path / "x.npy"),
        "array": x.numpy(),
    }[source]
    survey = run(tmp_path / "store", images={"x": made}, models={"small": survey_models.small}, layers=["0"])
    torch.testing.assert_close(survey.result().image, x, rtol=0, atol=1e-6)


def test_models_are_files_names_functions_or_modules(tmp_path):
    module = survey_models.small().eval()
    torch.save(module, tmp_path / "whole.pt")
    torch.export.save(torch.export.export(module, (picture(0, (1, 3, 32, 32)),)), tmp_path / "exported.pt2")
    models = {
        "module": module,
        "file": tmp_path / "whole.pt",
        "exported": str(tmp_path / "exported.pt2"),
        "function": torch.nn.functional.silu,
        "name": "survey_models:small",
        "torchvision": "torchvision:squeezenet1_1",
    }
    pytest.importorskip("torchvision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fo.models, "_fetch", lambda url: (_ for _ in ()).throw(OSError("no network here")))
        survey = run(tmp_path / "store", models, {"x": picture(0, (1, 3, 32, 32))}, None, k=1, which="LM")
    assert survey.failures() == []
    values = [survey.result(model=name).eigenvalues for name in ("module", "file", "exported")]
    np.testing.assert_allclose(values, np.broadcast_to(values[0], (3, 1)), rtol=1e-5)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3)))
def test_fingerprint_tells_values_apart_and_ignores_the_order_of_dicts(x):
    assert fingerprint([x]) != fingerprint(x) != fingerprint({"x": x})
    assert fingerprint({"a": x, "b": 1}) == fingerprint({"b": 1, "a": x})


def test_fingerprint_knows_content():
    a, b = survey_models.small(), survey_models.small()
    assert fingerprint(a) != fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert fingerprint(a) == fingerprint(b)
    b[2].stride = (2, 2)
    assert fingerprint(a) != fingerprint(b)
    x = torch.arange(6.0)
    assert fingerprint(x) == fingerprint(x.numpy()) == fingerprint(torch.stack([x, x], 1)[:, 0])
    assert len({fingerprint(y) for y in (x, x.double(), x.reshape(2, 3), x + 1)}) == 4
    noises = [fo.noise.Gaussian(1.0), fo.noise.Gaussian(2.0), fo.noise.Gaussian(x), fo.noise.Poisson(), None]
    assert len({fingerprint(noise) for noise in noises}) == 5
    assert fingerprint(partial(survey_models.small)) != fingerprint(survey_models.small)


class Gained(torch.nn.Module):
    """A model whose numbers come from attributes, and from a buffer that is not persistent."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        self.gain = 1.0
        self.register_buffer("mean", torch.zeros(3, 1, 1), persistent=False)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * torch.tanh(x - self.mean)


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


def test_modules_that_differ_in_anything_public_are_told_apart_and_equal_ones_are_not():
    def point(x: float) -> types.SimpleNamespace:
        return types.SimpleNamespace(inner=types.SimpleNamespace(x=x))

    values = [
        1.5,
        2,
        True,
        "a",
        "weights.pt",
        (1, 2),
        {"a": 1},
        {"a": 2},
        None,
        {"x", "y", "z"},
        Colour.RED,
        Colour.GREEN,
    ]
    values += [
        torch.ones(3),
        torch.zeros(3),
        torch.ones(3, dtype=torch.bfloat16),
        np.ones(2),
        torch.float64,
        Path("w.pt"),
    ]
    values += [torch.tanh, torch.relu, partial(torch.sum, dim=1), partial(torch.sum, dim=2), point(1.0), point(2.0)]
    values += [[torch.nn.ReLU()], [torch.nn.ELU(alpha=2.0)], [Gained(gain=2.0)], [Gained(gain=3.0)]]

    def made() -> list[torch.nn.Module]:
        alone = [Gained(), Gained(mean=torch.ones(3, 1, 1)), Gained().eval(), *(Gained(gain=value) for value in values)]
        return [*alone, *(torch.nn.Sequential(model) for model in alone)]

    prints = [fingerprint(model) for model in made()]
    assert len(set(prints)) == 2 * (3 + len(values))
    assert prints == [fingerprint(model) for model in copy.deepcopy(made())]


def test_fingerprint_of_a_module_needs_neither_trees_nor_picklable_attributes():
    model = Gained(lock=threading.Lock(), logger=logging.getLogger("any"))
    model.parent, model.forward = [model], model.forward
    assert fingerprint(model) == fingerprint(model) != fingerprint(Gained())
    model._cache = 3
    before = fingerprint(model)
    model._cache = 4
    assert fingerprint(model) == before
    traced = [torch.fx.symbolic_trace(Gained(gain=gain)) for gain in (2.0, 3.0, 3.0)]
    assert fingerprint(traced[0]) != fingerprint(traced[1]) == fingerprint(traced[2])


FUNCTIONS = """
import functools, torch, types
scale, table, _cache, setup = {gain}, [1.0, {gain}], {{}}, types.SimpleNamespace(gain={gain})

def plain(x, power=1):
    "Any words."
    return x * {gain}

def helper(x):
    return [scale * y for y in x]

def calls(x):
    return helper(x) if x is not calls else None

def closure(gain=scale):
    def inner(x):
        return inner and gain * x
    return inner

class Scaled:
    gain = 1
    def __init__(self):
        self.by = {gain}
        self.function = plain

functions = {{
    "instructions": plain, "of a list": lambda x: table[1] * x, "global": lambda x: scale * x, "called": calls,
    "of an object": lambda x: setup.gain * x,
    "closure": closure(), "default": lambda x, by=scale: by * x, "keyword": (lambda: lambda x, *, by=scale: by * x)(),
    "constant": lambda x: 1 if x in ("a", "b", {gain}) else {{"a", "b"}},
    "method": types.MethodType(lambda self, x: self.by * x, types.SimpleNamespace(by={gain})),
    "partial": functools.partial(torch.mul, scale), "partial of a function": functools.partial(plain, power=2),
    "wrapped": functools.wraps(torch.sin)(lambda x: plain(x)), "within": functools.partial(lambda f, x: f(x), plain),
}}
holder = Scaled()
"""


def functions(gain: float, above: str = "") -> types.SimpleNamespace:
    made = {"__name__": "of_a_user"}
    exec(compile(above + FUNCTIONS.format(gain=gain), "any file", "exec"), made)
    return types.SimpleNamespace(**made)


NAMES = sorted(functions(1.0).functions)


@pytest.mark.parametrize("name", NAMES)
def test_functions_in_noises_and_modules_are_known_by_what_they_do(name):
    """Not by where they stand: lines above, and what a cache holds, make no other function of one."""
    one, same_one, other = functions(2.0), functions(2.0, "\n# a line more\n\n"), functions(3.0)
    same_one._cache["x"] = 1
    for place in (fo.noise.Custom, lambda f: Gained(gain=f), lambda f: Gained(gain=[{"f": f}]), lambda f: (f,)):
        prints = [fingerprint(place(known.functions[name])) for known in (one, same_one, other)]
        assert prints[0] == prints[1] != prints[2]


def test_objects_that_hold_functions_are_known_by_them_and_need_not_be_picklable(monkeypatch):
    prints = []
    for gain in (2.0, 2.0, 3.0):
        made = functions(gain)
        monkeypatch.setitem(sys.modules, "of_a_user", made)  # a pickle has the class by its name
        prints.append(fingerprint(made.holder))
        made.holder.by, made.holder.function = 0, lambda x: x * 2
        made.holder.function.__code__ = made.plain.__code__
        prints.append(fingerprint(made.holder))
    assert prints[:2] == prints[2:4]
    assert len(set(prints)) == 4


def test_fingerprints_of_functions_are_those_of_every_process():
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_survey as t; "
        "print(*[t.fingerprint((t.functions(2.0).functions[name],)) for name in t.NAMES])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(fo.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {" ".join(fingerprint((functions(2.0).functions[name],)) for name in NAMES)}


def test_functions_of_the_libraries_and_those_that_make_models_are_known_by_their_names():
    """As in stores that are there already."""
    assert fingerprint(survey_models.small, named=True) == "ba31ca0527340ef57099a17df963ef26"
    assert fingerprint(partial(survey_models.small), named=True) == "221d1b3b7d5d36c9f9383d7d046357d9"
    assert fingerprint(torch.relu) == "67b0618751804db562578b30c5741a8b"
    assert fingerprint(fo.noise.Gaussian(2.0)) == "d44d2d35147158b2b985536688b1c021"
    model = Gained(gain=torch.nn.functional.relu, other=partial(np.mean, axis=1))
    assert fingerprint(model) == "e1669c05d918c2214f8950734072f459"


@pytest.mark.parametrize("kind", ["noise", "module"])
def test_changed_function_is_another_cell(tmp_path, kind):
    found = []
    for gain in (1.0, 4.0):
        function = functions(gain).functions["global"]
        model = Gained(act=function) if kind == "module" else Gained()
        noise = fo.noise.Custom(function) if kind == "noise" else None
        found.append(run(tmp_path, {"m": model}, pictures(1), None, k=1, which="LM", noise=noise))
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    assert kind == "module" or found[1].result().lambda_max == pytest.approx(4 * found[0].result().lambda_max)


@pytest.mark.parametrize("change", [{"gain": 2.0}, {"mean": torch.full((3, 1, 1), 0.5)}, {"training": False}])
def test_module_that_differs_beyond_its_weights_is_another_cell(tmp_path, change):
    for attributes in ({}, change):
        survey = run(tmp_path, {"m": Gained(**attributes)}, pictures(1), None, k=1, which="LM")
    expected = fo.eigendistortions(fo.FisherOperator(Gained(**change), pictures(1)["image 0"]), k=1, which="LM")
    np.testing.assert_allclose(survey.result().eigenvalues, expected.eigenvalues, rtol=1e-4)
    run(tmp_path, {"m": Gained()}, pictures(2), None, k=1, which="LM")
    with pytest.warns(UserWarning, match="cells of m have different weights"):
        fo.Survey.open(tmp_path)


def test_name_may_look_like_that_of_a_file(tmp_path):
    survey = run(tmp_path, {"net.pt": survey_models.small}, {"x.pth": picture(0)}, ["0"])
    assert (survey.failures(), survey.models) == ([], ("net.pt",))


@given(st.integers(0, 2**70), st.text(), st.text())
def test_seeds_are_told_apart_by_every_name(root, a, b):
    assert seed_of(root, a, b) == seed_of(root, a, b)
    assert len({seed_of(root, a, b), seed_of(root, a + b), seed_of(root, a, b, ""), seed_of(root + 1, a, b)}) == 4


# -------------------------------------------------------------------------------------------------------------- resume


def test_rerun_computes_only_what_is_missing(tmp_path):
    run(tmp_path, images=pictures(1))
    before = files(tmp_path)
    survey = run(tmp_path, images=pictures(2))
    after = files(tmp_path)
    assert before.items() <= after.items()
    assert len(survey) == 8
    assert len(after) == 2 * 8
    assert run(tmp_path, images=pictures(2)).table().equals(survey.table())
    assert files(tmp_path) == after


@pytest.mark.parametrize(
    "change",
    [
        {"k": 3},
        {"which": "LM"},
        {"method": "lobpcg"},
        {"tol": 1e-3},
        {"rng": 1},
        {"noise": fo.noise.Gaussian(2.0)},
        {"images": {"image 0": picture(9)}},
        {"models": {"small": survey_models.small().eval()}},
    ],
)
def test_other_question_is_another_cell(tmp_path, change):
    first = {"models": {"small": survey_models.small}, "images": pictures(1), "layers": ["0"]}
    run(tmp_path, **first)
    survey = run(tmp_path, **(first | change))
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    assert len(survey) == 1


def test_failed_cell_is_recorded_and_the_others_go_on_and_it_is_retried_on_request(tmp_path, monkeypatch):
    rain = tmp_path / "rain"
    rain.touch()
    monkeypatch.setenv("SURVEY_FLAKY", str(rain))
    models = {"flaky": survey_models.Flaky, "small": survey_models.small}
    store = tmp_path / "store"
    survey = run(store, models, layers=None)
    assert (len(survey), len(survey.failures())) == (4, 2)
    failure = survey.failures()[0]
    assert (failure.model, failure.error, failure.message) == ("flaky", "RuntimeError", "it rains")
    assert "survey_models.py" in failure.traceback
    assert "it rains" in str(failure)
    with pytest.raises(KeyError, match="it rains"):
        survey.result("image 0", model="flaky")
    rain.unlink()
    assert len(run(store, models, layers=None).failures()) == 2
    assert run(store, models, layers=None, retry_failed=True).failures() == []
    assert fo.Survey.open(store).failures() == []


def test_what_does_not_exist_fails_alone(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = pictures(1) | {"broken": tmp_path / "broken.png", "bytes": torch.zeros(1, 3, 9, 9, dtype=torch.uint8)}
    models = {"small": survey_models.small, "grey": survey_models.Grey, "nobody": "survey_models:nobody"}
    survey = run(tmp_path / "store", models, images, {"small": ["0", "7"]})
    assert len(survey) == 12
    assert [record.name for record in survey.records if record.done] == [("image 0", "0", "small")]
    messages = " ".join(failure.message for failure in survey.failures())
    for words in ("no image that Pillow can read", "divide bytes by 255", "has no layer '7'", "has no 'nobody'"):
        assert words in messages


def test_image_that_raises_anything_fails_alone_with_its_reason(tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00\x10")
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)

    def lost() -> torch.Tensor:
        raise LookupError("no such photograph")

    images = {"bomb": tmp_path / "bomb.png", "lost": lost, "cut": tmp_path / "cut.npy"} | pictures(1)
    for executor in (None, ThreadPoolExecutor(1)):
        store = tmp_path / f"store {executor is None}"
        survey = run(store, {"small": survey_models.small}, images, ["0"], executor=executor)
        assert [record.image for record in survey.records if record.done] == ["image 0"]
        found = {failure.image: (failure.error, failure.message) for failure in survey.failures()}
        assert found["bomb"][0] == "DecompressionBombError"
        assert found["lost"] == ("LookupError", "no such photograph")
        assert len(run(store, {"small": survey_models.small}, images, ["0"])) == 4
        assert len(list(store.rglob("*.json"))) == 4


def leave(*_) -> None:
    sys.exit("it leaves")


@pytest.mark.parametrize("executor", [None, partial(ThreadPoolExecutor, 1), ThreadPoolExecutor(1)])
def test_models_and_images_that_leave_fail_alone(tmp_path, executor):
    models = {"leaves": leave, "builds none": partial(leave), "small": survey_models.small}
    images = {"none": partial(leave)} | pictures(1)
    survey = run(tmp_path, models, images, None, executor=executor)
    assert [record.name for record in survey.records if record.done] == [("image 0", "output", "small")]
    assert {(failure.error, failure.message) for failure in survey.failures()} == {("SystemExit", "it leaves")}


@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "gone", "sidecar flipped", "sidecar cut", "sidecar empty", "folder", "sidecar folder"]
)
def test_damaged_cell_is_set_aside_and_computed_again(tmp_path, damage):
    whole = run(tmp_path)
    expected = {record.name: whole.read(record) for record in whole.records}
    victim = sorted(tmp_path.rglob("*.json" if "sidecar" in damage else "*.npz"))[3]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        victim.unlink()
    elif "folder" in damage:
        victim.unlink()
        victim.mkdir()
        (victim / "inside").touch()
    else:
        victim.write_bytes({"flipped": content, "cut": content[:100], "empty": b""}[damage.split()[-1]])
    told = pytest.warns(UserWarning, match="1 of the cells of .* run the survey again")
    with told if "sidecar" in damage else nullcontext():
        opened = fo.Survey.open(tmp_path)
    with pytest.raises(ValueError, match="run the survey again"):
        [whole.read(record) for record in whole.records]
    if "sidecar" in damage:
        assert len(opened) == 7
    else:
        with pytest.raises(ValueError, match="run the survey again"):
            [opened.read(record) for record in opened.records]
    again = run(tmp_path)
    assert (len(again), again.failures()) == (8, [])
    for record in again.records:
        assert same(again.read(record), expected[record.name])
    assert any((tmp_path / "damaged").iterdir())


def test_store_has_no_pickle_and_says_how_it_was_made(tmp_path):
    run(tmp_path, rng=7)
    for path in tmp_path.rglob("*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            assert {array.dtype.kind for array in arrays.values()} <= set("fiubU")
    path = next(tmp_path.rglob("*.json"))
    sidecar = json.loads(path.read_text())
    assert sidecar["settings"]["seed"] == 7
    assert sidecar["worker"]["versions"]["torch"] == torch.__version__
    assert len(sidecar["result"]["residuals"]) == 2
    assert sidecar["seconds"]["all"] > 0
    data = path.parent / sidecar["data"]["file"]
    assert hashlib.sha256(data.read_bytes()).hexdigest() == sidecar["data"]["sha256"]


def test_two_surveys_on_one_store_do_no_harm(tmp_path):
    """Interleave two, so that each finds cells that the other has finished meanwhile."""
    inner_done = []

    def images():
        if not inner_done:
            inner_done.append(True)
            run(tmp_path, {"small": survey_models.small}, {"x": partial(picture, 0), "y": picture(1)}, ["0"])
        return picture(0)

    run(tmp_path, {"small": survey_models.small}, {"x": picture(0), "z": images}, ["0"])
    survey = fo.Survey.open(tmp_path)
    assert {record.image for record in survey.records} == {"x", "y", "z"}
    assert len(list(tmp_path.rglob("*.npz"))) == len(list(tmp_path.rglob("*.json"))) == 3


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=50)), max_size=12))
@settings(max_examples=20)
def test_first_of_two_that_finish_a_cell_wins_whole(tmp_path_factory, writes):
    store = Store(tmp_path_factory.mktemp("store"))
    store.prepare()
    first: dict[str, bytes] = {}
    for key, data in writes:
        store.put(f"{key:032x}", {"cell": {}}, data)
        first.setdefault(f"{key:032x}", data)
    for sidecar in store.sidecars():
        assert store.data(sidecar).read_bytes() == first.pop(sidecar["key"])
    assert first == {}


# --------------------------------------------------------------------------------------------------- disks and signals

CHILD = """
import resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
import survey_models, torch, fisherop as fo
source = torch.Generator()
images = {{f"image {{i}}": torch.rand(1, 3, 12, 12, generator=source.manual_seed(i)) for i in range({count})}}
{setting}
print("ready", flush=True)
fo.survey({{"m": survey_models.{model}}}, images, store={store!r}, k=2, which="LM", progress=False)
"""


def child(store: Path, setting: str = "", model: str = "Slow", count: int = 40) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    code = CHILD.format(tests=tests, store=str(store), setting=setting, model=model, count=count)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], text=True, **pipes)


def finished(store: Path) -> int:
    return len(list(store.rglob("*.json")))


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        os.sched_yield()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_survey_leaves_a_store_that_resumes(tmp_path, how):
    process = child(tmp_path)
    try:
        wait_for(lambda: finished(tmp_path) >= 3)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode != 0
    assert how != signal.SIGINT or "KeyboardInterrupt" in errors
    before = {name: data for name, data in files(tmp_path).items() if name.endswith((".json", ".npz"))}
    assert 3 <= finished(tmp_path) < 40
    survey = run(tmp_path, {"m": survey_models.Slow}, pictures(40), None, k=2, which="LM")
    assert (len(survey), survey.failures()) == (40, [])
    after = files(tmp_path)
    # A sidecar is what makes a cell exist: an .npz written just before the end may have been written again.
    assert {name: data for name, data in before.items() if name.endswith(".json")}.items() <= after.items()


def test_full_disk_is_one_clear_error_and_loses_nothing(tmp_path):
    """On a real file system of one megabyte, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs privileges that are not here")
    try:
        with pytest.raises(OSError, match=r"No space left on device.*is safe") as caught:
            run(disk / "store", {"m": survey_models.Slow}, pictures(60), None)
        assert caught.value.errno == errno.ENOSPC
        survey = fo.Survey.open(disk / "store")
        count = len(survey)
        assert 3 < count < 60
        assert all(survey.read(record).converged.all() for record in survey.records)
        assert not list(disk.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert len(run(disk / "store", {"m": survey_models.Slow}, pictures(60), None)) == 60
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert len(run(disk / "store", {"m": survey_models.Slow}, pictures(60), None)) == 60  # nothing is missing
        with pytest.raises(OSError, match=r"Read-only file system.*is safe"):
            run(disk / "store", {"m": survey_models.Slow}, pictures(61), None)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_that_may_not_grow_is_one_clear_error_and_loses_nothing(tmp_path):
    """The same without privileges: a limit on the size of files, which the kernel enforces."""
    run(tmp_path, {"m": survey_models.Slow}, pictures(2), None, k=2, which="LM")
    setting = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    process = child(tmp_path, setting, count=4)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the store cannot be written (File too large); what is in it is safe" in errors.splitlines()[-1]
    survey = fo.Survey.open(tmp_path)
    assert len(survey) == 2
    assert all(survey.read(record).converged.all() for record in survey.records)


def test_store_that_is_a_file_and_no_store_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a store is a folder"):
        run(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="there is no store"):
        fo.Survey.open(tmp_path / "nothing")


def test_file_in_place_of_a_folder_of_cells_is_told(tmp_path):
    run(tmp_path, images=pictures(1))
    folder = next(tmp_path.rglob("*.json")).parent
    shutil.rmtree(folder)
    folder.touch()
    assert len(fo.Survey.open(tmp_path)) < 4
    with pytest.raises(OSError, match=f"a file is where a store has a folder: move it away: '{folder}'"):
        run(tmp_path, images=pictures(1))


def test_unfinished_files_of_dead_processes_are_swept(tmp_path):
    run(tmp_path, images=pictures(1))
    folder = next(tmp_path.rglob("*.json")).parent
    old, young = folder / ".x.npz.1.a.partial", folder / ".y.npz.1.b.partial"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    run(tmp_path, images=pictures(2))
    assert (old.exists(), young.exists()) == (False, True)


# -------------------------------------------------------------------------------------------------------------- opened


def test_table_has_a_row_for_every_pair(tmp_path):
    survey = run(tmp_path, k=3)
    table = survey.table()
    assert len(table) == 8 * 3
    for record in survey.records:
        image, layer, model = record.name
        rows = table[(table.image == image) & (table.layer == layer) & (table.model == model)]
        result = survey.read(record)
        np.testing.assert_array_equal(rows.eigenvalue, result.eigenvalues)
        np.testing.assert_array_equal(rows.residual, result.residuals)
        np.testing.assert_array_equal(rows[["lower", "upper"]], result.eigenvalue_bounds)
        np.testing.assert_array_equal(rows.threshold, fo.thresholds(result))
    assert table.converged.all()


def test_arrays_are_labelled_and_missing_cells_are_told(tmp_path):
    survey = run(tmp_path)
    data = survey.to_xarray(distortions=True)
    assert dict(data.sizes) == {"image": 2, "layer": 3, "model": 2, "pair": 2, "channel": 3, "row": 12, "column": 12}
    assert list(data.layer.values) == ["0", "2", "output"]
    here = data.sel(image="image 1", layer="2", model="small")
    result = survey.result("image 1", "2", "small")
    np.testing.assert_array_equal(here.eigenvalue, result.eigenvalues)
    np.testing.assert_array_equal(here.distortion, result.eigendistortions)
    np.testing.assert_array_equal(data.picture.sel(image="image 1"), result.image[0])
    absent = data.sel(layer="2", model="grey mean")
    assert not absent.done.any()
    assert np.isnan(absent.eigenvalue).all()
    assert data.attrs["k"] == 2


def test_own_response_is_the_last_layer_whatever_other_models_have(tmp_path):
    models = {"deep": survey_models.small, "shallow": survey_models.Slow}
    survey = run(tmp_path, models, pictures(1), {"deep": ["0", "1", "2"]}, k=1, which="LM")
    assert survey.layers == ("0", "1", "2", "output")


def test_settings_that_differ_must_be_chosen_from(tmp_path):
    run(tmp_path, k=2)
    run(tmp_path, k=3)
    survey = fo.Survey.open(tmp_path)
    with pytest.raises(ValueError, match=r"k: 2, 3.*select\(k=2\)"):
        survey.to_xarray()
    assert survey.select(k=3).to_xarray().sizes["pair"] == 3
    assert set(survey.table().k) == {2, 3}
    assert len(survey.select(model="small", layer=["0", "2"], k=2)) == 4
    with pytest.raises(ValueError, match="not by colour"):
        survey.select(colour="red")


def test_latest_cell_of_a_name_counts(tmp_path):
    run(tmp_path, images={"x": picture(0)})
    run(tmp_path, images={"x": picture(1)})
    survey = fo.Survey.open(tmp_path)
    assert len(survey) == 4
    torch.testing.assert_close(survey.result(layer="0").image, picture(1), rtol=0, atol=0)


def test_models_of_one_name_and_different_weights_are_told(tmp_path):
    run(tmp_path, {"m": survey_models.small().eval()}, {"a": picture(0)}, None)
    run(tmp_path, {"m": survey_models.small().eval()}, {"b": picture(1)}, None)
    with pytest.warns(UserWarning, match="cells of m have different weights"):
        fo.Survey.open(tmp_path)


def test_own_D_is_the_difference_of_log_thresholds_and_cross_D_is_the_threshold_table(tmp_path):
    models = {"a": survey_models.small().eval(), "b": survey_models.small().eval()}
    survey = run(tmp_path, models, None, [None, "2"])
    own = survey.compare().D.set_index(["image", "model", "layer"]).D
    cross = survey.compare(models).D.set_index(["image", "model", "layer", "of_model", "of_layer"]).D
    for image in pictures(2):
        ops = {
            (name, layer): fo.FisherOperator(model if layer == "output" else fo.Layer(model, layer), pictures(2)[image])
            for name, model in models.items()
            for layer in ("output", "2")
        }
        results = {(name, layer): survey.result(image, layer, name) for name, layer in ops}
        table = fo.threshold_table(ops, results)
        for i, a in enumerate(ops):
            np.testing.assert_allclose(own[(image, *a)], np.log(fo.thresholds(results[a])[[0, -1]]) @ [-1, 1])
            for j, b in enumerate(ops):
                np.testing.assert_allclose(cross[(image, *a, *b)], table.D[i, j], rtol=1e-2)


def linear(*weights: float) -> torch.nn.Module:
    model = torch.nn.Linear(len(weights), len(weights), bias=False).eval()
    model.weight.data = torch.diag(torch.tensor(weights))
    return model


SPREAD = fo.noise.Gaussian(torch.tensor([4.0, 1.0, 1.0, 0.25]))


@pytest.mark.parametrize(
    ("model", "noise", "words"),
    [
        (linear(4.0, 3.0, 2.0, 1.0), None, "^noise must be what the survey was given"),
        (linear(4.0, 3.0, 2.0, 1.0), fo.noise.Poisson(), "^noise must be"),
        (linear(1.0, 2.0, 3.0, 4.0), SPREAD, r"^models\['m'\] must be"),
        (linear(1.0, 2.0, 3.0, 4.0), None, r"^noise and models\['m'\] must be"),
    ],
)
def test_comparison_refuses_a_model_or_a_noise_that_is_not_the_surveys(tmp_path, model, noise, words):
    arguments = {"images": {"x": picture(0, (4,))}, "layers": None, "noise": SPREAD}
    survey = run(tmp_path, {"m": linear(4.0, 3.0, 2.0, 1.0)}, **arguments)
    assert np.isfinite(survey.compare({"m": linear(4.0, 3.0, 2.0, 1.0)}, noise=SPREAD).D.D).all()
    with pytest.raises(ValueError, match=words):
        survey.compare({"m": model}, noise=noise)


def test_comparison_takes_what_computes_the_same_under_another_name(tmp_path):
    survey = run(tmp_path, {"m": "survey_models:small", "f": "torch.nn.functional:silu"}, pictures(1), None)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(0, "m"))
        same_one = torch.nn.Sequential(*survey_models.small().eval())
    own = survey.compare({"m": "survey_models:small", "f": "torch.nn.functional:silu"}, noise=fo.noise.Gaussian()).D
    other = survey.compare({"m": same_one, "f": torch.nn.functional.silu}).D
    assert own.equals(other)


def test_D_of_a_cell_for_itself_is_that_of_its_certificate(tmp_path):
    """Rounding leaves something where the certificate says zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = torch.nn.Conv2d(3, 8, 7), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 5, stride=2)
        models = {"net": torch.nn.Sequential(*parts).eval(), "small": survey_models.small().eval()}
    survey = run(tmp_path, models, {"x": picture(0, (1, 3, 32, 32))}, None)
    own = survey.compare().D
    cross = survey.compare(models).D
    assert np.isinf(own.D).any()
    diagonal = cross[(cross.model == cross.of_model) & (cross.layer == cross.of_layer)]
    np.testing.assert_array_equal(diagonal.D, own.D)


def test_layer_called_output_is_not_the_models_own_response(tmp_path):
    parts = {"output": linear(3.0, 1.0, 1.0, 2.0), "head": linear(1.0, 5.0, 1.0, 1.0)}
    models = {"m": torch.nn.Sequential(OrderedDict(parts)).eval()}
    arguments = {"models": models, "images": {"x": picture(0, (4,))}}
    together = run(tmp_path / "one", **arguments, layers=[None, "output", "head"])
    for layer in ("output", None):
        apart = run(tmp_path / "two", **arguments, layers=[layer])
        assert len(apart) == 1
    for survey in (together, fo.Survey.open(tmp_path / "one"), fo.Survey.open(tmp_path / "two")):
        assert {record.layer for record in survey.records} >= {"output", "output (layer)"}
        values = [survey.result(layer=layer).eigenvalues for layer in ("output", "output (layer)")]
        np.testing.assert_allclose(values, [[25.0, 1.0], [9.0, 1.0]], rtol=1e-5)
        D = survey.compare(models).D
        own = D[D.layer == D.of_layer].set_index("layer").D
        np.testing.assert_allclose(own[["output", "output (layer)"]], np.log([5.0, 3.0]), rtol=1e-5)
    assert together.layers == ("output (layer)", "head", "output")


def test_angles_are_those_of_scipy_and_curves_average_over_images(tmp_path):
    from scipy.linalg import subspace_angles

    survey = run(tmp_path, {"small": survey_models.small}, pictures(3), ["0", "2"], k=4)
    found = survey.compare()
    row = found.angles[found.angles.image == "image 1"].iloc[0]
    vectors = [survey.result("image 1", layer).eigendistortions.reshape(4, -1).double().numpy().T for layer in "02"]
    np.testing.assert_allclose(row.most, subspace_angles(vectors[0][:, :2], vectors[1][:, :2])[0], atol=1e-6)
    np.testing.assert_allclose(row.least, subspace_angles(vectors[0][:, 2:], vectors[1][:, 2:])[0], atol=1e-6)
    curve = found.curves.set_index(["layer", "quantity"]).loc[("2", "log10_most")]
    values = np.log10([survey.result(image, "2").eigenvalues[0] for image in survey.images])
    np.testing.assert_allclose([curve["mean"], curve.error], [values.mean(), values.std(ddof=1) / 3**0.5])
    assert curve.images == 3


def test_whole_spectrum_is_the_dense_one(tmp_path):
    survey = run(tmp_path, {"small": survey_models.small().eval()}, pictures(1), ["0"], spectrum=True)
    [record] = survey.records
    assert record.spectrum is not None
    values = np.array(record.spectrum["eigenvalues"])
    assert record.spectrum["index"][0] == 0
    np.testing.assert_allclose(values[0], survey.result().eigenvalues[0], rtol=1e-4)
    assert record.spectrum["index"][-1] == min(record.fact("n"), record.fact("m")) - 1
    assert record.spectrum["trace"] >= values.sum() * (1 - 1e-6)
    assert 1 <= record.spectrum["effective_dimension"] <= record.fact("n")


# ----------------------------------------------------------------------------------------------------------- mistakes


class Locked:
    """What no pickle takes: a noise, and a function of an image."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    at = __call__


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": {}}, "models must be a dict"),
        ({"models": {"a": 3}}, r"models\['a'\] must be a Module"),
        ({"models": {"a": "nowhere.pt"}}, "does not exist"),
        ({"images": [1]}, "images must be a dict"),
        ({"layers": "0"}, "layers must be a list"),
        ({"layers": ["0", "0"]}, "each named once"),
        ({"layers": {"other": ["0"]}}, "models that there are not: other"),
        ({"k": 0}, "k must be"),
        ({"which": "XX"}, "which must be"),
        ({"method": "magic"}, "method must be"),
        ({"tol": 2.0}, "tol is relative"),
        ({"tol": "small"}, "tol must be made of numbers, not str"),
        ({"tol": float("nan")}, "tol is relative"),
        ({"maxiter": 0}, "maxiter must be at least 1, not 0"),
        ({"maxiter": "9"}, "maxiter must be a whole number, not '9'"),
        ({"maxiter": 2.5}, "maxiter must be"),
        ({"maxiter": True}, "maxiter must be"),
        ({"spectrum": "no"}, "spectrum must be True or False"),
        ({"layers": 3}, "layers must be a list"),
        ({"layers": [1.5]}, "a layer is a name, a number"),
        ({"layers": {"small": 0}}, "layers must be a list"),
        ({"noise": 3}, "noise must be"),
        ({"noise": fo.noise.Poisson}, "noise must be one of fisherop.noise, made with its arguments"),
        ({"rng": True}, "rng must be a whole number"),
        ({"store": None}, "store must be the path of a folder, not None"),
        ({"store": ""}, "store must be the path of a folder, not ''"),
        ({"executor": 3}, "executor must be"),
        ({"threads": 0}, "threads must be"),
        ({"rng": "x"}, "rng must be"),
        ({"models": {"net": Locked()}}, r"models\['net'\] cannot be told from others .*pickle '_thread.lock' object"),
        ({"noise": Locked()}, "noise cannot be told from others"),
        ({"rng": -1}, "rng must be"),
    ],
)
def test_mistake_is_told_before_anything_is_written(tmp_path, change, words):
    arguments = {"models": MODELS, "images": pictures(1), "layers": None, "store": tmp_path / "store"} | change
    with pytest.raises((TypeError, ValueError), match=words):
        run(**arguments)
    assert not (tmp_path / "store").exists()


def test_import_is_light():
    heavy = ("pandas", "xarray", "dask", "matplotlib", "loky")
    code = f"import sys, fisherop; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert callable(fo.survey)


def test_variants_by_rule_are_the_same_every_time_and_agree_with_direct_ones():
    networks = {"fft": (fo.OnOff(), 1), "phases": (torch.nn.Conv2d(3, 8, 7, stride=2), 3)}
    for variant, (model, channels) in networks.items():
        image = picture(0, (1, channels, 40, 40))
        ruled = [fo.FisherOperator(model, image, tuning=TUNING) for _ in range(2)]
        direct = fo.FisherOperator(model, image, tuning={"block": 2})
        assert variant in ruled[0].tuning.values()
        assert ruled[0].tuning == ruled[1].tuning
        rows = torch.randn(9, image.numel(), generator=torch.Generator().manual_seed(0))
        assert torch.equal(ruled[0].rows(rows), ruled[1].rows(rows))
        expected = direct.rows(rows)
        torch.testing.assert_close(ruled[0].rows(rows), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
