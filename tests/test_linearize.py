"""Laws of the linearization: the right Jacobian, for every model, without a trace left on the model."""

import re
import threading
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
from models import MODELS, build, dense_jacobian, parts
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherop as fo
from fisherop.linearize import Linearization

DTYPES = (torch.float32, torch.float64)
EPS = {dtype: 300 * torch.finfo(dtype).eps for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_both_products_agree_with_the_dense_jacobian(name, dtype):
    model, image = build(name, dtype)
    at, dense = Linearization(model, image), dense_jacobian(model, image)
    m, n = dense.shape
    assert at.shape == (m, n)
    scale = EPS[dtype] * dense.norm()
    assert (at.jvp(torch.eye(n, dtype=dtype)).T - dense).norm() <= scale
    assert (at.vjp(torch.eye(m, dtype=dtype)) - dense).norm() <= scale


Pair = namedtuple("Pair", ["first", "second"])
RESPONSES = {
    "a number": lambda x: x.prod(),
    "a complex number": lambda x: (x * (1 + 2j)).prod(),
    "a dictionary of its own kind": lambda x: OrderedDict(a=x.sin(), b=None, c=x.sum()),
    "a named tuple": lambda x: Pair(x.cumsum(-1), (x.std(), x.exp())),
    "a conjugate": lambda x: torch.fft.fft(x.exp()).conj(),
    "a negative view": lambda x: [torch.fft.fft(x.exp()).conj().imag, torch._neg_view(torch.fft.fft(x))],
    "an adjoint": lambda x: torch.fft.fft2(x.sin()).mH,
    "one real and complex": lambda x: (x.sum(), torch.fft.fft(x), x.prod()),
    "real and complex": lambda x: {"real": x**2, "complex": (torch.fft.rfft(x), x.mean() * 1j)},
}


@pytest.mark.parametrize("live", [False, True], ids=["recorded", "forward-mode"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RESPONSES)
def test_every_number_of_a_response_counts_and_a_complex_one_twice(name, dtype, live):
    class Once(torch.autograd.Function):
        """Nothing, whose reverse rule reads a value of the cotangent."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, u):
            return u if float(u.sum()) > 0 else u.clone()

        @staticmethod
        def jvp(ctx, t):
            return t.clone()

    respond = RESPONSES[name]
    image = torch.linspace(0.4, 1.3, 12, dtype=dtype).view(3, 4)
    at = Linearization((lambda x: respond(Once.apply(x))) if live else respond, image)
    assert at.strategy == ("forward-mode" if live else "recorded")
    dense = torch.autograd.functional.jacobian(lambda x: torch.cat([numbers(y) for y in parts(respond(x))]), image)
    dense = dense.reshape(-1, 12)
    scale = EPS[dtype] * dense.norm()
    assert (at.jvp(torch.eye(12, dtype=dtype)).T - dense).norm() <= scale
    assert (at.vjp(torch.eye(len(dense), dtype=dtype)) - dense).norm() <= scale


def numbers(y):
    """Return real numbers, of a complex one its parts."""
    return torch.stack([y.real, y.imag], dim=-1).flatten() if y.is_complex() else y.flatten()


class Operations(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one, and do it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_conjugates_do_not_make_a_block_one_product_after_another():
    def correlations(x):
        spectrum = torch.fft.fft2(x)
        return torch.view_as_real(spectrum.roll(1, -1) * spectrum.conj() * torch.conj_physical(spectrum.exp()))

    at = Linearization(correlations, torch.rand(6, 5, generator=torch.Generator().manual_seed(0)))
    assert at.strategy == "recorded"
    at = Linearization(correlations, at.image, tuning={"block": 16})
    for product, length in ((at.jvp, 30), (at.vjp, 60)):
        product(torch.ones(2, length))  # checked at first use
        counts = []
        for size in (2, 16):
            with Operations() as operations:
                product(torch.ones(size, length))
            counts.append(operations.count)
        assert counts[0] == counts[1]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_any_size_give_the_same_rows(name):
    model, image = build(name)
    at = Linearization(model, image)
    rows = torch.randn(7, at.shape[1], dtype=image.dtype, generator=torch.Generator().manual_seed(1))
    whole = at.jvp(rows)
    at.tuning["block"] = 3
    torch.testing.assert_close(at.jvp(rows), whole, rtol=0, atol=1e-13 * float(whole.abs().max()))
    assert at.jvp(rows[:0]).shape == (0, at.shape[0])


def test_the_image_may_change_afterwards():
    image = torch.tensor([1.0, 2.0])
    at = Linearization(lambda x: x**3, image)
    image.zero_()
    assert torch.equal(at.jvp(torch.ones(1, 2)), torch.tensor([[3.0, 12.0]]))


def test_a_layout_that_is_not_contiguous_is_taken_as_it_looks():
    image = torch.arange(6.0).reshape(2, 3)
    straight = Linearization(lambda x: x**2, image.T.contiguous())
    turned = Linearization(lambda x: x**2, image.T)
    assert torch.equal(straight.jvp(torch.ones(1, 6)), turned.jvp(torch.ones(1, 6)))


def test_the_model_is_left_as_found():
    model, image = build("attention", torch.float32)
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    flags = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.random.get_rng_state()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    model.layer.linear1.weight.requires_grad_(False)
    Linearization(model, image).vjp(torch.ones(2, 48))
    assert not model.training
    assert len(model._forward_hooks) == 1
    assert all(torch.equal(w.grad, torch.ones_like(w)) for w in model.parameters())
    assert [w.requires_grad for w in model.parameters()].count(False) == 1
    assert (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()) == flags[:2]
    assert torch.equal(torch.random.get_rng_state(), flags[2])
    handle.remove()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(context):
    with context():
        at = Linearization(lambda x: x**2, torch.tensor([1.0, 2.0]))
        assert torch.equal(at.vjp(torch.ones(1, 2)), torch.tensor([[2.0, 4.0]]))


class Doubled(torch.autograd.Function):
    """Twice the input, without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, u):
        return 2 * u


class WronglyTripled(Doubled):
    """Twice the input, and a derivative that is not."""

    @staticmethod
    def jvp(ctx, t):
        return 3 * t


def test_a_function_without_forward_mode_is_served_all_the_same():
    at = Linearization(lambda x: Doubled.apply(x) ** 2, torch.tensor([1.0, 2.0]))
    assert torch.equal(at.jvp(torch.ones(1, 2)), torch.tensor([[8.0, 16.0]]))


def test_a_wrong_forward_rule_is_found_out_and_not_used():
    at = Linearization(WronglyTripled.apply, torch.tensor([1.0, 2.0]))
    assert torch.equal(at.jvp(torch.ones(1, 2)), torch.tensor([[2.0, 2.0]]))
    assert torch.equal(at.vjp(torch.ones(1, 2)), torch.tensor([[2.0, 2.0]]))


def test_a_model_whose_buffers_are_cached_at_the_first_call_is_served():
    class Cached(nn.Module):
        kernel = None

        def forward(self, x):
            if self.kernel is None:
                self.kernel = torch.ones(1, 1, 3, 3)
            return nn.functional.conv2d(x, self.kernel)

    assert Linearization(Cached(), torch.rand(1, 1, 5, 5)).shape == (9, 25)


def test_a_model_that_rounds_to_float32_on_its_way_is_served_with_a_warning():
    weight = torch.linspace(-1, 1, 200).sin().view(10, 20)
    with pytest.warns(UserWarning, match="rounds to float32"):
        at = Linearization(lambda x: (x.float().exp() @ weight.T).double(), torch.linspace(0, 1, 20).double())
    assert (at.dtype, at.strategy) == (torch.float64, "recorded")
    dense = weight.double() * at.image.exp()
    torch.testing.assert_close(at.vjp(torch.eye(10).double()), dense, atol=1e-5, rtol=0)


def test_products_are_counted_per_vector():
    at = Linearization(lambda x: x**2, torch.ones(3))
    at.jvp(torch.ones(4, 3))
    at.vjp(torch.ones(2, 3))
    assert (at.n_jvp, at.n_vjp) == (4, 2)


def nan_weights():
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, torch.nan)
    return model


