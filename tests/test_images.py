"""Every image is a tensor (1, C, H, W) in [0, 1]; a file is shown as a viewer would show it."""

from __future__ import annotations

import socket
import struct
import zlib

import numpy as np
import pytest
import torch

from fisherop import images
from fisherop.images import PHOTOGRAPHS, center_crop, color_wheel, photograph, resize, to_grey


def ramp(height: int, width: int) -> torch.Tensor:
    return torch.linspace(0, 1, height * width, dtype=torch.float64).reshape(1, 1, height, width)


# ---------------------------------------------------------------------------------------------------------- photographs


def test_every_photograph_loads_without_a_network(monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went to the network"))
    for name in PHOTOGRAPHS:
        image = photograph(name, size=16)
        assert image.shape in {(1, 1, 16, 16), (1, 3, 16, 16)}
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert 0 <= image.min() < image.max() <= 1


def test_photograph_is_the_array_of_scikit_image():
    data = pytest.importorskip("skimage.data")
    rebuilt = (photograph("chelsea", dtype=torch.float64)[0].movedim(0, -1) * 255).numpy()
    np.testing.assert_allclose(rebuilt, data.chelsea(), rtol=0, atol=1e-12)


def test_photograph_of_a_size_is_its_middle_square_made_smaller():
    pytest.importorskip("skimage")
    whole = photograph("chelsea", dtype=torch.float64)
    middle = whole[..., 75:375]  # chelsea is 300 x 451
    small = photograph("chelsea", size=50, grey=True, dtype=torch.float64)
    torch.testing.assert_close(small, resize(to_grey(middle), 50))


def test_unknown_photograph_is_refused_with_a_close_one_or_with_all():
    with pytest.raises(ValueError, match="did you mean 'astronaut'"):
        photograph("astronuat")
    with pytest.raises(ValueError, match=r"there are astronaut, .*rocket"):
        photograph("einstein")


def test_photograph_without_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(ImportError, match=r"fisherop\[plot\]"):
        photograph()


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def pil():
    return pytest.importorskip("PIL.Image")


def test_file_in_colour_and_in_grey_keeps_its_values_and_channels(pil, tmp_path):
    pixels = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3) * 4
    pil.fromarray(pixels).save(tmp_path / "colour.png")
    pil.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    pil.fromarray(pixels[..., 0] > 100).save(tmp_path / "bits.png")
    colour = images.load(tmp_path / "colour.png", dtype=torch.float64)
    assert colour.shape == (1, 3, 5, 4)
    np.testing.assert_allclose(colour[0].movedim(0, -1) * 255, pixels, rtol=0, atol=1e-12)
    torch.testing.assert_close(images.load(tmp_path / "grey.png"), colour[:, :1].float())
    torch.testing.assert_close(images.load(str(tmp_path / "bits.png")), (colour[:, :1] * 255 > 100).float())
    assert images.load(tmp_path / "colour.png", size=3, grey=True).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_file_of_16_bits_keeps_all_of_them(pil, tmp_path, extension):
    pixels = np.array([[0, 1, 257], [40000, 65534, 65535]], dtype=np.uint16)
    pil.fromarray(pixels).save(tmp_path / f"deep.{extension}")
    image = images.load(tmp_path / f"deep.{extension}", dtype=torch.float64)
    np.testing.assert_allclose(image[0, 0] * 65535, pixels, rtol=0, atol=1e-9)


def test_file_of_16_bits_in_colour_is_read(tmp_path):
    pytest.importorskip("PIL.Image")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    scanline = zlib.compress(b"\0" + struct.pack(">HHH", 65535, 32768, 0))
    file = tmp_path / "deep.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", scanline) + chunk(b"IEND", b""))
    expected = torch.tensor([1, 0.5, 0]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(images.load(file), expected, rtol=0, atol=1 / 255)


def test_file_of_floats_is_taken_in_range_and_refused_out_of_it(pil, tmp_path):
    pixels = np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32)
    pil.fromarray(pixels).save(tmp_path / "unit.tif")
    pil.fromarray(pixels * 2).save(tmp_path / "more.tif")
    np.testing.assert_array_equal(images.load(tmp_path / "unit.tif")[0, 0], pixels)
    with pytest.raises(ValueError, match=r"from 0.0 to 2.0: scale them to \[0, 1\]"):
        images.load(tmp_path / "more.tif")


def test_transparent_file_lies_on_white(pil, tmp_path):
    pil.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 51], [9, 9, 9, 0]]], dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    expected = torch.tensor([[1, 0, 0], [1, 0.8, 0.8], [1, 1, 1]]).T.reshape(1, 3, 1, 3)
    torch.testing.assert_close(images.load(tmp_path / "a.png"), expected)
    pil.fromarray(np.array([[[0, 255], [0, 0]]], dtype=np.uint8)).save(tmp_path / "la.png")
    torch.testing.assert_close(images.load(tmp_path / "la.png"), torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2))


def test_palette_is_looked_up_and_its_transparent_entry_is_white(pil, tmp_path):
    file = pil.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    file.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    file.save(tmp_path / "p.png", transparency=2)
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 1]]).T.reshape(1, 3, 1, 3)
    torch.testing.assert_close(images.load(tmp_path / "p.png"), expected)


def test_file_is_turned_upright_as_its_camera_noted(pil, tmp_path):
    pixels = np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8)
    exif = pil.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the pixels
    pil.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = images.load(tmp_path / "turned.png", dtype=torch.float64)
    np.testing.assert_allclose(image[0, 0] * 255, np.rot90(pixels, -1), rtol=0, atol=1e-12)


