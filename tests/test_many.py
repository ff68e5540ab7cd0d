"""Many images at once: each gets what it would get alone, for the products of the slowest one."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import build, dense_jacobian
from scipy.linalg import subspace_angles
from torch import nn

import fisherop as fo
from fisherop import eigen, many
from fisherop.linearize import Linearization
from fisherop.solvers.contract import rows_in_memory


def problem(name="conv relu pool", count=4, dtype=torch.float64):
    """Return a model and images of the shape that it takes."""
    model, image = build(name, dtype)
    source = torch.Generator().manual_seed(1)
    return model, torch.rand(count, *image.shape[1:], dtype=torch.float64, generator=source).to(dtype)


def alone(model, images, *args, noise=None, within=None, rng=0, **kwargs):
    """Return the results of single calls that draw the same random numbers."""
    streams = np.random.default_rng(rng).spawn(len(images))
    ops = [fo.FisherOperator(model, image[None], noise, within) for image in images]
    return [fo.eigendistortions(op, *args, rng=stream, **kwargs) for op, stream in zip(ops, streams, strict=True)]


def assert_same(results, expected):
    """Compare results with those of single calls, up to their residuals."""
    assert len(results) == len(expected)
    for one, other in zip(results, expected, strict=True):
        slack = (one.residuals + other.residuals).max() * other.lambda_max + 1e-6 * other.lambda_max
        np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, atol=slack, rtol=0)
        assert np.array_equal(one.index, other.index)
        assert np.array_equal(one.converged, other.converged)
        assert one.eigendistortions.shape == other.eigendistortions.shape
        assert torch.equal(one.image, other.image)
        assert one.method == other.method


@pytest.fixture
def passes(monkeypatch):
    """Count the passes forward through linearizations, and linearizations made, in a list of their batch sizes."""
    seen = {"products": 0, "batches": []}
    jvp, init = Linearization.jvp, Linearization.__init__

    def counted(self, rows):
        seen["products"] += 1
        return jvp(self, rows)

    def noted(self, model, image, *args):
        init(self, model, image, *args)
        seen["batches"].append(image.shape[1])
        seen["products"] = 0  # those of the construction are not the solver's

    monkeypatch.setattr(Linearization, "jvp", counted)
    monkeypatch.setattr(Linearization, "__init__", noted)
    return seen


# ------------------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize(
    ("name", "method", "k", "which", "dtype"),
    [
        ("conv relu pool", "lanczos", 3, "BE", torch.float64),
        ("conv relu pool", "auto", 3, "BE", torch.float32),
        ("gain control", "lanczos", 3, "LM", torch.float32),
        ("gain control", "auto", 2, "SM", torch.float64),
        ("fourier", "lanczos", 2, "SM", torch.float64),
        ("linear m<n", "lanczos", 2, "BE", torch.float32),
        ("linear m>n", "lanczos", 9, "BE", torch.float64),
        ("complex", "lanczos", 3, "BE", torch.float32),
    ],
)
def test_every_image_gets_what_it_would_get_alone(name, method, k, which, dtype):
    model, images = problem(name, dtype=dtype)
    assert_same(
        fo.eigendistortions_many(model, images, k, which, method, rng=0), alone(model, images, k, which, method)
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from(["LM", "SM", "BE"]))
def test_every_image_agrees_with_its_dense_matrix(seed, count, which):
    source = torch.Generator().manual_seed(seed)
    weight, images = (torch.randn(shape, generator=source, dtype=torch.float64) for shape in ((14, 9), (count, 9)))

    def model(x):
        return torch.tanh(x @ weight.T) + 0.3 * (x @ weight.T)

    for image, result in zip(images, fo.eigendistortions_many(model, images, 3, which, "lanczos", rng=0), strict=True):
        J = dense_jacobian(model, image[None]).numpy()
        values, vectors = (part[..., ::-1] for part in np.linalg.eigh(J.T @ J))
        np.testing.assert_allclose(result.eigenvalues, values[result.index], atol=1e-5 * values[0])
        assert result.converged.all()
        for index, vector in zip(result.index, result.eigendistortions, strict=True):
            near = abs(values - values[index]) < 1e-4 * values[0]
            assert subspace_angles(vectors[:, near], vector.numpy()[:, None])[0] < 0.02


@pytest.mark.parametrize(
    "noise",
    [
        fo.noise.Poisson(gain=3.0),
        fo.noise.Bernoulli(),
        fo.noise.Categorical(),
        fo.noise.Gaussian(torch.linspace(0.5, 2, 36)),
        fo.noise.Gaussian((torch.ones(36, 1).double(), 0.5)),
        fo.noise.Custom(lambda rows: rows * torch.linspace(1, 2, 36)),
    ],
    ids=lambda noise: type(noise).__name__,
)
def test_every_image_has_the_noise_of_its_own_response(noise):
    model, images = problem()
    assert_same(
        fo.eigendistortions_many(_Rates(model), images, 3, method="lanczos", noise=noise, rng=0),
        alone(_Rates(model), images, 3, method="lanczos", noise=noise),
    )


class _Rates(nn.Module):
    """A model's responses, made positive."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x):
        return nn.functional.softplus(self.model(x).flatten(1)) + 0.1


