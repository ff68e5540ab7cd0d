"""The tutorial's two examples: a linear model with a null space, and two layers of ResNet18 at a photograph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import run
from torch import nn

import fisherop as fo

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(25, 10, bias=False)
    return model, fo.FisherOperator(model, torch.ones(1, 1, 1, 25))


def test_the_jacobian_of_a_linear_model_is_its_weight(linear):
    model, _ = linear
    for value in (1.0, 0.3):
        J = fo.JacobianOperator(model, torch.full((1, 1, 1, 25), value))
        torch.testing.assert_close(J @ torch.eye(25), model.weight.detach())


def test_all_pairs_of_the_linear_model_and_its_null_space(linear):
    _, F = linear
    result = fo.eigendistortions(F, k=25, method="exact")
    assert result.eigendistortions.shape == (25, 1, 1, 25)
    assert result.converged.all()
    assert result.nullity == 15
    assert (result.eigenvalues[:10] > 1e-3).all()
    assert (result.eigenvalues[10:] < 1e-12).all()


def test_power_iteration_agrees_with_the_exact_pairs(linear):
    _, F = linear
    exact = fo.eigendistortions(F, k=25, method="exact")
    power = fo.eigendistortions(F, k=2, method="power", rng=0)
    assert power.converged.all()
    assert power.nullity == 15
    assert power.index.tolist() == [0, 24]
    np.testing.assert_allclose(power.eigenvalues, exact.eigenvalues[[0, 24]], atol=1e-6)
    overlap = exact.eigendistortions.flatten(1) @ power.eigendistortions.flatten(1).T
    assert abs(abs(overlap[0, 0]) - 1) < 1e-4
    assert overlap[:10, 1].norm() < 1e-3
    assert abs(overlap[10:, 1].norm() - 1) < 1e-4


@pytest.mark.parametrize(("index", "name", "m"), [(3, "maxpool", 65536), (6, "layer2.0", 32768)])
def test_both_ends_of_resnet18_converge_at_a_photograph(index, name, m):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.resnet18(weights=None).eval()
    layer = fo.Layer(network, index)
    assert layer.layer == name
    F = fo.FisherOperator(layer, fo.images.photograph("chelsea", size=128))
    assert (F.linearization.shape, F.strategy) == ((m, 49152), "recorded")
    result = fo.eigendistortions(F, k=2, which="BE", tol=1e-5, rng=0)
    assert result.converged.all()
    assert (result.residuals <= 1e-5).all()
    assert result.eigenvalues[1] <= 1e-5 * result.lambda_max
    v = result.eigendistortions.flatten(1)
    torch.testing.assert_close(v @ v.T, torch.eye(2), atol=1e-5, rtol=0)
    assert (F.factor_rows(v[1:]).norm() ** 2).item() == pytest.approx(result.eigenvalues[1], rel=0.2, abs=1e-9)


TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.py"


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """Run the script; give its names, its figures, and the files that it left behind."""
    with run(TUTORIAL, tmp_path_factory.mktemp("tutorial")) as outcome:
        yield outcome


def test_script_draws_its_figures_and_writes_no_file(tutorial):
    _, figures, files = tutorial
    assert len(figures) == 14
    assert all(figure.axes for figure in figures)
    assert not files


def test_script_is_true_of_the_linear_model(tutorial):
    names, *_ = tutorial
    assert names["jacobian_is_weight"]
    assert names["same_elsewhere"]
    assert names["exact"].nullity == 15
    assert names["exact"].clusters.tolist() == [1] * 10 + [15] * 15
    assert names["change_first"] == pytest.approx(names["exact"].eigenvalues[0] ** 0.5, rel=1e-4)
    assert names["change_last"] < 1e-4
    torch.testing.assert_close(names["found"][0], names["basis"][0], atol=1e-3, rtol=0)
    assert not torch.allclose(names["found"][1], names["basis"][-1], atol=1e-3)
    assert names["projection"][10:].norm().item() == pytest.approx(1, abs=1e-4)
    assert names["cosine"] < 0.99


def test_script_is_true_of_the_two_layers(tutorial):
    names, *_ = tutorial
    for results in (names["results"], names["elsewhere"]):
        assert all(result.converged.all() for result in results.values())
    assert names["results"]["layer 6"].nullity >= 4096
    for observer, result in names["results"].items():
        for origin in names["results"]:
            assert names["noticed"][observer, origin].max() <= result.eigenvalues[0] * (1 + 1e-5)
        own = names["noticed"][observer, observer]
        assert own[0].item() == pytest.approx(result.eigenvalues[0], rel=1e-4)
        assert names["overlaps"][observer] < 0.5


def test_script_is_true_of_power_iteration(tutorial):
    names, *_ = tutorial
    lanczos, power = names["lanczos"], names["stopped"]
    assert lanczos.converged.all()
    assert not power.converged[1]
    assert power.n_matvec > lanczos.n_matvec
    assert power.eigenvalues[1] > 100 * lanczos.eigenvalues[1]
    assert len(names["caught"]) == 1
    assert names["eig"].eigendistortions.shape == (25, 1, 1, 25)
