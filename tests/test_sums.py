"""Laws of sums: independent responses add, and the factor of a sum is its factors one below the other."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from models import build
from noises import rates
from scipy.sparse.linalg import aslinearoperator
from strategies import block, seeds

import fisherop as fo


def looks(noise=None, within=None, seed=0):
    """Return Fisher operators of two models at one image."""
    (one, image), (other, _) = build("dict", seed=seed), build("dict", seed=seed + 1)
    return [fo.FisherOperator(rates(model), image, noise, within) for model in (one, other)]


def population(count=3, dtype=torch.float64, within=None):
    """Return Fisher operators of one model at several images."""
    model, _ = build("dict", dtype)
    return [fo.FisherOperator(model, build("dict", dtype, seed)[1], within=within) for seed in range(count)]


def dense(op):
    return op @ torch.eye(op.shape[0]).double()


@settings(max_examples=8)
@given(seeds)
def test_the_sum_is_the_operator_of_the_concatenated_responses(seed):
    (one, image), (other, _) = build("linear m<n", seed=seed), build("linear m<n", seed=seed + 1)
    one, other, noise = rates(one), rates(other), fo.noise.Poisson()
    both = fo.FisherOperator(lambda x: (one(x), other(x)), image, noise)
    total = fo.sum_fisher([fo.FisherOperator(model, image, noise) for model in (one, other)])
    torch.testing.assert_close(dense(total), dense(both))


@pytest.mark.parametrize("within", [None, [3, 5, 7], fo.restrict.Band(0.0, 0.3), block(0, 60, 4)], ids=repr)
@pytest.mark.parametrize("noise", [fo.noise.Poisson(), fo.noise.Categorical()], ids=["poisson", "categorical"])
def test_the_dense_sum_is_the_sum_of_dense_matrices(noise, within):
    ops = looks(noise, within)
    total = fo.sum_fisher(ops, weights=[2.0, 0.5])
    expected = 2 * dense(ops[0]) + 0.5 * dense(ops[1])
    assert total.shape == ops[0].shape
    torch.testing.assert_close(dense(total), expected)
    L = total.factor_rows(torch.eye(total.shape[0]).double())
    assert L.shape[1] == total.factor_size
    torch.testing.assert_close(L @ L.T, expected)
    torch.testing.assert_close(total.factor_adjoint_rows(torch.eye(L.shape[1]).double()), L.T)
    assert torch.equal(total.to_image(L.T), ops[0].to_image(L.T))
    assert torch.equal(total.from_image(ops[0].image), ops[0].from_image(ops[0].image))


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_eigendistortions_of_a_sum_are_those_of_the_dense_matrix(method):
    ops = looks(within=fo.restrict.Channel(0))
    total = fo.sum_fisher(ops)
    r = fo.eigendistortions(total, k=4, method=method, rng=0)
    expected = torch.linalg.eigvalsh(dense(total)).flip(0).numpy()
    np.testing.assert_allclose(r.eigenvalues, expected[r.index], atol=1e-9 * expected[0])
    assert r.converged.all()
    assert r.eigendistortions.shape == (4, 2, 6, 5)
    assert not r.eigendistortions[:, 1].any()
    assert torch.equal(r.image, ops[0].image)


def test_a_sum_of_few_responses_knows_its_null_space():
    (one, image), (other, _) = build("linear m<n"), build("linear m<n", seed=1)
    ops = [fo.FisherOperator(model, image) for model in (one, other)]
    r = fo.eigendistortions(fo.sum_fisher(ops), k=2, which="SM")
    assert r.nullity == 5
    assert (r.eigenvalues <= 1e-12 * r.lambda_max).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_mean_over_images_is_the_mean_of_dense_matrices(dtype):
    ops = population(dtype=dtype)
    matrices = torch.stack([dense(op).double() for op in ops])
    torch.testing.assert_close(dense(fo.mean_fisher(ops)).double(), matrices.mean(0), atol=1e-6, rtol=1e-4)
    shares = torch.tensor([1.0, 2.0, 5.0])
    expected = torch.einsum("i,ijk->jk", shares.double() / 8, matrices)
    torch.testing.assert_close(dense(fo.mean_fisher(ops, weights=shares)).double(), expected, atol=1e-6, rtol=1e-4)


def test_a_result_of_many_images_belongs_to_none():
    mean = fo.mean_fisher(population())
    r = fo.eigendistortions(mean, k=2)
    assert r.image is None
    assert r.eigendistortions.shape == (2, 2, 6, 5)
    again = fo.eigendistortions(mean, k=2, method="lanczos", v0=r.eigendistortions)
    np.testing.assert_allclose(again.eigenvalues, r.eigenvalues, atol=1e-9 * r.lambda_max)
    one = population(1)
    assert torch.equal(fo.mean_fisher(one * 2).image, one[0].image)


def test_one_batch_through_the_model_is_the_mean_over_its_images():
    model, _ = build("gain control")
    images = torch.cat([build("gain control", seed=seed)[1] for seed in range(3)])
    batched = fo.FisherOperator(lambda d: model(images + d), torch.zeros(1, 1, 9, 9).double(), fo.noise.Gaussian(3.0))
    mean = fo.mean_fisher([fo.FisherOperator(model, x[None]) for x in images])
    torch.testing.assert_close(dense(batched), dense(mean))


def test_sums_are_summed_pickled_and_refreshed():
    model, image = torch.nn.Linear(3, 2).double(), torch.ones(3).double()
    F = fo.FisherOperator(model, image)
    total = fo.sum_fisher([fo.sum_fisher([F, F]), F])
    torch.testing.assert_close(dense(total), 3 * dense(F))
    torch.testing.assert_close(dense(pickle.loads(pickle.dumps(total))), 3 * dense(F))
    before = dense(F)
    with torch.no_grad():
        model.weight.mul_(2)
    total.refresh()
    torch.testing.assert_close(dense(total), 12 * before)
    assert total.T is total


def test_pythons_sum_adds_operators():
    F = fo.FisherOperator(torch.square, torch.arange(3.0))
    np.testing.assert_array_equal(sum([F, F]) @ np.eye(3), 2 * (F @ np.eye(3)))
    for other in (1, np.eye(3)):
        with pytest.raises(TypeError, match="an operator is added to an operator"):
            sum([F], start=other)


def test_a_sum_without_every_factor_is_served_without_one():
    model, image = build("linear m=n")
    wide = lambda x: torch.cat([model(x), x.new_ones(600)])  # noqa: E731
    rootless = fo.FisherOperator(wide, image, fo.noise.Gaussian(precision=aslinearoperator(np.eye(612))))
    total = fo.sum_fisher([rootless, fo.FisherOperator(model, image)])
    assert total.factor_size is None
    torch.testing.assert_close(dense(total), 2 * dense(fo.FisherOperator(model, image)))
    assert fo.eigendistortions(total, k=2).converged.all()


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_sum_over_different_images_is_refused_for_the_mean():
    with pytest.raises(ValueError, match=r"belong to different images.*use mean_fisher"):
        fo.sum_fisher(population())
    with pytest.raises(ValueError, match="belong to different images"):
        fo.sum_fisher([fo.mean_fisher(population()), population()[0]])


@pytest.mark.parametrize("add", [fo.sum_fisher, fo.mean_fisher])
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda F: [], ValueError, "ops is empty"),
        (lambda F: F, TypeError, "put them in a list"),
        (lambda F: [F, np.eye(60)], TypeError, r"ops\[1\] is ndarray"),
        (lambda F: [F, *population(1, torch.float32)], ValueError, r"agree in torch_dtype, and ops\[1\]"),
        (lambda F: [F, fo.FisherOperator(*build("fourier"))], ValueError, "agree in image_shape"),
        (lambda F: [F, *population(1, within=[0])], ValueError, "agree in shape"),
        (lambda F: population(1, within=[0]) + population(1, within=[1]), ValueError, "restricted to different"),
    ],
)
def test_operators_that_have_no_sum_are_refused(add, change, kind, words):
    with pytest.raises(kind, match=words):
        add(change(population(1)[0]))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "do not fit 2 operators"),
        ([1.0, -1.0], "not negative"),
        ([0.0, 0.0], "not all zero"),
        ([1.0, np.nan], "must be finite"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, words):
    F = population(1)[0]
    for add in (fo.sum_fisher, fo.mean_fisher):
        with pytest.raises(ValueError, match=words):
            add([F, F], weights)
