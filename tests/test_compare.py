"""Comparisons of models at one image, against dense pencils, finite differences and laws of invariance."""

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import build, dense_jacobian
from scipy.sparse.linalg import aslinearoperator
from strategies import pair, spd

import fisherop as fo

# generalized_eigendistortions


@pytest.mark.parametrize("kind", ["array", "sparse", "operator", "tensor"])
@pytest.mark.parametrize("delta", [1e-3, 0.1])
def test_one_model_relative_to_another_is_the_dense_pencil(kind, delta):
    A, B = spd(60), spd(60, seed=1, low=0.0)
    wrap = {"array": np.asarray, "sparse": sp.csr_array, "operator": aslinearoperator, "tensor": torch.tensor}[kind]
    values = scipy.linalg.eigh(A, B + delta * np.eye(60), eigvals_only=True)[::-1]
    result = fo.generalized_eigendistortions(wrap(A), wrap(B), 4, delta=delta, rng=0)
    assert result.converged.all()
    np.testing.assert_allclose(result.eigenvalues, values[result.index], atol=1e-5 * values[0])


@pytest.mark.parametrize("method", ["auto", "davidson"])
def test_models_are_compared_in_the_image_s_shape(method):
    models, image, (A, B) = pair()
    dense_A, dense_B = (J.T @ J for J in (dense_jacobian(m, image).numpy() for m in models))
    M = dense_B + 1e-3 * np.linalg.eigvalsh(dense_B)[-1] * np.eye(A.shape[0])
    values = scipy.linalg.eigh(dense_A, M, eigvals_only=True)[::-1]
    result = fo.generalized_eigendistortions(A, B, 4, method=method, rng=0)
    np.testing.assert_allclose(result.eigenvalues, values[result.index], atol=2e-5 * values[0])
    assert result.eigendistortions.shape == (4, *image.shape[1:])
    seen = [fo.discriminability(op, result.eigendistortions) ** 2 for op in (A, B)]
    lifted = seen[1] + 1e-3 * np.linalg.eigvalsh(dense_B)[-1]
    # Of what is zero no digit is right.
    np.testing.assert_allclose(seen[0] / lifted, result.eigenvalues, rtol=1e-3, atol=1e-20 * values[0])


def test_a_ratio_does_not_depend_on_the_scale_of_the_second_model():
    A, B = spd(40), spd(40, seed=1)
    one, other = (fo.generalized_eigendistortions(A, c * B, rng=0) for c in (1, 100))
    np.testing.assert_allclose(one.eigenvalues, 100 * other.eigenvalues, rtol=1e-6)


# discriminability, thresholds, D


