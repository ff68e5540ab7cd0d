"""A script written for plenoptic runs on this package, with its shapes, order, warnings and errors."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisherop as fo
import fisherop.plenoptic as po
from tests.models import MODELS, build, dense_jacobian


def photograph(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conv(channels: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Softplus())
    model = model.to(dtype).eval()
    po.remove_grad(model)
    return model


class Linear(nn.Module):
    """A fixed matrix, by its singular values."""

    def __init__(self, singular: list[float], m: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        n = len(singular)
        u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=dtype))[0] for size in (m, n))
        rank = min(m, n)
        self.register_buffer("matrix", u[:, :rank] * torch.tensor(singular[:rank], dtype=dtype) @ v[:rank])

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix @ x.flatten()


def square(x: Tensor) -> Tensor:
    return x**2


def synthesized(method: str = "power", shape: tuple[int, ...] = (1, 1, 8, 8), **options: object) -> po.Eigendistortion:
    eig = po.Eigendistortion(photograph(*shape), conv(shape[1]))
    eig.synthesize(method, **options)
    return eig


# ----------------------------------------------------------------------------------------------- shapes, order, values


@pytest.mark.parametrize(("channels", "size"), [(1, 20), (3, 12)])
def test_exact_gives_all_pairs_in_image_shape_and_the_jacobian(channels, size):
    model = fo.OnOff().eval() if channels == 1 else conv(3)
    eig = po.Eigendistortion(photograph(1, channels, size, size), model)
    assert eig.synthesize("exact") is None
    n = channels * size**2
    assert eig.eigendistortions.shape == (n, channels, size, size)
    assert torch.equal(eig.eigenindex, torch.arange(n))
    assert eig.eigenvalues.shape == (n,)
    assert (eig.eigenvalues.diff() <= 0).all()
    assert eig.jacobian.shape == (eig.model(eig.image).numel(), n)
    assert not eig.jacobian.requires_grad


def test_power_gives_first_and_last():
    eig = po.Eigendistortion(photograph(1, 1, 64, 64), fo.OnOff().eval())
    eig.synthesize(method="power", stop_criterion=1e-4)
    assert eig.eigendistortions.shape == (2, 1, 64, 64)
    assert eig.eigenindex.tolist() == [0, 4095]
    assert eig.jacobian is None
    assert eig.result.converged.all()


@pytest.mark.parametrize("k", [1, 3, 10])
def test_indices_count_from_both_ends_of_the_spectrum_and_values_descend(k):
    both, top = synthesized("power", k=k), synthesized("randomized_svd", k=k)
    assert both.eigenindex.tolist() == [*range(k), *range(64 - k, 64)]
    assert top.eigenindex.tolist() == [*range(k)]
    for eig, count in ((both, 2 * k), (top, k)):
        assert eig.eigendistortions.shape == (count, 1, 8, 8)
        assert eig.eigenvalues.shape == (count,)  # for k = 1 too
        assert (eig.eigenvalues.diff() <= 0).all()


def test_every_method_agrees_with_the_dense_matrix():
    model = Linear([5.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.25, 0.1], m=12)
    image = photograph(1, 1, 3, 3, dtype=torch.float64)
    model.eval()
    expected, vectors = torch.linalg.eigh(model.matrix.T @ model.matrix)
    expected, vectors = expected.flip(0), vectors.flip(1).T
    for method, kept in (("exact", range(9)), ("power", [0, 1, 7, 8]), ("randomized_svd", [0, 1])):
        eig = po.Eigendistortion(image, model)
        eig.synthesize(method, k=2)
        torch.testing.assert_close(eig.eigenvalues, expected[list(kept)], atol=1e-9, rtol=0)
        overlap = (eig.eigendistortions.flatten(1) * vectors[list(kept)]).sum(1).abs()
        torch.testing.assert_close(overlap, torch.ones(len(overlap), dtype=torch.float64), atol=1e-6, rtol=0)


def test_power_finds_the_null_space_where_the_response_is_shorter_than_the_image():
    model, image = build("linear m<n", torch.float32)
    eig = po.Eigendistortion(image, model)
    eig.synthesize("power")
    assert eig.eigenvalues[-1] <= 1e-10 * eig.eigenvalues[0]
    moved = model(image + eig.eigendistortions[-1:]) - model(image)
    assert moved.norm() < 1e-5


@pytest.mark.parametrize("name", [name for name, (_, shape) in MODELS.items() if len(shape) == 1 or shape[0] == 1])
def test_jacobian_is_that_of_plain_autograd(name):
    model, image = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eig = po.Eigendistortion(image, model)
    assert eig.jacobian is None
    assert eig.compute_jacobian() is eig.compute_jacobian() is eig.jacobian
    torch.testing.assert_close(eig.jacobian, dense_jacobian(model, image), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("size", [(4, 6, 6), (1, 1, 16)])
def test_multiple_of_the_image_has_one_singular_value(size):
    with pytest.warns(UserWarning, match="4 dimensions"):
        eig = po.Eigendistortion(photograph(1, *size[1:]), lambda x: 3 * x)
    eig.synthesize("exact")
    torch.testing.assert_close(eig.eigenvalues, torch.full_like(eig.eigenvalues, 9.0))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 4, 6), (1, 2, 3, 4), (1, 2, 2, 3, 2)])
@pytest.mark.parametrize("out", [(12,), (1, 12), (1, 3, 4), (2, 2, 3), (1, 2, 2, 3), (1, 1, 2, 2, 3), ()])
def test_inputs_and_outputs_may_have_any_number_of_dimensions(shape, out):
    matrix = photograph(int(np.prod(out)), 24)
    with pytest.warns(UserWarning, match="4 dimensions") if len(shape) != 4 else warnings.catch_warnings():
        eig = po.Eigendistortion(photograph(*shape), lambda x: (matrix @ x.flatten()).reshape(out))
    for method, count in (("exact", 24), ("power", 4), ("randomized_svd", 2)):
        eig.synthesize(method, k=2)
        assert eig.eigendistortions.shape == (count, *(shape if len(shape) == 1 else shape[1:]))
    torch.testing.assert_close(eig.jacobian, matrix)


def test_tuples_and_dictionaries_of_tensors_are_responses():
    eig = po.Eigendistortion(photograph(1, 1, 4, 4), lambda x: {"a": x.sum(), "b": (x[..., :2], x**2)})
    assert eig.compute_jacobian().shape == (1 + 8 + 16, 16)


def test_results_are_in_dtype_of_the_image():
    for dtype in (torch.float32, torch.float64):
        eig = po.Eigendistortion(photograph(1, 1, 6, 6, dtype=dtype), conv(dtype=dtype))
        eig.synthesize("exact")
        assert eig.image.dtype == eig.eigendistortions.dtype == eig.eigenvalues.dtype == eig.jacobian.dtype == dtype
        assert eig.eigenindex.dtype == torch.int64


def test_same_seed_gives_the_same_vectors_and_no_global_state_is_touched():
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    vectors = []
    for rng in (0, 0, 1):
        eig = po.Eigendistortion(photograph(1, 1, 8, 8), nn.AvgPool2d(2).eval())  # with a null space to choose from
        eig.synthesize(rng=rng)
        vectors.append(eig.eigendistortions[-1])
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    assert torch.equal(state[0], torch.random.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])  # noqa: NPY002


def test_result_tells_how_good_the_pairs_are():
    eig = po.Eigendistortion(photograph(1, 1, 8, 8), conv())
    assert eig.result is None
    eig.synthesize(k=2)
    assert isinstance(eig.result, fo.Eigendistortions)
    assert eig.result.converged.all()
    np.testing.assert_allclose(eig.result.eigenvalues, eig.eigenvalues, rtol=1e-6)


# --------------------------------------------------------------------------------------------------- steps and stopping


def large() -> po.Eigendistortion:
    """Return a problem that is too large for the dense method."""
    return po.Eigendistortion(photograph(1, 1, 32, 32), conv())


def test_stop_criterion_bounds_residuals_but_not_below_what_the_dtype_reaches():
    eig = large()
    eig.synthesize(stop_criterion=1e-2)
    assert eig.result.tol == 1e-2
    loose = eig.result.n_matvec
    eig.synthesize(max_iter=1000, stop_criterion=1e-20)
    assert eig.result.tol == pytest.approx(100 * torch.finfo(torch.float32).eps)
    assert eig.result.n_matvec > loose
    assert eig.result.converged.all()


def test_too_few_steps_keep_the_best_pairs_and_warn():
    eig = large()
    with pytest.warns(fo.ConvergenceWarning, match="raise maxiter"):
        eig.synthesize(max_iter=2)
    assert eig.eigendistortions.shape == (2, 1, 32, 32)
    assert not eig.result.converged.all()


def test_jacobian_of_zeros_does_not_crash():
    eig = po.Eigendistortion(photograph(1, 1, 3, 3), lambda x: 0 * x)
    for method in ("exact", "power", "randomized_svd"):
        with pytest.warns(UserWarning, match="F = 0"):
            eig.synthesize(method)
        assert (eig.eigenvalues == 0).all()
        assert torch.isfinite(eig.eigendistortions).all()


# ------------------------------------------------------------------------------------------------- errors and warnings


def test_unknown_method_is_refused():
    eig = po.Eigendistortion(photograph(1, 1, 4, 4), square)
    with pytest.raises(ValueError, match="method must be in"):
        eig.synthesize("lanczos")
    with pytest.raises(AssertionError, match="max_iter must be greater than zero"):
        eig.synthesize("power", max_iter=0)


@pytest.mark.parametrize(("method", "k"), [("power", 0), ("power", 9), ("randomized_svd", 17), ("randomized_svd", -1)])
def test_k_has_to_fit_the_image(method, k):
    eig = po.Eigendistortion(photograph(1, 1, 4, 4), square)
    with pytest.raises(ValueError, match=rf"16 values finds k = 1 to \d+ eigendistortions, not {k}"):
        eig.synthesize(method, k=k)
    assert eig.eigenvalues is None


def test_large_jacobians_are_warned_of():
    eig = po.Eigendistortion(photograph(1, 1, 4, 4), lambda x: x.repeat(1, 1, 1, 4000))
    with pytest.warns(UserWarning, match="Jacobian > 1e6 elements"):
        eig.synthesize("exact")
    eig = po.Eigendistortion(photograph(1, 1, 101, 100), lambda x: x.mean())
    with pytest.warns(UserWarning, match="too long"):
        eig.compute_jacobian()


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4), (3, 4, 4)])
def test_batches_are_refused(shape):
    with pytest.raises(ValueError, match=r"input_tensor batch dimension must be 1\."):
        po.Eigendistortion(photograph(*shape), square)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.complex64])
def test_images_of_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="float32 or float64"):
        po.Eigendistortion(torch.ones(1, 1, 4, 4, dtype=dtype), square)


def test_values_beyond_zero_and_one_are_warned_of():
    for image in (photograph(1, 1, 4, 4) + 0.5, photograph(1, 1, 4, 4) - 0.5):
        with pytest.warns(UserWarning, match="input_tensor range is"):
            po.Eigendistortion(image, square)


def test_training_mode_is_warned_of():
    with pytest.warns(UserWarning, match="model is in training mode"):
        po.Eigendistortion(photograph(1, 1, 4, 4), conv().train())


class Faulty(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda x: x.detach().numpy(), ValueError, "does not return a torch.Tensor"),
        (lambda x: 2 * x.detach(), ValueError, "autograd cannot see how"),
        (lambda x: torch.as_tensor(x.detach().numpy() * 2), ValueError, "autograd cannot see how"),
        (lambda x: torch.as_tensor(x.numpy() * 2), ValueError, "cannot be differentiated|autograd cannot see how"),
        (lambda x: x.double(), TypeError, "model changes precision"),
        (lambda x: x.half(), TypeError, "model changes precision"),
        (lambda x: x.to("meta"), RuntimeError, "model changes device"),
        (lambda x: x + float("nan"), ValueError, "NaN"),
    ],
)
def test_faulty_models_are_refused(answer, error, words):
    with pytest.raises(error, match=words):
        po.Eigendistortion(photograph(1, 1, 4, 4), Faulty(answer).eval())


def test_properties_are_read_only_and_none_before_synthesis():
    eig = po.Eigendistortion(photograph(1, 1, 4, 4), square)
    for name in ("eigendistortions", "eigenvalues", "eigenindex", "jacobian", "image", "model", "result"):
        with pytest.raises(AttributeError):
            setattr(eig, name, None)
    assert [eig.eigendistortions, eig.eigenvalues, eig.eigenindex, eig.jacobian] == [None] * 4
    assert eig.model is square


def test_image_and_model_of_the_user_stay_as_they_are():
    image = photograph(1, 1, 8, 8).requires_grad_()
    model = nn.Conv2d(1, 2, 3).eval()
    before, weights = image.detach().clone(), model.weight.detach().clone()
    eig = po.Eigendistortion(image, model)
    eig.synthesize()
    assert image.requires_grad
    assert image.grad is None
    assert model.weight.requires_grad
    assert model.weight.grad is None
    assert torch.equal(image, before)
    assert torch.equal(model.weight, weights)
    assert not eig.image.requires_grad
    assert torch.equal(eig.image, before)


def test_a_jacobian_of_other_weights_is_never_used():
    model = nn.Conv2d(1, 2, 3, bias=False).eval()
    eig = po.Eigendistortion(photograph(1, 1, 6, 6), model)
    eig.synthesize("exact")
    once = eig.eigenvalues
    eig.to("cpu")
    assert eig.jacobian is not None  # nothing has changed
    with torch.no_grad():
        model.weight.mul_(10)
    with pytest.raises(RuntimeError, match="weights were written"):
        eig.synthesize("exact")
    with pytest.raises(RuntimeError, match="weights were written"):
        eig.compute_jacobian()
    eig.to("cpu")
    eig.synthesize("exact")
    torch.testing.assert_close(eig.eigenvalues, 100 * once, rtol=1e-4, atol=1e-4 * float(once[0]))


def test_arguments_that_make_no_sense_are_named_as_this_class_names_them():
    eig = po.Eigendistortion(photograph(1, 1, 4, 4), square)
    for change, error, words in (
        ({"max_iter": "a"}, TypeError, "max_iter must be a whole number"),
        ({"stop_criterion": "a"}, TypeError, "stop_criterion must be made of numbers"),
        ({"stop_criterion": -1.0}, ValueError, "stop_criterion is relative to the largest eigenvalue"),
    ):
        with pytest.raises(error, match=words):
            eig.synthesize(**change)


def test_weights_written_after_the_start_are_noticed():
    model = nn.Conv2d(1, 2, 3).eval()
    eig = po.Eigendistortion(photograph(1, 1, 8, 8), model)
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights were written"):
        eig.synthesize()
    eig.to(torch.float32)
    eig.synthesize()


def test_repr_names_image_and_model_and_does_not_change():
    eig = po.Eigendistortion(photograph(1, 1, 8, 8), conv())
    before = repr(eig)
    assert "torch.Size([1, 1, 8, 8]) (torch.float32)" in before
    assert "Softplus" in before
    eig.synthesize()
    assert repr(eig) == before
    assert "model = square" in repr(po.Eigendistortion(photograph(1, 1, 4, 4), square))


# ------------------------------------------------------------------------------------------------------- save and load


def saved(tmp_path, method="power", **options):
    eig = synthesized(method, **options)
    eig.save(tmp_path / "eig.pt")
    return eig, tmp_path / "eig.pt"


def fresh(seed: int = 0) -> po.Eigendistortion:
    return po.Eigendistortion(photograph(1, 1, 8, 8, seed=seed), conv())


@pytest.mark.parametrize("method", ["exact", "power", "randomized_svd"])
def test_what_was_saved_is_loaded(method, tmp_path):
    eig, path = saved(tmp_path, method, k=2)
    again = fresh()
    assert again.load(path) is None
    for name in ("eigendistortions", "eigenvalues", "eigenindex"):
        assert torch.equal(getattr(again, name), getattr(eig, name))
    assert (again.jacobian is None) == (method != "exact")
    if method == "exact":
        assert torch.equal(again.jacobian, eig.jacobian)
    np.testing.assert_array_equal(again.result.residuals, eig.result.residuals)
    assert again.result.message == eig.result.message
    again.synthesize(method, k=2)
    torch.testing.assert_close(again.eigenvalues, eig.eigenvalues)


def test_what_was_not_synthesized_can_be_saved_and_loaded(tmp_path):
    fresh().save(tmp_path / "eig.pt")
    again = fresh()
    again.load(tmp_path / "eig.pt")
    assert again.eigenvalues is None


def test_files_hold_tensors_and_plain_data_only(tmp_path):
    _, path = saved(tmp_path)
    torch.load(path, weights_only=True)
    fresh().load(path, weights_only=True, map_location="cpu")


def test_load_needs_an_object_that_was_not_used(tmp_path):
    eig, path = saved(tmp_path)
    with pytest.raises(ValueError, match="just-initialized"):
        eig.load(path)


def renamed() -> nn.Module:
    class Renamed(type(conv())):
        pass

    model = conv()
    model.__class__ = Renamed
    return model


IMAGE = photograph(1, 1, 8, 8)
DIFFERENT = {
    "image": (lambda: po.Eigendistortion(photograph(1, 1, 8, 8, seed=9), conv()), "image have different values"),
    "shape": (lambda: po.Eigendistortion(photograph(1, 1, 8, 9), conv()), "image have different shape"),
    "model": (lambda: po.Eigendistortion(IMAGE, conv(seed=9)), "output have different values"),
    "name": (lambda: po.Eigendistortion(IMAGE, renamed()), "different names"),
    "response": (lambda: po.Eigendistortion(IMAGE, nn.Sequential(conv(), nn.MaxPool2d(2)).eval()), "shape"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_image_or_model_is_refused_or_warned_of(case, tmp_path):
    eig, path = saved(tmp_path)
    make, words = DIFFERENT[case]
    other = make()
    with pytest.raises(ValueError, match=words):
        other.load(path)
    assert other.eigenvalues is None
    with pytest.warns(po.LoadWarning, match=words):
        other.load(path, raise_on_checks=False)
    assert torch.equal(other.eigenvalues, eig.eigenvalues)
    assert torch.equal(other.image, eig.image)


@pytest.mark.parametrize("raise_on_checks", [True, False])
def test_another_dtype_is_refused_always(raise_on_checks, tmp_path):
    _, path = saved(tmp_path)
    other = fresh()
    other.to(torch.float64)
    with pytest.raises(ValueError, match="image have different dtype"):
        other.load(path, raise_on_checks=raise_on_checks)


def test_tolerances_of_load_are_the_users(tmp_path):
    _, path = saved(tmp_path)
    other = po.Eigendistortion(photograph(1, 1, 8, 8) * (1 - 1e-3), conv())
    with pytest.raises(ValueError, match="different values: by up to"):
        other.load(path)
    other.load(path, tensor_equality_atol=1e-2)


@pytest.mark.parametrize("content", [{"image": torch.zeros(1)}, [1, 2], torch.ones(3)])
def test_files_of_another_kind_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    for raise_on_checks in (True, False):
        with pytest.raises(ValueError, match="not an Eigendistortion"):
            fresh().load(tmp_path / "other.pt", raise_on_checks=raise_on_checks)


def test_files_that_lack_or_add_entries_are_told(tmp_path):
    _, path = saved(tmp_path)
    state = torch.load(path)
    torch.save(state | {"extra": 1}, path)
    with pytest.raises(ValueError, match="extra"):
        fresh().load(path)
    with pytest.warns(po.LoadWarning, match="extra"):
        fresh().load(path, raise_on_checks=False)
    del state["response"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="response"):
        fresh().load(path, raise_on_checks=False)


# ------------------------------------------------------------------------------------------------------- move and cast


@pytest.mark.parametrize("method", ["exact", "power", "randomized_svd"])
def test_to_casts_all_that_was_found_and_synthesis_goes_on(method):
    eig = synthesized(method)
    values = eig.eigenvalues
    assert eig.to(torch.float64) is None
    assert eig.image.dtype == eig.eigendistortions.dtype == eig.eigenvalues.dtype == torch.float64
    assert eig.eigenindex.dtype == torch.int64
    assert eig.jacobian is None or eig.jacobian.dtype == torch.float64
    assert eig.model(eig.image).dtype == torch.float64
    eig.synthesize(method)
    assert eig.eigendistortions.dtype == torch.float64
    torch.testing.assert_close(eig.eigenvalues.float(), values, atol=1e-5, rtol=0)
    eig.to(torch.ones(1, dtype=torch.float32))
    assert eig.eigenvalues.dtype == torch.float32


def test_to_leaves_a_function_as_it_is_and_says_so():
    eig = po.Eigendistortion(photograph(1, 1, 4, 4), square)
    with pytest.warns(UserWarning, match=r"Unable to call model\.to\(\)"):
        eig.to(torch.float64)
    eig.synthesize()
    assert eig.model is square
    assert eig.eigenvalues.dtype == torch.float64


def test_to_refuses_other_dtypes_and_leaves_the_model_alone():
    eig = fresh()
    for dtype in (torch.float16, torch.int64):
        with pytest.raises(TypeError):
            eig.to(dtype)
    assert next(eig.model.parameters()).dtype == torch.float32


@pytest.mark.gpu
def test_all_is_moved_to_a_device_and_loaded_from_it(tmp_path):
    eig = fresh()
    eig.to("cuda")
    for method in ("exact", "power", "randomized_svd"):
        eig.synthesize(method)
        found = (eig.image, eig.eigendistortions, eig.eigenvalues, eig.eigenindex, eig.jacobian)
        assert {x.device.type for x in found} == {"cuda"}
    eig.save(tmp_path / "eig.pt")
    again = fresh()
    with pytest.raises(ValueError, match="different device"):
        again.load(tmp_path / "eig.pt")
    again.load(tmp_path / "eig.pt", map_location="cpu", tensor_equality_atol=1e-4)
    assert again.eigendistortions.device.type == "cpu"
    po.display_eigendistortion(eig)


# ------------------------------------------------------------------------------------------------------- with plenoptic


def both(image: Tensor, model: nn.Module, method: str, **options: object) -> tuple[object, po.Eigendistortion]:
    plenoptic = pytest.importorskip("plenoptic")
    found = []
    for module in (plenoptic, po):
        eig = module.Eigendistortion(image, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eig.synthesize(method, **options)
        found.append(eig)
    return found[0], found[1]


@pytest.mark.parametrize("name", ["OnOff", "LN", "conv"])
def test_exact_has_the_eigenvalues_and_jacobian_that_plenoptic_finds(name):
    pytest.importorskip("plenoptic")
    model = conv(dtype=torch.float64) if name == "conv" else getattr(fo, name)().double()
    po.remove_grad(model.eval())
    theirs, ours = both(photograph(1, 1, 16, 16, dtype=torch.float64), model, "exact")
    scale = ours.eigenvalues[0]
    torch.testing.assert_close(ours.eigenvalues / scale, theirs.eigenvalues / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.jacobian, theirs.jacobian)
    assert torch.equal(ours.eigenindex, theirs.eigenindex)
    assert ours.eigendistortions.shape == theirs.eigendistortions.shape


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("method", ["power", "randomized_svd"])
def test_iterative_methods_have_the_largest_eigenvalues_that_plenoptic_finds(method, k):
    # A spectrum that falls fast, so that the other side has converged.
    model = Linear([10 * 0.5**i for i in range(36)], m=40)
    image = photograph(1, 1, 6, 6, dtype=torch.float64)
    theirs, ours = both(image, model.eval(), method, k=k, max_iter=60, q=6, p=20)
    top = theirs.eigenvalues.reshape(-1)[:k]
    torch.testing.assert_close(ours.eigenvalues[:k], top, atol=0, rtol=1e-3)
    assert torch.equal(ours.eigenindex, theirs.eigenindex)
    assert ours.eigendistortions.shape == theirs.eigendistortions.shape
    for i in range(k):
        cosine = (ours.eigendistortions[i] * theirs.eigendistortions[i]).sum().abs()
        assert cosine > 0.999


def test_portilla_simoncelli_statistics_are_a_response():
    plenoptic = pytest.importorskip("plenoptic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = plenoptic.models.PortillaSimoncelli((32, 32), n_scales=2, n_orientations=2, spatial_corr_width=3)
        theirs, ours = both(photograph(1, 1, 32, 32), model.eval(), "exact")
    scale = ours.eigenvalues[0]
    torch.testing.assert_close(ours.eigenvalues / scale, theirs.eigenvalues / scale, atol=1e-5, rtol=0)
    ours.synthesize("power")
    torch.testing.assert_close(ours.eigenvalues[0], scale, atol=0, rtol=1e-6)
    assert ours.eigenvalues[1] <= 1e-6 * scale


SCRIPT = """
import torch
import {name} as po