@pytest.mark.parametrize("within", [torch.arange(144).reshape(12, 12) % 3 > 0, fo.restrict.Band(0.0, 0.2), [3, 77, 90]])
def test_distortions_stay_within_the_restriction(within):
    model, images = problem()
    results = fo.eigendistortions_many(model, images, 2, within=within, rng=0)
    assert_same(results, alone(model, images, 2, within=within))
    F = fo.FisherOperator(model, images[:1], within=within)
    for result in results:
        rows = result.eigendistortions.flatten(1)
        torch.testing.assert_close(F.expand(F.project(rows)), rows)


def test_responses_of_several_parts_are_sorted_by_image():
    def model(x):
        return {"a": x.flatten(1) ** 2, "b": (torch.fft.rfft(x), None, x.sum((1, 2)).sin())}

    images = torch.rand(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_same(fo.eigendistortions_many(model, images, 4, rng=0), alone(model, images, 4))


def test_images_come_as_a_batch_or_as_a_list():
    model, images = problem()
    whole = fo.eigendistortions_many(model, images, rng=0)
    for given_images in ([image[None] for image in images], tuple(image[None] for image in images)):
        assert_same(fo.eigendistortions_many(model, given_images, rng=0), whole)
    rows = torch.rand(3, 4)
    assert_same(
        fo.eigendistortions_many(torch.square, list(rows), rng=0), fo.eigendistortions_many(torch.square, rows, rng=0)
    )


@pytest.mark.parametrize("certify", ["residuals", "probe"])
def test_the_proof_is_the_one_of_single_calls(certify):
    model, images = problem()
    results = fo.eigendistortions_many(model, images, 2, method="lanczos", rng=0, certify=certify)
    for one, other in zip(results, alone(model, images, 2, method="lanczos", certify=certify), strict=True):
        assert one.message.partition(" in ")[0] == other.message.partition(" in ")[0]
        assert one.message.partition(";")[2] == other.message.partition(";")[2]
        assert one.nullity == other.nullity
        np.testing.assert_allclose(one.eigenvalue_bounds, other.eigenvalue_bounds, atol=1e-6 * other.lambda_max)


def test_the_same_seed_gives_the_same_answer_whatever_the_batch():
    model, images = problem(count=5)
    first, again, pairs = (
        fo.eigendistortions_many(model, images, 3, method="lanczos", rng=7, batch=batch) for batch in (5, 5, 2)
    )
    for one, other, third in zip(first, again, pairs, strict=True):
        # The variants of a product are measured anew, and round otherwise.
        torch.testing.assert_close(one.eigendistortions, other.eigendistortions, atol=1e-7, rtol=0)
        torch.testing.assert_close(one.eigendistortions, third.eigendistortions, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------- products


def test_products_are_as_many_as_the_slowest_image_needs(passes):
    model, images = problem("gain control", count=6)
    results = fo.eigendistortions_many(model, images, 1, "LM", "lanczos", rng=0, batch=6)
    products, longest = passes["products"], max(result.n_matvec for result in results)
    assert longest <= products <= longest + 1  # half a product of the construction's check is an image's, rounded up
    for result, other in zip(results, alone(model, images, 1, "LM", "lanczos"), strict=True):
        assert other.n_matvec <= result.n_matvec <= 1.05 * other.n_matvec + 2  # shared products are judged less often
    assert products < sum(result.n_matvec for result in results) / 4


def test_wide_blocks_are_shared_too(passes):
    model, images = problem("gain control", count=4)
    steps = [0] * 4

    def count(i, progress):
        steps[i] = progress.iteration

    fo.eigendistortions_many(model, images, 4, "SM", "lanczos", rng=0, batch=4, callback=count)
    assert max(steps) <= passes["products"] <= max(steps) + 3


def test_memory_bounds_the_batch(passes, monkeypatch):
    model, images = problem(count=7)
    whole = fo.eigendistortions_many(model, images, rng=0, batch=7)
    written = many.bytes_written(lambda: model(images[:1]))
    row = images[0].numel() * images.element_size()
    monkeypatch.setattr(many, "MEMORY", 3 * max(many.HELD_PASSES * written, many.ROWS_EACH * row))
    monkeypatch.setattr(many, "_seconds", lambda model, images: len(images) ** 0.5)  # the more, the better
    passes["batches"].clear()
    assert_same(fo.eigendistortions_many(model, images, rng=0), whole)
    assert passes["batches"] == [3, 3, 1]


def test_images_share_the_memory_of_dense_problems_and_search_spaces(monkeypatch):
    model, images = problem(count=4)
    monkeypatch.setattr(eigen, "DENSE_BYTES", 2 * 8 * 36 * 144)
    methods = {batch: fo.eigendistortions_many(model, images, rng=0, batch=batch)[0].method for batch in (2, 4)}
    assert methods == {2: "exact", 4: "lanczos"}
    rooms = [rows_in_memory(many.FisherBatch(model, images[:count], fo.noise.Gaussian()).ops[0]) for count in (1, 4)]
    assert rooms[0] == pytest.approx(4 * rooms[1], rel=1e-3)


def test_a_batch_that_slows_the_model_down_is_not_taken(passes, monkeypatch):
    model, images = problem(count=8)
    monkeypatch.setattr(many, "_seconds", lambda model, images: max(len(images), 4) * (1 if len(images) <= 4 else 9))
    fo.eigendistortions_many(model, images, rng=0)
    assert passes["batches"] == [4, 4]


def test_a_batch_too_large_for_the_device_is_halved(passes, monkeypatch):
    model, images = problem(count=6)
    init = many.FisherBatch.__init__

    def small(self, model, images, *args):
        if len(images) > 3:
            raise torch.OutOfMemoryError("no room")
        init(self, model, images, *args)

    monkeypatch.setattr(many.FisherBatch, "__init__", small)
    assert_same(fo.eigendistortions_many(model, images, rng=0, batch=6), alone(model, images))


# ------------------------------------------------------------------------------------------ stopping, and going on


def test_a_callback_stops_its_image_and_no_other():
    model, images = problem("gain control")

    def stop_the_second(i, progress):
        return i == 1 and progress.iteration == 5

    with pytest.warns(fo.ConvergenceWarning, match=r"^image 1: .* the callback stopped") as caught:
        results = fo.eigendistortions_many(model, images, method="lanczos", rng=0, callback=stop_the_second)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [result.converged.all() for result in results] == [True, False, True, True]


def test_a_short_budget_gives_the_best_pairs_and_one_warning():
    model, images = problem("gain control")
    with pytest.warns(fo.ConvergenceWarning, match=r"raise maxiter.*, and 3 more of 4 images") as caught:
        results = fo.eigendistortions_many(model, images, method="lanczos", rng=0, maxiter=8)
    assert len(caught) == 1
    assert not any(result.converged.all() for result in results)
    resumed = fo.eigendistortions_many(
        model, images, method="lanczos", rng=0, v0=[result.eigendistortions for result in results]
    )
    assert all(result.converged.all() for result in resumed)


def test_an_image_without_information_spoils_no_other():
    images = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -1.0, -1.0]])
    with pytest.warns(UserWarning, match="^image 1: F = 0") as caught:
        results = fo.eigendistortions_many(lambda x: x.relu() ** 2, images, rng=0)
    assert [warning.category for warning in caught] == [UserWarning]
    assert results[0].eigenvalues[0] == pytest.approx(36.0)
    assert results[1].lambda_max == 0


