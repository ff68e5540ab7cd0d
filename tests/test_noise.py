"""Laws of response noise: what W is for each likelihood, and how F follows from it."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from models import build, dense_jacobian
from noises import NOISES, covariance, low_rank, rates
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from strategies import block, names, seeds
from torch import distributions

import fisherop as fo

SMALL = ("linear m<n", "linear m>n", "fourier")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


def dense(model, image, noise=None):
    return fo.FisherOperator(model, image, noise) @ torch.eye(image.numel()).double()


def gaussian(model, image, covariance=None):
    return dense(model, image, fo.noise.Gaussian(covariance))


def near(a, b, tolerance=1e-11):
    return bool((a - b).norm() <= tolerance * b.norm())


# ------------------------------------------------------------------------------------------------- the dense truth


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("name", SMALL)
def test_f_is_j_transpose_w_j_for_every_noise(name, kind, dtype):
    model, image = build(name, dtype)
    model = rates(model)
    J, f = dense_jacobian(model, image).double(), model(image).detach().double()
    make, truth = NOISES[kind]
    W = truth(f)
    expected = J.T @ W @ J
    F = fo.FisherOperator(model, image, double_proof(make(len(f)), dtype))
    eye = torch.eye(len(expected))
    assert near((F @ eye).double(), expected, TOLERANCE[dtype])
    L = F.factor_rows(eye.to(dtype)).T.double()
    assert L.shape[0] == F.factor_size
    assert near(L.T @ L, expected, TOLERANCE[dtype])
    assert near(F.factor_adjoint_rows(torch.eye(len(L), dtype=dtype)).double(), L, TOLERANCE[dtype])


def double_proof(noise, dtype):
    """Let a noise of functions in float64 take float32 rows."""
    if dtype == torch.float64 or not callable(getattr(noise, "precision", None)):
        return noise
    if isinstance(noise.precision, LinearOperator):
        return noise
    return fo.noise.Custom(lambda x: noise.precision(x.double()), root=lambda x: noise.root(x.double()))


LIKELIHOODS = {
    "matrix": lambda f: distributions.MultivariateNormal(f, covariance(f.shape[-1])),
    "low rank": lambda f: distributions.LowRankMultivariateNormal(f, *low_rank(f.shape[-1])),
    "poisson": lambda f: distributions.Independent(distributions.Poisson(3 * f), 1),
    "bernoulli": lambda f: distributions.Independent(distributions.Bernoulli(logits=f), 1),
    "categorical": lambda f: distributions.Categorical(logits=f),
}


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("name", ["linear m>n", "linear m<n"])
def test_f_is_the_curvature_of_the_divergence_between_likelihoods(name, kind):
    model, image = build(name)
    model, likelihood = rates(model), LIKELIHOODS[kind]
    here = likelihood(model(image).detach())

    def divergence(x):
        return distributions.kl_divergence(here, likelihood(model(x)))

    expected = torch.autograd.functional.hessian(divergence, image).reshape(image.numel(), -1)
    assert near(dense(model, image, NOISES[kind][0](len(here.mean) if kind != "categorical" else 0)), expected, 1e-9)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_f_is_the_covariance_of_the_score(kind):
    model, image = build("linear m>n")
    model, likelihood, draws = rates(model), LIKELIHOODS[kind], 5_000
    f = model(image).detach().expand(draws, -1).clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = likelihood(f.detach()).sample()
    (slopes,) = torch.autograd.grad(likelihood(f).log_prob(samples).sum(), f)
    scores = slopes @ dense_jacobian(model, image)
    products = scores[:, :, None] * scores[:, None, :]
    error = (products.mean(0) - dense(model, image, NOISES[kind][0](f.shape[1]))).abs()
    assert (error <= 5 * products.std(0) / draws**0.5).all()


# -------------------------------------------------------------------------------------------------------------- laws


@given(names, seeds)
def test_scaling_the_covariance_divides_f(name, seed):
    model, image = build(name, seed=seed)
    torch.testing.assert_close(gaussian(model, image, 8.0) * 8, gaussian(model, image))


@pytest.mark.parametrize("make", [covariance, lambda m: low_rank(m, 1)], ids=["matrix", "low rank"])
def test_scaling_any_covariance_divides_f(make):
    model, image = build("fourier")
    given = make(40)
    scaled = tuple(s * c for s, c in zip((4.0, 16.0), given, strict=True)) if isinstance(given, tuple) else 16 * given
    torch.testing.assert_close(gaussian(model, image, scaled) * 16, gaussian(model, image, given))


def test_whitening_the_response_is_the_same_as_its_noise():
    model, image = build("fourier")
    deviation = torch.linspace(0.5, 3, 40, dtype=torch.float64)
    whitened = gaussian(lambda x: model(x).flatten() / deviation, image)
    torch.testing.assert_close(gaussian(model, image, deviation**2), whitened)


@settings(max_examples=8)
@given(seeds)
def test_whitening_correlated_noise_is_the_same_as_having_it(seed):
    model, image = build("linear m>n", seed=seed)
    C = covariance(30, seed)
    values, vectors = torch.linalg.eigh(C)
    whitener = (vectors / values.sqrt()) @ vectors.T
    assert near(gaussian(model, image, C), gaussian(lambda x: whitener @ model(x).flatten(), image))


@settings(max_examples=8)
@given(seeds)
def test_an_invertible_recoding_of_response_and_noise_changes_nothing(seed):
    model, image = build("linear m>n", seed=seed)
    C = covariance(30, seed)
    A = torch.from_numpy(block(seed, 30, 30)) + 4 * torch.eye(30)
    assert near(gaussian(lambda x: A @ model(x).flatten(), image, A @ C @ A.T), gaussian(model, image, C), 1e-7)


@settings(max_examples=8)
@given(seeds)
def test_low_rank_plus_diagonal_is_the_full_covariance_without_its_matrix(seed):
    model, image = build("linear m>n", seed=seed)
    U, d = low_rank(30, 1 + seed % 40, seed)
    expected = gaussian(model, image, U @ U.T + torch.diag(d))
    assert near(gaussian(model, image, (U, d)), expected, 1e-10)
    assert near(gaussian(model, image, (d, U)), expected, 1e-10)


def test_a_dominant_shared_noise_leaves_what_is_orthogonal_to_it():
    shared = torch.ones(5, 1).double() / math.sqrt(5)
    F = dense(torch.nn.Identity(), torch.zeros(5).double(), fo.noise.Gaussian((1e8 * shared, 1.0)))
    assert near(F, torch.eye(5).double() - shared @ shared.T)


@settings(max_examples=8)
@given(seeds)
def test_poisson_information_is_in_proportion_to_the_rate(seed):
    model, image = build("linear m>n", seed=seed)
    F = [dense(rates(model, scale), image, fo.noise.Poisson()) for scale in (1.0, 5.0)]
    assert near(F[1], 5 * F[0])
    assert near(dense(rates(model), image, fo.noise.Poisson(gain=5.0)), F[1])


def test_rates_below_the_floor_are_taken_for_the_floor():
    image = torch.tensor([0.0, 0.01, 4.0], dtype=torch.float64)
    F = dense(torch.nn.Identity(), image, fo.noise.Poisson(floor=0.5))
    assert near(F, torch.diag(torch.tensor([2.0, 2.0, 0.25])).double())


@pytest.mark.parametrize("kind", ["unit", "poisson", "bernoulli"])
def test_independent_responses_add(kind):
    (one, image), (other, _) = build("fourier"), build("fourier", seed=1)
    one, other, noise = rates(one), rates(other), NOISES[kind][0](0)
    both = dense(lambda x: (one(x), other(x)), image, noise)
    assert near(both, dense(one, image, noise) + dense(other, image, noise))


def test_a_constant_added_to_all_logits_goes_unnoticed():
    image = torch.linspace(-2, 3, 6).double()
    W = dense(torch.nn.Identity(), image, fo.noise.Categorical())
    assert (W @ torch.ones(6).double()).norm() <= 1e-14
    assert near(dense(lambda x: x + 100, image, fo.noise.Categorical()), W)


def test_two_classes_and_yes_or_no_are_one_likelihood():
    model, image = build("linear m=n")
    logit = rates(model)
    yes = dense(lambda x: logit(x)[0], image, fo.noise.Bernoulli())
    assert near(dense(lambda x: torch.stack([logit(x)[0], x.new_zeros(())]), image, fo.noise.Categorical()), yes)


@pytest.mark.parametrize("noise", [fo.noise.Bernoulli(), fo.noise.Categorical()], ids=str)
def test_certain_responses_give_finite_products(noise):
    F = fo.FisherOperator(lambda x: 1e4 * x, torch.tensor([1.0, -1.0, 0.5]), noise)
    assert torch.isfinite(F @ torch.eye(3)).all()
    assert torch.isfinite(F.factor_rows(torch.eye(3))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("margin", [0.0, 10.0, 20.0, 30.0, 40.0, 80.0])
def test_a_confident_choice_keeps_all_digits_of_what_little_is_noticed(margin, dtype):
    logits = torch.zeros(10).double()
    logits[3] = margin
    p = torch.softmax(logits, 0)
    W = -torch.outer(p, p)
    W.fill_diagonal_(0)
    W -= torch.diag(W.sum(1))  # each row's sum is zero: p_i (1 - p_i) without its difference
    A = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)).double()
    F = fo.FisherOperator(lambda x: A.to(dtype) @ x + logits.to(dtype), torch.zeros(20, dtype=dtype), CHOICE)
    assert near((F @ torch.eye(20, dtype=dtype)).double(), A.T @ W @ A, 30 * torch.finfo(dtype).eps)


CHOICE = fo.noise.Categorical()


def test_what_moves_along_the_dominant_shared_noise_alone_keeps_its_digits():
    noise = fo.noise.Gaussian((1e4 * torch.ones(3, 1), 1.0))
    F = fo.FisherOperator(lambda x: torch.ones(3, 2) @ x, torch.zeros(2), noise)
    assert near((F @ torch.eye(2)).double(), torch.full((2, 2), 1 / (1e8 + 1 / 3)).double(), 1e-2)


def test_an_ill_conditioned_covariance_is_inverted_before_it_is_rounded():
    t = torch.arange(60.0).double()
    C = torch.exp(-((t[:, None] - t) ** 2) / 50) + 1e-8 * torch.eye(60)
    W = gaussian(torch.nn.Identity(), t, C)
    F = fo.FisherOperator(torch.nn.Identity(), t.float(), fo.noise.Gaussian(C))
    assert near((F @ torch.eye(60)).double(), W, 1e-6)


@pytest.mark.parametrize("kind", NOISES)
def test_root_and_its_transpose_make_the_precision(kind):
    W = (NOISES[kind][0](7) or fo.noise.Gaussian()).at(torch.linspace(0.5, 2, 7).double())
    rows = torch.from_numpy(block(0, 3, 7))
    torch.testing.assert_close(W.root_transpose(W.root(rows)), W.apply(rows))


@pytest.mark.parametrize("kind", ["poisson", "matrix", "low rank", "categorical", "custom root"])
def test_eigendistortions_are_those_of_the_dense_matrix(kind):
    model, image = build("attention", torch.float32)
    model = rates(model)
    J, f = dense_jacobian(model, image).double(), model(image).detach().double()
    noise, W = NOISES[kind][0](len(f)), NOISES[kind][1](f)
    r = fo.eigendistortions(fo.FisherOperator(model, image, noise), k=4)
    expected = torch.linalg.eigvalsh(J.T @ W @ J).flip(0)[r.index].numpy()
    np.testing.assert_allclose(r.eigenvalues, expected, atol=2e-6 * expected[0])
    assert r.converged.all()


def test_a_large_operator_without_a_root_is_served_without_its_factor():
    model, image = build("linear m<n")
    wide = lambda x: torch.nn.functional.pad(model(x).flatten(), (0, 600), value=1.0)  # noqa: E731
    F = fo.FisherOperator(wide, image, fo.noise.Gaussian(precision=aslinearoperator(2 * np.eye(610))))
    assert F.factor_size is None
    with pytest.raises(NotImplementedError, match=r"pass root="):
        F.factor_rows(torch.eye(25).double())
    assert near(F @ torch.eye(25).double(), 2 * gaussian(model, image))
    assert fo.eigendistortions(F, k=2).converged.all()


# ---------------------------------------------------------------------------------------------------------- refusals

INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (0.0, "must be positive and finite"),
        (-1.0, "must be positive and finite"),
        (float("inf"), "must be positive and finite"),
        (torch.ones(3), "3 entries and the response 40"),
        (torch.zeros(40), "must be positive"),
        (torch.ones(40, 30), "1200 entries and the response 40"),
        (torch.block_diag(INDEFINITE, torch.eye(38)), r"not positive definite \(its least eigenvalue is -1\): add"),
        (torch.triu(torch.ones(40, 40)), r"not symmetric: pass \(C \+ C.T\) / 2"),
        ((torch.ones(40, 2), 0.0), "diagonal of a low rank plus diagonal covariance must be positive"),
        ((torch.ones(39, 2), 1.0), "U of shape"),
        ((torch.ones(40, 2), 1.0, 1.0), r"a pair \(U, d\), not 3 things"),
    ],
)
def test_a_covariance_that_is_none_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        gaussian(*build("fourier"), given)


def test_a_covariance_as_an_operator_is_refused_for_its_inverse():
    with pytest.raises(TypeError, match="give its inverse as precision="):
        gaussian(*build("fourier"), aslinearoperator(np.eye(40)))
    with pytest.raises(ValueError, match="each other's inverse"):
        dense(*build("fourier"), fo.noise.Gaussian(1.0, precision=np.eye(40)))
    with pytest.raises(TypeError, match="made of numbers, not str"):
        gaussian(*build("fourier"), "unit")
    with pytest.raises(TypeError, match="covariance is complex"):
        gaussian(*build("fourier"), torch.ones(40) + 0j)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_precision_of_any_scale_keeps_what_it_knows_and_its_null_space(scale):
    W = scale * torch.diag(torch.tensor([4.0, 1.0, 0.0])).double()
    F = fo.FisherOperator(torch.nn.Identity(), torch.zeros(3).double(), fo.noise.Custom(W))
    assert F.factor_size == 2
    torch.testing.assert_close(F @ torch.eye(3).double(), W, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=re.escape(f"its least eigenvalue is {-1e-3 * scale:.3g}")):
        dense(torch.nn.Identity(), torch.zeros(3).double(), fo.noise.Custom(W - 1e-3 * scale * torch.eye(3)))


def test_a_noise_is_checked_without_the_global_random_numbers():
    state = torch.random.get_rng_state()
    dense(torch.nn.Identity(), torch.zeros(2), fo.noise.Custom(torch.eye(2), root=torch.eye(2)))
    dense(torch.nn.Identity(), torch.zeros(2), fo.noise.Custom(lambda rows: 2 * rows))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_gain_that_fits_no_response_is_named():
    with pytest.raises(ValueError, match="gain must be positive and finite"):
        dense(torch.nn.Identity(), torch.ones(3), fo.noise.Poisson(gain=float("nan")))
    with pytest.raises(ValueError, match=r"gain of shape \(2,\) has 2 .* response 3: give one number, or one gain for"):
        dense(torch.nn.Identity(), torch.ones(3), fo.noise.Poisson(gain=torch.ones(2)))


def test_a_negative_rate_is_refused():
    with pytest.raises(ValueError, match=r"1 of 3 responses are negative \(lowest -0.5\)"):
        dense(torch.nn.Identity(), torch.tensor([1.0, -0.5, 0.0]), fo.noise.Poisson())


@pytest.mark.parametrize("settings", [{"gain": 0.0}, {"gain": -1.0}, {"floor": 0.0}, {"floor": torch.ones(3)}])
def test_a_gain_or_floor_that_is_not_positive_is_refused(settings):
    with pytest.raises(ValueError, match="gain and floor of Poisson noise must be positive"):
        dense(torch.nn.Identity(), torch.ones(3), fo.noise.Poisson(**settings))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"precision": torch.eye(3)}, ValueError, r"precision has shape \(3, 3\), and the response 2 entries"),
        ({"precision": INDEFINITE}, ValueError, "precision is not positive semidefinite"),
        ({"precision": aslinearoperator(-np.eye(2))}, ValueError, "v'Wv is negative"),
        ({"precision": torch.tensor([[1.0, 1.0], [0.0, 1.0]])}, ValueError, "precision is not symmetric"),
        ({"precision": torch.eye(2), "root": 2 * torch.eye(2)}, ValueError, "root does not belong to precision"),
        ({"precision": torch.eye(2), "root": torch.eye(3)}, ValueError, r"root has shape \(3, 3\)"),
        ({"precision": lambda x: x[:, :1]}, ValueError, r"rows of shape \(2, 2\) into as many, not \(2, 1\)"),
        ({"precision": lambda x: x * math.nan}, ValueError, "holds NaN"),
        ({"precision": 2.0}, TypeError, "must be a matrix with two dimensions"),
        ({"precision": torch.eye(2) * 1j}, TypeError, "complex"),
        ({"precision": aslinearoperator(np.eye(2) * 1j)}, TypeError, "complex"),
    ],
)
def test_a_precision_that_is_none_is_refused(settings, kind, words):
    with pytest.raises(kind, match=words):
        dense(torch.nn.Identity(), torch.ones(2), fo.noise.Custom(**settings))


class Own:
    """A noise whose precision is of the user's own class."""

    def __init__(self, **products):
        self.products = products

    def at(self, response):
        return SimpleNamespace(**self.products)


