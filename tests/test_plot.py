"""What is drawn is the numbers themselves, clipped; and every panel says what it is."""

# ruff: noqa: RUF001

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from torch import nn

import fisherop as fo

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

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
        fig = plot.eigendistortions(result)
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