# ------------------------------------------------------------------------------------------------------ what is refused


class _Mixing(nn.Module):
    """A model that is right image by image, and whose derivative alone mixes them."""

    def forward(self, x):
        mean = x.mean(0, keepdim=True)
        return x.flatten(1) + (mean - mean.detach()).flatten(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.BatchNorm2d(1, track_running_stats=False), "depends on the others in its batch: call model.eval"),
        (nn.BatchNorm2d(1).train(), "call model.eval"),
        (lambda x: x - x.mean(), "depends on the others"),
        (_Mixing().eval(), "depends on the others"),
        (lambda x: x.sum((1, 2, 3)) * x.mean(), "depends on the others"),
        (lambda x: x.flatten() ** 2, "shape .* leading dimension of 3"),
        (lambda x: (x**2).sum(), "shape .* leading dimension of 3"),
        (lambda x: x.reshape(1, 16) ** 2, r"does not take a batch of 3 images \(.*\): take images one by one"),
    ],
)
def test_a_model_that_does_not_treat_images_one_by_one_is_refused(model, message):
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in getattr(model, "state_dict", dict)().items()}
    with pytest.raises(ValueError, match=message):
        fo.eigendistortions_many(model, images, batch=3)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_dictionary_of_its_own_kind_is_taken_as_a_dictionary():
    model, images = problem()
    expected = fo.eigendistortions_many(lambda x: {"a": model(x), "b": x.sum((1, 2, 3))}, images, rng=0)
    results = fo.eigendistortions_many(lambda x: OrderedDict(a=model(x), b=x.sum((1, 2, 3))), images, rng=0)
    assert_same(results, expected)


