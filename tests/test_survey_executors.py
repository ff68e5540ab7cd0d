"""A survey on executors: the same numbers to the bit, and nothing lost when workers die."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import survey_models
import torch

import fisherop as fo
from fisherop.surveys import work
from fisherop.surveys.run import MOST_LOSSES, MOST_RENEWALS

pytest.importorskip("pandas")

MODELS = {"small": survey_models.small, "resnet18": survey_models.resnet18}
LAYERS = {"small": ["0", "2", None], "resnet18": ["conv1", "maxpool", "layer1.0"]}

processes = partial(ProcessPoolExecutor, 2, get_context("spawn"))


def pictures(count: int, shape: tuple[int, ...] = (1, 3, 12, 12)) -> dict[str, torch.Tensor]:
    source = torch.Generator()
    return {f"image {i}": torch.rand(shape, generator=source.manual_seed(i)) for i in range(count)}


def run(store: Path, models=MODELS, images=None, layers=LAYERS, **options) -> fo.Survey:
    settings = {"k": 2, "which": "LM", "tol": 1e-3, "progress": False}
    return fo.survey(models, images or pictures(2), layers, store=store, **settings | options)


def assert_same(a: fo.Survey, b: fo.Survey) -> None:
    assert a.failures() == b.failures() == []
    assert [record.name for record in a.records] == [record.name for record in b.records]
    for one, other in zip(a.records, b.records, strict=True):
        assert one.weights == other.weights
        x, y = a.read(one), b.read(other)
        assert torch.equal(x.eigendistortions, y.eigendistortions), one.name
        for name in ("eigenvalues", "residuals", "eigenvalue_bounds", "index"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> fo.Survey:
    pytest.importorskip("torchvision")
    return run(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def cluster():
    """Have Dask on two processes, the first of which has a resource."""
    distributed = pytest.importorskip("distributed")
    import dask

    quiet = {"distributed.worker.profile.enabled": False, "logging.distributed": "error"}
    path = {"env": {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.getcwd()])}}
    workers = {
        name: {"cls": distributed.Nanny, "options": {"nthreads": 1, "resources": {name: 1}, **path}}
        for name in ("A", "B")
    }
    scheduler = {"cls": distributed.Scheduler, "options": {"dashboard": False, "port": 0}}
    with (
        dask.config.set(quiet),
        distributed.SpecCluster(workers, scheduler, asynchronous=False) as made,
        distributed.Client(made) as client,
    ):
        yield client


def test_processes_give_the_same_bits_and_build_a_model_once(tmp_path, expected):
    with processes() as pool:
        survey = run(tmp_path, executor=pool)
        assert pool.submit(len, "usable").result() == 6
    assert_same(survey, expected)
    built = [s for s in survey._store.sidecars() if s["cell"]["model"] == "resnet18" and s["seconds"]["model"] > 0.02]
    pids = [sidecar["worker"]["pid"] for sidecar in built]
    assert pids
    assert len(pids) == len(set(pids))


def test_loky_gives_the_same_bits_for_a_lambda(tmp_path, expected):
    loky = pytest.importorskip("loky")
    models = {"small": lambda: survey_models.small(), "resnet18": survey_models.resnet18}
    survey = run(tmp_path, models, executor=partial(loky.get_reusable_executor, 2))
    assert_same(survey, expected)


def test_dask_gives_the_same_bits_and_obeys_resources(tmp_path, expected, cluster):
    survey = run(tmp_path, executor=cluster.get_executor(resources={"B": 1}))
    assert_same(survey, expected)
    workers = {sidecar["worker"]["pid"] for sidecar in survey._store.sidecars()}
    pids = cluster.run(os.getpid)
    names = {info["id"]: address for address, info in cluster.scheduler_info()["workers"].items()}
    assert workers == {pids[names["B"]]}


def test_dask_retries_what_raises(tmp_path, cluster):
    counter = tmp_path / "counter"

    class Third(torch.nn.Module):
        """Fail twice."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with open(counter, "a") as file:
                file.write("x")
            if counter.stat().st_size < 3:
                raise RuntimeError("not yet")
            return torch.tanh(x[:, :, ::2])

    images = pictures(1)
    assert run(tmp_path / "a", {"m": Third()}, images, None, executor=cluster.get_executor(retries=1)).failures()
    counter.unlink()
    assert not run(tmp_path / "b", {"m": Third()}, images, None, executor=cluster.get_executor(retries=2)).failures()


def test_threads_give_the_same_bits(tmp_path, expected):
    with ThreadPoolExecutor(3) as pool:
        assert_same(run(tmp_path, executor=pool), expected)


def scaled(gain: float) -> torch.nn.Module:
    return Scaled(gain).eval()


