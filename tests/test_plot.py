"""What is drawn is the numbers themselves, clipped; and every panel says what it is."""

# ruff: noqa: RUF001

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherop as fo

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image, ImageSequence  # noqa: E402

from fisherop import plot  # noqa: E402

SHAPES = {
    "grey": (1, 1, 12, 9),
    "rgb": (1, 3, 9, 12),
    "no batch": (3, 8, 8),
    "plane": (7, 11),
    "signal": (1, 1, 1, 25),
    "row": (25,),
}


@pytest.fixture(autouse=True)
def _no_figure_left_open():
    yield
    plt.close("all")


def solved(shape: tuple[int, ...], k: int = 2) -> fo.Eigendistortions:
    n = int(np.prod(shape))
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(n, n, generator=torch.Generator().manual_seed(1)) / n
    return fo.eigendistortions(fo.FisherOperator(lambda x: weights @ x.flatten(), image), k=k, rng=0)


def panels(fig: Figure) -> dict[str, mpl.axes.Axes]:
    return {ax.get_label(): ax for ax in fig.axes}


def pixels(ax: mpl.axes.Axes) -> np.ndarray:
    """Return a panel's image as (H, W, C)."""
    data = np.asarray(ax.images[0].get_array())
    return data if data.ndim == 3 else data[..., None]


def channels_last(x: object) -> np.ndarray:
    array = np.asarray(x, dtype=np.float64)
    return np.moveaxis(array.reshape((1,) * (3 - array.ndim) + array.shape), 0, -1)


def rendered(fig: Figure) -> np.ndarray:
    file = io.BytesIO()
    fig.savefig(file, format="rgba")
    shape = round(fig.bbox.height), round(fig.bbox.width), 4
    return np.frombuffer(file.getvalue(), np.uint8).reshape(shape)[..., :3]


def title(ax: mpl.axes.Axes) -> str:
    return ax.get_title(loc="left")


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("grey", "rgb", "no batch", "plane")])
def test_drawn_pixels_are_image_plus_alpha_distortion_clipped(shape):
    result = solved(shape, k=3)
    drawn = panels(plot.eigendistortions(result, alpha=1.5))
    image = channels_last(result.image[0] if len(shape) == 4 else result.image)
    np.testing.assert_array_equal(pixels(drawn["image"]), image)
    for i, v in zip(result.index, result.eigendistortions, strict=True):
        moved = image + 1.5 * channels_last(v)
        np.testing.assert_allclose(pixels(drawn[f"distorted {i}"]), moved.clip(0, 1), rtol=0, atol=1e-15)
        clipped = 100 * np.mean((moved < 0) | (moved > 1))
        assert drawn[f"distorted {i}"].get_xlabel() == f"α = 1.5, {clipped:.3g} % clipped"


def test_distortions_are_drawn_with_zero_as_mid_grey():
    grey, rgb = solved(SHAPES["grey"]), solved(SHAPES["rgb"])
    [artist] = panels(plot.eigendistortions(grey))["distortion 0"].images
    low, high = artist.get_clim()
    assert -low == high == grey.eigendistortions[0].abs().max()
    np.testing.assert_array_equal(artist.get_array(), grey.eigendistortions[0, 0])
    ax = panels(plot.eigendistortions(rgb))["distortion 0"]
    v = channels_last(rgb.eigendistortions[0])
    gain = 0.5 / np.abs(v).max()
    np.testing.assert_allclose(pixels(ax), 0.5 + gain * v)
    assert ax.get_xlabel() == f"0.5 + {gain:.3g} v"


def test_default_alpha_is_one_norm_for_all_of_a_twentieth_of_the_range_per_pixel():
    result = solved(SHAPES["rgb"], k=4)
    expected = 0.05 * np.sqrt(result.image.numel())
    for fig, range_ in ((plot.eigendistortions(result), 1), (plot.eigendistortions(result, vrange=(-1, 1)), 2)):
        captions = [ax.get_xlabel() for label, ax in panels(fig).items() if label.startswith("distorted")]
        assert [words.split(",")[0] for words in captions] == [f"α = {range_ * expected:.3g}"] * 4


def test_every_pair_can_have_its_own_alpha():
    drawn = panels(plot.eigendistortions(solved(SHAPES["grey"]), alpha=[0.25, 40]))
    assert drawn["distorted 0"].get_xlabel().startswith("α = 0.25, ")
    assert drawn["distorted 107"].get_xlabel().startswith("α = 40, ")


