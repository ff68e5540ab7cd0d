"""Every method against dense truth, at every end; a result is right, or says that it is not."""

import importlib.util
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS, build, dense_jacobian
from scipy.linalg import subspace_angles
from scipy.sparse.linalg import aslinearoperator
from strategies import block, spectrum_operator

import fisherop as fo
from fisherop.solvers import BACKENDS
from fisherop.solvers.contract import orthonormal

METHODS = ["auto", *(name for name in BACKENDS if name != "primme" or importlib.util.find_spec("primme"))]
DTYPES = (torch.float32, torch.float64)


def solve(op, *args, rng=0, **kwargs):
    """Return a result whatever it says of its convergence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fo.ConvergenceWarning)
        return fo.eigendistortions(op, *args, rng=rng, **kwargs)


def assert_right(result, dense):
    """Compare what claims to be converged with a dense eigendecomposition, as subspaces where values cluster."""
    values, vectors = (part[..., ::-1] for part in np.linalg.eigh(dense))
    top, tol = max(values[0], 1e-300), result.tol + 64 * np.finfo(np.float32).eps
    found = np.asarray(result.eigendistortions).reshape(len(result), -1)
    claims = np.flatnonzero(result.converged)
    np.testing.assert_allclose(result.eigenvalues[claims], values[result.index[claims]], atol=tol * top, rtol=0)
    np.testing.assert_allclose(found @ found.T, np.eye(len(found)), atol=1e-4)
    for i in claims:
        cluster = abs(values - values[result.index[i]]) <= 20 * tol * top
        outside = abs(values[~cluster] - values[result.index[i]])
        gap = outside.min() if len(outside) else np.inf
        angle = subspace_angles(vectors[:, cluster], found[i][:, None])[-1]
        assert np.sin(angle) <= 1.5 * (result.residuals[i] * top + 1e-6 * top) / gap + 1e-6
        low, high = result.eigenvalue_bounds[i]
        assert ((values >= low) & (values <= high)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_converged_agrees_with_the_dense_matrix(name, method, dtype):
    model, image = build(name, dtype)
    F = fo.FisherOperator(model, image)
    J = dense_jacobian(model, image).double().numpy()
    n = len(J.T)
    for which in ("LM",) if method == "randomized_svd" else ("LM", "SM", "BE"):
        for k in (1, min(5, n)):
            result = solve(F, k, which, method, maxiter=200)
            assert_right(result, J.T @ J)
            if method in ("auto", "exact"):
                assert result.converged.all()
                assert result.nullity >= n - len(J)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "values",
    [
        np.ones(150),
        np.r_[1.0, np.zeros(149)],
        np.r_[np.ones(5), np.linspace(0.5, 0.1, 140), np.zeros(5)],
        1e12 * np.linspace(1, 2, 150),
        np.logspace(0, -12, 150),
        np.r_[np.linspace(1, 0.1, 149), 4e-5],
    ],
    ids=["identity", "rank one", "clusters", "scale 1e12", "decay", "one tiny"],
)
def test_hard_spectra_are_right_or_honestly_not_converged(method, values):
    matrix, _ = spectrum_operator(values)
    for which in ("LM",) if method == "randomized_svd" else ("LM", "SM", "BE"):
        for k in (1, 4):
            assert_right(solve(matrix, k, which, method, maxiter=200), matrix.numpy())


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("auto", "exact")])
def test_with_too_few_steps_the_best_pairs_come_with_one_warning(method):
    matrix, _ = spectrum_operator(np.linspace(1, 0.1, 400))
    which = "LM" if method == "randomized_svd" else "BE"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fo.eigendistortions(matrix, 4, which, method, maxiter=2, tol=1e-9, rng=0)
    assert [w.category for w in caught] == [fo.ConvergenceWarning]
    assert "raise maxiter" in str(caught[0].message)
    assert not result.converged.all()
    assert result.eigendistortions.shape == (4, 400)
    assert (np.diff(result.eigenvalues) <= 0).all()


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_the_warning_points_at_the_line_that_called(method):
    with pytest.warns(fo.ConvergenceWarning) as caught:
        fo.eigendistortions(np.diag(np.linspace(1, 0.1, 400)), 4, "LM", method, maxiter=2, tol=1e-9, rng=0)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("method", METHODS)
def test_scaling_the_model_changes_no_flag(method):
    model, image = build("conv relu pool")
    which = "LM" if method == "randomized_svd" else "BE"
    results = [solve(fo.FisherOperator(lambda x, s=s: s * model(x), image), 4, which, method) for s in (1e-3, 1, 1e3)]
    for result, scale in zip(results, (1e-6, 1, 1e6), strict=True):
        assert np.array_equal(result.converged, results[1].converged)
        np.testing.assert_allclose(
            result.eigenvalues / scale, results[1].eigenvalues, atol=1e-6 * results[1].lambda_max
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "scales"), [(torch.float32, (-21, -18)), (torch.float64, (-150, -80, 80))], ids=["float32", "float64"]
)
def test_what_a_dtype_has_no_room_for_is_never_called_converged(method, dtype, scales):
    factor, which = spectrum_operator(np.linspace(1, 0.3, 80))[0], "LM" if method == "randomized_svd" else "BE"
    for power in scales:
        gains = factor.to(dtype) * 10.0**power
        F = fo.FisherOperator(lambda x, gains=gains: gains @ x, torch.zeros(80, dtype=dtype))
        with pytest.warns(fo.ConvergenceWarning, match="room of .*: rescale the model's response"):
            result = fo.eigendistortions(F, 2, which, method, maxiter=300, rng=0)
        assert not result.converged.any()


@pytest.mark.parametrize("method", METHODS)
def test_responses_whose_squares_float32_cannot_hold_change_no_flag(method):
    model, image = build("conv relu pool", torch.float32)
    which = "LM" if method == "randomized_svd" else "SM"
    once, tiny = (solve(fo.FisherOperator(lambda x, s=s: s * model(x), image), 3, which, method) for s in (1, 2**-43))
    # LOBPCG, at its limit, returns other vectors by other rounding, and says so.
    assert method == "lobpcg" or np.array_equal(once.converged, tiny.converged)
    J = 2.0**-43 * dense_jacobian(model, image).double().numpy()
    assert_right(tiny, J.T @ J)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_around_a_product_or_a_solver_rounds_nothing(method):
    noise = fo.noise.Gaussian((torch.ones(40, 1), 1.0))
    F = fo.FisherOperator(*build("fourier", torch.float32), noise)
    x, which = torch.from_numpy(block(0, 64, 3)).float(), "LM" if method == "randomized_svd" else "BE"
    product, plain = F @ x, solve(F, 2, which, method)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F @ x, product)
        np.testing.assert_allclose(solve(F, 2, which, method).eigenvalues, plain.eigenvalues, rtol=1e-6)
        assert torch.isfinite(fo.project_to_null(F, x[:, 0]).image).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_answer(method):
    matrix, _ = spectrum_operator(np.linspace(1, 0, 200))
    which = "LM" if method == "randomized_svd" else "BE"
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (solve(matrix, 3, which, method) for _ in range(2))
    assert torch.equal(first.eigendistortions, second.eigendistortions)
    assert np.array_equal(first.residuals, second.residuals)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


@pytest.mark.parametrize("method", ["lanczos", "lobpcg", "davidson", "nullspace", "arpack"])
def test_a_seed_that_made_the_operator_too_hides_nothing_of_it(method):
    factor = np.random.default_rng(0).standard_normal((190, 200))  # its rows have no part in the null space
    result = fo.eigendistortions(factor.T @ factor, 1, "SM", method, rng=0, maxiter=3000)
    assert result.converged.all()
    assert result.eigenvalues[0] <= 1e-6 * result.lambda_max


def test_one_generator_gives_one_call_after_the_other_numbers_of_its_own():
    matrix, _ = spectrum_operator(np.append(1, np.linspace(0.9, 0.1, 199)))
    first, again = np.random.default_rng(5), np.random.default_rng(5)
    results = [fo.eigendistortions(matrix, 1, "LM", "power", rng=rng) for rng in (first, first, again)]
    assert torch.equal(results[0].eigendistortions, results[2].eigendistortions)
    assert not torch.equal(results[0].eigendistortions, results[1].eigendistortions)


@pytest.mark.parametrize("method", ["arpack", "lanczos"])
def test_a_space_that_is_exhausted_goes_on_by_the_seed(method):
    matrix, _ = spectrum_operator(np.r_[3, 2, 1, np.zeros(197)])
    first, again = (solve(matrix, 6, "LM", method) for _ in range(2))
    assert torch.equal(first.eigendistortions, again.eigendistortions)


@pytest.mark.parametrize("answer", [True, np.True_])
def test_true_of_python_or_numpy_stops_and_nothing_else_does(answer):
    matrix, _ = spectrum_operator(np.linspace(1, 0.1, 400))
    for reply, steps in ((answer, 1), (1, 4), (np.ones(3), 4)):
        seen = []
        solve(matrix, 4, "LM", "lanczos", maxiter=4, callback=lambda p, r=reply, s=seen: (s.append(p), r)[1])
        assert len(seen) == steps


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("auto", "exact")])
def test_a_callback_sees_every_step_and_can_stop(method):
    matrix, _ = spectrum_operator(np.linspace(1, 0.1, 400))
    which = "LM" if method == "randomized_svd" else "BE"
    seen = []

    def stop_at_3(progress):
        seen.append(progress)
        return progress.iteration == 3

    with pytest.warns(fo.ConvergenceWarning, match="the callback stopped"):
        fo.eigendistortions(matrix, 4, which, method, tol=1e-9, callback=stop_at_3)
    assert [p.iteration for p in seen] == [1, 2, 3]
    assert [p.n_matvec for p in seen] == sorted(p.n_matvec for p in seen)
    if method not in ("arpack", "lobpcg", "primme", "cupyx"):  # those do not know their residuals
        assert all(p.residuals.max() > 1e-9 and p.residuals.min() < 10 for p in seen)
        assert len({p.residuals.tobytes() for p in seen}) == 3  # each report keeps its own


@pytest.mark.parametrize("m", [150, 300])
@pytest.mark.parametrize("factored", [True, False])
def test_a_dense_problem_that_is_stopped_gives_the_best_of_what_it_has_seen(factored, m):
    L = torch.randn(m, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = torch.zeros(1, 200, dtype=torch.float64)
    F = fo.FisherOperator(lambda x: x @ L.T, image) if factored else (L.T @ L).numpy()
    tops = []
    for steps in (1, 2):
        with pytest.warns(
            fo.ConvergenceWarning, match=r"stopped 'exact'; start again from v0=.* with method='lanczos'"
        ):
            r = fo.eigendistortions(F, 6, "BE", "exact", rng=0, callback=lambda p, s=steps: p.iteration == s)
        assert r.n_matvec <= 64 * steps + 6
        assert not r.converged.any()
        assert r.nullity == (200 - m if factored and m < 200 else 0)  # what the shape says
        tops.append(r.eigenvalues[0])
    whole = fo.eigendistortions(F, 6, "BE", "exact", rng=0)
    assert 0.3 * whole.lambda_max < tops[0] < tops[1] < whole.lambda_max  # by interlacing


@pytest.mark.parametrize("values", [np.linspace(0.1, 2, 100), np.r_[np.zeros(70), np.ones(30)]])
@pytest.mark.parametrize("method", ["exact", "lobpcg"])
def test_a_dense_problem_that_is_stopped_believes_no_pair_that_it_has_seen(values, method):
    with pytest.warns(fo.ConvergenceWarning, match="stopped before all of the dense problem was known: let the"):
        fo.eigendistortions(np.diag(values), 40, "BE", method, rng=0, callback=lambda p: True)


@pytest.mark.parametrize("method", ["lanczos", "davidson", "nullspace", "power"])
@pytest.mark.parametrize("which", ["LM", "SM"])
def test_residuals_are_told_of_either_end(method, which):
    seen = []
    values = np.concatenate([[1, 0.8], np.linspace(0.5, 0.3, 198), np.zeros(100)])
    fo.eigendistortions(spectrum_operator(values)[0], 2, which, method, rng=0, tol=1e-4, callback=seen.append)
    sizes = [p.residuals.max() for p in seen[1:]]  # after one product there may be fewer vectors than pairs
    assert min(sizes) <= 1e-4
    assert max(sizes) < 10


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("auto", "exact", "cupyx")])
def test_a_problem_too_small_for_a_method_is_solved_whatever_the_method(method):
    matrix, _ = spectrum_operator(np.linspace(1, 0.1, 4))
    result = solve(matrix, 2, "LM", method)
    assert_right(result, matrix.numpy())
    assert result.converged.all()
    if method in ("arpack", "lobpcg", "primme"):
        assert "n is so small that the dense problem was solved" in result.message


@pytest.mark.parametrize("n", [60, 64, 66, 90])
@pytest.mark.parametrize("method", ["arpack", "lobpcg"])
def test_a_problem_about_as_large_as_a_basis_is_solved(method, n):
    matrix, _ = spectrum_operator(np.linspace(1, 0.1, n))
    result = solve(matrix, 4, "BE", method, maxiter=2000)
    assert_right(result, matrix.numpy())
    assert result.converged.all()


@pytest.mark.parametrize("method", ["lanczos", "davidson", "exact"])
def test_the_dimension_of_a_null_space_that_was_seen_whole_is_told(method):
    result = solve(spectrum_operator(np.append(np.linspace(1, 0.5, 37), np.zeros(3)))[0], 6, "SM", method)
    assert result.nullity == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "known", "new"), [(7, 6, 6), (17, 8, 8), (17, 16, 8), (100, 96, 6), (100, 99, 6)])
def test_rows_that_others_leave_no_room_for_are_dropped(n, known, new, dtype):
    for seed in range(10):
        others = orthonormal(torch.from_numpy(block(seed, known, n)).to(dtype))
        products = others[-new:] @ torch.from_numpy(spectrum_operator(np.linspace(2, 1, n), seed)[0].numpy()).to(dtype)
        both = torch.cat([others, orthonormal(products, others)]).double()
        assert len(both) <= n
        torch.testing.assert_close(
            both @ both.T, torch.eye(len(both)).double(), atol=100 * torch.finfo(dtype).eps, rtol=0
        )


@pytest.mark.parametrize("n", [7, 9, 13, 17, 49])
def test_a_krylov_space_that_fills_all_there_is_claims_no_wrong_pair(n):
    for seed in range(10):
        matrix = spectrum_operator(np.linspace(1, 0.1, n), seed, torch.float32)[0]
        result = fo.eigendistortions(matrix, 3, "LM", "randomized_svd", tol=1e-2, rng=seed)
        assert_right(result, matrix.double().numpy())
        assert result.lambda_max <= 1 + 1e-5


@pytest.mark.parametrize("method", ["lobpcg", "power"])
def test_a_stopped_search_goes_on_from_its_result(method):
    matrix, _ = spectrum_operator(np.r_[1, 0.9, np.linspace(0.3, 0.1, 398)])
    first = solve(matrix, 2, "LM", method, maxiter=6, tol=1e-9)
    resumed = solve(matrix, 2, "LM", method, maxiter=6, tol=1e-9, v0=first.eigendistortions)
    assert (resumed.residuals < first.residuals).all()


@pytest.mark.parametrize("method", METHODS)
def test_eigenvectors_of_another_part_of_the_spectrum_do_not_deceive_as_a_start(method):
    values = np.linspace(1, 0.1, 100)
    matrix, vectors = spectrum_operator(values)
    for which in ("LM",) if method == "randomized_svd" else ("LM", "SM", "BE"):
        for first in (0, 50, 98):
            v0 = torch.from_numpy(vectors[:, first : first + 2].T.copy())
            for seed in range(
                8 if method == "davidson" else 1
            ):  # what else it starts from is little, and chance decides
                assert_right(solve(matrix, 2, which, method, v0=v0, maxiter=500, rng=seed), matrix.numpy())


GAPS = np.r_[5.0, 4, 3, np.linspace(1, 0.1, 597)]


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("auto", "exact", "power", "nullspace")])
def test_eigenvectors_of_the_next_indices_do_not_pass_for_the_first(method):
    for k in (1, 2):
        for rows in (np.eye(600)[1 : 1 + k], np.eye(600)[[1] * 3], np.eye(600)[[3, 2, 1]]):
            result = fo.eigendistortions(np.diag(GAPS), k, "LM", method, v0=rows, rng=0)
            assert result.converged.all()
            np.testing.assert_allclose(result.eigenvalues, GAPS[:k], atol=1e-5)


@pytest.mark.parametrize("method", ["davidson", "randomized_svd", "lanczos"])
def test_a_near_neighbour_given_as_a_start_does_not_pass_for_the_first(method):
    values = np.linspace(1, 0.1, 600)
    for seed in range(4):
        result = fo.eigendistortions(np.diag(values), 1, "LM", method, v0=np.eye(600)[1], tol=1e-4, rng=seed)
        assert result.converged.all()
        np.testing.assert_allclose(result.eigenvalues, 1, atol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("auto", "exact")])
def test_a_search_that_was_cut_off_claims_no_index_without_a_warning(method):
    for steps in (1, 2, 3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = fo.eigendistortions(
                np.diag(GAPS), 1, "LM", method, v0=np.eye(600)[1], rng=0, maxiter=steps, tol=1e-3
            )
        assert abs(result.eigenvalues[0] - 5) <= 5e-3 or [w.category for w in caught] == [fo.ConvergenceWarning]
        if caught and result.converged.all():
            assert "stopped before" in result.message


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from(["LM", "SM", "BE"]))
def test_residuals_and_bounds_are_what_they_say(seed, k, which):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.uniform(0, 1, 30) ** rng.integers(1, 12))[::-1]
    matrix, _ = spectrum_operator(values, seed=seed % 1000)
    result = solve(matrix, k, which)
    v = result.eigendistortions.numpy()
    residuals = np.linalg.norm(matrix.numpy() @ v.T - v.T * result.eigenvalues, axis=0) / result.lambda_max
    np.testing.assert_allclose(result.residuals, residuals, atol=1e-13)
    assert np.array_equal(result.converged, result.residuals <= result.tol)
    for low, high in result.eigenvalue_bounds:
        assert ((values >= low - 1e-14) & (values <= high + 1e-14)).any()


@pytest.mark.parametrize("k", range(1, 6))
def test_which_takes_its_share_from_each_end(k):
    matrix = torch.diag(torch.arange(5.0))
    top, bottom = list(range(k)), list(range(5 - k, 5))
    for which, index in {"LM": top, "LA": top, "SM": bottom, "SA": bottom}.items():
        assert solve(matrix, k, which).index.tolist() == index
    both = solve(matrix, k, "BE").index.tolist()
    assert both == [*range(k - k // 2), *range(5 - k // 2, 5)]


def test_signs_make_the_largest_entry_positive():
    x = solve(spectrum_operator(np.linspace(1, 0, 40))[0], 40).eigendistortions
    assert (x.gather(1, x.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "randomized_svd"])
def test_a_negative_eigenvalue_that_is_found_is_refused(method):
    signs = torch.ones(600)
    signs[0] = -0.5
    noise = fo.noise.Custom(lambda rows: rows * signs)  # positive on every vector that is drawn at random
    for op in (np.diag(np.r_[np.linspace(1, 0.5, 20), -0.3]), fo.FisherOperator(abs, torch.ones(600), noise)):
        with pytest.raises(ValueError, match=r"not positive semidefinite: .* \(an eigenvalue is -0"):
            solve(op, 2, method=method)


@pytest.mark.parametrize("method", ["exact", "lanczos", "davidson", "arpack"])
def test_what_is_negative_by_noise_alone_is_no_null_space_and_has_bounds(method):
    result = solve(np.diag(np.r_[np.linspace(1, 0.5, 20), -3e-7, -2e-7]), 4, method=method)
    assert result.converged.all()
    assert result.nullity == 0
    assert (np.diff(result.eigenvalue_bounds) >= 0).all()


@pytest.mark.parametrize("scale", [1e-280, 1e280])
def test_a_matrix_of_any_scale_is_seen_to_be_symmetric_or_not(scale):
    matrix = scale * np.array([[2.0, 1.0], [1.0, 2.0]])
    with pytest.warns(fo.ConvergenceWarning, match="room"):
        assert not fo.eigendistortions(matrix, 2, rng=0).converged.any()
    with pytest.raises(ValueError, match="not symmetric"):
        solve(scale * np.array([[2.0, 1.0], [-1.0, 2.0]]), 2)


def test_every_kind_of_operator_gives_the_same_pairs():
    matrix, _ = spectrum_operator(np.linspace(1, 0, 60))
    dense = matrix.numpy()
    expected = solve(matrix, 3)
    assert isinstance(expected.eigendistortions, torch.Tensor)
    for op in (dense, sp.csr_array(dense), aslinearoperator(dense), aslinearoperator(dense) * 1.0):
        result = solve(op, 3)
        assert isinstance(result.eigendistortions, np.ndarray)
        np.testing.assert_allclose(result.eigenvalues, expected.eigenvalues, atol=1e-12)
        np.testing.assert_allclose(result.eigendistortions, expected.eigendistortions.numpy(), atol=1e-9)
    integers = np.diag([3, 2, 1])
    np.testing.assert_allclose(solve(integers, 3).eigenvalues, [3, 2, 1])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 3, 4, 5), (2, 3, 4, 5)), ((1, 60), (2, 60)), ((60,), (2, 60)), ((3, 4, 5), (2, 3, 4, 5)), ((1,), (1, 1))],
)
def test_k_takes_the_place_of_a_leading_one(shape, expected):
    F = fo.FisherOperator(lambda x: x * torch.linspace(1, 2, x.numel()).reshape(x.shape), torch.ones(shape))
    result = solve(F, expected[0])
    assert result.eigendistortions.shape == expected
    torch.testing.assert_close(result.eigendistortions.flatten(1).norm(dim=1), torch.ones(expected[0]))
    again = solve(F, expected[0], v0=result.eigendistortions)
    torch.testing.assert_close(again.eigendistortions, result.eigendistortions, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(20, 20), (12, 20), (30, 20)])
@pytest.mark.parametrize("method", ["exact", "lanczos", "davidson"])
def test_an_eigenvalue_that_products_round_away_is_no_null_space(method, shape):
    rank = min(shape)
    singular = np.append(np.linspace(1, 0.5, rank - 1), 1e-9)
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in shape)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    linear.weight.data = torch.from_numpy(left * singular @ right.T)
    F = fo.FisherOperator(linear, torch.zeros(shape[1], dtype=torch.float64))
    result = solve(F, shape[1] - rank + 1, "SM", method)
    assert result.nullity == shape[1] - rank
    if method == "exact":
        np.testing.assert_allclose(result.eigenvalues[0], 1e-18, rtol=1e-5)


def test_the_null_space_is_found_and_reported():
    result = fo.eigendistortions(fo.FisherOperator(*build("linear m<n")), k=25)
    assert result.nullity == 15
    assert "null space has dimension 15;" in result.message
    assert "only a subspace, of dimension 15, is determined" in result.message
    assert (result.eigenvalues[10:] <= 1e-20).all()


@pytest.mark.parametrize("method", METHODS)
def test_zero_f_gives_zeros_and_a_warning(method):
    F = fo.FisherOperator(torch.relu, -torch.ones(200))
    with pytest.warns(UserWarning, match="F = 0"):
        result = fo.eigendistortions(F, 2, "LM", method)
    assert np.array_equal(result.eigenvalues, [0, 0])
    assert np.array_equal(result.residuals, [0, 0])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "randomized_svd"])
def test_a_factor_without_rows_is_zero(method):
    nothing = fo.noise.Custom(torch.zeros(1, 1), root=torch.zeros(0, 1))
    F = fo.FisherOperator(lambda x: x.sum(), torch.ones(40), nothing)
    with pytest.warns(UserWarning, match="F = 0"):
        assert not fo.eigendistortions(F, 2, "SM", method).eigenvalues.any()


def test_a_floor_above_the_tolerance_is_told_apart_from_a_small_budget():
    F = fo.FisherOperator(*build("fourier", torch.float32))
    with pytest.warns(fo.ConvergenceWarning, match="floor in torch.float32: loosen tol"):
        fo.eigendistortions(F, 2, tol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_failure_that_is_no_rounding_is_given_the_remedy_of_its_solver(dtype):
    matrix = torch.diag(torch.linspace(1, 0.1, 300, dtype=dtype))
    with pytest.warns(fo.ConvergenceWarning, match="no null space of dimension 1 was found: use method='lanczos'$"):
        fo.eigendistortions(matrix, 2, "BE", "nullspace", rng=0)


def test_who_works_in_float64_is_not_told_to_use_it():
    with pytest.warns(fo.ConvergenceWarning, match="floor in torch.float64: loosen tol, or use another method"):
        fo.eigendistortions(spectrum_operator(np.linspace(1, 0.1, 60))[0], 2, tol=1e-17)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "auto"])
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_the_size_of_start_vectors_does_not_matter(method, scale):
    matrix, _ = spectrum_operator(np.r_[1, 0.9, np.linspace(0.3, 0.1, 198)])
    one, other = (solve(matrix, 2, "LM", method, v0=s * block(0, 2, 200)) for s in (1.0, scale))
    assert np.array_equal(one.converged, other.converged)
    np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, atol=1e-6)


REFUSED = {
    "k = 0": ({"k": 0}, ValueError, "k must lie between 1 and n = 64, not 0"),
    "k > n": ({"k": 65}, ValueError, "between 1 and n = 64, not 65"),
    "k = 1.5": ({"k": 1.5}, TypeError, "k must be a whole number, not 1.5"),
    "k = True": ({"k": True}, TypeError, "k must be a whole number"),
    "which": ({"which": "BM"}, ValueError, "which must be one of LM, LA, SM, SA, BE, not 'BM': did you mean"),
    "method": ({"method": "arpak"}, ValueError, "not 'arpak': did you mean 'arpack'"),
    "method without small end": ({"method": "randomized_svd"}, ValueError, "largest pairs only: use which='LM'"),
    "k = '3', with a metric": ({"k": "3", "M": 2.0}, TypeError, "k must be a whole number, not '3'"),
    "tol": ({"tol": 0}, ValueError, "tol is relative to the largest eigenvalue"),
    "tol of two numbers": ({"tol": [1e-3, 1e-6]}, TypeError, "tol must be one number, not 2"),
    "maxiter": ({"maxiter": 0, "method": "power"}, ValueError, "maxiter must be at least 1"),
    "maxiter = 2.5": ({"maxiter": 2.5}, TypeError, "maxiter must be a whole number, not 2.5"),
    "v0 of wrong length": ({"v0": np.ones(63)}, ValueError, "does not hold vectors of length n = 64"),
    "v0 zero": ({"v0": np.zeros(64)}, ValueError, "no vector of it zero"),
    "v0 of text": ({"v0": ["a"] * 64}, TypeError, "v0 must be made of numbers, not list"),
    "v0 complex": ({"v0": 1j * np.ones(64)}, TypeError, "v0 is complex"),
    "callback": ({"callback": 3}, TypeError, "callback must be a function of one Progress, or None, not 3"),
    "rng negative": ({"rng": -1}, TypeError, "rng must be a whole number of at least 0 or a numpy"),
    "rng": ({"rng": "seed"}, TypeError, "rng must be a whole number or a numpy.random.Generator, not 'seed'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_without_sense_is_refused_in_one_sentence(case):
    kwargs, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as caught:
        fo.eigendistortions(fo.FisherOperator(*build("fourier")), **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("op", "error", "words"),
    [
        (np.ones((3, 4)), TypeError, r"ndarray of shape \(3, 4\)"),
        ("F", TypeError, "not str"),
        (np.arange(9.0).reshape(3, 3), ValueError, "not symmetric"),
        (-np.eye(3), ValueError, "not positive semidefinite"),
        (1j * np.eye(3), TypeError, "complex"),
        (np.diag([1.0, np.nan]), ValueError, "NaN"),
    ],
)
def test_what_is_no_fisher_matrix_is_refused(op, error, words):
    with pytest.raises(error, match=words):
        fo.eigendistortions(op, 1)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "auto"])
def test_start_vectors_are_not_written(method):
    matrix, _ = spectrum_operator(np.linspace(1, 0, 200))
    v0 = torch.from_numpy(block(0, 2, 200))
    kept = v0.clone()
    solve(matrix, 2, "LM", method, v0=v0)
    assert torch.equal(v0, kept)


@pytest.mark.parametrize("seed", range(6))
def test_a_null_space_that_is_not_there_is_never_silently_another_pair(seed):
    with pytest.warns(fo.ConvergenceWarning, match="no null space of dimension 1 was found: use method='lanczos'"):
        fo.eigendistortions(np.diag([1.0, 0.1]), 1, "SM", "nullspace", rng=seed)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "nullspace"])
def test_a_null_vector_to_start_from_is_not_taken_for_all(method):
    matrix = np.diag(np.r_[np.linspace(1, 0.2, 140), np.zeros(60)])
    result = solve(matrix, 1, "LM", method, v0=np.eye(200)[-1], maxiter=4000)
    assert result.lambda_max > 0.5
    assert_right(result, matrix)