def test_a_model_may_make_sparse_tensors_on_its_way():
    images = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    results = fo.eigendistortions_many(lambda x: x.diag_embed().flatten(1).to_sparse().to_dense() ** 2, images, k=4)
    for result, image in zip(results, images, strict=True):
        np.testing.assert_allclose(result.eigenvalues, 4 * np.sort(image.numpy())[::-1] ** 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "noise", "message"),
    [
        (lambda x: 1 / x, None, "image 5: the response holds NaN or infinity"),
        (lambda x: x - 0.05, fo.noise.Poisson(), "image 5: .*negative"),
        (torch.sqrt, None, "image 5: the derivative of the response holds NaN or infinity"),
    ],
    ids=["response", "noise", "derivative"],
)
def test_an_image_that_cannot_be_taken_is_named(model, noise, message):
    images = 0.1 + torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    images[5, 2] = 0
    steps = []
    with pytest.raises(ValueError, match=message):
        fo.eigendistortions_many(model, images, noise=noise, batch=2, callback=lambda i, progress: steps.append(i))
    assert message.startswith("image 5: the derivative") or not steps


def test_noise_that_inherits_from_gaussian_may_depend_on_the_response():
    class Weber(fo.noise.Gaussian):
        def at(self, response):
            return fo.noise.Gaussian((0.1 + response.abs()) ** 2).at(response)

    model, images = problem()
    images = images * torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None, None]
    results = fo.eigendistortions_many(model, images, noise=Weber(), rng=0)
    assert_same(results, alone(model, images, noise=Weber()))