def test_chosen_pairs_are_drawn_in_the_order_asked_for():
    result = solved(SHAPES["grey"], k=4)
    whole = panels(plot.eigendistortions(result, alpha=[1, 2, 3, 4]))
    some = panels(plot.eigendistortions(result, pairs=[-1, 1], alpha=[4, 2]))
    assert list(some) == ["image", "distorted 107", "distortion 107", "distorted 1", "distortion 1"]
    for label in ("distorted 107", "distortion 107", "distorted 1", "distortion 1"):
        np.testing.assert_array_equal(pixels(some[label]), pixels(whole[label]))
        assert some[label].get_xlabel() == whole[label].get_xlabel()
        assert title(some[label]) == title(whole[label])
    assert list(panels(plot.eigendistortions(result, pairs=np.int64(0)))) == ["image", "distorted 0", "distortion 0"]
    with pytest.raises(ValueError, match="pairs must be one or more of 0 to 3"):
        plot.eigendistortions(result, pairs=4)


NUMBERS = [np.int8, np.uint8, np.int64, np.array, torch.tensor]


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.__name__)
def test_numbers_of_any_type_are_drawn_as_pythons(kind, tmp_path):
    result = solved(SHAPES["rgb"], k=3)

    def drawn(**arguments):
        fig = plot.eigendistortions(result, **arguments)
        fig.canvas.draw()
        return np.asarray(fig.canvas.buffer_rgba())

    for name, value in {"alpha": 2, "pairs": 1, "channel": 1, "zoom": 20}.items():
        np.testing.assert_array_equal(drawn(**{name: kind(value)}), drawn(**{name: value}), err_msg=name)
    expected = drawn(alpha="threshold", d_prime=2.0, vrange=(0.0, 2.0))
    for vrange in ((kind(0), kind(2)), [0, kind(2)], np.array([0, 2]), torch.tensor([0.0, 2.0])):
        np.testing.assert_array_equal(drawn(alpha="threshold", d_prime=kind(2), vrange=vrange), expected)
    plot.flip(
        result, tmp_path / "kind.png", pair=kind(1), zoom=kind(3), seconds=kind(1), channel=kind(2), alpha=kind(3)
    )
    plot.flip(result, tmp_path / "plain.png", pair=1, zoom=3, seconds=1, channel=2, alpha=3)
    assert (tmp_path / "kind.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    shown = [plot.both_signs(result, pairs=pairs) for pairs in (1, kind(1), [kind(1)])]
    assert [list(panels(fig)) for fig in shown] == [["minus 1", "image", "plus 1"]] * 3


@pytest.mark.parametrize(
    "alpha", [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0], requires_grad=True), (np.float32(1), torch.tensor(2))]
)
def test_sizes_come_in_any_sequence(alpha):
    drawn = panels(plot.eigendistortions(solved(SHAPES["grey"]), alpha=alpha))
    assert [ax.get_xlabel().split(",")[0] for label, ax in drawn.items() if label.startswith("distorted")] == [
        "α = 1",
        "α = 2",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": np.nan}, "alpha must be finite"),
        ({"alpha": [1.0, np.inf]}, "alpha must be finite"),
        ({"alpha": None}, "alpha must be made of numbers"),
        ({"pairs": [True, False]}, "pairs must be a whole number, not True"),
        ({"pairs": np.array([True, False])}, "pairs must be a whole number"),
        ({"channel": True}, "channel must be a whole number"),
        ({"zoom": 2.5}, "zoom must be a whole number, not 2.5"),
        ({"vrange": (0, np.inf)}, "black < white, both finite"),
        ({"vrange": (0, 1, 2)}, r"vrange must be \(black, white\)"),
        ({"vrange": "01"}, "vrange must be made of numbers"),
    ],
)
def test_what_is_no_number_is_refused_in_one_sentence(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        plot.eigendistortions(solved(SHAPES["grey"]), **arguments)
    assert "\n" not in str(caught.value)


def test_panels_check_the_range_that_they_are_given():
    for call in (
        lambda ax: plot.show_image(ax, np.ones((3, 3)), vrange=(1, 0)),
        lambda ax: plot.show_distorted(ax, np.ones((3, 3)), np.ones((3, 3)), 1.0, vrange=(0, np.nan)),
    ):
        with pytest.raises(ValueError, match=r"vrange must be \(black, white\)"):
            call(Figure().add_subplot())


def test_pixel_range_says_what_is_black_and_white():
    result = solved(SHAPES["rgb"])
    normalized = dataclasses.replace(result, image=4 * result.image - 2)
    plain = panels(plot.eigendistortions(result, alpha=1))
    drawn = panels(plot.eigendistortions(normalized, alpha=4, vrange=(-2, 2)))
    for label, ax in plain.items():
        np.testing.assert_allclose(pixels(drawn[label]), pixels(ax), atol=1e-6)


def test_image_beyond_the_range_is_said_to_be_clipped():
    fig = Figure()
    [artist] = plot.show_image(fig.add_subplot(), [[-1.0, 0.5], [0.5, 0.5]])
    assert artist.get_array().min() == 0
    assert fig.axes[0].get_xlabel() == "25 % clipped"
    plot.show_image(ax := fig.add_subplot(), [[0.0, 0.5], [0.5, 1.0]])
    assert ax.get_xlabel() == ""


def test_small_fraction_is_not_rounded_to_none():
    image = np.full((120, 120), 0.5)
    image[0, 0] = 2
    plot.show_image(ax := Figure().add_subplot(), image)
    assert ax.get_xlabel() == "< 0.01 % clipped"


def test_large_fraction_is_not_rounded_to_all():
    [caption] = set(map(plot.panels.percent, (0.99951, 0.9999999)))
    assert caption == "> 99.9 %"
    assert plot.panels.percent(1.0) == "100 %"
    assert plot.panels.percent(0.999) == "99.9 %"


def test_channel_is_drawn_alone():
    result = solved((1, 5, 6, 7))
    drawn = panels(plot.eigendistortions(result, channel=3, alpha=2))
    np.testing.assert_array_equal(pixels(drawn["image"])[..., 0], result.image[0, 3])
    np.testing.assert_array_equal(pixels(drawn["distortion 0"])[..., 0], result.eigendistortions[0, 3])


def test_signal_is_drawn_as_lines_and_not_clipped():
    for shape in (SHAPES["signal"], SHAPES["row"], (1, 2, 1, 40)):
        result = solved(shape)
        drawn = panels(plot.eigendistortions(result, alpha=30))
        channels = shape[1] if shape == (1, 2, 1, 40) else 1
        image = result.image.reshape(channels, -1)
        v = result.eigendistortions[0].reshape(channels, -1)
        assert len(drawn["image"].lines) == channels
        for line, expected in zip(drawn["distorted 0"].lines[channels:], image + 30 * v, strict=True):
            np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-5)
        assert drawn["distorted 0"].get_xlabel() == "α = 30"


