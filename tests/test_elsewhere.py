"""On a device other than the host: results are the same, tensors stay there, and little is launched or waited for."""

import numpy as np
import pytest
import torch
from elsewhere import PLACE, Away, Elsewhere
from models import MODELS, build
from scipy.sparse.linalg import aslinearoperator
from torch import nn

import fisherop as fo
from fisherop.linearize.capture import NoWaits
from fisherop.solvers import lanczos

SIDE = 12
COLUMNS = np.random.default_rng(5).standard_normal((SIDE**2, 3))
METHODS = {
    "lanczos": "BE",
    "exact": "BE",
    "davidson": "BE",
    "power": "LM",
    "randomized_svd": "LM",
    "lobpcg": "BE",
    "arpack": "BE",
    "primme": "BE",
    "nullspace": "SM",
}


@pytest.fixture
def device():
    with Elsewhere() as device:
        yield device


def problem(count=1):
    """Return a model with a null space, and images of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)).double()
    return model.eval().requires_grad_(False), torch.rand(count, 1, SIDE, SIDE, dtype=torch.float64)


def pooled(x):
    """Respond without convolutions, whose variants are chosen by a stopwatch and launch more or less."""
    weights = torch.linspace(1, 3, (SIDE // 2) ** 2, dtype=x.dtype).to(x.device)
    return nn.functional.avg_pool2d(x**2, 2) * weights.view(SIDE // 2, SIDE // 2)


def fisher(place):
    """Return two Fisher operators at one image, on the host or elsewhere."""
    model, image = problem()
    image = image.to(place)
    return fo.FisherOperator(model.to(place), image), fo.FisherOperator(lambda x: 0.1 * x**2, image)


def close(there, here, size=1.0):
    """Compare a tensor, array or number from elsewhere with the host's; every tensor must have stayed where it was."""
    if isinstance(here, torch.Tensor):
        assert isinstance(there, Away)
        there, here = there.values, here.numpy()
    np.testing.assert_allclose(there, here, atol=1e-6 * size, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------- the device itself


def test_tensors_of_two_places_do_not_meet():
    with Elsewhere(), pytest.raises(RuntimeError, match="add mixes tensors"):
        torch.ones(2).to(PLACE) + torch.ones(2)


def test_what_waits_is_counted(device):
    x = torch.arange(4.0).to(PLACE)
    assert device.waits.total() == device.launches.total() == 1
    assert float(x[x > 1].sum()) == 5
    assert x.cpu().tolist() == [0, 1, 2, 3]
    assert device.waits == {"_to_copy": 2, "index": 1, "_local_scalar_dense": 1}
    y = x.reshape(2, 2)
    y[[1], :] += 1
    assert x.tolist() == [0, 1, 3, 4]


# -------------------------------------------------------------------------------------------------------------- results


@pytest.mark.filterwarnings("ignore::fisherop.ConvergenceWarning")
@pytest.mark.parametrize("certify", ["residuals", "probe"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_elsewhere_what_it_gives_on_the_host(method, certify):
    if method == "primme":
        pytest.importorskip("primme")

    def solved(place):
        return fo.eigendistortions(fisher(place)[0], 3, METHODS[method], method, rng=0, certify=certify, maxiter=300)

    here = solved("cpu")
    with Elsewhere():
        there = solved(PLACE)
        close(there.eigenvalues, here.eigenvalues, here.lambda_max)
        assert np.array_equal(there.converged, here.converged)
        assert there.eigendistortions.device == PLACE
        assert there.image.device == PLACE


def values(op, k=3, *args, **kwargs):
    """Return the eigenvalues that a search finds."""
    return fo.eigendistortions(op, k, *args, rng=0, **kwargs).eigenvalues


def resumed(F):
    """Return the eigenvalues of a search that starts from the answer of another."""
    return values(F, 2, "BE", "lanczos", v0=fo.eigendistortions(F, 2, "BE", "lanczos", rng=1).eigendistortions)


MATRIX = np.eye(SIDE**2) + COLUMNS @ COLUMNS.T
FUNCTIONS = {
    "trace": lambda F, G, put: fo.trace(F, rng=0).value,
    "trace of few probes": lambda F, G, put: fo.trace(F, 10, rng=0).value,
    "norm": lambda F, G, put: fo.spectrum.frobenius_norm(F, 10, rng=0).value,
    "logdet": lambda F, G, put: fo.logdet(F, 1e-3, rng=0).value,
    "count": lambda F, G, put: fo.count(F, 1e-3, rng=0).value,
    "large end": lambda F, G, put: fo.spectrum.lambda_max(F, rng=0).value,
    "small end": lambda F, G, put: fo.spectrum.lambda_min(G, rng=0).value,
    "density": lambda F, G, put: fo.spectral_density(F, rng=0).eigenvalues,
    "sensitivity map": lambda F, G, put: fo.sensitivity_map(F, rng=0).value,
    "discriminability": lambda F, G, put: fo.discriminability(F, put(COLUMNS.T)),
    "left vectors": lambda F, G, put: fo.spectrum.left_vectors(F, fo.eigendistortions(F, 2, rng=0)),
    "projection": lambda F, G, put: fo.project_to_null(F, put(COLUMNS.T[:1]), tol=1e-12).image,
    "sum": lambda F, G, put: values(F + G),
    "sum's distortions": lambda F, G, put: abs(fo.eigendistortions(F + G, 1, "LM", rng=0).eigendistortions),
    "mean": lambda F, G, put: values(fo.mean_fisher([F, G])),
    "algebra": lambda F, G, put: ((F @ G - 2 * F) ** 2).rows(put(COLUMNS.T)),
    "arrays": lambda F, G, put: F @ COLUMNS,
    "columns": lambda F, G, put: F @ put(COLUMNS),
    "a metric of numbers": lambda F, G, put: values(F, M=put(MATRIX)),
    "a metric of products": lambda F, G, put: values(F, method="davidson", M=aslinearoperator(MATRIX)),
    "generalized": lambda F, G, put: fo.generalized_eigendistortions(F, G, 2, rng=0).eigenvalues,
    "restricted": lambda F, G, put: values(fo.FisherOperator(torch.sin, F.image, within=put(COLUMNS))),
    "noise": lambda F, G, put: values(fo.FisherOperator(lambda x: 1 + x**2, F.image, noise=fo.noise.Poisson())),
    "resumed": lambda F, G, put: resumed(F),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_gives_elsewhere_what_it_gives_on_the_host(name):
    here = FUNCTIONS[name](*fisher("cpu"), torch.from_numpy)
    with Elsewhere():
        there = FUNCTIONS[name](*fisher(PLACE), lambda x: torch.from_numpy(x).to(PLACE))
        close(there, here)


@pytest.mark.filterwarnings("ignore:image 1. F = 0", "ignore::fisherop.ConvergenceWarning")
@pytest.mark.parametrize(("k", "which"), [(2, "BE"), (3, "LM"), (5, "BE")])
@pytest.mark.parametrize("room", [1500, 24])
def test_images_side_by_side_get_elsewhere_what_they_get_on_the_host(k, which, room, monkeypatch):
    monkeypatch.setattr(lanczos, "BASIS_ROWS", room)  # the smaller one is full, and restarted, many times
    images = problem(6)[1]
    images[1], images[4] = 0, 0.5  # of zeros nothing comes, and a constant one exhausts its search space early
    here = fo.eigendistortions_many(pooled, images, k, which, "lanczos", rng=0, batch=6)
    with Elsewhere():
        there = fo.eigendistortions_many(pooled, images.to(PLACE), k, which, "lanczos", rng=0, batch=6)
    assert len({result.n_matvec for result in here}) > 2
    for one, other in zip(there, here, strict=True):
        close(one.eigenvalues, other.eigenvalues, other.lambda_max)
        assert np.array_equal(one.converged, other.converged)


# --------------------------------------------------------------------------------------------------- launches and waits


def spent(device, work, steps=20):
    """Return launches and waits of some steps of a search, those of its beginning and its end not counted."""
    counts = []
    for maxiter in (10, 10 + steps):
        before = device.launches.total(), device.waits.total()
        work(maxiter)
        counts.append((device.launches.total() - before[0], device.waits.total() - before[1]))
    return tuple((late - early) / steps for early, late in zip(*counts, strict=True))


WAITS = {
    "value": lambda x: x.sum().item(),
    "truth": lambda x: bool((x > 0).all()),
    "comparison": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "mask written to": lambda x: x.__setitem__(x > 0, torch.ones(4).to(PLACE)),
    "places": lambda x: x.nonzero(),
    "copy to the host": lambda x: x.cpu(),
    "copy from the host": lambda x: x.copy_(torch.ones(4)),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_refused_where_a_graph_is_to_be_captured(device, name):
    x = torch.ones(4).to(PLACE)
    with NoWaits(), pytest.raises(RuntimeError, match=r"\w+ waits for the device"):
        WAITS[name](x)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "fourier"])  # conjugate views are not simulated
def test_products_wait_for_nothing(device, name):
    model, image = build(name)
    J = fo.JacobianOperator(model.to(PLACE) if isinstance(model, nn.Module) else model, image.to(PLACE))
    assert J.strategy == "recorded"
    for width in (1, 5, 5):
        vectors = torch.ones(width, J.shape[1]).to(J.response), torch.ones(width, J.shape[0]).to(J.response)
        (J.rows(vectors[0]), J.adjoint_rows(vectors[1]))  # measured, and checked, which may wait
        with NoWaits():
            for product, x in zip((J.linearization._jvp, J.linearization._vjp), vectors, strict=True):
                product(x)


def test_the_block_size_is_measured_when_blocks_are_wanted():
    model, image = problem()
    dense = fo.FisherOperator(model, image) @ torch.eye(SIDE**2, dtype=torch.float64)
    with Elsewhere():
        F = fo.FisherOperator(model.to(PLACE), image.to(PLACE))
        twin = fo.FisherOperator(model, F.image, tuning=F.tuning)
        for op in (F, twin):
            for vectors, known in ((1, False), (3, False), (20, True), (2, True)):
                rows = torch.from_numpy(COLUMNS.T).repeat(7, 1)[:vectors]
                close(op.rows(rows.to(PLACE)), rows @ dense)
                assert ("block" in op.tuning) == known


@pytest.mark.filterwarnings("ignore::fisherop.ConvergenceWarning")
def test_a_step_of_many_images_costs_no_more_launches_and_waits_than_one_of_two(device):
    def work(count):
        images, common = problem(count)[1].to(PLACE), {"tol": 1e-12, "rng": 0, "batch": count}
        return lambda n: fo.eigendistortions_many(pooled, images, 2, "BE", "lanczos", maxiter=n, **common)

    costs = [spent(device, work(count)) for count in (2, 7)]
    assert costs[0] == costs[1]
    assert costs[0][1] == 1


@pytest.mark.filterwarnings("ignore::fisherop.ConvergenceWarning")
def test_images_that_are_done_make_no_wait_for_the_others(device):
    images, common = problem(6)[1].to(PLACE), {"tol": 1e-12, "rng": 0, "batch": 6}

    def work(n):
        def stopped(image, progress):
            return image > 2 and progress.iteration == 8

        fo.eigendistortions_many(pooled, images, 2, "BE", "lanczos", maxiter=n, callback=stopped, **common)

    assert spent(device, work)[1] == 1


@pytest.mark.filterwarnings("ignore::fisherop.ConvergenceWarning")
def test_a_step_of_one_image_waits_once(device):
    F = fo.FisherOperator(pooled, problem()[1].to(PLACE))
    _, waits = spent(device, lambda n: fo.eigendistortions(F, 2, "BE", "lanczos", tol=1e-12, rng=0, maxiter=n))
    assert waits == 1
