"""Laws of response noise."""

import pytest
import torch
from hypothesis import given
from models import build
from strategies import names, seeds

import fisherop as fo


def dense(model, image, covariance=None):
    return fo.FisherOperator(model, image, fo.noise.Gaussian(covariance)) @ torch.eye(image.numel()).double()


@given(names, seeds)
def test_scaling_the_covariance_divides_f(name, seed):
    model, image = build(name, seed=seed)
    torch.testing.assert_close(dense(model, image, 8.0) * 8, dense(model, image))


def test_whitening_the_response_is_the_same_as_its_noise():
    model, image = build("fourier")
    deviation = torch.linspace(0.5, 3, 40, dtype=torch.float64)
    whitened = dense(lambda x: model(x).flatten() / deviation, image)
    torch.testing.assert_close(dense(model, image, deviation**2), whitened)


def test_root_and_its_transpose_make_the_precision():
    W = fo.noise.Gaussian(torch.tensor([1.0, 4.0])).at(torch.zeros(2))
    rows = torch.eye(2)
    assert torch.equal(W.root_transpose(W.root(rows)), W.apply(rows))


@pytest.mark.parametrize(
    ("covariance", "words"),
    [
        (0.0, "must be positive and finite"),
        (-1.0, "must be positive and finite"),
        (float("inf"), "must be positive and finite"),
        (torch.ones(3), "3 entries and the response 40"),
        (torch.zeros(40), "must be positive"),
    ],
)
def test_a_covariance_that_is_none_is_refused(covariance, words):
    with pytest.raises(ValueError, match=words):
        dense(*build("fourier"), covariance)
