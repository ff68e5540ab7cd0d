"""A Layer is the truncated network; the front-ends are their formulas; a model is found by its name."""

from __future__ import annotations

import copy
import hashlib
import http.server
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scipy.ndimage import correlate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fisherop import models
from fisherop.models import LG, LGG, LN, Layer, OnOff, load

FRONT_ENDS = [LN, LG, LGG, OnOff]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4))


class Recurrent(nn.Module):
    """Calls one layer twice and an LSTM, and guards itself against every Exception."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(5, 5)
        self.lstm = nn.LSTM(5, 2)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.lstm(self.twice(self.twice(x)))[0]
        except Exception:
            return x


# ---------------------------------------------------------------------------------------------------------------- Layer


def test_layer_is_the_network_cut_after_it():
    net, x = network().eval(), torch.randn(1, 1, 8, 8)
    for i in range(len(net)):
        torch.testing.assert_close(Layer(net, str(i))(x), net[: i + 1](x), rtol=0, atol=0)


def test_layer_response_is_not_overwritten_by_the_in_place_relu_after_it():
    response = Layer(network(), "0")(torch.randn(1, 1, 8, 8))
    assert (response < 0).any()


def test_nothing_after_the_layer_runs():
    net = network()
    net[3].register_forward_hook(lambda *_: pytest.fail("the pass went on"))
    Layer(net, "2")(torch.randn(1, 1, 8, 8))


@pytest.mark.parametrize("training", [True, False])
def test_layer_leaves_the_network_as_it_was(training):
    net = network().train(training)
    net[2].eval()
    modes = [module.training for module in net.modules()]
    layer = Layer(net, "1")
    layer(torch.randn(1, 1, 8, 8))
    with pytest.raises(RuntimeError, match="channels"):
        layer(torch.randn(1, 2, 8, 8))
    assert layer.training == training
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks for module in net.modules())
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 4)


def test_layer_called_twice_gives_its_first_output_and_no_guard_swallows_it():
    net, x = Recurrent(), torch.randn(3, 5)
    torch.testing.assert_close(Layer(net, "twice")(x), net.twice(x))


def test_layer_returns_a_tuple_as_it_is():
    net, x = Recurrent(), torch.randn(3, 5)
    output, (hidden, cell) = Layer(net, "lstm")(x)
    assert output.shape == (3, 2)
    assert hidden.shape == cell.shape == (1, 2)


def test_layer_of_a_layer_stops_at_the_earlier_of_the_two():
    net, x = network(), torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(Layer(Layer(net, "3"), "model.0")(x), net[0](x))


def test_layer_survives_pickle_and_deepcopy():
    layer, x = Layer(network(), "1"), torch.randn(1, 1, 8, 8)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert twin.model is not layer.model
        assert repr(twin) == repr(layer) == "Layer(Sequential, '1')"
        torch.testing.assert_close(twin(x), layer(x))


def test_threads_share_one_network_each_with_its_own_layer():
    net, x = network().eval(), torch.randn(1, 1, 8, 8)
    layers = [Layer(net, str(i)) for i in range(len(net))]
    expected = [layer(x) for layer in layers]
    start = threading.Barrier(len(layers))

    def repeat(layer: Layer) -> list[Tensor]:
        start.wait()
        return [layer(x) for _ in range(50)]

    with ThreadPoolExecutor(len(layers)) as pool:
        for responses, response in zip(pool.map(repeat, layers), expected, strict=True):
            assert all(torch.equal(again, response) for again in responses)


def test_layer_is_differentiated_in_both_modes_and_recorded():
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            recorded.append(func)
            return func(*args, **(kwargs or {}))

    recorded: list[object] = []
    layer, x, t = Layer(network().double(), "1"), torch.randn(1, 1, 8, 8).double(), torch.randn(1, 1, 8, 8).double()
    response, jvp = torch.func.jvp(layer, (x,), (t,))
    _, pullback = torch.func.vjp(layer, x)
    cotangent = torch.randn_like(response)
    torch.testing.assert_close((cotangent * jvp).sum(), (pullback(cotangent)[0] * t).sum())
    with Recorder():
        layer(x)
    assert torch.ops.aten.relu_.default in recorded
    assert torch.ops.aten.addmm.default not in recorded


def test_layer_numbers_are_those_of_the_tutorial():
    torchvision = pytest.importorskip("torchvision")
    resnet = torchvision.models.resnet18()
    with torch.device("meta"):  # 500 MB of weights, not needed for their names
        vgg = torchvision.models.vgg11()
    names = [Layer(resnet, i).layer for i in range(14)]
    assert names[:7] == ["conv1", "bn1", "relu", "maxpool", "layer1.0", "layer1.1", "layer2.0"]
    assert names[-3:] == ["layer4.1", "avgpool", "fc"]
    assert Layer(vgg, 5).layer == "features.5"
    x = torch.rand(1, 3, 32, 32)
    assert Layer(resnet, 3)(x).shape == (1, 64, 8, 8)
    assert Layer(resnet, 6)(x).shape == (1, 128, 4, 4)
    with pytest.raises(ValueError, match=r"layer 14 is out of range.* 0 to 13, 'conv1', .*'fc'"):
        Layer(resnet, 14)
    with pytest.raises(ValueError, match=r"did you mean 'layer2\.1', "):
        Layer(resnet, "layer2.7")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("twic", "did you mean 'twice'"),
        ("xyz", "top-level layers are 'twice', 'lstm', 'unused'"),
        (0, "name the layer"),
    ],
)
def test_layer_that_is_not_there_is_refused_with_what_is(layer, message):
    with pytest.raises(ValueError, match=message):
        Layer(Recurrent(), layer)


def test_layer_that_is_never_called_is_an_error():
    with pytest.raises(RuntimeError, match=r"never called '0\.unused'"):
        Layer(nn.Sequential(Recurrent(), nn.Identity()), "0.unused")(torch.randn(3, 5))


def test_layer_of_a_function_is_refused():
    with pytest.raises(TypeError, match="not builtin_function_or_method"):
        Layer(torch.sin, "0")


# ----------------------------------------------------------------------------------------------------------- front-ends


def image(dtype: torch.dtype = torch.float64, height: int = 24, width: int = 20) -> Tensor:
    """Return noise with a black and a flat part."""
    x = torch.rand(1, 1, height, width, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[..., :8, :6] = 0
    x[..., 12:, 10:] = 0.5
    return x


def test_lgg_is_its_formula():
    c, s, p, k, alpha, beta = 1.5, 4.0, 3.0, 2.0, 2.5, 7.0
    x = image()[0, 0].numpy()

    def blur(z, std):
        radius2 = (torch.arange(-4, 5.0, dtype=torch.float64) ** 2).numpy()
        kernel = torch.exp(-torch.from_numpy(radius2[:, None] + radius2) / (2 * std**2)).numpy()
        return correlate(z, kernel / kernel.sum(), mode="mirror")

    u = 1.25 * (blur(x, c) - blur(x, s)) / (1 + alpha * blur(x, p))
    v = blur(u**2, k) ** 0.5 + 1e-6
    expected = nn.functional.softplus(torch.from_numpy(u / (1 + beta * v)))
    model = LGG(c, s, p, alpha, k, beta, kernel_size=9).double()
    torch.testing.assert_close(model(image())[0, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:pretrained is True but cache_filt")
def test_front_ends_equal_those_of_plenoptic(dtype):
    po = pytest.importorskip("plenoptic").models
    theirs = [po.LinearNonlinear, po.LuminanceGainControl, po.LuminanceContrastGainControl, po.OnOff]
    x = image(dtype)
    for our, their in zip(FRONT_ENDS, theirs, strict=True):
        expected = their((31, 31), pretrained=True).to(dtype)(x)
        torch.testing.assert_close(our().to(dtype)(x), expected, rtol=0, atol=1e-6)
    masked = po.OnOff((31, 31), pretrained=True, apply_mask=True).to(dtype)(x)
    torch.testing.assert_close(OnOff(mask=True).to(dtype)(x), masked, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", FRONT_ENDS)
def test_front_end_cast_to_float64_has_all_its_digits(make):
    torch.set_default_dtype(torch.float64)
    try:
        born_double = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(born_double.buffers()).dtype == torch.float64
    torch.testing.assert_close(make().double()(image()), born_double(image()), rtol=0, atol=0)
    torch.testing.assert_close(make().half().double()(image()), born_double(image()), rtol=0, atol=0)


@pytest.mark.parametrize("level", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [LGG, OnOff])
def test_front_end_jacobian_at_a_flat_image_is_finite_and_linear_filtering(make, dtype, level):
    """Where there is no contrast the second gain control is 1, up to its 1e-6; so is the slope of softplus, 1/2."""
    model, x = make().to(dtype), torch.full((1, 1, 24, 20), level, dtype=dtype)
    t = image(dtype)
    response, jvp = torch.func.jvp(model, (x,), (t,))
    cotangent = torch.rand_like(response)
    (vjp,) = torch.func.vjp(model, x)[1](cotangent)
    assert vjp.isfinite().all()
    torch.testing.assert_close((cotangent * jvp).sum(), (vjp * t).sum(), rtol=1e-4, atol=1e-4)
    scalar = torch.as_tensor(model._settings["luminance_scalar"], dtype=dtype).reshape(-1, 1, 1)
    filtered = model._convolve(t, model.filters)[:, : response.shape[1]] / (1 + scalar * level)
    torch.testing.assert_close(jvp, filtered / 2, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", FRONT_ENDS)
def test_front_end_with_circular_padding_moves_with_the_image(make):
    model, x = make(padding="circular").double(), image(height=18, width=16)
    shifted = x.roll((5, -3), (-2, -1))
    torch.testing.assert_close(model(shifted), model(x).roll((5, -3), (-2, -1)))


@pytest.mark.parametrize("padding", ["reflect", "circular", "replicate", "constant"])
def test_front_end_takes_every_image_that_its_padding_can_pad(padding):
    smallest = {"reflect": 16, "circular": 15}.get(padding, 1)
    model = LGG(padding=padding)
    assert model(torch.rand(1, 1, smallest, smallest)).isfinite().all()
    if smallest > 1:
        with pytest.raises(ValueError, match=f"at least {smallest}x{smallest} .* padding='replicate'"):
            model(torch.rand(1, 1, 40, smallest - 1))


def test_on_off_is_two_lgg_of_opposite_sign():
    both = OnOff((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (0.5, 1.5), (2.0, 1.0), (7.0, 8.0)).double()
    on = LGG(1.0, 3.0, 5.0, 0.5, 2.0, 7.0).double()
    off = LGG(2.0, 4.0, 6.0, 1.5, 1.0, 8.0, amplitude=-1.25).double()
    torch.testing.assert_close(both(image()), torch.cat([on(image()), off(image())], dim=1))


def test_on_off_mask_is_one_in_the_middle_and_zero_in_the_corners():
    x = image(height=41, width=31)
    masked, whole = OnOff(mask=True).double()(x), OnOff().double()(x)
    assert torch.equal(masked[..., 15:26, 10:21], whole[..., 15:26, 10:21])
    assert not masked[..., :5, :].any()
    assert not masked[..., :, 0].any()


@pytest.mark.parametrize("make", FRONT_ENDS)
def test_front_end_is_its_repr_and_survives_pickle(make):
    model = make(amplitude=2.0, kernel_size=7).double()
    for twin in (eval(repr(model)).double(), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).float().double()):
        assert torch.equal(twin(image()), model(image()))


def test_front_end_refuses_what_it_cannot_take():
    model = LN()
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\): fisherop.images.to_grey"):
        model(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="shape"):
        model(torch.rand(32, 32))
    with pytest.raises(ValueError, match=r"float64 and the model torch.float32: call model.to\(torch.float64\)"):
        model(torch.rand(1, 1, 32, 32).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 30}, "odd"),
        ({"padding": "mirror"}, "'reflect', 'circular'"),
        ({"center_std": 0.0}, "center_std must be positive"),
        ({"center_std": (1.0, 2.0)}, "one value for each of 1"),
        ({"contrast_scalar": -1.0}, "at least 0"),
    ],
)
def test_front_end_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LGG(**options)


# ------------------------------------------------------------------------------------------------------------ by a name


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return an empty torch home, which no download can fill."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(models, "urlopen", _unreachable)
    return tmp_path


def _unreachable(*_, **__):
    raise OSError("no network")


@pytest.mark.parametrize("make", FRONT_ENDS)
def test_load_finds_front_ends_in_any_case(make):
    for name in (make.__name__, make.__name__.lower(), make.__name__.upper()):
        model, note = load(name)
        assert type(model) is make
        assert not model.training
        assert note is None


def test_load_without_trained_weights_draws_them_from_the_seed_and_says_so(home, capsys):
    pytest.importorskip("torchvision")
    state = torch.get_rng_state()
    (model, note), (twin, _), (other, _) = load("SqueezeNet1_1"), load("squeezenet1_1"), load("squeezenet1_1", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [next(each.parameters()) for each in (model, twin, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not model.training
    for word in ("random weights (seed 0)", "no network", "squeezenet1_1-b8a52dc0.pth", str(home)):
        assert word in note
    assert list(home.rglob("*")) == []
    assert capsys.readouterr() == ("", "")


def test_load_without_trained_weights_asks_for_no_backbone_and_warns_of_nothing(home):
    pytest.importorskip("torchvision")
    for name in ("lraspp_mobilenet_v3_large", "googlenet"):
        assert "random" in load(name)[1]


def test_load_takes_trained_weights_from_the_torch_home(home, capsys):
    torchvision = pytest.importorskip("torchvision")
    trained = torchvision.models.squeezenet1_1()
    file = home / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir(parents=True)
    torch.save(trained.state_dict(), file)
    model, note = load("squeezenet1_1")
    assert note is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve the folder ``tmp_path / "web"`` on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(tmp_path / "web"), **kwargs)

        def log_message(self, *args):
            pass

    (tmp_path / "web").mkdir()
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def _fetched(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_fetch_keeps_a_checkpoint_whose_hash_is_right_and_nothing_else(server, tmp_path, capsys):
    right = f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    for name in (right, "net-00000000.pth"):
        (tmp_path / "web" / name).write_bytes(b"weights")
    models._fetch(f"{server}/{right}")
    with pytest.raises(RuntimeError, match="hash"):
        models._fetch(f"{server}/net-00000000.pth")
    with pytest.raises(OSError, match="404"):
        models._fetch(f"{server}/net-11111111.pth")
    assert _fetched(tmp_path) == [right]
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    (tmp_path / "fisherop_zoo.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self, n=3): super().__init__(n, n)\n"
        "class Needs(torch.nn.Module):\n"
        "    def __init__(self, n): super().__init__()\n"
        "def build(): return Net(5)\n"
        "def nothing(): return None\n"
        "def double(x): return 2 * x\n"
        "net = Net(7)\n"
        "width = 7\n"
    )
    (tmp_path / "fisherop_broken.py").write_text("import fisherop_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    import fisherop_zoo

    return fisherop_zoo


def test_load_takes_a_module_as_it_is_calls_what_needs_no_argument_and_leaves_functions(zoo):
    assert load("fisherop_zoo:net")[0] is zoo.net
    assert not zoo.net.training
    assert load("fisherop_zoo:double")[0] is zoo.double
    assert load("torch:sin")[0] is torch.sin
    assert load("fisherop_zoo:Net")[0].in_features == 3
    assert torch.equal(load("fisherop_zoo:build")[0].weight, load("fisherop_zoo:build")[0].weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fisherop_zoo:Needs", "gives no model but <class"),
        ("fisherop_zoo:nothing", "gives no model but None"),
        ("fisherop_zoo:width", "gives no model but 7"),
        ("fisherop_zoo:buidl", "did you mean 'build'"),
        ("fisherop_zoo:", "write package.module:name"),
        ("fisherop_zo:build", "no module 'fisherop_zo'"),
    ],
)
def test_load_refuses_what_is_no_model_and_says_what_to_name(zoo, name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_load_shows_an_import_that_fails_inside_the_users_module(zoo):
    with pytest.raises(ModuleNotFoundError, match="fisherop_not_there"):
        load("fisherop_broken:net")


@pytest.mark.parametrize(("name", "close"), [("resnet19", "'resnet18'"), ("lng", "'ln'"), ("qqq", "Known are 'LN'")])
def test_load_names_what_an_unknown_name_may_mean(name, close):
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=close):
        load(name)


def test_load_without_torchvision_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"fisherop\[vision\]"):
        load("resnet18")