def test_vectors_of_a_matrix_take_the_shape_of_the_given_image():
    result = fo.eigendistortions(np.diag(np.arange(48.0)), k=2)
    image = np.full((1, 3, 4, 4), 0.5)
    drawn = panels(plot.eigendistortions(result, image))
    v = channels_last(result.eigendistortions[0].reshape(3, 4, 4))
    np.testing.assert_allclose(pixels(drawn["distortion 0"]), 0.5 + 0.5 * v)


# ---------------------------------------------------------------------------------------------------------------- sizes


def alpha_of(ax: mpl.axes.Axes) -> float:
    return float(ax.get_xlabel().removeprefix("α = ").split(",")[0].split("\n")[0])


@pytest.mark.parametrize("d_prime", [0.03, 0.1])
def test_threshold_is_where_the_predicted_change_is_d_prime_unless_the_caption_says_capped(d_prime):
    result = solved(SHAPES["rgb"], k=20)
    drawn = panels(plot.eigendistortions(result, alpha="threshold", d_prime=d_prime))
    capped = 0
    for i, value in zip(result.index, result.eigenvalues, strict=True):
        ax = drawn[f"distorted {i}"]
        if "capped" in ax.get_xlabel():
            capped += 1
            assert alpha_of(ax) * np.sqrt(value) < d_prime
            reached = float(ax.get_xlabel().split("capped at d′ = ")[1].split("\n")[0])
            assert reached == pytest.approx(alpha_of(ax) * np.sqrt(value), rel=0.06)
        else:
            assert alpha_of(ax) * np.sqrt(value) == pytest.approx(d_prime, rel=5e-3)
    assert 0 < capped < 20


@given(st.integers(0, 2**32 - 1), st.sampled_from([(0.0, 1.0), (-2.0, 3.0)]), st.floats(0, 0.5))
def test_cap_hides_a_twentieth_of_what_can_be_seen_of_a_distortion_and_no_more(seed, vrange, saturated):
    rng = np.random.default_rng(seed)
    low, high = vrange
    x = low + (high - low) * rng.random((1, 12, 12))
    x[rng.random(x.shape) < saturated] = low
    v = rng.standard_normal(x.shape) * 10.0 ** rng.uniform(-2, 0, x.shape)
    v /= np.linalg.norm(v)
    result = dataclasses.replace(solved((1, 1, 1, 2), k=1), eigendistortions=v[None], eigenvalues=np.zeros(1))
    fig = plot.eigendistortions(result, x, alpha="threshold", vrange=vrange)
    alpha = alpha_of(panels(fig)["distorted 0"])
    plt.close(fig)
    shown = np.linalg.norm((x + alpha * v).clip(*vrange) - x)
    seen = np.linalg.norm(v[(x > low) | (v > 0)])
    assert shown == pytest.approx(0.95 * alpha * seen, rel=0.01)