def test_weights_stored_in_few_bits_are_no_cause_for_refusal():
    weight = torch.linspace(-1, 1, 60).half().view(20, 3)
    at = Linearization(lambda x: weight.float() @ x.sin(), ONES)
    assert (at.strategy, at.reason) == ("recorded", "")


def made_in_inference_mode():
    with torch.inference_mode():
        return nn.Linear(3, 2)


def bfloat16_by_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x.outer(x) @ x.outer(x).sin()).float()


ONES = torch.ones(3)
RAMP = torch.linspace(0.1, 1, 20)
REFUSED = {
    "model is no function": (3, ONES, TypeError, "model must be an nn.Module or a function"),
    "NaN image": (nn.Identity(), torch.tensor([1.0, torch.nan]), ValueError, "image holds NaN or infinity"),
    "NaN weights": (nan_weights(), ONES, ValueError, "check the model's weights"),
    "dropout": (nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)).train(), ONES, ValueError, r"call model.eval\(\)"),
    "batch norm": (
        nn.BatchNorm2d(2).train(),
        torch.rand(1, 2, 4, 4),
        ValueError,
        r"training mode.*call model.eval\(\)",
    ),
    "rare dropout": (nn.Dropout(0.001).train(), torch.ones(1, 1, 8, 8), ValueError, r"twice: call model.eval\(\)"),
    "made in inference mode": (made_in_inference_mode(), ONES, ValueError, "under torch.inference_mode.*outside"),
    "sparse image": (nn.Identity(), ONES.to_sparse(), TypeError, r"sparse.*image.to_dense\(\)"),
    "image without values": (nn.Identity(), ONES.to("meta"), ValueError, "meta device, which holds no values"),
    "float16 inside": (lambda x: x.half().sin().float(), RAMP, ValueError, "in torch.float16: run all of it in .*32"),
    "bfloat16 inside": (
        lambda x: x.bfloat16().sin().double(),
        RAMP.double(),
        ValueError,
        "in torch.bfloat16: run .*64",
    ),
    "autocast inside": (bfloat16_by_autocast, RAMP, ValueError, "in torch.bfloat16: .* switch autocast off"),
    "float16 image": (nn.Identity(), ONES.half(), TypeError, r"float32 or float64, not torch.float16.*image.float\(\)"),
    "integer image": (nn.Identity(), torch.arange(3), TypeError, r"not torch.int64: convert it with image.float\(\)"),
    "array image": (nn.Identity(), [1.0, 2.0], TypeError, "torch.Tensor, not list"),
    "empty image": (nn.Identity(), torch.zeros(0), ValueError, "is empty"),
    "batch of 2": (nn.Identity(), torch.ones(2, 1, 4, 4), ValueError, r"batch dimension of 2.*image\[i : i \+ 1\]"),
    "half response": (lambda x: x.half(), ONES, TypeError, r"torch.float16.*call .float\(\)"),
    "integer response": (lambda x: (x, x.argmax()), ONES, TypeError, "torch.int64"),
    "string response": (lambda x: [x, "label"], ONES, TypeError, "returned str"),
    "boolean response beside": (lambda x: {"y": x, "on": x > 0}, ONES, TypeError, "torch.bool; return only float32"),
    "number beside": (lambda x: [x, 3.0], ONES, TypeError, "returned float; return a tensor"),
    "sparse response": (lambda x: x.to_sparse(), ONES, TypeError, r"sparse tensor: call .to_dense\(\)"),
    "NaN response": (lambda x: [x, x * torch.nan], ONES, ValueError, "response holds NaN or infinity"),
    "infinite response": (lambda x: {"y": x.sum() / 0}, ONES, ValueError, "response holds NaN or infinity"),
    "NaN imaginary part": (lambda x: torch.complex(x, x * torch.nan), ONES, ValueError, "response holds NaN"),
    "no response": (lambda x: (), ONES, ValueError, "returned no tensor"),
    "weights of another dtype": (nn.Linear(3, 2).double(), ONES, TypeError, r"float32 and the model's weight.*float64"),
    "weights elsewhere": (nn.Linear(3, 2, device="meta"), ONES, ValueError, "on cpu and the model's weight on meta"),
    "constant elsewhere": (lambda x: torch.ones(3, device="meta"), ONES, ValueError, "response is on meta"),
    "detached": (lambda x: x.detach() ** 2, ONES, ValueError, r"autograd cannot see how: remove .detach\(\)"),
    "infinite slope": (lambda x: x.sqrt(), torch.zeros(3), ValueError, "derivative of the response holds NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_linearized_is_refused_in_one_sentence(case):
    model, image, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as caught:
        Linearization(model, image)
    assert "\n" not in str(caught.value)


def test_a_model_that_draws_is_refused_and_the_generator_left_as_found():
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="twice"):
        Linearization(lambda x: x + 1e-9 * torch.rand(3), ONES)
    assert torch.equal(torch.get_rng_state(), before)


