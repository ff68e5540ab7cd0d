"""Laws of the recorded product: right for every architecture, in blocks too, and never quietly wrong."""

import gc
import pickle
import threading
from functools import partial

import pytest
import torch
from architectures import NETWORKS, SMALL, large, small
from hypothesis import assume, example, given, reject
from hypothesis import strategies as st
from models import dense_jacobian
from torch import nn

import fisherop as fo
from fisherop.linearize import Linearization
from fisherop.linearize.checks import flat_response

# -------------------------------------------------------------------------------------------- random programs
# A program is a list of (operation, which tensor, which view, which other): tensors come and go in a pool of eight.


def fitted(source, shape):
    """Repeat a tensor's entries until they fill a shape."""
    size = torch.Size(shape).numel()
    flat = source.reshape(-1)
    return flat.repeat(size // flat.numel() + 1)[:size].reshape(shape)


VIEWS = (
    lambda t: t,
    lambda t: t[..., 0],
    lambda t: t.transpose(0, -1),
    lambda t: t[-1:],
    lambda t: t[..., ::2],
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: t.diagonal() if t.ndim == 2 else t,
    lambda t: t.as_strided((2,), (1,), t.storage_offset()) if t.is_contiguous() and t.numel() > 1 else t,
)
CONSTANT = torch.linspace(-1, 1, 48, dtype=torch.float64).cos().roll(5)
NEW = {
    "view": lambda t, other: t,
    "clone": lambda t, other: t.clone(),
    "sin": lambda t, other: t.sin(),
    "product": lambda t, other: t * fitted(other, t.shape),
    "scaled": lambda t, other: t * fitted(CONSTANT, t.shape),
    "constant": lambda t, other: fitted(CONSTANT, (3, 4)).clone(),
    "filled": lambda t, other: torch.zeros(t.shape, dtype=t.dtype).copy_(t),
    "joined": lambda t, other: torch.cat([t.reshape(-1), other.reshape(-1)]),
    "expanded": lambda t, other: t.expand(2, *t.shape),
    "square": lambda t, other: torch.view_as_real(torch.complex(t, t.cos()).mul_(1 + 2j)),
}
WRITES = {
    "add_": lambda t, other: t.add_(fitted(CONSTANT, t.shape), alpha=2),
    "sub_": lambda t, other: t.sub_(fitted(other, t.shape), alpha=0.5),
    "mul_": lambda t, other: t.mul_(1.5),
    "copy_": lambda t, other: t.copy_(fitted(other, t.shape).clone()),
    "zero_": lambda t, other: t.zero_(),
    "fill_": lambda t, other: t.fill_(0.7),
    "tanh_": lambda t, other: t.tanh_(),
    "masked_fill_": lambda t, other: t.masked_fill_(fitted(CONSTANT, t.shape) > 0.7, 0.3),
    "lerp_": lambda t, other: t.lerp_(fitted(other, t.shape).clone(), 0.3),
    "index_add_": lambda t, other: t.index_add_(0, torch.tensor([0]), fitted(other, (1, *t.shape[1:])).clone()),
    "addcmul_": lambda t, other: t.addcmul_(fitted(CONSTANT, t.shape), fitted(other, t.shape).clone()),
    "unsqueeze_": lambda t, other: t.unsqueeze_(0),
}


def run(program, x):
    """Run a random program and return all that is left in the pool."""
    pool = [x * 1]
    for name, which, view, other in program:
        base = pool[which % len(pool)]
        target = VIEWS[view % len(VIEWS)](base) if base.ndim else base
        source = pool[other % len(pool)]
        if name in NEW:
            pool.append(NEW[name](target, source))
        elif target.ndim:
            WRITES[name](target, source)
        pool = [t for t in pool if 0 < t.numel() <= 48][-8:]
    return torch.cat([t.reshape(-1) for t in pool])


STEPS = st.tuples(st.sampled_from([*NEW, *WRITES]), *[st.integers(0, 71)] * 3)

# ------------------------------------------------------------------------------------------------------ products

ROUNDING = {torch.float32: 2e-4, torch.float64: 1e-11}


def probes(at, count, seed=1):
    """Return random rows for J and for its transpose."""
    source = torch.Generator().manual_seed(seed)
    m, n = at.shape
    return [torch.randn(count, size, generator=source, dtype=at.dtype) for size in (n, m)]


def assert_close(found, wanted):
    assert (found - wanted).norm() <= ROUNDING[found.dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_models_are_recorded_and_their_products_are_autograds(name, dtype):
    if name == "resized" and torch.__version__ < "2.13":
        pytest.skip("torch 2.6 cannot differentiate the derivative of grid_sample, as 2.13 can")
    model, image = small(name, dtype)
    at = Linearization(model, image)
    assert (at.strategy, at.reason) == ("recorded", "")
    if name == "reentrant checkpoint":
        model.reentrant = False  # the same function, which autograd differentiates
    dense = dense_jacobian(lambda x: flat_response(model(x.clone()), x), image)
    v, u = probes(at, 5)
    assert_close(at.jvp(v), v @ dense.T)
    assert_close(at.vjp(u), u @ dense)
    for i in range(5):
        assert_close(at.jvp(v[i : i + 1]), v[i : i + 1] @ dense.T)
        assert_close(at.vjp(u[i : i + 1]), u[i : i + 1] @ dense)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_recorded_and_agree_with_autograd(name):
    model, image = large(name)
    at = Linearization(model, image)
    assert (at.strategy, at.reason) == ("recorded", "")
    v, u = probes(at, 5)
    jv, jtu = at.jvp(v), at.vjp(u)
    leaf = image.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model(leaf), leaf, u[:1].view(1, -1))
    assert_close(jtu[:1], wanted.view(1, -1))
    assert_close(at.vjp(u[:1]), wanted.view(1, -1))
    # The recorded program cannot know of a step forward: a difference quotient is independent of all of it.
    with torch.no_grad():
        double = model.double()
        step = 1e-7 * v[:1].double().view_as(image)
        change = (double(image.double() + step) - double(image.double() - step)) / 2e-7
    model.float()
    assert (jv[:1] - change).norm() <= 5e-3 * change.norm()
    assert_adjoint(v, jv, u, jtu)


def assert_adjoint(v, jv, u, jtu):
    left, right = (jv.double() @ u.double().T), (v.double() @ jtu.double().T)
    assert (left - right).norm() <= 1e-4 * left.norm()


class Branches(nn.Module):
    """Convolutions of one image by side, whose transposes are rewritten after their slopes were folded."""

    def __init__(self):
        super().__init__()
        self.paths = nn.ModuleList(nn.Conv2d(2, 4, 5, stride=2, bias=False) for _ in range(3))

    def forward(self, x):
        return [nn.functional.gelu(path(x)) for path in self.paths]


def test_a_constant_folded_late_does_not_take_the_name_of_one_folded_before():
    torch.manual_seed(0)
    at = Linearization(Branches(), torch.rand(1, 2, 16, 16), {"block": 1, "others": "cheapest"})
    assert (at.strategy, at.reason) == ("recorded", "")
    assert list(at.tuning.values()).count("phases") == 3


@pytest.mark.slow
def test_a_transformer_is_recorded_at_its_own_size():
    torchvision = pytest.importorskip("torchvision")

    torch.manual_seed(0)
    model = torchvision.models.vit_b_16(weights=None).eval()
    nn.init.normal_(model.heads.head.weight, std=0.02)
    at = Linearization(model, torch.rand(1, 3, 224, 224))
    assert at.strategy == "recorded"
    v, u = probes(at, 2)
    assert_adjoint(v, at.jvp(v), u, at.vjp(u))


@pytest.mark.filterwarnings("ignore")
def test_portilla_simoncelli_statistics_are_recorded():
    plenoptic = pytest.importorskip("plenoptic")
    model = plenoptic.models.PortillaSimoncelli((32, 32), n_scales=2)
    at = Linearization(model, torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert at.strategy == "recorded"
    v, u = probes(at, 5)
    assert_adjoint(v, at.jvp(v), u, at.vjp(u))


@pytest.mark.filterwarnings("ignore")
@given(st.lists(STEPS, min_size=2, max_size=12))
@example([("square", 0, 0, 0), ("view", 0, 1, 0)])  # complex views of rows at odd places
def test_random_programs_of_views_and_writes_in_place_have_autograds_jacobian(program):
    image = torch.linspace(-1.1, 1.3, 12, dtype=torch.float64).view(3, 4)
    try:
        dense = torch.autograd.functional.jacobian(lambda x: run(program, x), image, strict=False).reshape(-1, 12)
    except RuntimeError:  # autograd itself refuses some writes
        reject()
    assume(dense.norm() < 1e6)
    at = Linearization(lambda x: run(program, x), image)
    eye, tall = torch.eye(12, dtype=image.dtype), torch.eye(len(dense), dtype=image.dtype)
    atol = 1e-11 * float(1 + dense.norm())
    for size in (1, 2, 64):
        jacobian = torch.cat([at.jvp(rows) for rows in eye.split(size)]).T
        torch.testing.assert_close(jacobian, dense, rtol=0, atol=atol)
        torch.testing.assert_close(torch.cat([at.vjp(rows) for rows in tall.split(size)]), dense, rtol=0, atol=atol)


# --------------------------------------------------------------------------------------------------- what is refused


class Untransposed(torch.autograd.Function):
    """A product with a matrix, whose reverse rule forgets to transpose."""

    matrix = torch.arange(16.0).view(4, 4)

    @staticmethod
    def forward(ctx, x):
        return x @ Untransposed.matrix.T

    @staticmethod
    def backward(ctx, u):
        return u @ Untransposed.matrix.T

    @staticmethod
    def jvp(ctx, t):
        return t @ Untransposed.matrix.T


def test_a_square_map_is_not_mistaken_for_its_transpose():
    with pytest.warns(UserWarning, match="confirms forward mode, and forward mode serves"):
        at = Linearization(Untransposed.apply, torch.ones(4))
    eye = torch.eye(4)
    assert torch.equal(at.jvp(eye).T, Untransposed.matrix)
    assert torch.equal(at.vjp(eye), Untransposed.matrix)


def sine(backward=lambda u: u, jvp=lambda t: t):
    """Return the sine, with a reverse rule and a forward rule that take their own way with a derivative."""

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, u):
            return backward(u * ctx.saved_tensors[0].cos())

        @staticmethod
        def jvp(ctx, t):
            return jvp(t * ctx.saved_tensors[0].cos())

    return Sine.apply


def hooked(change):
    """Return the sine, with a hook on its gradient."""

    def respond(x):
        y = x.sin()
        if y.requires_grad:
            y.register_hook(change)
        return y

    return respond


def mixed(step, n, dtype):
    """Return a model of one step after a matrix, its image, and the true Jacobian where the step is the sine."""
    source = torch.Generator().manual_seed(n)
    matrix = torch.randn(n, n, generator=source, dtype=dtype) / n**0.5
    image = torch.rand(n, generator=source, dtype=dtype)
    return (lambda x: step(matrix @ x)), image, (matrix @ image).cos()[:, None] * matrix


CHANGES = {
    "1 %": lambda u: 1.01 * u,
    "200 %": lambda u: 3 * u,
    "100 %": lambda u: 0 * u,
    r"\d+": lambda u: u.clamp(-0.3, 0.3),  # not even linear
}


@pytest.mark.parametrize("make", [sine, hooked], ids=["Function", "hook"])
@pytest.mark.parametrize("part", CHANGES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_gradient_that_is_no_derivative_is_not_believed_and_named(dtype, part, make):
    model, image, dense = mixed(make(CHANGES[part]), 30, dtype)
    with pytest.warns(UserWarning, match=f"reverse mode differ by {part}.*confirms forward mode") as caught:
        at = Linearization(model, image)
    assert len(caught) == 1
    assert at.strategy == "recorded"
    assert at.reason == str(caught[0].message)
    eye = torch.eye(30, dtype=dtype)
    assert_close(at.jvp(eye).T, dense)
    assert_close(at.vjp(eye), dense)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("share", "n"), [(1, 307), (1, 762), (0.1, 20), (0.1, 160), (0.1, 517)])
def test_a_forward_rule_off_by_a_percent_cannot_hide_in_rounding_and_a_right_result_is_no_cause_for_a_warning(
    share, n, dtype
):
    wrong = torch.ones(n, dtype=dtype)
    wrong[: int(share * n)] += 0.01
    model, image, dense = mixed(sine(jvp=lambda t: t * wrong), n, dtype)
    at = Linearization(model, image)
    assert "a difference quotient confirms reverse mode" in at.reason
    eye = torch.eye(n, dtype=dtype)
    assert_close(at.jvp(eye).T, dense)
    assert_close(at.vjp(eye), dense)


def test_modes_of_which_neither_is_the_derivative_are_named():
    straight = sine(jvp=lambda t: 2 * t)

    def rounded(x):
        return (4 * x).detach().sin().round() / 4 + straight(x) - straight(x).detach()

    with pytest.warns(UserWarning, match="confirms neither, and reverse mode serves"):
        at = Linearization(rounded, torch.rand(30, dtype=torch.float64))
    assert_close(at.jvp(torch.eye(30).double()), at.image.cos().diag())
    assert_close(at.vjp(torch.eye(30).double()), at.image.cos().diag())


class StraightThrough(torch.autograd.Function):
    """Rounding, with a gradient that passes through."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, u):
        return u


PASSES = {
    "a Function": StraightThrough.apply,
    "detach": lambda x: x + (x.round() - x).detach(),
    "both modes": sine(lambda u: 2 * u, lambda t: 2 * t),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_gradient_made_on_purpose_is_the_derivative_where_forward_mode_does_not_deny_it(name):
    at = Linearization(lambda x: PASSES[name](3 * x), torch.rand(20, dtype=torch.float64))
    assert (at.strategy, at.reason) == ("recorded", "")
    dense = 6 * (3 * at.image).cos().diag() if name == "both modes" else 3 * torch.eye(20).double()
    assert_close(at.jvp(torch.eye(20).double()), dense)
    assert_close(at.vjp(torch.eye(20).double()), dense)


def test_forward_mode_that_is_not_a_number_gives_way_to_reverse_mode():
    def respond(x):
        return sine(jvp=lambda t: t * torch.nan)(x)

    at = Linearization(respond, torch.rand(20, dtype=torch.float64))
    assert (at.strategy, at.reason) == ("recorded", "")
    assert_close(at.jvp(torch.eye(20).double()), at.image.cos().diag())


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_where_nothing_is_recorded_and_the_modes_differ_that_is_said_too(dtype):
    model, image, _ = mixed(sine(lambda u: 1.01 * u if float(u.detach().sum()) > 0 else 1.01 * u.clone()), 30, dtype)
    with pytest.warns(UserWarning, match="differ by 1 %.* confirms forward mode, and reverse mode serves"):
        at = Linearization(model, image)
    assert at.strategy == "double-backward"
    assert "reads a value" in at.reason
    assert "differ by 1 %" in at.reason


@pytest.mark.parametrize("step", ["recorded", "forward-mode"])
def test_what_the_model_holds_constant_is_constant_in_forward_mode_too(step):
    def respond(x):
        with torch.no_grad():
            spread = x.std()
        y = BranchOnCotangent.apply(x) if step == "forward-mode" else 2 * x
        return y / spread

    image = torch.rand(20, dtype=torch.float64)
    with torch.no_grad():
        at = Linearization(respond, image)
        assert at.strategy == step
        assert_close(at.jvp(torch.eye(20).double()), 2 / image.std() * torch.eye(20).double())
    assert torch._C._is_fwd_grad_enabled()


def test_a_model_without_contradictions_is_called_twice():
    calls = []
    Linearization(lambda x: (calls.append(1), x.sin() * x)[1], torch.rand(20))
    assert len(calls) == 2


class NumpySine(torch.autograd.Function):
    """The sine, differentiated in NumPy, out of the recorder's sight."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, u):
        return torch.from_numpy(u.detach().numpy() * ctx.saved_tensors[0].detach().cos().numpy())

    @staticmethod
    def jvp(ctx, t):
        return None


class BranchOnCotangent(torch.autograd.Function):
    """Twice the input; the reverse rule reads a value of the cotangent."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, u):
        return 2 * u if float(u.sum()) > 0 else u + u

    @staticmethod
    def jvp(ctx, t):
        return 2 * t


def test_a_model_that_reads_a_value_of_its_derivative_falls_back_and_says_why():
    at = Linearization(BranchOnCotangent.apply, torch.ones(4))
    assert at.strategy != "recorded"
    assert "reads a value of the derivative" in at.reason
    assert torch.equal(at.vjp(-torch.eye(4)), -2 * torch.eye(4))


class NumpyForward(NumpySine):
    """The same, with a forward rule in NumPy as well."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def jvp(ctx, t):
        return torch.from_numpy(t.numpy() * ctx.saved_tensors[0].detach().cos().numpy())


def test_numpy_inside_a_function_falls_back_and_says_why():
    image = torch.tensor([0.1, 0.7])
    at = Linearization(NumpyForward.apply, image)
    assert at.strategy == "forward-mode"
    assert "leaves torch's operations" in at.reason
    assert_close(at.jvp(torch.eye(2)), image.cos().diag())


def test_a_function_without_any_derivative_gives_an_error_that_names_it():
    @torch.library.custom_op("fisherop_tests::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    with pytest.raises((ValueError, RuntimeError), match="opaque"):
        Linearization(lambda x: opaque(x) + x, torch.ones(3))


# ---------------------------------------------------------------------------------------------------------- lifetime


def normalized_network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU()
    return nn.Sequential(*layers).eval()


WEIGHTS = ("0.weight", "1.weight", "1.bias", "1.running_var", "3.weight", "3.bias")
IMAGE = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_written_afterwards_is_noticed_and_refresh_heals_it(name):
    model = normalized_network()
    op = fo.JacobianOperator(model, IMAGE)
    with torch.no_grad():
        model.state_dict()[name].mul_(1.5)
    rows = torch.eye(op.shape[1])[:3]
    with pytest.raises(RuntimeError, match="weights were written"):
        op.rows(rows)
    op.refresh()
    assert torch.equal(op.rows(rows), fo.JacobianOperator(model, IMAGE, tuning=op.tuning).rows(rows))


def live_network():
    """Return a network whose derivative cannot be recorded."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = normalized_network()

        def forward(self, x):
            return BranchOnCotangent.apply(self.layers(x))

    return Network().eval()


class Holder:
    """Neither a module nor a function, and holds one."""

    def __init__(self, model):
        self.parts = [model]

    def __call__(self, x):
        return self.parts[0](x)

    respond = __call__


def by_default(model):
    def respond(x, model=model):
        return model(x)

    return respond


def by_global_name(model):
    scope = {"network": model}
    exec("def respond(x):\n    return network(x)", scope)
    return scope["respond"]


HOLDERS = {
    "itself": lambda model: model,
    "closure": lambda model: lambda x: model(x),
    "function of a function": lambda model: (lambda inner: lambda x: inner(x))(model.forward),
    "partial": lambda model: partial(nn.Module.__call__, model),
    "default": by_default,
    "global": by_global_name,
    "method": lambda model: Holder(model).respond,
    "object": Holder,
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("strategy", ["recorded", "forward-mode"])
def test_a_weight_is_watched_wherever_the_model_keeps_it_and_however_it_is_served(strategy, holder, name):
    model = normalized_network() if strategy == "recorded" else live_network()
    op = fo.JacobianOperator(HOLDERS[holder](model), IMAGE)
    assert op.strategy == strategy
    weight = next(value for key, value in model.state_dict().items() if key.endswith(name))
    with torch.no_grad():
        weight.mul_(1.5)
    for product in (op, op.T):
        with pytest.raises(RuntimeError, match="weights were written"):
            product @ torch.ones(product.shape[1])
    op.refresh()
    with torch.no_grad():
        change = model(IMAGE + 1e-2) - model(IMAGE - 1e-2)
    assert (op @ torch.full((128,), 2e-2) - change.flatten()).norm() <= 0.05 * change.norm()


def test_a_weight_is_watched_where_the_response_does_not_depend_on_the_image():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    op = fo.JacobianOperator(lambda x: model(torch.zeros_like(x)), torch.ones(3))
    assert op.strategy == "constant"
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    with pytest.raises(RuntimeError, match="weights were written"):
        op @ torch.ones(3)


def test_a_weight_is_watched_where_another_one_was_replaced():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    op = fo.JacobianOperator(model, torch.ones(3))
    model[0].weight = nn.Parameter(torch.eye(3))
    op @ torch.ones(3)
    with torch.no_grad():
        model[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights were written"):
        op @ torch.ones(3)


@pytest.mark.parametrize("step", [torch.clone, BranchOnCotangent.apply])
def test_a_tensor_that_a_function_closes_over_is_watched_too(step):
    factor = torch.linspace(1, 2, 128)
    op = fo.JacobianOperator(lambda x: step(x.flatten() * factor), IMAGE)
    factor.mul_(2)
    with pytest.raises(RuntimeError, match="written"):
        op @ torch.ones(128)


class Counter(nn.Module):
    """A model that counts its calls and averages its responses, and is served in one of two ways."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(128))
        self.weight = nn.Parameter(torch.linspace(1, 2, 128))

    def forward(self, x):
        y = self.step(x.flatten() * self.weight)
        self.calls += 1
        self.average.lerp_(y.detach(), 1 / self.calls)
        return y


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("step", [torch.clone, BranchOnCotangent.apply], ids=["recorded", "forward-mode"])
def test_what_the_model_itself_writes_is_no_weight_that_was_written(step, hold):
    model = Counter(step).eval()
    op = fo.JacobianOperator(hold(model), IMAGE)
    wanted, calls = op @ torch.ones(128), model.calls.item()
    model(3 * IMAGE)
    assert model.calls > calls
    assert torch.equal(op @ torch.ones(128), wanted)
    op.T @ wanted
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights were written"):
        op @ torch.ones(128)


class FirstImage(nn.Module):
    """A model that takes its gain from the first image that it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.zeros(()))

    def forward(self, x):
        if not self.gain:
            self.gain.copy_(x.norm())
        return x / self.gain


def test_what_only_the_first_call_writes_is_watched():
    model = FirstImage().eval()
    op = fo.JacobianOperator(model, IMAGE)
    op @ torch.ones(128)
    model.gain.mul_(2)
    with pytest.raises(RuntimeError, match="weights were written"):
        op @ torch.ones(128)


class Workspace(nn.Module):
    """A model that keeps the last image in a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.seen = torch.zeros(1, 2, 8, 8)

    def forward(self, x):
        self.seen.copy_(x.detach())
        return x * self.seen


def test_a_workspace_overwritten_by_another_call_changes_no_product():
    model = Workspace()
    op = fo.JacobianOperator(model, IMAGE)
    model(3 * IMAGE)
    assert torch.equal(op @ torch.ones(128), IMAGE.flatten())
    assert torch.equal(op.T @ torch.ones(128), IMAGE.flatten())


def test_memory_counts_what_the_products_hold_beside_the_weights():
    def scaled(x):
        return x.flatten() * torch.arange(128.0)

    assert fo.JacobianOperator(scaled, IMAGE).memory == 128 * 4  # J and its transpose share it
    assert fo.JacobianOperator(nn.Linear(8, 3, bias=False), IMAGE).memory == 0


def test_pinned_tuning_gives_the_same_bits():
    model = normalized_network()
    op = fo.FisherOperator(model, IMAGE)
    twin = fo.FisherOperator(model, IMAGE, tuning=op.tuning)
    X = torch.randn(128, 11, generator=torch.Generator().manual_seed(3))
    assert twin.tuning == op.tuning
    assert torch.equal(op @ X, twin @ X)


def test_a_pickled_operator_gives_the_same_bits():
    op = fo.FisherOperator(normalized_network(), IMAGE)
    X = torch.randn(128, 11, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pickle.loads(pickle.dumps(op)) @ X, op @ X)


def test_rows_of_any_layout_give_the_same_products():
    op = fo.JacobianOperator(small("column set", torch.float32)[0], IMAGE)
    columns = torch.randn(128, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(op.rows(columns.T), op.rows(columns.T.contiguous()))
    assert torch.equal(op.rows(columns.T[1:2]), op.rows(columns.T[1:2].clone()))


def test_products_from_two_threads_are_right():
    op = fo.FisherOperator(normalized_network(), IMAGE)
    X = torch.randn(128, 9, generator=torch.Generator().manual_seed(3))
    wanted, found = op @ X, []

    def work():
        found.extend(torch.equal(op @ X, wanted) for _ in range(50))

    in_threads(work)
    assert len(found) == 100
    assert all(found)


def test_operators_made_in_two_threads_are_right_and_leave_torchs_switches_alone():
    model = normalized_network()
    model(IMAGE)
    before, found = switches(), []
    wanted = fo.JacobianOperator(model, IMAGE) @ torch.eye(128)

    def work():
        for _ in range(5):
            found.append(fo.JacobianOperator(model, IMAGE) @ torch.eye(128))

    in_threads(work)
    for result in found:
        assert_close(result, wanted)
    assert len(found) == 10
    assert switches() == before


def in_threads(work):
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def switches():
    sdp = torch.backends.cuda
    return (
        torch.backends.mha.get_fastpath_enabled(),
        sdp.flash_sdp_enabled(),
        sdp.mem_efficient_sdp_enabled(),
        sdp.math_sdp_enabled(),
        torch.backends.mkldnn.enabled,
    )


def test_autocast_around_a_product_does_not_round_it():
    op = fo.FisherOperator(normalized_network(), IMAGE)
    x = torch.randn(128, generator=torch.Generator().manual_seed(3))
    wanted = op @ x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op @ x, wanted)


def test_ten_thousand_products_leave_nothing_behind():
    op = fo.FisherOperator(lambda x: x**2, torch.arange(1.0, 5.0))
    x, X = torch.ones(4), torch.ones(4, 3)

    def alive():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    op @ x, op @ X
    before = alive()
    for _ in range(5000):
        op @ x
        op @ X
    assert alive() <= before + 2