def test_null_distortion_has_a_finite_size_on_every_image_and_signal():
    null = {"eigenvalues": np.zeros(2)}
    for name, shape in SHAPES.items():
        result = dataclasses.replace(solved(shape), **null)
        for fig in (plot.eigendistortions(result, alpha="threshold"), plot.both_signs(result, alpha="threshold")):
            words = [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel().startswith("α")]
            assert all("capped at d′ = 0" in text and "inf" not in text and "nan" not in text for text in words), name
    white = dataclasses.replace(solved((1, 1, 4, 4)), eigendistortions=np.full((2, 16), 0.25), **null)
    assert alpha_of(panels(plot.eigendistortions(white, np.ones((4, 4)), alpha="threshold"))["distorted 0"]) > 0


def test_signal_is_capped_at_its_own_norm():
    result = dataclasses.replace(solved(SHAPES["row"]), eigenvalues=np.zeros(2))
    drawn = panels(plot.eigendistortions(result, alpha="threshold"))
    assert alpha_of(drawn["distorted 0"]) == pytest.approx(result.image.norm().item(), rel=5e-3)


# ----------------------------------------------------------------------------------------------------------- both signs


@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("grey", "rgb", "no batch", "plane")])
def test_both_signs_are_image_minus_and_plus_alpha_distortion(shape):
    result = solved(shape, k=3)
    drawn = panels(plot.both_signs(result, alpha=[0.5, 1.5, 2.0]))
    image = channels_last(result.image[0] if len(shape) == 4 else result.image)
    np.testing.assert_array_equal(pixels(drawn["image"]), image)
    for i, alpha, v in zip(result.index, (0.5, 1.5, 2.0), result.eigendistortions, strict=True):
        for name, sign in (("minus", -1), ("plus", 1)):
            moved = image + sign * alpha * channels_last(v)
            np.testing.assert_allclose(pixels(drawn[f"{name} {i}"]), moved.clip(0, 1), rtol=0, atol=1e-15)
            assert f"index {i}" in title(drawn[f"{name} {i}"])


def test_pairs_are_chosen_by_their_place_in_the_result():
    result = solved(SHAPES["grey"], k=4)
    for pairs, indices in ((0, [0]), (-1, [107]), ([3, 1], [107, 1]), (None, [0, 1, 106, 107])):
        labels = [ax.get_label() for ax in plot.both_signs(result, pairs=pairs).axes]
        assert labels == [label for i in indices for label in (f"minus {i}", "image", f"plus {i}")]
    for pairs in (4, -5, [], [0, 9]):
        with pytest.raises(ValueError, match="pairs must be one or more of 0 to 3"):
            plot.both_signs(result, pairs=pairs)


def test_signals_in_a_row_have_one_scale():
    result = solved(SHAPES["signal"])
    for fig in (plot.both_signs(result, pairs=0, alpha=9), plot.eigendistortions(result, alpha=[1, 9])):
        scales = {ax.get_ylim() for ax in fig.axes if not ax.get_label().startswith("distortion")}
        assert len(scales) == 1


# ------------------------------------------------------------------------------------------------------------- spectrum


def drawn_spectrum(fig: Figure) -> dict[float, float]:
    """Return the markers of a spectrum: position on the axis to height."""
    [ax] = fig.axes
    markers = [line.get_data() for line in ax.get_lines() if line.get_linestyle() == "None"]
    return {x: y for xs, ys in markers for x, y in zip(xs, ys, strict=True)}


@pytest.mark.parametrize("k", [2, 3, 108])
def test_markers_stand_at_the_eigenvalues_in_order(k):
    result = solved(SHAPES["grey"], k=k)
    markers = drawn_spectrum(plot.spectrum(result))
    np.testing.assert_array_equal([markers[x] for x in sorted(markers)], result.eigenvalues)
    if k == 108:
        assert sorted(markers) == list(range(108))