def seeded(x):
    torch.manual_seed(3)
    return x * torch.rand(3)


def of_a_generator_of_its_own(x):
    return x * torch.rand(3, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model", [seeded, of_a_generator_of_its_own])
def test_a_model_that_draws_the_same_numbers_every_time_is_served(model):
    with torch.random.fork_rng():
        at = Linearization(model, ONES)
        assert torch.equal(at.jvp(torch.eye(3)), model(ONES).diag())


def test_numbers_that_another_thread_draws_are_not_the_models():
    def respond(x):
        thread = threading.Thread(target=torch.rand, args=(3,))
        thread.start()
        thread.join()
        return x**2

    with torch.random.fork_rng():
        assert Linearization(respond, ONES).strategy == "recorded"


def test_a_model_is_recorded_under_anomaly_detection_which_stays_on():
    with torch.autograd.set_detect_anomaly(True):
        at = Linearization(lambda x: x.sin(), ONES)
        assert torch.is_anomaly_enabled()
    assert (at.strategy, at.reason) == ("recorded", "")


class Constant(fo.JacobianOperator):
    """An operator of one more frame, in a file of the user's."""

    def __init__(self, image):
        super().__init__(lambda x: torch.ones(2), image)


MAKERS = {
    "FisherOperator": lambda: fo.FisherOperator(lambda x: torch.ones(2), ONES),
    "JacobianOperator": lambda: fo.JacobianOperator(lambda x: torch.ones(2), ONES),
    "a class of one's own": lambda: Constant(ONES),
    "many": lambda: fo.eigendistortions_many(lambda x: torch.ones(len(x), 2), [ONES[None]], 1),
    "Linearization": lambda: Linearization(lambda x: x.float().exp().double(), RAMP.double()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_warning_points_to_the_first_line_outside_the_package(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MAKERS[name]()
    found = [w.filename for w in caught if re.search("does not depend on the image|rounds to float32", str(w.message))]
    assert found
    assert set(found) == {__file__}


def test_batch_norm_in_training_mode_keeps_its_averages():
    model = nn.BatchNorm2d(2).train()
    with pytest.raises(ValueError, match="training mode"):
        Linearization(model, torch.rand(1, 2, 4, 4))
    assert torch.equal(model.running_mean, torch.zeros(2))
    assert model.num_batches_tracked == 0


def test_a_response_that_ignores_the_image_is_zero_with_a_warning():
    with pytest.warns(UserWarning, match="does not depend on the image"):
        at = Linearization(lambda x: torch.ones(2), ONES)
    assert torch.equal(at.jvp(torch.ones(1, 3)), torch.zeros(1, 2))
    assert torch.equal(at.vjp(torch.ones(1, 2)), torch.zeros(1, 3))


def test_a_flat_response_is_no_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at = Linearization(torch.relu, -ONES)
    assert torch.equal(at.jvp(torch.ones(1, 3)), torch.zeros(1, 3))