torch.manual_seed(0)
model = torch.nn.Linear(25, 10, bias=False).eval()
po.remove_grad(model)
image = torch.ones((1, 1, 1, 25))
jac = po.Eigendistortion(image, model)
jac.synthesize(method="exact")
matches = jac.jacobian.allclose(model.weight.data)
power = po.Eigendistortion(image, model)
power.synthesize(method="power", max_iter=1000)
same = (power.eigendistortions.squeeze()[0] @ jac.eigendistortions.squeeze()[0]).abs().item()
index = power.eigenindex.tolist()
"""


@pytest.mark.parametrize("name", ["plenoptic", "fisherop.plenoptic"])
def test_script_runs_with_one_name_changed(name):
    pytest.importorskip(name)
    found: dict[str, object] = {}
    exec(SCRIPT.format(name=name), found)
    assert found["matches"]
    assert found["same"] == pytest.approx(1, abs=1e-4)
    assert found["index"] == [0, 24]


def test_module_is_loaded_when_named():
    assert fo.plenoptic is po


def test_remove_grad_makes_constants_of_weights():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    eig = po.Eigendistortion(photograph(1, 1, 8, 8), model)
    po.remove_grad(model)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model(eig.image).requires_grad
    eig.synthesize()  # the weights themselves were not written


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.fixture
def plt():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def pixels(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def rendered(fig) -> np.ndarray:
    file = io.BytesIO()
    fig.savefig(file, format="rgba")
    shape = round(fig.bbox.height), round(fig.bbox.width), 4
    return np.frombuffer(file.getvalue(), np.uint8).reshape(shape)[..., :3]


def test_displayed_pixels_are_image_plus_alpha_distortion_clipped(plt):
    grey, colour = synthesized(k=2), synthesized(shape=(1, 3, 7, 8))
    for eig, channels in ((grey, 1), (colour, 3)):
        for index, place in ((0, 0), (-1, -1)):
            expected = (eig.image + 3 * eig.eigendistortions[place]).clamp(0, 1)[0]
            fig = po.display_eigendistortion(eig, index, alpha=3, as_rgb=True, zoom=2)
            drawn = pixels(fig.axes[0]).reshape(*expected.shape[1:], channels)
            np.testing.assert_allclose(drawn, expected.movedim(0, -1), atol=1e-6)
    fig = po.display_eigendistortion(colour, process_image=lambda x: x / 2)
    assert len(fig.axes) == 3
    for ax, expected in zip(fig.axes, (colour.image + 5 * colour.eigendistortions[0])[0] / 2, strict=True):
        np.testing.assert_allclose(pixels(ax), expected.clamp(0, 1), atol=1e-6)


def test_display_takes_axes_and_title(plt):
    eig = synthesized()
    fig, ax = plt.subplots()
    assert po.display_eigendistortion(eig, 0, ax=ax, title="top") is fig
    assert ax.get_title() == "top"
    with pytest.raises(ValueError, match="3 panels do not fit one ax"):
        po.display_eigendistortion(synthesized(shape=(1, 3, 8, 8)), ax=ax)


def test_grey_pixels_of_imshow_all_are_image_plus_scale_distortion(plt):
    eig = synthesized(k=2)
    fig = po.eigendistortion_imshow_all(eig, [0, 1, -2, 63], distortion_scale=[1, 2, 3, 4])
    assert not fig.axes[0].get_visible()
    for i in range(4):
        v = eig.eigendistortions[i, 0]
        np.testing.assert_allclose(pixels(fig.axes[1 + i]), v, atol=1e-7)
        np.testing.assert_allclose(pixels(fig.axes[6 + i]), eig.image[0, 0] + (i + 1) * v, atol=1e-6)
        assert fig.axes[6 + i].images[0].get_clim() == (0, 1)
    np.testing.assert_array_equal(pixels(fig.axes[5]), eig.image[0, 0])


def test_colour_and_channels_and_processing_of_imshow_all(plt):
    eig = synthesized(shape=(1, 3, 7, 8))
    v = eig.eigendistortions[0]
    drawn = po.eigendistortion_imshow_all(eig, 0, distortion_scale=2).axes
    np.testing.assert_allclose(pixels(drawn[3]), (eig.image[0] + 2 * v).clamp(0, 1).movedim(0, -1), atol=1e-6)
    np.testing.assert_allclose(pixels(drawn[1]), (0.5 + 0.5 * v / v.abs().max()).movedim(0, -1), atol=1e-6)
    drawn = po.eigendistortion_imshow_all(eig, -1, channel_idx=1, distortion_scale=2).axes
    np.testing.assert_allclose(pixels(drawn[3]), eig.image[0, 1] + 2 * eig.eigendistortions[1, 1], atol=1e-6)
    drawn = po.eigendistortion_imshow_all(eig, 0, 0, 1.0, lambda x: x / 4, lambda x: x * 0 + 0.3).axes
    np.testing.assert_allclose(pixels(drawn[3]), (eig.image[0, 0] + v[0]) / 4, atol=1e-6)
    np.testing.assert_allclose(pixels(drawn[1]), 0.3, atol=1e-6)


def test_display_all_clips(plt):
    eig = synthesized()
    fig = po.display_eigendistortion_all(eig, alpha=[10, 20], suptitle="both", zoom=3)
    expected = (eig.image[0, 0] + 20 * eig.eigendistortions[1, 0]).clamp(0, 1)
    np.testing.assert_allclose(pixels(fig.axes[5]), expected, atol=1e-6)
    assert fig.get_suptitle() == "both"


def test_signals_are_drawn_as_lines(plt):
    eig = po.Eigendistortion(torch.ones(1, 1, 1, 25), nn.Linear(25, 10).eval())
    eig.synthesize()
    assert len(po.imshow(eig.image).axes[0].lines) == 1
    fig = po.eigendistortion_imshow_all(eig, distortion_scale=2)
    np.testing.assert_allclose(fig.axes[4].lines[-1].get_ydata(), 1 + 2 * eig.eigendistortions[0].flatten(), atol=1e-6)


@pytest.mark.parametrize("draw", [po.display_eigendistortion, po.eigendistortion_imshow_all])
def test_index_that_was_not_synthesized_is_refused(plt, draw):
    eig = fresh()
    with pytest.raises(ValueError, match="no eigendistortions synthesized"):
        draw(eig)
    eig.synthesize("randomized_svd", k=3)
    draw(eig, 2)
    for index in (3, -1, 64, -65):
        with pytest.raises(ValueError, match="eigenindex must be the index of one of the vectors"):
            draw(eig, index)


def test_lists_of_different_lengths_are_refused(plt):
    eig = synthesized()
    with pytest.raises(ValueError, match="3 scales for 2"):
        po.eigendistortion_imshow_all(eig, distortion_scale=[1, 2, 3])
    with pytest.raises(ValueError, match="2 scales for 1"):
        po.display_eigendistortion_all(eig, 0, alpha=[1, 2])
    with pytest.raises(ValueError, match="2 titles for 1"):
        po.imshow(eig.image, title=["a", "b"])
    with pytest.raises(ValueError, match="zoom must be"):
        po.imshow(eig.image, zoom=1.5)


@pytest.mark.parametrize("zoom", [1, 3])
def test_image_pixels_are_squares_of_the_figure(plt, zoom):
    with plt.rc_context({"figure.dpi": 72, "image.interpolation": "bilinear"}):
        before = plt.rcParams.copy()
        image = photograph(1, 3, 9, 11)
        fig = po.imshow([image, image.flip(-1)], as_rgb=True, zoom=zoom, title="Original")
        canvas = rendered(fig)
        assert plt.rcParams == before
    assert len(fig.axes) == 2
    for ax, shown in zip(fig.axes, (image, image.flip(-1)), strict=True):
        box = ax.get_window_extent()
        left, top = round(box.x0), round(canvas.shape[0] - box.y1)
        panel = canvas[top : top + 9 * zoom, left : left + 11 * zoom]
        expected = np.repeat(np.repeat(shown[0].movedim(0, -1).numpy(), zoom, 0), zoom, 1)
        np.testing.assert_allclose(panel / 255, expected, atol=1.01 / 255)


def test_imshow_scales_values_beyond_zero_and_one_to_be_seen(plt):
    eig = synthesized()
    [ax] = po.imshow(eig.eigendistortions[:1]).axes
    v = eig.eigendistortions[0, 0]
    assert ax.images[0].get_clim() == pytest.approx((float(v.min()), float(v.max())))
    assert len(po.imshow(photograph(2, 3, 4, 4)).axes) == 6
    assert len(po.imshow(photograph(2, 3, 4, 4), channel_idx=2).axes) == 2
    assert po.imshow(photograph(4, 4), vrange=(0, 2)).axes[0].images[0].get_clim() == (0, 2)


@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_numbers_of_any_type_are_taken_as_pythons(plt, kind):
    eig = po.Eigendistortion(torch.rand(1, 3, 8, 8), torch.nn.Conv2d(3, 4, 3).eval())
    eig.synthesize(k=kind(2), max_iter=kind(100))
    assert eig.eigenindex.tolist() == [0, 1, 190, 191]
    words = ["image", "image + 2 * eigendistortion[-2]"]
    for index in (kind(-2), [kind(-2)]):
        fig = po.eigendistortion_imshow_all(eig, index, distortion_scale=kind(2), zoom=kind(4))
        assert [ax.get_title() for ax in fig.axes[-2:]] == words
        fig = po.display_eigendistortion_all(eig, index, kind(2), channel_idx=kind(1))
        assert [ax.get_title() for ax in fig.axes[-2:]] == words
    assert po.display_eigendistortion(eig, kind(-2), kind(2), as_rgb=True).axes[0].get_title() == words[1]
    with pytest.raises(TypeError, match="eigenindex must be a whole number, not True"):
        po.eigendistortion_imshow_all(eig, True)


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path):
    image, model = torch.rand(1, 1, 6, 6), torch.nn.AvgPool2d(2).eval()
    path = tmp_path / "eig.pt"
    eig = po.Eigendistortion(image, model)
    eig.synthesize()
    eig.save(path)
    whole, state = path.read_bytes(), torch.load(path)
    for content in (b"", b"not a file of tensors", b"hello", b"\x80\x02.", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"eig.pt is not a file of tensors and plain data, or is damaged"):
            po.Eigendistortion(image, model).load(path)
    for result in (3, {"eigenvalues": torch.ones(2)}, state["result"] | {"more": 1}):
        torch.save(state | {"result": result}, path)
        with pytest.raises(ValueError, match=r"the result saved at .*eig.pt lacks an entry"):
            po.Eigendistortion(image, model).load(path)
    with pytest.raises(FileNotFoundError):
        po.Eigendistortion(image, model).load(tmp_path / "none.pt")
