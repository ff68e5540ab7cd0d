"""A result survives its file, and a file that is none is refused."""

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


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        fo.Eigendistortions.load(tmp_path / "none.npz")


def test_a_result_prints_as_a_table():
    lines = str(fo.eigendistortions(np.diag([3.0, 2.0, 1.0]), 3)).splitlines()
    assert lines[0].split() == ["index", "eigenvalue", "residual", "converged"]
    assert [line.split()[1] for line in lines[1:]] == ["3", "2", "1"]