def twice(rows):
    return 2 * rows


def rootless(rows):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("noise", "kind", "words"),
    [
        (Own(apply=twice, root=twice, root_transpose=twice), ValueError, "root does not belong to precision"),
        (Own(apply=torch.neg, root=rootless, root_transpose=rootless), ValueError, "v'Wv is negative"),
        (Own(apply=lambda x: x.cumsum(1), root=rootless, root_transpose=rootless), ValueError, "is not symmetric"),
        (Own(apply=twice), TypeError, r"without root\(rows\)"),
        (Own(apply=lambda x: x[:, 0], root=twice, root_transpose=twice), ValueError, "apply must turn rows"),
    ],
)
def test_a_precision_of_ones_own_class_is_checked_as_any_other(noise, kind, words):
    images = torch.ones(2, 1, 3)
    for F in (lambda: dense(torch.nn.Identity(), images[0], noise), lambda: many(images, noise)):
        with pytest.raises(kind, match=words):
            F()


def many(images, noise):
    return fo.eigendistortions_many(torch.nn.Identity(), images, noise=noise)


def test_a_precision_of_ones_own_class_needs_no_root():
    F = fo.FisherOperator(torch.nn.Identity(), torch.zeros(3), Own(apply=twice, root=rootless, root_transpose=rootless))
    assert F.factor_size is None
    assert torch.equal(F @ torch.eye(3), 2 * torch.eye(3))


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["array", "tensor"])
def test_a_matrix_that_is_written_to_later_leaves_the_operator_as_it_was(kind):
    W, root = kind(np.diag([4.0, 1.0])), kind(np.diag([2.0, 1.0]))
    F = fo.FisherOperator(torch.nn.Identity(), torch.zeros(2).double(), fo.noise.Custom(W, root=root))
    before = F @ np.eye(2), F.factor_rows(torch.eye(2).double())
    W *= 9
    root *= 3
    np.testing.assert_array_equal(F @ np.eye(2), before[0])
    assert torch.equal(F.factor_rows(torch.eye(2).double()), before[1])