class Scaled(torch.nn.Module):
    """A gain, as a weight."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * x


@pytest.mark.parametrize("make", [partial(ThreadPoolExecutor, 1), type(None)], ids=["threads", "in process"])
def test_survey_never_computes_with_another_surveys_model(tmp_path, make):
    """One object stands for both, as one that has gone and another at the same place in memory do by chance."""
    executor, source, found = make(), partial(scaled, gain=1.0), []
    for gain in (1.0, 2.0):
        source.keywords["gain"] = gain
        survey = run(tmp_path, {"m": source}, pictures(1), None, k=1, executor=executor)
        found.append(survey.result().eigenvalues[0])
    np.testing.assert_allclose(found, [1.0, 4.0], rtol=1e-5)


def test_threads_keep_no_model_when_the_survey_is_over(tmp_path):
    before = set(work._models)
    with ThreadPoolExecutor(2) as pool:
        run(tmp_path, {"m": partial(scaled, 2.0)}, None, None, executor=pool)
    assert set(work._models) <= before


def test_worker_that_lives_on_reads_a_file_of_weights_again_when_it_changed(tmp_path):
    path, found = tmp_path / "net.pt", []
    with ThreadPoolExecutor(1) as pool:
        for gain in (1.0, 2.0):
            torch.save(scaled(gain), path)
            kind = type("Pool", (Executor,), {"submit": lambda self, *task: pool.submit(*task)})  # to other processes
            survey = run(tmp_path / "store", {"m": path}, pictures(1), None, k=1, executor=kind())
            found.append(survey.result().eigenvalues[0])
    np.testing.assert_allclose(found, [1.0, 4.0], rtol=1e-5)


def test_client_is_told_from_an_executor(tmp_path, cluster):
    with pytest.raises(TypeError, match=r"pass client.get_executor\(\)"):
        run(tmp_path, executor=cluster)


# ------------------------------------------------------------------------------------------------------------- deaths


class Killer(threading.Thread):
    """Kills a random worker, some times, at moments at which something is finished between two of them."""

    def __init__(self, pids, store: Path, times: int) -> None:
        super().__init__(daemon=True)
        self.pids, self.store, self.times, self.killed = pids, store, times, 0
        self.random = random.Random(0)
        self.lost: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        seen: set[str] = set()
        while self.killed < self.times and not self.over.is_set():
            done = {path.name for path in self.store.rglob("*.json")}
            self.lost += seen - done
            if len(done) > len(seen) or not seen:
                pids = list(self.pids())
                if pids:
                    time.sleep(self.random.uniform(0, 0.1))
                    try:
                        os.kill(self.random.choice(pids), signal.SIGKILL)
                        self.killed += 1
                        seen = done
                    except ProcessLookupError:
                        pass
            time.sleep(0.02)


def killed(store: Path, pids, times: int, count: int, **options) -> tuple[fo.Survey, Killer]:
    killer = Killer(pids, store, times)
    killer.start()
    survey = run(store, {"slow": survey_models.Slow}, pictures(count), None, **options)
    killer.over.set()
    killer.join()
    return survey, killer


@pytest.mark.slow
def test_twenty_killed_processes_lose_no_finished_cell(tmp_path):
    pools: list[ProcessPoolExecutor] = []

    def make() -> Executor:
        pools.append(processes())
        return pools[-1]

    def pids() -> list[int]:
        return list(pools[-1]._processes) if pools and pools[-1]._processes else []

    survey, killer = killed(tmp_path, pids, 20, 150, executor=make)
    assert (len(survey), survey.failures(), killer.lost) == (150, [], [])
    assert killer.killed == 20
    assert len(pools) > 5
    assert_same(survey, run(tmp_path / "here", {"slow": survey_models.Slow}, pictures(150), None))


@pytest.mark.slow
def test_twenty_killed_dask_workers_lose_no_finished_cell(tmp_path, cluster):

    def pids() -> list[int]:
        return [nanny.pid for nanny in cluster.cluster.workers.values() if nanny.pid]

    survey, killer = killed(tmp_path, pids, 20, 150, executor=cluster.get_executor(retries=1))
    assert (len(survey), survey.failures(), killer.lost) == (150, [], [])
    assert killer.killed == 20


def test_broken_pool_of_processes_is_replaced(tmp_path):
    with processes() as pool:
        survey, killer = killed(tmp_path, lambda: list(pool._processes or ()), 1, 12, executor=pool)
    assert (len(survey), survey.failures(), killer.killed) == (12, [], 1)


class Mortal(Executor):
    """Breaks at the fifth task, as pools do: for good."""

    def __init__(self) -> None:
        self.tasks = 0

    def submit(self, fn, /, *args, **kwargs):
        self.tasks += 1
        if self.tasks > 5:
            raise BrokenExecutor("a worker died")
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_executor_that_breaks_leaves_a_store_that_resumes_and_says_so(tmp_path):
    arguments = {"models": {"slow": survey_models.Slow}, "images": pictures(12), "layers": None}
    with pytest.raises(RuntimeError, match=r"workers died \(BrokenExecutor: a worker died\); 5 of 12 cells are done"):
        run(tmp_path, **arguments, executor=Mortal())
    assert len(fo.Survey.open(tmp_path)) == 5
    made = []
    survey = run(tmp_path, **arguments, executor=lambda: made.append(Mortal()) or made[-1])
    assert (len(survey), survey.failures(), len(made)) == (12, [], 2)


class Stillborn(Executor):
    """Takes nothing, as a pool whose workers die as they start; or takes it and loses it."""

    def __init__(self, takes: bool) -> None:
        self.takes = takes

    def submit(self, fn, /, *args, **kwargs):
        if not self.takes:
            raise BrokenExecutor("a worker died as it started")
        future: Future = Future()
        future.set_exception(BrokenExecutor("a worker died as it started"))
        return future


@pytest.mark.parametrize("takes", [False, True])
def test_executors_that_break_whatever_they_are_given_end_the_survey_and_blame_no_cell(tmp_path, takes):
    arguments = {"models": {"slow": survey_models.Slow}, "images": pictures(12), "layers": None}
    made: list[Executor] = []

    def make() -> Executor:
        made.append(Stillborn(takes) if made else Mortal())
        return made[-1]

    words = (
        r"5 executors in a row broke.*\(BrokenExecutor: a worker died as it started\); 5 of 12 cells are done and safe"
    )
    with pytest.raises(RuntimeError, match=words):
        run(tmp_path, **arguments, executor=make)
    survey = fo.Survey.open(tmp_path)
    assert (len(survey), survey.failures(), len(made)) == (5, [], 2 + MOST_RENEWALS)


def test_processes_that_die_as_they_start_end_the_survey(tmp_path, monkeypatch):
    monkeypatch.setattr("fisherop.surveys.run.MOST_RENEWALS", 2)
    make = partial(processes, initializer=os._exit, initargs=(1,))
    with pytest.raises(RuntimeError, match=r"2 executors in a row broke.*0 of 2 cells are done"):
        run(tmp_path, {"slow": survey_models.Slow}, None, None, executor=make)


def test_function_that_makes_the_same_broken_executor_again_is_told(tmp_path):
    pool = Mortal()
    pool.shutdown()
    with pytest.raises(RuntimeError, match=r"5 of 12 cells.*makes a new executor every time"):
        run(tmp_path, {"slow": survey_models.Slow}, pictures(12), None, executor=lambda: pool)
    with pytest.raises(TypeError, match=r"function that makes a concurrent\.futures.Executor, not None"):
        run(tmp_path, {"slow": survey_models.Slow}, pictures(12), None, executor=lambda: None)


@pytest.mark.parametrize("count", [0, None])
def test_executor_that_does_not_say_how_many_workers_it_has_is_used(tmp_path, count):
    executor = Treacherous()
    executor._max_workers = count
    assert len(run(tmp_path, {"slow": survey_models.Slow}, {"x": torch.rand(1, 3, 9, 9)}, None, executor=executor)) == 1


class Leaving(Executor):
    """Hands on that its worker leaves."""

    def submit(self, fn, /, *args):
        future: Future = Future()
        future.set_exception(SystemExit(7))
        return future


def test_worker_that_leaves_is_a_failure_of_its_cell(tmp_path):
    survey = run(tmp_path, {"slow": survey_models.Slow}, None, None, executor=Leaving())
    assert [(failure.error, failure.message) for failure in survey.failures()] == [("SystemExit", "7")] * 2


class Murderous(Executor):
    """Breaks whenever it is given one of two cells."""

    def __init__(self) -> None:
        self.broken = False

    def submit(self, fn, /, *args):
        future: Future = Future()
        self.broken |= bool(args) and args[0].cell.image in ("image 1", "image 2")
        if self.broken:
            future.set_exception(BrokenExecutor("out of memory"))
        else:
            future.set_result(fn(*args))
        return future


def test_cells_that_break_every_executor_are_given_up_and_the_others_are_done(tmp_path):
    survey = run(tmp_path, {"slow": survey_models.Slow}, pictures(4), None, executor=Murderous)
    assert [failure.image for failure in survey.failures()] == ["image 1", "image 2"]
    assert len(survey) == 4


class Treacherous(Executor):
    """Loses one cell's worker every time; nothing else is wrong with it."""

    def __init__(self) -> None:
        self.tasks = 0

    def submit(self, fn, task, /):
        class KilledWorker(Exception):
            pass

        self.tasks += 1
        future: Future = Future()
        if task.cell.image == "image 1":
            future.set_exception(KilledWorker("its worker died"))
        else:
            future.set_result(fn(task))
        return future


def test_cell_that_kills_its_worker_every_time_is_given_up_and_the_others_are_not(tmp_path):
    executor = Treacherous()
    survey = run(tmp_path, {"slow": survey_models.Slow}, pictures(4), None, executor=executor)
    [failure] = survey.failures()
    assert (failure.image, failure.error) == ("image 1", "KilledWorker")
    assert executor.tasks == 3 + MOST_LOSSES


def test_model_that_cannot_travel_is_told_before_anything_is_computed(tmp_path):
    lock = threading.Lock()
    with processes() as pool, pytest.raises(TypeError, match=r"models\['locked'\] cannot be sent to other processes"):
        run(tmp_path, {"locked": lambda x: (lock, x)[1]}, None, None, executor=pool)
