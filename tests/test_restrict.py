"""Laws of restrictions: F within a subspace is B^T F B, and its results are images of that subspace."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, dense_jacobian
from noises import NOISES, rates
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from strategies import block, seeds

import fisherop as fo

SHAPE = (1, 2, 6, 5)
N = math.prod(SHAPE)
BASIS = block(0, N, 4)
MASK = torch.zeros(SHAPE, dtype=torch.bool)
MASK[0, 1, 2:4, 1:] = True


def selected(mask):
    """Return the columns of the identity where a mask is True."""
    return np.eye(N)[:, np.broadcast_to(mask, SHAPE).ravel()]


def low_pass(low, high):
    """Return columns that span a band: the range of the projector that removes all other frequencies."""
    fy, fx = np.meshgrid(np.fft.fftfreq(6), np.fft.fftfreq(5), indexing="ij")
    inside = (np.hypot(fy, fx) >= low) & (np.hypot(fy, fx) < high)
    images = np.eye(N).reshape(N, *SHAPE)
    projector = np.fft.ifft2(np.fft.fft2(images) * inside).real.reshape(N, N)
    values, vectors = np.linalg.eigh(projector)
    return vectors[:, values > 0.5]


WITHIN = {
    "mask": (MASK, selected(MASK.numpy())),
    "plane mask": (MASK.numpy()[0, 1], selected(MASK.numpy()[0, 1])),
    "channel": (fo.restrict.Channel(1), selected(np.array([0, 1]).reshape(2, 1, 1) == 1)),
    "pixels": ([40, 3, 17], np.eye(N)[:, [3, 17, 40]]),
    "positions": (fo.restrict.Pixels([(0, 1), (5, 4)]), np.eye(N)[:, [1, 29, 31, 59]]),
    "band": (fo.restrict.Band(0.15, 0.4), low_pass(0.15, 0.4)),
    "matrix": (BASIS, BASIS),
    "tensor": (torch.from_numpy(BASIS), BASIS),
    "sparse": (csr_array(BASIS), BASIS),
    "operator": (aslinearoperator(BASIS), BASIS),
    "orthonormal operator": (aslinearoperator(np.linalg.qr(BASIS)[0]), BASIS),
}


@pytest.fixture(scope="module")
def subject():
    """Return a model with a positive response, its image, the dense Jacobian and the response."""
    model, image = build("dict")
    model = rates(model)
    return model, image, dense_jacobian(model, image).numpy(), model(image).detach()


def projector(columns):
    q = np.linalg.qr(columns)[0]
    return q @ q.T


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("within", WITHIN)
def test_f_is_the_dense_one_seen_from_the_subspace_for_every_noise(subject, noise, within):
    model, image, J, f = subject
    make, truth = NOISES[noise]
    given, columns = WITHIN[within]
    F = fo.FisherOperator(model, image, make(len(f)), within=given, tuning=tuning(subject))
    assert F.shape == (columns.shape[1],) * 2
    P, E = projector(columns), F.to_image(torch.eye(F.shape[0])).reshape(-1, N).numpy()
    expected = P @ J.T @ truth(f).numpy() @ J @ P
    small = np.linalg.norm(expected) * 1e-10
    np.testing.assert_allclose(E @ E.T, np.eye(len(E)), atol=1e-12)
    np.testing.assert_allclose(E.T @ (F @ np.eye(len(E))) @ E, expected, atol=small)
    L = F.factor_rows(torch.eye(len(E)).double()).T.numpy()
    np.testing.assert_allclose(E.T @ L.T @ L @ E, expected, atol=small)
    np.testing.assert_allclose(F.factor_adjoint_rows(torch.eye(len(L)).double()).numpy(), L, atol=small)


def metrics(r):
    """Return an M of every kind for r coordinates, and its matrix."""
    entries, B = np.linspace(0.5, 2, r), block(1, r, r)
    matrix = B @ B.T / r + np.eye(r)
    products = LinearOperator(matrix.shape, matvec=lambda x: matrix @ x, matmat=lambda x: matrix @ x, dtype=float)
    return {"diagonal": (entries, np.diag(entries)), "dense": (matrix, matrix), "products": (products, matrix)}


@given(
    st.sampled_from(sorted(NOISES)), st.sampled_from(sorted(WITHIN)), st.sampled_from(["diagonal", "dense", "products"])
)
def test_noise_restriction_and_metric_together_give_the_dense_answer(subject, noise, within, kind):
    model, image, J, f = subject
    make, truth = NOISES[noise]
    F = fo.FisherOperator(model, image, make(len(f)), within=WITHIN[within][0], tuning=tuning(subject))
    M, dense_M = metrics(F.shape[0])[kind]
    E = F.to_image(torch.eye(F.shape[0])).reshape(-1, N).numpy()
    dense_F = E @ J.T @ truth(f).numpy() @ J @ E.T
    values, vectors = (x[..., ::-1] for x in scipy.linalg.eigh(dense_F, dense_M))
    result = fo.eigendistortions(F, which="BE", M=M)
    assert result.converged.all()
    np.testing.assert_allclose(result.eigenvalues, values[result.index], atol=3e-6 * values[0])
    if values[1] < 0.99 * values[0]:
        top, found = vectors[:, 0] @ E, result.eigendistortions[0].flatten().numpy()
        assert abs(found @ top) / np.linalg.norm(top) > 1 - 1e-4


_TUNING = {}


def tuning(subject):
    """Return a tuning measured once, to save the time."""
    if not _TUNING:
        _TUNING.update(fo.FisherOperator(*subject[:2]).tuning)
    return _TUNING


@pytest.mark.parametrize("method", ["exact", "lanczos", "lobpcg"])
@pytest.mark.parametrize("within", ["mask", "channel", "band", "operator"])
def test_results_are_images_of_the_subspace(subject, within, method):
    model, image, J, _ = subject
    given, columns = WITHIN[within]
    r = fo.eigendistortions(fo.FisherOperator(model, image, within=given), k=2, method=method, rng=0)
    P, size = projector(columns), columns.shape[1]
    expected = np.linalg.eigvalsh(P @ J.T @ J @ P)[::-1]
    np.testing.assert_allclose(r.eigenvalues, expected[[0, size - 1]], atol=1e-8 * expected[0])
    assert r.index.tolist() == [0, size - 1]
    assert r.eigendistortions.shape == (2, *SHAPE[1:])
    rows = r.eigendistortions.reshape(2, N).numpy()
    np.testing.assert_allclose(rows @ P, rows, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    assert torch.equal(r.image, image)
    if within in ("mask", "channel"):
        assert not rows[:, ~columns.any(axis=1)].any()


@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.integers(1, 24))
def test_restriction_interlaces_the_eigenvalues(seed, r):
    model, image = build("linear m>n", seed=seed)
    whole = np.linalg.eigvalsh(fo.FisherOperator(model, image) @ np.eye(9))
    r = min(r, 9)
    within = np.linalg.eigvalsh(fo.FisherOperator(model, image, within=block(seed, 9, r)) @ np.eye(r))
    slack = 1e-10 * whole[-1]
    for i, value in enumerate(within):  # Cauchy
        assert whole[i] - slack <= value <= whole[i + 9 - r] + slack


@settings(max_examples=8)
@given(seeds)
def test_the_range_counts_and_not_the_basis(seed):
    model, image = build("linear m=n", seed=seed)
    B = block(seed, 12, 4)
    mixed = B @ (block(seed + 1, 4, 4) + 4 * np.eye(4)) * np.array([1e-6, 1.0, 1e3, 1.0])
    one, other = (np.linalg.eigvalsh(fo.FisherOperator(model, image, within=M) @ np.eye(4)) for M in (B, mixed))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9 * one[-1])


def test_an_orthonormal_basis_gives_its_own_coordinates():
    model, image = build("linear m=n")
    Q = np.linalg.qr(block(0, 12, 5))[0]
    F = fo.FisherOperator(model, image) @ np.eye(12)
    np.testing.assert_allclose(fo.FisherOperator(model, image, within=Q) @ np.eye(5), Q.T @ F @ Q, atol=1e-12)


def test_neighbouring_bands_share_nothing_and_make_up_all_images():
    image = torch.zeros(SHAPE).double()
    edges = [0.0, 0.15, 0.2, 0.5, math.inf]
    parts = [fo.restrict.Band(*pair).at(image) for pair in itertools.pairwise(edges)]
    waves = torch.cat([part.expand(torch.eye(part.size).double()) for part in parts])
    torch.testing.assert_close(waves @ waves.T, torch.eye(N).double())


@pytest.mark.parametrize("within", WITHIN)
def test_images_and_coordinates_are_each_others_adjoint(within):
    F = fo.FisherOperator(*build("dict"), within=WITHIN[within][0])
    z = torch.from_numpy(block(0, 3, F.shape[0]))
    images = F.to_image(z)
    assert images.shape == (3, *SHAPE[1:])
    torch.testing.assert_close(F.from_image(images), z)
    assert F.from_image(images.half()).dtype == z.dtype
    anywhere = torch.from_numpy(block(1, 3, *SHAPE[1:]))
    torch.testing.assert_close((images * anywhere).sum((1, 2, 3)), (z * F.from_image(anywhere)).sum(1))


@pytest.mark.parametrize("within", WITHIN)
def test_a_block_of_no_vectors_is_multiplied(within):
    F = fo.FisherOperator(*build("dict"), within=WITHIN[within][0])
    assert (F @ np.zeros((F.shape[0], 0))).shape == (F.shape[0], 0)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (3, 3), (2, 7)])
def test_images_of_every_shape_are_restricted(shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for within in ([0, 4], fo.restrict.Band(0.0, 0.4), image > 0.5):
        F = fo.FisherOperator(torch.sin, image, within=within)
        shown = fo.eigendistortions(F, k=2, which="LM").eigendistortions
        assert shown.shape == (2, *(shape[1:] if len(shape) > 1 and shape[0] == 1 else shape))


def test_an_earlier_result_starts_a_restricted_search():
    F = fo.FisherOperator(*build("dict"), within=fo.restrict.Band(0.0, 0.3))
    first = fo.eigendistortions(F, k=2, which="LM")
    again = [
        fo.eigendistortions(F, k=2, which="LM", method="lanczos", v0=v0)
        for v0 in (
            first.eigendistortions,
            first.eigendistortions.reshape(2, N).numpy(),
            F.from_image(first.eigendistortions),
            first.eigendistortions + 1.0 * (torch.arange(N).reshape(SHAPE[1:]) % 2),
        )
    ]
    cold = fo.eigendistortions(F, k=2, which="LM", method="lanczos")
    for r in again:
        np.testing.assert_allclose(r.eigenvalues, first.eigenvalues)
    assert again[0].n_matvec < cold.n_matvec
    with pytest.raises(ValueError, match=f"n = {F.shape[0]} or {N}"):
        fo.eigendistortions(F, k=2, v0=torch.ones(7))


def test_as_many_images_as_coordinates_are_taken_for_images():
    F = fo.FisherOperator(*build("dict"), within=[3, 40])
    first = fo.eigendistortions(F, k=2)
    again = fo.eigendistortions(F, k=2, v0=first.eigendistortions.reshape(2, N))
    np.testing.assert_allclose(again.eigenvalues, first.eigenvalues)


def test_a_start_outside_the_restriction_is_refused():
    F = fo.FisherOperator(*build("dict"), within=fo.restrict.Channel(0))
    outside = torch.zeros(1, *SHAPE[1:])
    outside[:, 1] = 1
    with pytest.raises(ValueError, match="no vector of it zero where distortions are allowed"):
        fo.eigendistortions(F, v0=outside)
    with pytest.raises(ValueError, match="does not hold vectors"):
        fo.eigendistortions(F, v0=outside[:0])


def test_numbers_of_any_type_choose_what_pythons_do():
    model, image = build("dict")
    mask = np.zeros(SHAPE[-2:], dtype=bool)
    mask[:2] = True
    for plain, same in [
        (fo.restrict.Channel(1), [fo.restrict.Channel(x) for x in (np.int64(1), np.array(-1), torch.tensor(1))]),
        (fo.restrict.Band(0.125, 0.25), [fo.restrict.Band(np.float32(0.125), torch.tensor(0.25))]),
        (fo.restrict.Band(0.125, 0.25), [fo.restrict.Band(np.array(0.125), np.float64(0.25))]),
        (
            [3, 1],
            [np.array([1, 3])[::-1], np.array([3, 1], ">i8"), [torch.tensor(3), np.uint8(1)], torch.tensor([3, 1])],
        ),
        (mask, [mask[::-1, ::-1].copy()[::-1, ::-1], torch.tensor(mask)]),
        (BASIS, [BASIS[::-1].copy()[::-1], BASIS.astype(">f8"), np.asfortranarray(BASIS)]),
    ]:
        expected = fo.FisherOperator(model, image, within=plain) @ np.eye(fo.restrict.subspace(plain, image).size)
        for other in same:
            F = fo.FisherOperator(model, image, within=other)
            assert F.shape == expected.shape
            np.testing.assert_allclose(F @ np.eye(len(expected)), expected, atol=1e-12)


TOGETHER = {
    "sum": lambda A, B: A + B,
    "difference of multiples": lambda A, B: 2 * A - B / 3,
    "product": lambda A, B: A @ B,
    "sum of sums": lambda A, B: (A + A) + (B @ B).T,
    "sum_fisher": lambda A, B: fo.sum_fisher([A, B]),
    "mean_fisher": lambda A, B: fo.mean_fisher([A, A, B]),
    "metric": lambda A, B: fo.eigendistortions(A, M=B),
    "metric, a multiple": lambda A, B: fo.eigendistortions(A, M=2 * B),
    "generalized": fo.generalized_eigendistortions,
    "principal": lambda A, B: fo.principal_distortions([A @ np.eye(A.shape[0]), A, B]),
    "table": lambda A, B: fo.threshold_table({"A": A, "B": B}, {"A": fo.eigendistortions(A)}),
}


@pytest.mark.parametrize("way", TOGETHER)
def test_coordinates_of_different_subspaces_are_never_taken_for_each_other(way):
    model, image = build("dict")
    for within, other in [
        (fo.restrict.Channel(0), fo.restrict.Channel(1)),
        ([3, 40, 7], [3, 40, 8]),
        (np.eye(N), np.eye(N)[:, ::-1]),
        (None, block(0, N, N)),
    ]:
        A, B = (fo.FisherOperator(model, image, within=w) for w in (within, other))
        with pytest.raises(ValueError, match="restricted to different distortions: pass the same within=") as caught:
            TOGETHER[way](A, B)
        assert "\n" not in str(caught.value)


def test_operators_of_one_subspace_go_together_however_it_was_named():
    model, image = build("dict")
    mask = torch.zeros(image.shape, dtype=torch.bool)
    mask[:, 0] = True
    A, B = (fo.FisherOperator(model, image, within=w) for w in (mask, fo.restrict.Channel(0)))
    x = torch.ones(A.shape[0]).double()
    torch.testing.assert_close((A + 2 * B) @ x, 3 * (A @ x))
    torch.testing.assert_close((A @ B) @ x, (A**2) @ x)
    np.testing.assert_allclose(fo.generalized_eigendistortions(A, A + B, delta=1e-6).eigenvalues[0], 0.5, rtol=1e-4)
    assert fo.principal_distortions([A, B, A + B]).converged


def test_images_of_another_shape_are_other_images_though_as_many_numbers():
    wide = fo.FisherOperator(torch.sin, torch.rand(1, 2, 6, 5).double())
    tall = fo.FisherOperator(torch.sin, torch.rand(1, 2, 5, 6).double())
    for way in ("sum", "product", "metric, a multiple"):
        with pytest.raises(ValueError, match=r"different shape, \(1, 2, 6, 5\) and \(1, 2, 5, 6\): make both"):
            TOGETHER[way](wide, tall)


def test_what_a_restriction_leaves_out_of_a_distortion_is_not_left_out_in_silence():
    model, image = build("dict")
    whole, first, second = (
        fo.FisherOperator(model, image, within=w) for w in (None, fo.restrict.Channel(0), fo.restrict.Channel(1))
    )
    r = fo.eigendistortions(second)
    np.testing.assert_allclose(fo.discriminability(second, r.eigendistortions), np.sqrt(r.eigenvalues))
    for ask in (
        lambda: fo.discriminability(first, r.eigendistortions),
        lambda: fo.discriminability(first, fo.eigendistortions(whole).eigendistortions),
        lambda: fo.threshold_table({"first": first}, {"second": r}),
    ):
        with pytest.raises(ValueError, match="beyond those that the operator is restricted to"):
            ask()
    d = torch.from_numpy(block(0, N, 1)).reshape(SHAPE)
    within = first.to_image(first.from_image(d))
    np.testing.assert_allclose(fo.discriminability(first, within), fo.discriminability(whole, within))


def test_coordinates_that_are_as_many_numbers_as_an_image_are_no_image():
    F = fo.FisherOperator(*build("dict"), within=fo.restrict.Channel(0))
    pair = torch.eye(F.shape[0]).double()[:2]
    np.testing.assert_allclose(fo.discriminability(F, pair), fo.discriminability(F, F.to_image(pair)))


def test_the_null_space_is_projected_on_within_the_restriction():
    model, image = build("linear m<n")
    mask = block(0, 25, 18)
    F = fo.FisherOperator(model, image, within=mask)
    picture = torch.from_numpy(block(1, *image.shape))
    p = fo.project_to_null(F, picture)
    assert p.converged
    assert p.image.shape == image.shape
    assert model(p.image).norm() <= 1e-5 * p.image.norm()
    coordinates = fo.project_to_null(F, F.from_image(picture)).image
    torch.testing.assert_close(F.from_image(p.image).flatten(), coordinates.flatten())
    assert p.image.norm() == pytest.approx(coordinates.norm())


@pytest.mark.parametrize("within", [block(0, 25, 25), fo.restrict.Band(0.0)], ids=["matrix", "band"])
def test_a_restriction_to_all_distortions_projects_pictures_as_none_does(within):
    model, image = build("linear m<n")
    picture = torch.from_numpy(block(1, *image.shape))
    expected, found = (fo.project_to_null(fo.FisherOperator(model, image, within=w), picture) for w in (None, within))
    torch.testing.assert_close(found.image, expected.image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("within", ["mask", "channel", "positions", "band", "matrix"])
def test_a_copy_by_pickle_keeps_restriction_and_noise(within):
    model, image = build("dict")
    J = fo.JacobianOperator(model, image)
    noise = fo.noise.Gaussian((block(0, J.shape[0], 2), 1.0))
    F = fo.FisherOperator(model, image, noise, within=WITHIN[within][0])
    for twin in (pickle.loads(pickle.dumps(F)), copy.deepcopy(F)):
        assert torch.equal(twin @ torch.eye(F.shape[0]), F @ torch.eye(F.shape[0]))
    assert repr(F) == f"<{F.shape[0]}x{F.shape[0]} FisherOperator with dtype=float64>"
    assert F.T is F


def test_refresh_keeps_the_restriction_and_renews_the_noise():
    model = torch.nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.arange(1.0, 13).reshape(3, 4))
    image = torch.ones(4).double()
    F = fo.FisherOperator(model, image, fo.noise.Poisson(), within=[1, 3])
    with torch.no_grad():
        model.weight.mul_(4)
        model.bias.zero_()
    F.refresh()
    J = model.weight.detach()[:, [1, 3]]
    torch.testing.assert_close(F @ torch.eye(2), J.T @ torch.diag(1 / model(image).detach()) @ J)


def test_a_generator_restricts_to_its_manifold_by_composition():
    model, _ = build("dict")
    decoder = torch.nn.Sequential(torch.nn.Linear(3, N), torch.nn.Tanh(), torch.nn.Unflatten(0, SHAPE)).double()
    latent = torch.tensor([0.1, -0.2, 0.3]).double()
    F = fo.FisherOperator(lambda z: model(decoder(z)), latent)
    G = fo.JacobianOperator(decoder, latent) @ torch.eye(3)
    at = fo.FisherOperator(model, decoder(latent).detach())
    torch.testing.assert_close(F @ torch.eye(3), G.T @ (at @ G))


# ---------------------------------------------------------------------------------------------------------- refusals


class Own:
    """A restriction of the user's own class."""

    def __init__(self, at):
        self.at = at