def test_what_is_no_image_file_is_refused_by_name(pil, tmp_path):
    (tmp_path / "note.png").write_text("no image")
    pil.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "empty.png").touch()
    for name in ("note.png", "cut.png", "empty.png"):
        with pytest.raises(ValueError, match=f"{name}' is no image that Pillow can read, or not a whole one"):
            images.load(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder"):
        images.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no image file .*missing\.png"):
        images.load(tmp_path / "missing.png")


# --------------------------------------------------------------------------------------------------------- colour wheel


def test_wheel_is_white_in_the_middle_and_in_the_corners_and_saturated_at_the_rim():
    wheel = color_wheel(257, dtype=torch.float64)[0]
    white, red, cyan = torch.ones(3), torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 1])
    for (row, column), color in {(128, 128): white, (0, 0): white, (128, 255): red, (128, 1): cyan}.items():
        torch.testing.assert_close(wheel[:, row, column].float(), color, rtol=0, atol=0.02)


def test_wheel_is_hsv_with_hue_as_angle_and_saturation_as_radius():
    color = pytest.importorskip("skimage.color")
    size = 64
    hsv = color.rgb2hsv(color_wheel(size, dtype=torch.float64)[0].movedim(0, -1).numpy())
    offset = (np.arange(size) + 0.5) / (size / 2) - 1
    radius = np.hypot(*np.meshgrid(offset, offset))
    inside = radius < 1 - 1 / size
    hue = np.arctan2(-offset[:, None], offset[None, :]) / (2 * np.pi) % 1
    np.testing.assert_allclose(hsv[inside][:, 0], hue[inside], atol=1e-9)
    np.testing.assert_allclose(hsv[inside][:, 1], radius[inside], atol=1e-9)
    np.testing.assert_allclose(hsv[..., 2], 1)


@pytest.mark.parametrize("size", [1, 2, 63, 64])
def test_wheel_has_the_size_asked_for_and_stays_in_range(size):
    wheel = color_wheel(size)
    assert wheel.shape == (1, 3, size, size)
    assert wheel.dtype == torch.float32
    assert 0 <= wheel.min() <= wheel.max() <= 1


# --------------------------------------------------------------------------------------------------- crop, resize, grey


@pytest.mark.parametrize(("shape", "size"), [((6, 8), 4), ((7, 9), 4), ((6, 9), (5, 2)), ((5, 5), 5)])
def test_center_crop_leaves_equal_margins_or_one_more_at_the_bottom_and_right(shape, size):
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    height, width = (size, size) if isinstance(size, int) else size
    for index, full, length in ((rows, shape[0], height), (columns, shape[1], width)):
        cropped = center_crop(index, size)
        before, after = int(cropped.min()), full - 1 - int(cropped.max())
        assert cropped.shape == (height, width)
        assert before + length + after == full
        assert after - before in {0, 1}


@pytest.mark.parametrize("size", [5, (2, 9), 0, (3, -1)])
def test_center_crop_of_more_than_there_is_or_of_nothing_is_refused(size):
    with pytest.raises(ValueError, match=r"cannot crop|at least 1"):
        center_crop(torch.zeros(1, 1, 4, 8), size)


def test_resize_keeps_a_flat_image_and_the_mean_and_has_no_aliasing():
    torch.testing.assert_close(resize(torch.full((1, 3, 9, 7), 0.3), (4, 20)), torch.full((1, 3, 4, 20), 0.3))
    torch.testing.assert_close(resize(ramp(64, 64), 16).mean(), ramp(64, 64).mean(), rtol=0, atol=1e-3)
    checkerboard = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).double()[None, None]
    inner = center_crop(resize(checkerboard, 16), 10)
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), rtol=0, atol=0.02)


def test_resize_stays_in_range_where_bicubic_overshoots():
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1
    larger = resize(edge, 32)
    assert larger.min() == 0
    assert larger.max() == 1


def test_resize_refuses_what_is_no_image():
    with pytest.raises(ValueError, match=r"not \(3, 8, 8\)"):
        resize(torch.zeros(3, 8, 8), 4)


def test_grey_is_the_luminance_of_scikit_image():
    color = pytest.importorskip("skimage.color")
    image = torch.rand(1, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = color.rgb2gray(image[0].movedim(0, -1).numpy())
    np.testing.assert_allclose(to_grey(image)[0, 0], expected, rtol=0, atol=3e-4)  # which has 0.2125, 0.7154, 0.0721
    torch.testing.assert_close(to_grey(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))


def test_grey_of_grey_is_itself_and_of_anything_else_refused():
    grey = torch.rand(1, 1, 4, 4)
    assert to_grey(grey) is grey
    for shape in ((1, 4, 8, 8), (3, 8), (8,)):
        with pytest.raises(ValueError, match="in colour or"):
            to_grey(torch.zeros(shape))


@pytest.mark.parametrize(
    "size",
    [np.int64(6), np.uint8(6), np.array(6), torch.tensor(6), (np.int8(6), 6), np.array([6, 6]), torch.Size([6, 6])],
)
def test_a_size_is_a_whole_number_of_any_type(size):
    x = color_wheel(20)
    assert torch.equal(center_crop(x, size), center_crop(x, 6))
    assert torch.equal(resize(x, size), resize(x, 6))
    assert torch.equal(color_wheel(size), color_wheel(6))


@pytest.mark.parametrize("size", [6.0, "6", (1, 2, 3), (6, 6.0), None, []])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(TypeError, match="a size in pixels is a whole number, or two of them, not"):
        center_crop(torch.zeros(1, 1, 8, 8), size)


def test_what_is_written_to_a_photograph_is_not_in_the_next_one():
    pytest.importorskip("skimage")
    first = photograph("camera", dtype=torch.float64)
    kept = first.clone()
    first.zero_()
    assert torch.equal(photograph("camera", dtype=torch.float64), kept)
