"""A result survives its file, and a file that is none is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from models import build

import fisherop as fo


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b)


@pytest.mark.parametrize("op", [np.diag([3.0, 2.0, 0.0]), fo.FisherOperator(*build("dict", torch.float32))])
def test_a_saved_result_comes_back_whole(tmp_path, op):
    result = fo.eigendistortions(op, 3)
    result.save(tmp_path / "r.npz")
    loaded = fo.Eigendistortions.load(tmp_path / "r.npz")
    for name in result.__dataclass_fields__:
        mine, theirs = getattr(result, name), getattr(loaded, name)
        assert type(mine) is type(theirs), name
        assert same(mine, theirs), name
    assert [file.name for file in tmp_path.iterdir()] == ["r.npz"]


def test_a_result_loads_onto_the_device_asked_for(tmp_path):
    fo.eigendistortions(torch.eye(3)).save(tmp_path / "r.npz")
    assert fo.Eigendistortions.load(tmp_path / "r.npz", device="meta").eigendistortions.device.type == "meta"


@pytest.mark.parametrize("content", [b"", b"not a result", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"r.npz is not a result of fisherop, or is damaged"):
        fo.Eigendistortions.load(tmp_path / "r.npz")


def test_somebody_elses_arrays_are_not_taken_for_a_result(tmp_path):
    np.savez(tmp_path / "r.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="is not a result"):
        fo.Eigendistortions.load(tmp_path / "r.npz")


def test_nothing_pickled_is_loaded(tmp_path):
    np.savez(tmp_path / "r.npz", facts=np.array({"method": "exact"}, dtype=object))
    with pytest.raises(ValueError, match="is not a result"):
        fo.Eigendistortions.load(tmp_path / "r.npz")


def written(path, result, drop="", **changes):
    """Write a result with an entry or a fact left out or changed."""
    result.save(path)
    with np.load(path) as entries:
        arrays = dict(entries)
    facts = json.loads(str(arrays.pop("facts")))
    arrays |= {name: changes.pop(name) for name in list(changes) if name in arrays}
    facts = changes.pop("facts", facts | changes)
    arrays["facts"] = np.array(json.dumps(facts if not drop else {n: v for n, v in facts.items() if n != drop}))
    np.savez(path, **{name: array for name, array in arrays.items() if name != drop})


ENTRIES = ["facts", "eigenvalues", "index", "residuals", "converged", "eigenvalue_bounds", "clusters"]
FACTS = ["format", "tensor", "n_matvec", "method", "tol", "message", "nullity", "lambda_max"]


@pytest.mark.parametrize(
    "change",
    [
        *({"drop": name} for name in ("eigendistortions", *ENTRIES, *FACTS)),
        *({"facts": facts} for facts in ([1, 2], "words", 3, None)),
        {"format": "one"},
        {"eigenvalues": np.ones(7)},
        {"eigendistortions": np.array(["a", "b"])},
        {"eigendistortions": np.array(3.0)},
    ],
    ids=str,
)
def test_a_file_that_lacks_or_garbles_an_entry_is_refused_in_the_same_words(tmp_path, change):
    written(tmp_path / "r.npz", fo.eigendistortions(np.diag([3.0, 2.0, 1.0])), **change)
    with pytest.raises(ValueError, match=r"r.npz is not a result of fisherop, or is damaged"):
        fo.Eigendistortions.load(tmp_path / "r.npz")


def test_a_file_of_a_later_format_asks_for_a_later_version(tmp_path):
    written(tmp_path / "r.npz", fo.eigendistortions(np.eye(3)), drop="index", format=99)
    with pytest.raises(ValueError, match="was written by a newer fisherop"):
        fo.Eigendistortions.load(tmp_path / "r.npz")


def read_or_refused(path):
    try:
        return fo.Eigendistortions.load(path)
    except ValueError as error:
        if "is not a result of fisherop, or is damaged" not in str(error):
            raise


def test_a_file_cut_short_or_with_a_byte_changed_is_read_right_or_refused(tmp_path):
    path, broken = tmp_path / "r.npz", tmp_path / "broken.npz"
    fo.eigendistortions(np.diag([3.0, 2.0, 1.0])).save(path)
    whole = path.read_bytes()
    changed = [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    for content in [whole[:i] for i in range(0, len(whole), 97)] + changed:
        broken.write_bytes(content)
        r = read_or_refused(broken)
        if r is not None:
            np.testing.assert_array_equal(r.eigenvalues, [3.0, 1.0])


def test_a_folder_is_no_result_and_what_cannot_be_opened_says_why(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is a folder, and not a result of fisherop"):
        fo.Eigendistortions.load(tmp_path)
    with pytest.raises(TypeError):
        fo.Eigendistortions.load(0)

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=r"r\.npz"):
        fo.Eigendistortions.load(tmp_path / "r.npz")


def test_what_could_not_be_saved_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        fo.eigendistortions(np.eye(3)).save(tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_numbers_of_numpys_are_saved_as_numbers(tmp_path):
    r = fo.eigendistortions(np.diag([3.0, 2.0, 1.0]))
    changed = dataclasses.replace(r, nullity=np.int64(2), lambda_max=np.float32(3), tol=np.float64(0.5))
    changed.save(tmp_path / "r.npz")
    again = fo.Eigendistortions.load(tmp_path / "r.npz")
    assert (again.nullity, again.lambda_max, again.tol) == (2, 3.0, 0.5)


def test_a_result_knows_the_size_of_its_operator(tmp_path):
    model, image = build("dict")
    r = fo.eigendistortions(fo.FisherOperator(model, image, within=fo.restrict.Channel(0)), 3)
    assert r.n == 30
    assert fo.eigendistortions(fo.FisherOperator(model, image), 2, "LM").n == 60
    dataclasses.replace(r, n=33).save(tmp_path / "r.npz")
    assert fo.Eigendistortions.load(tmp_path / "r.npz").n == 33
    written(tmp_path / "older.npz", r, drop="n")
    assert fo.Eigendistortions.load(tmp_path / "older.npz").n == 30


def test_what_is_written_to_the_image_of_a_result_changes_nothing_else():
    F = fo.FisherOperator(*build("dict"))
    before = F.image.clone()
    r, other = fo.eigendistortions(F), fo.eigendistortions(F)
    r.image.zero_()
    assert torch.equal(F.image, before)
    assert torch.equal(other.image, before)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 2), (1, 1), (1, 2, 3, 4), (2, 3, 1)])
def test_a_result_of_any_shape_comes_back_whole(tmp_path, shape):
    result = fo.eigendistortions(fo.FisherOperator(torch.sin, torch.rand(shape)), 1)
    result.save(tmp_path / "r.npz")
    loaded = fo.Eigendistortions.load(tmp_path / "r.npz")
    assert torch.equal(loaded.eigendistortions, result.eigendistortions)
    assert torch.equal(loaded.image, result.image)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        fo.Eigendistortions.load(tmp_path / "none.npz")


def test_a_result_prints_as_a_table():
    lines = str(fo.eigendistortions(np.diag([3.0, 2.0, 1.0]), 3)).splitlines()
    assert lines[0].split() == ["index", "eigenvalue", "residual", "converged"]
    assert [line.split()[1] for line in lines[1:]] == ["3", "2", "1"]