def stretched(out, back):
    """Return the first two pixels, with a basis of another length or a projection that is not its transpose."""

    def expand(rows):
        return torch.nn.functional.pad(out * rows, (0, N - 2))

    return fo.restrict.Subspace(2, expand, lambda images: back * images[:, :2])


DEPENDENT = np.column_stack([BASIS, BASIS[:, 0] + BASIS[:, 1]])


@pytest.mark.parametrize(
    ("within", "kind", "words"),
    [
        (torch.zeros(SHAPE, dtype=torch.bool), ValueError, "the mask is empty"),
        (torch.ones(3, 3, dtype=torch.bool), ValueError, r"mask of shape \(3, 3\) does not fit an image of shape"),
        (torch.ones(SHAPE), TypeError, "boolean mask"),
        ("left half", TypeError, "not str"),
        ([], ValueError, "lists no pixel"),
        ([3, 3], ValueError, "listed twice"),
        ([N], ValueError, "outside the image"),
        ([-1], ValueError, "outside the image"),
        ([0.5], TypeError, "whole numbers"),
        (fo.restrict.Pixels([(6, 0)]), ValueError, "outside the image"),
        (fo.restrict.Pixels([(1, 2, 3)]), ValueError, "neither places"),
        (fo.restrict.Channel(True), TypeError, "the index of a channel must be a whole number, not True"),
        (fo.restrict.Channel(1.0), TypeError, "must be a whole number, not 1.0"),
        (fo.restrict.Channel, TypeError, "one of fisherop.restrict, not type"),
        (fo.restrict.Band("a"), TypeError, "an edge of a band must be made of numbers"),
        ([(1, 2), (3,)], TypeError, "pixels are whole numbers"),
        (fo.restrict.Channel(2), ValueError, "has 2 channels, and none of index 2"),
        (fo.restrict.Band(0.3, 0.1), ValueError, "0 <= low < high"),
        (fo.restrict.Band(0.01, 0.02), ValueError, "widen the band"),
        (BASIS.T, ValueError, "pass its transpose"),
        (np.ones(SHAPE[-2:], dtype=np.uint8), ValueError, "of a mask pass mask > 0"),
        (np.ones((N, 0)), ValueError, "1 <= r <= n"),
        (DEPENDENT, ValueError, "has rank 4 and 5 columns"),
        (DEPENDENT.astype(np.float32), ValueError, "has rank 4 and 5 columns"),
        (aslinearoperator(DEPENDENT), ValueError, "has rank 4 and 5 columns"),
        (np.zeros((N, 2)), ValueError, "has rank 0"),
        (BASIS * np.nan, ValueError, "NaN"),
        (BASIS * 1j, TypeError, "complex"),
        (Own(lambda image: 3), TypeError, "must return a Subspace, not int"),
        (Own(lambda image: stretched(2.0, 1.0)), ValueError, "not orthonormal"),
        (Own(lambda image: stretched(2.0, 0.5)), ValueError, "not orthonormal"),
    ],
)
def test_a_restriction_that_makes_no_sense_is_refused(within, kind, words):
    with pytest.raises(kind, match=words):
        fo.FisherOperator(*build("dict"), within=within)


def test_a_basis_too_large_to_be_orthonormalized_is_refused():
    n = 200_000
    double = LinearOperator((n, n), lambda x: 2 * x, lambda x: 2 * x, dtype=np.float32)
    with pytest.raises(ValueError, match=r"pass one with B.T @ B = I"):
        fo.restrict.subspace(double, torch.zeros(n))


def test_an_operator_without_its_transpose_is_made_dense():
    bare = LinearOperator(BASIS.shape, lambda x: BASIS @ x, dtype=float)
    F, dense = (fo.FisherOperator(*build("dict"), within=B) @ np.eye(4) for B in (bare, BASIS))
    np.testing.assert_allclose(F, dense)


def test_autocast_rounds_neither_images_nor_coordinates():
    F = fo.FisherOperator(*build("dict", torch.float32), within=BASIS)
    images = torch.rand(2, *F.image_shape[1:], generator=torch.Generator().manual_seed(0))
    rows = F.from_image(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.from_image(images), rows)
        again = F.to_image(rows)
        result = fo.eigendistortions(F, 2, "SM", "lanczos", rng=0, v0=images)
    assert torch.equal(again, F.to_image(rows))
    assert result.converged.all()