def test_discriminability_is_the_norm_of_the_change_of_the_response():
    for name in ("attention", "linear m<n"):
        model, image = build(name)
        F, J = fo.FisherOperator(model, image), dense_jacobian(model, image)
        d = torch.randn(3, *image.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = (d.flatten(1) @ J.T).norm(dim=1).numpy()
        np.testing.assert_allclose(fo.discriminability(F, d), expected, rtol=1e-10)
        np.testing.assert_allclose(fo.discriminability(F, d.numpy()), expected, rtol=1e-10)
        one = fo.discriminability(F, d[:1])
        assert isinstance(one, float)
        np.testing.assert_allclose(one, expected[0], rtol=1e-10)
        dense = (J.T @ J).numpy()
        np.testing.assert_allclose(fo.discriminability(dense, d.reshape(3, -1)), expected, rtol=1e-7)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_threshold_is_where_discriminability_is_d_prime(d_prime, scale):
    F = np.diag([4.0, 2.0, 1.0]) * scale
    r = fo.eigendistortions(F, 3)
    t = fo.thresholds(r, d_prime=d_prime)
    np.testing.assert_allclose(fo.discriminability(F, t[:, None] * r.eigendistortions), d_prime)


def test_thresholds_are_infinite_in_the_null_space_only():
    r = fo.eigendistortions(fo.FisherOperator(*build("linear m<n", torch.float32)), 25)
    assert np.isfinite(fo.thresholds(r)).tolist() == [True] * 10 + [False] * 15


@pytest.mark.parametrize(("k", "which"), [(4, "BE"), (3, "SM"), (16, "LM"), (12, "LM")])
def test_thresholds_are_infinite_in_the_null_space_of_a_restriction(k, which):
    model, image = build("linear m<n")
    r = fo.eigendistortions(fo.FisherOperator(model, image, within=list(range(16))), k, which)
    assert (r.n, r.nullity) == (16, 6)
    np.testing.assert_array_equal(np.isinf(fo.thresholds(r)), r.index >= 10)


@pytest.mark.parametrize("full", [False, True])
def test_a_model_sees_its_own_distortions_furthest_apart(full):
    A, B = (spd(60), spd(60, seed=1)) if full else pair()[2]
    ops = {"one": A, "two": B}
    results = {name: fo.eigendistortions(op, 2) for name, op in ops.items()}
    table = fo.threshold_table(ops, results)
    assert table.D.shape == (2, 2)
    for i, (name, result) in enumerate(results.items()):
        most, least = fo.thresholds(result)
        assert np.isfinite(least) == full
        np.testing.assert_allclose(table.D[i, i], np.log(least / most), rtol=1e-4)
        other = 1 - i
        assert table.D[i, i] >= table.D[i, other]
        assert str(table).splitlines()[1 + i].split()[0] == name
    np.testing.assert_allclose(table.least, np.exp(table.D) * table.most)


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_a_table_keeps_its_columns_and_digits_at_every_scale(scale):
    F = np.diag([4.0, 1.0, 1.0]) * scale
    sets = {
        "tiny": np.eye(3)[[1, 2]] * [[1.0], [1 + 1e-9]],
        "half": np.array([[1.0, 0, 0], [1e-7, 1.0, 0.0]]),
        "": np.eye(3),
    }
    table = fo.threshold_table({"F": F, "much longer": F}, sets)
    for line in str(table).splitlines()[1:]:
        assert line.split()[-3:] == ["0", "0.693", "0.693"]
    np.testing.assert_allclose(table.most[0], 1 / np.sqrt(scale * np.array([1.0, 4.0, 4.0])))


def test_a_table_prints_no_negative_zero_no_rounding_and_no_joined_columns():
    most, least = np.array([[1.0, 1.0, 1.0, np.inf]]), np.array([[1 - 1e-16, 1 - 2e-16, np.exp(-1.23456e-7), np.inf]])
    table = fo.ThresholdTable(("F",), ("a", "b", "c", "d"), most, least)
    assert str(table).splitlines()[1].split() == ["F", "0", "0", "-1.23e-07", "nan"]
    assert {len(line) for line in str(table).splitlines()} == {len(str(table).splitlines()[0])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_not_noticed_but_for_rounding_has_an_infinite_threshold(dtype):
    F = fo.FisherOperator(*build("linear m<n", dtype))
    r = fo.eigendistortions(F, 25)
    sets = {"null": r.eigendistortions[[0, -1]], "seen": r.eigendistortions[[0, 9]], "neither": r.eigendistortions[-2:]}
    [values] = fo.threshold_table({"F": F}, sets).D
    assert np.isposinf(values[0])
    np.testing.assert_allclose(values[1], np.log(r.eigenvalues[0] / r.eigenvalues[9]) / 2, rtol=1e-3)
    assert np.isnan(values[2])


def test_bars_that_are_infinite_or_undefined_are_drawn_as_such():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib.figure import Figure

    most, least = np.array([[1.0, 1.0, np.inf, np.inf]]), np.array([[2.0, np.inf, 1.0, np.inf]])
    ax = fo.ThresholdTable(("F",), ("a", "b", "c", "d"), most, least).plot(Figure().add_subplot())
    assert [(round(text.get_position()[0]), text.get_text()) for text in ax.texts] == [(1, "∞"), (2, "-∞"), (3, "?")]


def test_a_table_is_drawn_on_the_axes_given():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib.figure import Figure

    A, B = np.diag([4.0, 1.0, 0.0]), np.diag([1.0, 1.0, 9.0])
    table = fo.threshold_table(
        {"A": A, "B": B}, {"principal": fo.principal_distortions([B, A], delta=1e-3), "x": np.eye(3)}
    )
    figure = Figure()
    ax = figure.add_subplot()
    assert table.plot(ax) is ax
    assert [label.get_text() for label in ax.get_xticklabels()] == ["principal", "x"]
    assert len(ax.patches) == 4
    assert np.isposinf(table.D[0, 1])
    table.plot().figure.clear()


REFUSED = {
    "generalized, sizes": (lambda: fo.generalized_eigendistortions(np.eye(3), np.eye(4)), "F_A and F_B have 3 and 4"),
    "generalized, images": (
        lambda: fo.generalized_eigendistortions(
            fo.FisherOperator(torch.tanh, torch.zeros(3)), fo.FisherOperator(torch.tanh, torch.ones(3))
        ),
        "F_A and F_B are taken at different images",
    ),
    "generalized, dtype": (
        lambda: fo.generalized_eigendistortions(torch.eye(3), torch.eye(3).double()),
        "torch.float32 on cpu and torch.float64 on cpu: convert or move one",
    ),
    "generalized, delta": (lambda: fo.generalized_eigendistortions(np.eye(3), np.eye(3), delta=0), "delta is relative"),
    "generalized, zero": (lambda: fo.generalized_eigendistortions(np.eye(3), np.zeros((3, 3))), "F_B is zero"),
    "generalized, asymmetric": (
        lambda: fo.generalized_eigendistortions(np.eye(3), np.tri(3)),
        "F_B: the operator is not symmetric",
    ),
    "principal, one": (lambda: fo.principal_distortions([np.eye(3)]), "two models or more"),
    "principal, k": (lambda: fo.principal_distortions([np.eye(3)] * 2, 3), "from 2 to the number of models, 2, not 3"),
    "principal, sizes": (lambda: fo.principal_distortions([np.eye(3), np.eye(4)]), r"ops\[0\] and ops\[1\] have"),
    "principal, zero": (lambda: fo.principal_distortions([np.eye(3), np.zeros((3, 3))]), r"ops\[1\] is zero"),
    "principal, restarts": (lambda: fo.principal_distortions([np.eye(3)] * 2, restarts=-1), "restarts must be 0"),
    "distortion's size": (lambda: fo.discriminability(np.eye(3), np.ones(4)), "do not fit n = 3 pixels"),
    "distortion's NaN": (lambda: fo.discriminability(np.eye(3), np.full(3, np.nan)), "holds NaN"),
    "d_prime": (lambda: fo.thresholds(fo.eigendistortions(np.eye(3)), d_prime=0), "d_prime must be positive"),
    "table, one distortion": (lambda: fo.threshold_table({"A": np.eye(3)}, {"x": np.ones(3)}), "holds one distortion"),
    "table, zero": (
        lambda: fo.threshold_table({"A": np.eye(3)}, {"x": np.array([[1.0, 0, 0], [0, 0, 0]])}),
        r"results\['x'\] holds a distortion of zero",
    ),
    "table, empty": (lambda: fo.threshold_table({}, {}), "at least one model"),
    "table, no names": (lambda: fo.threshold_table([np.eye(3)], {}), "ops must be a dict of names.* not list"),
    "table, no sets": (lambda: fo.threshold_table({}, [np.eye(3)]), "results must be a dict of names"),
    "thresholds of a matrix": (lambda: fo.thresholds(np.eye(3)), "what eigendistortions returns, not ndarray"),
    "principal, an operator": (
        lambda: fo.principal_distortions(fo.FisherOperator(torch.tanh, torch.zeros(3))),
        "ops must be a sequence of Fisher matrices, not FisherOperator",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_sentence(case):
    call, words = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, np.float32], ids=lambda kind: kind.__name__)
def test_numbers_of_any_type_are_taken_as_pythons(kind):
    A, B = np.diag([4.0, 1.0, 1.0]), np.diag([1.0, 1.0, 9.0])
    expected = fo.generalized_eigendistortions(A, B, delta=0.125).eigenvalues
    np.testing.assert_array_equal(fo.generalized_eigendistortions(A, B, delta=kind(0.125)).eigenvalues, expected)
    expected = fo.principal_distortions([A, B], delta=0.125).sensitivities
    np.testing.assert_array_equal(fo.principal_distortions([A, B], delta=kind(0.125)).sensitivities, expected)
    r = fo.eigendistortions(A)
    np.testing.assert_array_equal(fo.thresholds(r, d_prime=kind(2.0)), 2 * fo.thresholds(r))
    for k in (np.int8(2), np.array(2), torch.tensor(2)):
        assert len(fo.principal_distortions([A, B], k, restarts=k, maxiter=k * 10)) == 2