def test_bars_are_the_bounds():
    bounds = np.array([[2.0, 5.0], [0.5, 2.0]])
    result = dataclasses.replace(solved(SHAPES["grey"]), eigenvalues=np.array([4.0, 1.0]), eigenvalue_bounds=bounds)
    [ax] = plot.spectrum(dataclasses.replace(result, lambda_max=4.0)).axes
    bars = [segment[:, 1] for segment in ax.collections[-1].get_segments()]
    np.testing.assert_allclose(bars, bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_of_what_is_below_the_floor_hold_zero_and_zeros_are_marked_at_the_edge(dtype):
    weights = torch.randn(10, 25, generator=torch.Generator().manual_seed(0), dtype=dtype)
    F = fo.FisherOperator(lambda x: weights @ x, torch.ones(25, dtype=dtype))
    result = fo.eigendistortions(F, k=25)
    fig = plot.spectrum(result)
    [ax] = fig.axes
    [floor] = {line.get_ydata()[0] for line in ax.get_lines() if line.get_linestyle() == ":"}
    assert (result.eigenvalues[:10] > floor).all()
    assert (result.eigenvalues[10:] < floor).all()
    assert (result.eigenvalue_bounds[10:, 0] == 0).all()
    markers = drawn_spectrum(fig)
    assert all(markers[i] == max(result.eigenvalues[i], ax.get_ylim()[0]) for i in range(25))
    assert {"zero to rounding below", "below the axis"} <= set(legend(fig))


def legend(fig: Figure) -> list[str]:
    return [text.get_text() for text in fig.axes[0].get_legend().get_texts()]


def test_spectra_of_several_results_are_named():
    results = [solved(SHAPES["grey"]), solved(SHAPES["grey"], k=5)]
    method = results[0].method
    assert [words.split(":")[0] for words in legend(plot.spectrum(results))[:2]] == [f"1, {method}", f"2, {method}"]
    assert legend(plot.spectrum(dict(zip("ab", results, strict=True))))[:2] == [
        "a: 2 of 108 eigenvalues",
        "b: 5 of 108 eigenvalues",
    ]
    with pytest.raises(ValueError, match="no result"):
        plot.spectrum([])


def test_pair_of_a_spectrum_that_did_not_converge_is_a_cross():
    result = dataclasses.replace(solved(SHAPES["grey"]), converged=np.array([True, False]))
    fig = plot.spectrum(result)
    [cross] = [line for line in fig.axes[0].get_lines() if line.get_marker() == "x"]
    assert cross.get_ydata() == [result.eigenvalues[1]]
    assert "not converged" in legend(fig)


def test_ticks_name_the_indices_at_both_sides_of_what_is_left_out():
    [ax] = plot.spectrum(solved(SHAPES["grey"], k=20)).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "9", "98", "107"]
    [ax] = plot.spectrum(solved(SHAPES["grey"])).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "107"]


def test_zero_matrix_and_single_pair_have_a_spectrum():
    with pytest.warns(UserWarning, match="F = 0"):
        zero = fo.eigendistortions(np.zeros((4, 4)), k=4)
    assert legend(plot.spectrum(zero))[0] == "exact: 4 of 4 eigenvalues, F = 0"
    plot.spectrum(fo.eigendistortions(np.eye(4), k=1))


# ------------------------------------------------------------------------------------------------------------ linearity


def lines(ax: mpl.axes.Axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata()) for line in ax.get_lines()}


@pytest.mark.parametrize("noise", [None, 0.25, "vector"])
def test_curve_of_a_linear_model_is_the_predicted_line_in_both_directions(noise):
    weights = torch.randn(10, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = torch.linspace(0.1, 2, 10) if noise == "vector" else noise
    F = fo.FisherOperator(
        lambda x: weights @ x.flatten(), torch.ones(1, 1, 5, 5, dtype=torch.float64), fo.noise.Gaussian(covariance)
    )
    result = fo.eigendistortions(F, k=10, which="LM")
    alphas = [0.01, 0.5, 30]
    top, bottom = plot.linearity(F, result, alphas=alphas, pairs=range(10)).axes
    for i, value in enumerate(result.eigenvalues):
        np.testing.assert_allclose(lines(top)[f"predicted {i}"], np.multiply(alphas, np.sqrt(value)))
        for sign in ("plus", "minus"):
            np.testing.assert_allclose(lines(top)[f"{sign} {i}"], lines(top)[f"predicted {i}"], rtol=1e-9)
            np.testing.assert_allclose(lines(bottom)[f"{sign} {i}"], 1, rtol=1e-9)


def test_curve_is_the_change_of_the_response():
    model, image = nn.Softplus(), torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
    F = fo.FisherOperator(model, image)
    result = fo.eigendistortions(F, k=2)
    top, _ = plot.linearity(F, result, alphas=[0.5, 4]).axes
    for i, v in zip(result.index, result.eigendistortions, strict=True):
        for name, sign in (("plus", 1), ("minus", -1)):
            expected = [(model(image + sign * a * v) - model(image)).norm().item() for a in (0.5, 4)]
            np.testing.assert_allclose(lines(top)[f"{name} {i}"], expected, rtol=1e-5)


def test_change_that_is_rounding_has_no_ratio():
    weights = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    F = fo.FisherOperator(lambda x: weights @ x, torch.ones(9))
    top, bottom = plot.linearity(F, fo.eigendistortions(F, k=9), pairs=-1).axes
    assert len(lines(top)["plus 8"]) == 16
    assert len(lines(bottom)["plus 8"]) == 0
    assert "rounding" in [text.get_text() for text in top.texts]


def test_linearity_needs_the_operator_of_the_result():
    F = fo.FisherOperator(nn.Identity(), torch.ones(4))
    result = fo.eigendistortions(F)
    with pytest.raises(TypeError, match="not JacobianOperator"):
        plot.linearity(fo.JacobianOperator(nn.Identity(), torch.ones(4)), result)
    with pytest.raises(ValueError, match="3 pixels and the result 4"):
        plot.linearity(fo.FisherOperator(nn.Identity(), torch.ones(3)), result)
    with pytest.raises(ValueError, match="a value of 4, the result 1: pass the operator that the result is of"):
        plot.linearity(fo.FisherOperator(lambda x: 2 * x, torch.ones(4)), result)
    with pytest.raises(ValueError, match=r"a value of 1, the result 0\.25"):
        plot.linearity(F, fo.eigendistortions(F, M=4.0))
    for alphas in ([], [0.0], [-1.0], [np.nan]):
        with pytest.raises(ValueError, match="alphas must be positive"):
            plot.linearity(F, result, alphas=alphas)


def test_no_word_of_a_curve_is_cut_off():
    weights = torch.randn(4, 25, generator=torch.Generator().manual_seed(0))
    F = fo.FisherOperator(lambda x: weights @ x, torch.ones(25))
    full, ends = fo.eigendistortions(F, k=25), fo.eigendistortions(F)
    unsure = dataclasses.replace(full, converged=np.zeros(25, dtype=bool))
    for fig in (
        plot.spectrum({"all of them, and these words are a little longer": unsure, "ends": ends}),
        plot.spectrum(ends),
        plot.spectrum(fo.eigendistortions(F, k=3, which="LM")),
        plot.linearity(F, unsure),
        plot.linearity(F, ends, pairs=1),
    ):
        fig.draw_without_rendering()
        box = fig.get_tightbbox().transformed(fig.dpi_scale_trans)
        assert fig.bbox.x0 <= box.x0 < box.x1 <= fig.bbox.x1
        assert fig.bbox.y0 <= box.y0 < box.y1 <= fig.bbox.y1


# ----------------------------------------------------------------------------------------------------------------- flip


def frames(path) -> list[np.ndarray]:
    with Image.open(path) as file:
        assert file.n_frames == 2
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]


