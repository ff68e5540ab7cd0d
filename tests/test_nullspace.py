"""Projection on the null space: what is left is invisible, nearest, and honest where nothing is left."""

import numpy as np
import pytest
import torch
from models import MODELS, build, dense_jacobian
from strategies import block, spectrum_operator

import fisherop as fo
from fisherop.certificate import certify
from fisherop.rows import RowOperator
from fisherop.solvers import Control, Request, nullspace
from fisherop.solvers.nullspace import project_to_null

VALUES = np.concatenate([1 / np.arange(1.0, 151), np.zeros(50)])
FULL_RANK = np.linspace(1, 0.1, 200)
WIDE = [name for name in MODELS if name in ("linear m<n", "conv relu pool", "complex")]


def run(op, largest, smallest, tol=1e-6, maxiter=500, v0=None):
    op = RowOperator(op)
    request = Request(largest, smallest, tol, np.random.default_rng(0), v0)
    found = nullspace.solve(op, request, Control(op, maxiter))
    return certify(op, request, found, "nullspace")


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("ends", [(0, 1), (0, 5), (2, 2), (1, 0)])
def test_pairs_are_the_smallest_ones(ends, dtype, tol):
    result = run(spectrum_operator(VALUES, dtype=dtype)[0], *ends, tol)
    assert result.converged.all()
    np.testing.assert_allclose(result.eigenvalues, np.sort(VALUES)[::-1][result.index], atol=tol)


@pytest.mark.parametrize("name", WIDE)
def test_a_factored_operator_gives_values_zero_to_rounding(name):
    F = fo.FisherOperator(*build(name))
    result = run(F, 0, 2)
    assert result.converged.all()
    assert (result.eigenvalues <= 1e-10 * result.lambda_max).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_null_space_that_is_wanted_whole_is_found_whole(seed):
    matrix, _ = spectrum_operator(np.append(FULL_RANK, np.zeros(8)))
    result = fo.eigendistortions(matrix, 8, "SM", "nullspace", rng=seed)
    assert result.converged.all()
    assert (result.eigenvalues <= result.tol).all()


def test_a_null_space_that_was_found_is_not_missed():
    result = run(spectrum_operator(np.append(FULL_RANK, np.zeros(50)))[0], 0, 3)
    assert result.converged.all()
    assert result.message.split("; ")[1].startswith("3 of the smallest are zero to within tol")


@pytest.mark.parametrize("values", [FULL_RANK, np.ones(200), np.concatenate([FULL_RANK[:-1], [0]])])
def test_fewer_null_directions_than_wanted_are_never_claimed(values):
    result = run(spectrum_operator(values)[0], 0, 3)
    right = np.abs(result.eigenvalues - np.sort(values)[::-1][result.index]) <= 2e-6
    assert right[result.converged].all()
    assert "no null space of dimension 3" in result.message


def test_a_small_response_is_no_null_space_where_float32_has_no_room_for_its_square():
    F = fo.FisherOperator(lambda x: 1e-12 * torch.linspace(1, 2, 300) * x, torch.zeros(300))
    projection = fo.project_to_null(F, torch.randn(300, generator=torch.Generator().manual_seed(0)))
    assert not projection.converged
    assert "nothing of the image lies in a null space" in projection.message
    result = run(F, 0, 3)
    assert not result.converged.any() or (result.residuals[result.converged] <= result.tol).all()
    assert (result.eigenvalues >= 0.9e-24).all()


def test_zero_is_all_null_space():
    result = run(np.zeros((9, 9)), 1, 3)
    assert result.converged.all()
    assert not result.eigenvalues.any()


def test_the_steps_do_not_grow_with_the_rows():
    steps = []
    for k in (1, 16):
        op = RowOperator(spectrum_operator(VALUES)[0])
        control = Control(op, 500)
        nullspace.solve(op, Request(0, k, 1e-6, np.random.default_rng(0)), control)
        steps.append(control.iteration)
    assert steps[1] <= 1.3 * steps[0]