def test_a_matrix_may_lie_in_memory_as_it_will():
    W = np.array([[3.0, 1.0], [1.0, 2.0]])
    expected = fo.FisherOperator(torch.nn.Identity(), torch.zeros(2).double(), fo.noise.Custom(W)) @ np.eye(2)
    frozen = W.copy()
    frozen.flags.writeable = False
    for same in (
        W[::-1, ::-1].copy()[::-1, ::-1],
        W.astype(">f8"),
        np.asfortranarray(W),
        frozen,
        W.astype(np.longdouble),
    ):
        F = fo.FisherOperator(torch.nn.Identity(), torch.zeros(2).double(), fo.noise.Custom(same))
        np.testing.assert_allclose(F @ np.eye(2), expected)


def test_python_numbers_are_taken_in_double_precision():
    one = torch.zeros(1).double()
    identity = torch.nn.Identity()
    assert (fo.FisherOperator(identity, one, fo.noise.Gaussian(0.1)) @ np.ones(1)).item() == 1 / 0.1
    assert (fo.FisherOperator(identity, one, fo.noise.Gaussian([0.1])) @ np.ones(1)).item() == 1 / 0.1
    assert (fo.FisherOperator(identity, one + 1, fo.noise.Poisson(gain=0.3)) @ np.ones(1)).item() == 0.3
    assert (fo.FisherOperator(identity, one, fo.noise.Gaussian(1e-300)) @ np.ones(1)).item() == pytest.approx(1e300)