def in_bytes(values: object, zoom: int) -> np.ndarray:
    levels = np.round(channels_last(values).clip(0, 1) * 255).astype(np.uint8)
    return np.broadcast_to(levels, (*levels.shape[:2], 3)).repeat(zoom, 0).repeat(zoom, 1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 3), st.sampled_from([".gif", ".png"]))
def test_frames_of_a_grey_flip_are_the_exact_pixels(tmp_path_factory, seed, width, zoom, suffix):
    rng = np.random.default_rng(seed)
    x, v = rng.random((2, 18, width + 1))
    result = dataclasses.replace(solved((1, 1, 1, 2), k=1), eigendistortions=v.reshape(1, -1))
    path = tmp_path_factory.mktemp("flip") / f"flip{suffix}"
    plot.flip(result, path, x, alpha=0.5, zoom=zoom)
    for frame, values in zip(frames(path), (x, x + 0.5 * v), strict=True):
        expected = in_bytes(values, zoom)
        np.testing.assert_array_equal(frame[: len(expected), : expected.shape[1]], expected)


def test_frames_of_a_flip_in_colour_are_exact_as_png_and_as_gif_where_the_colours_fit(tmp_path):
    levels = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    few = levels[torch.arange(32 * 32) % 40].T.reshape(3, 32, 32)
    many = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    v = np.zeros((1, 3, 32, 32))
    v[0, :, 5:9, 5:9] = 1 / np.sqrt(48)
    result = dataclasses.replace(solved((1, 1, 1, 2), k=1), eigendistortions=v)
    for name, image in (("few.gif", few), ("many.png", many)):
        plot.flip(result, tmp_path / name, image, alpha=2, zoom=8)
        for frame, alpha in zip(frames(tmp_path / name), (0, 2), strict=True):
            np.testing.assert_array_equal(frame[:256, :256], in_bytes(image.numpy() + alpha * v[0], 8))
    plot.flip(result, tmp_path / "many.gif", many, alpha=2, zoom=8)
    first, second = frames(tmp_path / "many.gif")
    assert np.abs(first[:256].astype(int) - in_bytes(many, 8)).mean() < 16
    changed = (first != second).any(-1)
    assert changed.any()
    changed[40:72, 40:72] = False
    assert not changed.any()