def test_null_vectors_to_start_from_are_taken_as_they_are():
    matrix, vectors = spectrum_operator(VALUES)
    op = RowOperator(matrix)
    rows = torch.as_tensor(np.asarray(vectors)[:, -2:].T.copy())
    control = Control(op, 500)
    nullspace.solve(op, Request(0, 2, 1e-6, np.random.default_rng(0), rows), control)
    assert control.iteration == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_the_projection_is_the_orthogonal_one(name, dtype):
    model, image = build(name, dtype)
    F = fo.FisherOperator(model, image)
    picture = torch.from_numpy(block(1, *image.shape)).to(dtype)
    result = project_to_null(F, picture)
    J = dense_jacobian(model, image).double()
    x = picture.double().flatten()
    null = x - torch.linalg.lstsq(J, (J @ x)[:, None], driver="gelsd").solution[:, 0]
    assert result.converged
    assert result.image.shape == image.shape
    assert result.image.dtype == dtype
    scale = 1e-2 if dtype == torch.float32 else 1e-3  # what is left has values below tol: the residual's square root
    torch.testing.assert_close(result.image.double().flatten(), null, atol=scale, rtol=0)
    response = J @ result.image.double().flatten()
    assert float(response.norm() / result.image.norm()) == pytest.approx(result.sensitivity, abs=1e-6)
    assert result.kept == pytest.approx(float(null.norm() / x.norm()), abs=scale)
    assert "lies in the null space" in result.message


def test_null_vectors_of_a_result_of_both_ends_are_gone_on_from():
    op = spectrum_operator(VALUES)[0]
    first = run(op, 2, 3)
    again = run(op, 2, 3, v0=torch.as_tensor(first.eigendistortions))
    assert again.converged.all()
    assert again.n_matvec < 0.6 * first.n_matvec


def test_arrays_come_back_as_arrays():
    result = project_to_null(np.diag([2.0, 1.0, 0.0, 0.0]), np.ones((2, 2)))
    np.testing.assert_allclose(result.image, [[0, 0], [1, 1]], atol=1e-6)
    assert result.kept == pytest.approx(np.sqrt(0.5))
    assert result.lambda_max == pytest.approx(2)


def test_no_null_space_is_said():
    for op in (spectrum_operator(FULL_RANK)[0], np.eye(200)):
        result = project_to_null(op, np.ones(200))
        assert not result.converged
        words = "nothing of the image lies in a null space of F, if F has one at all"
        assert result.message == f"{words}; {result.n_matvec} products."
    whole = project_to_null(np.zeros((3, 3)), np.ones(3))
    assert whole.converged
    assert whole.kept == 1
    assert whole.sensitivity == 0


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
def test_a_picture_of_whole_numbers_has_a_projection_that_is_not_rounded(kind):
    F = fo.FisherOperator(torch.nn.Conv2d(1, 1, 3, bias=False), torch.rand(1, 1, 8, 8))
    numbers = np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8), dtype=np.uint8)
    found, wanted = (project_to_null(F, kind(picture)).image for picture in (numbers, numbers.astype(np.float32)))
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_the_budget_and_the_callback_stop_it():
    op = spectrum_operator(VALUES)[0]
    short = project_to_null(op, np.ones(200), maxiter=3)
    assert short.message.endswith(
        f"raise maxiter, pass the result's image to go on, or loosen tol; {short.n_matvec} products."
    )
    seen = []
    stopped = project_to_null(
        op, np.ones(200), callback=lambda progress: seen.append(progress.iteration) or len(seen) == 5
    )
    assert seen == [1, 2, 3, 4, 5]
    assert not stopped.converged
    resumed = project_to_null(op, stopped.image)
    assert resumed.converged


@pytest.mark.parametrize(
    ("image", "options", "error", "words"),
    [
        ([1.0, 2.0, 3.0], {}, TypeError, "tensor or an array"),
        (np.ones(4), {}, ValueError, "n = 3"),
        (np.zeros(3), {}, ValueError, "zero everywhere"),
        (np.array([1, np.nan, 0]), {}, ValueError, "finite"),
        (np.ones(3) * 1j, {}, TypeError, "image is complex"),
        (torch.ones(3) * 1j, {}, TypeError, "image is complex"),
        (np.ones(3), {"tol": 2}, ValueError, "tol"),
        (np.ones(3), {"maxiter": 0}, ValueError, "maxiter"),
    ],
)
def test_bad_input_gets_one_clear_sentence(image, options, error, words):
    with pytest.raises(error, match=words):
        project_to_null(np.diag([1.0, 1.0, 0.0]), image, **options)