@pytest.mark.parametrize("leading", [(), (1,)], ids=["(C, H, W)", "(1, C, H, W)"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_list_of_pictures_is_a_batch_of_them(leading, channels):
    model = nn.Conv2d(channels, 2, 3).double()
    images = torch.rand(3, channels, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    results = fo.eigendistortions_many(model, [image.reshape(*leading, *image.shape) for image in images], rng=0)
    assert_same(results, fo.eigendistortions_many(model, images, rng=0))


def test_any_generator_is_a_source_of_random_numbers():
    model, images = problem()
    without_seed = np.random.Generator(np.random.RandomState(3)._bit_generator)
    for rng in (without_seed, np.random.default_rng(3)):
        assert all(result.converged.all() for result in fo.eigendistortions_many(model, images, rng=rng))


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (lambda x: {x}, "returned set; return a tensor"),
        (lambda x: (x, 3.0), "returned float; return a tensor"),
        (lambda x: (x, x > 0), "torch.bool; return only float32"),
        (lambda x: x.flatten(1).to_sparse(), "to_dense"),
    ],
)
def test_a_response_that_is_no_numbers_is_refused_as_for_one_image(respond, message):
    with pytest.raises(TypeError, match=message):
        fo.eigendistortions_many(respond, torch.rand(3, 1, 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": [torch.rand(1, 4), torch.rand(1, 5)]},
            r"one shape, dtype and device, not shapes \(1, 4\), \(1, 5\)",
        ),
        ({"images": [torch.rand(4), torch.rand(4).double()]}, "not dtypes or devices"),
        ({"images": []}, "hold no image"),
        ({"images": "photographs"}, "images must be a tensor"),
        ({"images": torch.ones(2, 4, dtype=torch.int64)}, "float32 or float64"),
        ({"images": torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])}, "image 1: it holds NaN"),
        ({"images": [np.ones(4)]}, "list of tensors, not ndarray: use torch.as_tensor"),
        ({"noise": "gaussian"}, "noise must be one of fisherop.noise"),
        ({"v0": 5}, "v0 must hold a start for every image, not int"),
        ({"method": "arpack"}, "method 'arpack' takes one image at a time: use 'auto', 'exact', 'lanczos'"),
        ({"method": "lanzcos"}, "did you mean 'lanczos'"),
        ({"k": 5}, "between 1 and n = 4"),
        ({"which": "XX"}, "which must be one of"),
        ({"tol": 2.0}, "tol is relative"),
        ({"callback": 3}, "callback must be a function of an image's number and its Progress, not 3"),
        ({"maxiter": 0}, "maxiter must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"batch": 1.5}, "batch must be a whole number, not 1.5"),
        ({"v0": [torch.ones(4)]}, "v0 holds starts for 1 images, and there are 2"),
        ({"rng": "seed"}, "rng must be"),
        ({"certify": "maybe"}, "certify must be one of"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(change, message):
    arguments = {"images": torch.rand(2, 4, generator=torch.Generator().manual_seed(0))} | change
    with pytest.raises((ValueError, TypeError), match=message):
        fo.eigendistortions_many(torch.square, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("noise", [None, fo.noise.Poisson()], ids=["white", "poisson"])
def test_a_gpu_gives_what_the_cpu_gives(noise):
    model, images = problem("gain control", count=9, dtype=torch.float32)
    host = fo.eigendistortions_many(model, images, 3, method="lanczos", rng=0, noise=noise)
    device = fo.eigendistortions_many(model.cuda(), images.cuda(), 3, method="lanczos", rng=0, noise=noise)
    for one, other in zip(device, host, strict=True):
        assert one.eigendistortions.is_cuda
        assert one.converged.all()
        np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, atol=3e-5 * other.lambda_max)