def test_flip_is_slow_endless_and_says_what_it_is(tmp_path):
    result = solved(SHAPES["grey"])
    plot.flip(result, tmp_path / "a.gif", pair=-1, alpha="threshold")
    plot.flip(result, tmp_path / "b.gif", pair=-1, alpha="threshold", seconds=0.25)
    for name, milliseconds in (("a.gif", 1000), ("b.gif", 250)):
        with Image.open(tmp_path / name) as file:
            assert (file.info["duration"], file.info["loop"], file.mode) == (milliseconds, 0, "L")
    first, second = frames(tmp_path / "a.gif")
    assert (first[264:] < 128).any()
    np.testing.assert_array_equal(first[264:], second[264:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0.1}, "flicker is dangerous"),
        ({"path": "flip.mp4"}, "ends in .gif or .png"),
        ({"pair": 2}, "pairs must be"),
        ({"alpha": "loud"}, "alpha must be 'norm', 'threshold'"),
        ({"d_prime": 0}, "d_prime must be positive"),
        ({"alpha": [1.0, 2.0]}, "alpha must be one number or 1"),
    ],
)
def test_flip_that_makes_no_sense_is_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot.flip(solved(SHAPES["grey"]), **{"path": tmp_path / "flip.gif"} | arguments)
    assert not list(tmp_path.iterdir())


def test_signal_cannot_flip_and_other_channels_ask_for_one(tmp_path):
    with pytest.raises(ValueError, match="both_signs"):
        plot.flip(solved(SHAPES["row"]), tmp_path / "flip.gif")
    odd = solved((1, 5, 6, 7))
    for draw in (plot.both_signs, lambda result: plot.flip(result, tmp_path / "flip.gif")):
        with pytest.raises(ValueError, match="channel=0 to 4"):
            draw(odd)
    plot.flip(odd, tmp_path / "flip.gif", channel=2, zoom=1)
    np.testing.assert_array_equal(frames(tmp_path / "flip.gif")[0][:6, :7], in_bytes(odd.image[0, 2], 1))


# -------------------------------------------------------------------------------------------------------------- labels


def test_every_pair_has_its_index_eigenvalue_and_residual_over_it():
    result = solved(SHAPES["grey"], k=5)
    drawn = panels(plot.eigendistortions(result))
    for i, value, residual in zip(result.index, result.eigenvalues, result.residuals, strict=True):
        assert f"index {i}" in title(drawn[f"distorted {i}"])
        assert f"λ = {value:.4g}, residual {residual:.1e}" in title(drawn[f"distorted {i}"])


def test_only_ends_of_the_spectrum_are_called_so():
    drawn = panels(plot.eigendistortions(solved(SHAPES["grey"], k=4)))
    notes = [title(ax).split("\n")[0] for label, ax in drawn.items() if label.startswith("distorted")]
    assert notes == ["index 0, noticed most", "index 1", "index 106", "index 107, noticed least"]


def test_end_of_the_spectrum_of_a_restriction_is_called_so():
    F = fo.FisherOperator(torch.sin, torch.rand(1, 1, 6, 6), within=fo.restrict.Band(0.0, 0.3))
    result = fo.eigendistortions(F, k=2)
    drawn = panels(plot.eigendistortions(result))
    assert title(drawn[f"distorted {F.shape[0] - 1}"]).startswith(f"index {F.shape[0] - 1}, noticed least\n")
    assert legend(plot.spectrum(result))[0].endswith(f": 2 of {F.shape[0]} eigenvalues")


def test_pair_that_did_not_converge_says_so_and_claims_nothing_else():
    result = dataclasses.replace(solved(SHAPES["grey"]), converged=np.array([True, False]))
    drawn = panels(plot.eigendistortions(result))
    assert "not converged" not in title(drawn["distorted 0"])
    assert title(drawn["distorted 107"]).startswith("index 107, not converged\n")


