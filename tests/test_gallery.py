"""The gallery's scripts run anywhere, and what they say is true of what they compute."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import run

import fisherop as fo

pytest.importorskip("skimage")

GALLERY = Path(__file__).parent.parent / "docs" / "gallery"
FIGURES = {"plot_noise": 5, "plot_within": 6, "plot_metric": 4, "plot_compare": 6, "plot_spectrum": 4}


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory):
    """Run one script; give its names, figures and files."""
    if request.param in ("plot_compare", "plot_spectrum"):
        pytest.importorskip("torchvision")
    with run(GALLERY / f"{request.param}.py", tmp_path_factory.mktemp(request.param)) as found:
        yield request.param, *found


@pytest.fixture
def names(outcome):
    return outcome[1]


def of(script):
    return pytest.mark.parametrize("outcome", [script], indirect=True)


def test_every_script_of_the_gallery_is_tested():
    assert {path.stem for path in GALLERY.glob("*.py")} == set(FIGURES)


@pytest.mark.parametrize("outcome", FIGURES, indirect=True)
def test_script_draws_its_figures_writes_no_file_and_converges(outcome):
    script, names, figures, files = outcome
    assert len(figures) == FIGURES[script]
    assert all(figure.axes for figure in figures)
    assert not files
    groups = [value if isinstance(value, dict) else {"": value} for value in names.values()]
    results = [value for group in groups for value in group.values() if isinstance(value, fo.Eigendistortions)]
    assert results
    assert all(result.converged.all() for result in results)


@of("plot_noise")
def test_each_noise_has_its_own_first_distortion(names):
    noticed, results = names["noticed"], names["results"]
    for observer, result in results.items():
        own = noticed[observer, observer]
        assert own == pytest.approx(result.eigenvalues[0] ** 0.5)
        assert all(noticed[observer, origin] < 0.98 * own for origin in results if origin != observer)
    assert names["where"]["white"][0] > 3 * names["where"]["Poisson"][0]
    assert 1 < names["where"]["Poisson"][0] < 1.5
    assert all(last < 0.1 for _, last in names["where"].values())
    pooled = {name: (names["U"].T @ r.eigendistortions[0].flatten()).norm() for name, r in results.items()}
    assert pooled["shared"] < 0.5 * pooled["white"]


@of("plot_noise")
def test_shared_noise_lowers_every_eigenvalue(names):
    white, shared = (names["operators"][name] @ np.eye(1024) for name in ("white", "shared"))
    white, shared = np.linalg.eigvalsh(white), np.linalg.eigvalsh(shared)
    assert (shared <= white + 1e-12 * white[-1]).all()


@of("plot_noise")
def test_a_choice_of_six_has_rank_five_and_the_predicted_divergence(names):
    choices = names["choices"]
    assert choices.nullity == 251
    assert names["as_numbers"].nullity == 250
    predicted = names["alpha"] ** 2 * choices.eigenvalues[:5] / 2
    np.testing.assert_allclose(names["divergences"], predicted, rtol=0.05)
    assert (names["first"].eigendistortions > 0).all()


@of("plot_within")
def test_eigenvalues_interlace(names):
    assert len(names["interlaced"]) == 3
    assert all(names["interlaced"].values())


@of("plot_within")
def test_distortions_stay_within_their_bounds(names):
    ends, patch = names["ends"], names["patch"]
    assert not ends["in the patch"].eigendistortions[:, :, ~patch].any()
    assert not ends["in blue"].eigendistortions[:, :2].any()
    spectra = names["spectra"]
    zeros = {name: int((r.eigenvalues < 1e-12 * r.lambda_max).sum()) for name, r in spectra.items()}
    assert zeros == {"anywhere": 3, "in the patch": 0, "in blue": 1, "coarse": 3}


@of("plot_within")
def test_latent_distortions_are_noticed_as_their_eigenvalues_say(names):
    np.testing.assert_allclose(names["noticed"] ** 2, names["found"].eigenvalues, rtol=1e-6)


@of("plot_metric")
def test_weights_move_the_distortions_and_are_a_change_of_variables(names):
    shade, weber = names["shade"], names["weber"]
    assert shade["weber"][0] > shade["plain"][0] + 0.05
    assert shade["weber"][1] < shade["plain"][1] - 0.2
    assert abs(names["product"]) < 1e-10
    assert names["ratio"] == pytest.approx(weber.eigenvalues[0])
    np.testing.assert_allclose(names["by_hand"].eigenvalues, weber.eigenvalues, rtol=1e-6)


@of("plot_metric")
def test_pairs_relative_to_another_model_solve_the_generalized_problem(names):
    relative, M, F = names["relative"], names["M"], names["gain_control"]
    v = relative.eigendistortions[0].flatten()
    torch.testing.assert_close(F @ v, relative.eigenvalues[0] * (M @ v), rtol=0, atol=1e-4 * (F @ v).norm().item())
    assert all(cosine > 0.9999 for cosine in names["cosines"])
    assert names["roughness"][1] < 0.8 * names["roughness"][0]


@of("plot_compare")
def test_no_model_agrees_more_with_others_than_with_itself(names):
    D = names["table"].D
    assert (np.diag(D) > 0).all()
    assert (D.argmax(1) == np.arange(3)).all()


@of("plot_compare")
def test_ratios_of_sensitivity_are_the_generalized_eigenvalues(names):
    A, B = (names["operators"][name] for name in ("gain control", "layer 3"))
    v = names["ratio"].eigendistortions
    floor = 0.01 * names["results"]["layer 3"].eigenvalues[0]
    ratios = fo.discriminability(A, v) ** 2 / (fo.discriminability(B, v) ** 2 + floor)
    np.testing.assert_allclose(ratios, names["ratio"].eigenvalues, rtol=0.01)


@of("plot_compare")
def test_principal_distortions_and_sums_are_as_said(names):
    principal, together = names["principal"], names["together"]
    assert principal.converged
    s = principal.sensitivities
    logs = np.log(s[:, 0] / s[:, 1])
    assert np.ptp(logs) > 1
    for result in names["results"].values():
        assert (together.eigenvalues >= result.eigenvalues * (1 - 1e-5)).all()
    assert names["average"].eigenvalues[0] <= names["results"]["gain control"].eigenvalues[0] * (1 + 1e-5)


@of("plot_spectrum")
def test_sums_of_maps_traces_and_densities_agree(names):
    for key, total in names["totals"].items():
        found = names["maps"][key]
        assert abs(found.value.sum().item() - total.value) < 0.1 * total.value
        assert total.low < total.value < total.high
    for name, one in names["densities"].items():
        first = names["results"][name].eigenvalues[0]
        assert one.lambda_max <= first * (1 + 1e-3)
        assert one.count(1.01 * first).value == pytest.approx(3072, abs=1)