@pytest.mark.parametrize(
    "variance",
    [
        2,
        np.float32(2),
        np.int64(2),
        np.array(2.0),
        torch.tensor(2),
        [2, 2],
        np.array([2, 2], ">i4"),
        np.full(4, 2.0)[::-2],
    ],
    ids=repr,
)
def test_a_variance_is_a_number_of_any_type(variance):
    F = fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), fo.noise.Gaussian(variance))
    assert torch.equal(F @ torch.ones(2), torch.full((2,), 0.5))


@pytest.mark.parametrize(
    "noise",
    [
        fo.noise.Gaussian(1e-42),
        fo.noise.Gaussian(1e-60 * np.eye(2)),
        fo.noise.Gaussian((np.ones((2, 1)), 1e-90)),
        fo.noise.Poisson(gain=1e40),
        fo.noise.Poisson(floor=1e-40),
    ],
    ids=repr,
)
def test_a_precision_beyond_the_dtype_is_refused(noise):
    with pytest.raises(ValueError, match=r"is beyond torch.float32: take larger units of the response, or a float64"):
        fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), noise)
    assert np.isfinite(fo.FisherOperator(torch.nn.Identity(), torch.zeros(2).double(), noise) @ np.ones(2)).all()


@pytest.mark.parametrize("noise", [fo.noise.Gaussian, 2.0, "poisson", np.eye(2)], ids=repr)
def test_what_is_no_noise_is_refused_by_name(noise):
    with pytest.raises(TypeError, match=r"noise must be one of fisherop.noise, made with its arguments"):
        fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), noise)


@pytest.mark.parametrize("given", [None, "2.0", [None, None], [[1.0], [2.0, 3.0]], object], ids=repr)
def test_what_is_not_made_of_numbers_is_refused(given):
    with pytest.raises(TypeError, match="gain must be made of numbers"):
        fo.FisherOperator(torch.nn.Identity(), torch.zeros(2), fo.noise.Poisson(gain=given))