# -------------------------------------------------------------------------------------------------------------- figure


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7, 20])
def test_there_is_a_panel_for_every_pair_and_an_image_for_every_band(k):
    fig = plot.eigendistortions(solved((1, 1, 6, 6), k=k))
    labels = [ax.get_label() for ax in fig.axes]
    assert labels.count("image") == -(-k // 6)
    assert sum(label.startswith("distorted") for label in labels) == k
    assert sum(label.startswith("distortion") for label in labels) == k


@pytest.mark.parametrize(("size", "zoom"), [((32, 32), None), ((37, 11), None), ((11, 37), 5), ((100, 90), 1)])
def test_saved_panel_is_the_image_pixel_by_pixel(size, zoom):
    levels = np.random.default_rng(0).integers(0, 256, (3, *size))
    v = np.zeros((2, 3 * size[0] * size[1]))
    v[0, 0] = v[1, 1] = 1
    result = dataclasses.replace(solved((1, 1, 1, 2)), eigendistortions=v)
    saved = rendered(plot.eigendistortions(result, levels / 255, alpha=0, zoom=zoom))
    zoom = zoom or -(-256 // max(size))
    expected = np.moveaxis(levels, 0, -1).repeat(zoom, 0).repeat(zoom, 1)
    corner = expected[:1, : size[1] * zoom]
    places = [
        (y, x)
        for y in range(len(saved) - len(expected) + 1)
        for x in np.flatnonzero((saved[y, : saved.shape[1] - corner.shape[1] + 1] == corner[0, 0]).all(-1))
        if (saved[y : y + len(expected), x : x + expected.shape[1]] == expected).all()
    ]
    assert len(places) == 3  # the image, and twice the image with nothing added


def test_nothing_overlaps_and_nothing_is_cut_off():
    for shape, k in ((SHAPES["grey"], 2), (SHAPES["rgb"], 8), ((1, 1, 40, 8), 3), (SHAPES["signal"], 2)):
        result = dataclasses.replace(solved(shape, k), converged=np.zeros(k, dtype=bool))
        for fig in (
            plot.eigendistortions(result),
            plot.both_signs(result, alpha="threshold", d_prime=1e3),
            plot.eigendistortions(result, alpha="threshold", d_prime=1e3),
        ):
            assert_nothing_overlaps(fig)


def assert_nothing_overlaps(fig: Figure) -> None:
    fig.draw_without_rendering()
    boxes = [ax.get_tightbbox() for ax in fig.axes] + [text.get_window_extent() for text in fig.texts]
    for i, box in enumerate(boxes):
        assert fig.bbox.x0 <= box.x0 < box.x1 <= fig.bbox.x1
        assert fig.bbox.y0 <= box.y0 < box.y1 <= fig.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_users_settings_are_neither_changed_nor_obeyed_where_they_would_falsify():
    result = solved(SHAPES["grey"])
    plain = rendered(plot.eigendistortions(result))
    with mpl.rc_context({"image.origin": "lower", "image.interpolation": "bicubic", "image.cmap": "jet"}):
        mpl.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "image.aspect": "auto"})
        before = dict(mpl.rcParams)
        fig = plot.eigendistortions(result)
        assert dict(mpl.rcParams) == before
        np.testing.assert_array_equal(rendered(fig), plain)


def test_no_picture_changes_a_setting_or_the_users_figure(tmp_path):
    F = fo.FisherOperator(nn.AvgPool2d(2), torch.full((1, 1, 8, 8), 0.5))
    result = fo.eigendistortions(F)
    before, current = dict(mpl.rcParams), plt.figure()
    own = [plot.both_signs(result, fig=Figure()), plot.spectrum(result, fig=Figure())]
    own.append(plot.linearity(F, result, fig=Figure()))
    plot.flip(result, tmp_path / "flip.gif")
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == [current.number]
    assert not current.axes
    assert all(fig.axes for fig in own)


def test_new_figure_is_pyplots_and_a_given_one_is_not():
    result = solved(SHAPES["grey"])
    fig = plot.eigendistortions(result)
    assert plt.fignum_exists(fig.number)
    own = Figure()
    assert plot.eigendistortions(result, fig=own) is own
    assert plt.get_fignums() == [fig.number]
    np.testing.assert_array_equal(rendered(own), rendered(fig))


def test_panel_functions_return_their_artists():
    fig, result = Figure(), solved(SHAPES["rgb"])
    v = result.eigendistortions[0]
    for artists in (
        plot.show_image(fig.add_subplot(), result.image),
        plot.show_distortion(fig.add_subplot(), v),
        plot.show_distorted(fig.add_subplot(), result.image, v, 2.0),
    ):
        assert [type(artist).__name__ for artist in artists] == ["AxesImage"]
    assert [type(line).__name__ for line in plot.show_image(fig.add_subplot(), np.ones(9))] == ["Line2D"]


def test_model_with_gradients_and_float64_is_drawn():
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    result = fo.eigendistortions(fo.FisherOperator(nn.AvgPool2d(2), image.detach()))
    plot.eigendistortions(result, image)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": np.zeros((5, 5))}, r"\(5, 5\) has 25 values and a distortion 108"),
        ({"alpha": [1.0, 2.0, 3.0]}, "alpha must be one number or 2"),
        ({"channel": 1}, "channel must be one of 0 to 0"),
        ({"zoom": 0}, "zoom"),
        ({"vrange": (1, 0)}, "vrange"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot.eigendistortions(solved(SHAPES["grey"]), **arguments)


def test_result_without_an_image_asks_for_one():
    with pytest.raises(ValueError, match="pass image="):
        plot.eigendistortions(fo.eigendistortions(np.eye(4)))


def test_images_that_are_neither_grey_nor_rgb_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="channel=0 to 4"):
        plot.eigendistortions(solved((1, 5, 6, 7)))
    with pytest.raises(ValueError, match=r"not \(2, 3, 4, 4\)"):
        plot.show_image(Figure().add_subplot(), np.zeros((2, 3, 4, 4)))
    with pytest.raises(ValueError, match=r"shape \(4, 4\) and the image \(5, 5\)"):
        plot.show_distorted(Figure().add_subplot(), np.zeros((5, 5)), np.zeros((4, 4)), 1.0)
