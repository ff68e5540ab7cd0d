"""Devices: exact arithmetic, graphs of kernels, CuPy's operators and solvers. What needs no card is tested without."""

import inspect
import json
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from models import MODELS, build, dense_jacobian
from strategies import block, spectrum_operator

import fisherop as fo
from fisherop import gpu
from fisherop.linearize import exact_arithmetic
from fisherop.linearize.capture import SIZES, Captured, step_by_step

HOST_METHODS = ("arpack", "lobpcg")
METHODS = ("auto", "exact", "lanczos", "nullspace", "power", *HOST_METHODS)


def on_card(name, dtype=torch.float32):
    """Return a Fisher operator on the card, and its dense matrix in float64."""
    model, image = build(name, dtype)
    J = dense_jacobian(model, image).double().numpy()
    model = model.cuda() if isinstance(model, torch.nn.Module) else model
    return fo.FisherOperator(model, image.cuda()), J.T @ J


@pytest.fixture
def cupy():
    """CuPy, where it is installed."""
    pytest.importorskip("cupy")
    return gpu.import_cupy()


# --------------------------------------------------------------------------------------------------- exact arithmetic


@pytest.fixture(params=["medium", "high"])
def coarse(request):
    """Let the user ask for coarse float32 products; put the settings back after the test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(request.param)
    torch.backends.cudnn.allow_tf32 = True
    yield settings()
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def settings():
    backends = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]
    owners = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    return [owner.fp32_precision for owner in owners]


def is_exact():
    return not {"tf32", "bf16", True} & set(settings())


def test_solvers_run_in_full_precision_and_put_the_users_settings_back(coarse):
    seen = []
    matrix, _ = spectrum_operator(np.linspace(1, 0.1, 60), dtype=torch.float32)
    fo.eigendistortions(matrix, 1, "LM", "lanczos", callback=lambda progress: seen.append(is_exact()))
    assert not is_exact()
    assert seen
    assert all(seen)
    assert settings() == coarse


def test_settings_come_back_after_an_error_and_from_inside_one_another(coarse):
    def failing():
        with exact_arithmetic():
            with exact_arithmetic():
                found.append(is_exact())
            found.append(is_exact())
            raise RuntimeError("inside")

    found = []
    with pytest.raises(RuntimeError, match="inside"):
        failing()
    assert found == [True, True]
    assert settings() == coarse


def test_settings_come_back_when_the_last_of_several_threads_leaves(coarse):
    first_in, second_out = threading.Event(), threading.Event()
    found = []

    def first():
        with exact_arithmetic():
            first_in.set()
            second_out.wait(10)
            found.append(is_exact())

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait(10)
    with exact_arithmetic():
        pass
    found.append(is_exact())
    second_out.set()
    thread.join()
    assert found == [True, True]
    assert settings() == coarse


@pytest.mark.gpu
def test_products_are_exact_whatever_the_user_set(coarse):
    F, dense = on_card("conv relu pool")
    V = block(0, len(dense), 5)
    product = (F @ torch.tensor(V, dtype=torch.float32).to(F.device)).double().cpu().numpy()
    assert np.linalg.norm(product - dense @ V) <= 1e-5 * np.linalg.norm(dense @ V)
    assert settings() == coarse


# ---------------------------------------------------------------------------------------------------- graphs of kernels


def test_on_the_host_a_function_is_called_as_it_is():
    calls = []
    function = Captured(lambda x: calls.append(x) or 2 * x)
    x = torch.ones(3)
    for _ in range(4):
        assert torch.equal(function(x), 2 * x)
    assert all(call is x for call in calls)
    assert len(calls) == 4
    assert not function.failure


@pytest.mark.gpu
def test_a_shape_met_again_is_replayed_and_results_are_the_callers_own():
    calls = []
    function = Captured(lambda x: calls.append(1) or (2 * x).cumsum(0))
    results = []
    for i in range(6):
        x = torch.full((4,), float(i), device="cuda")
        results.append((function(x), (2 * x).cumsum(0)))
    assert len(calls) < 6
    assert not function.failure
    assert all(torch.equal(*pair) for pair in results)
    with step_by_step():
        before = len(calls)
        function(x)
        assert len(calls) == before + 1


@pytest.mark.gpu
def test_graphs_of_many_sizes_share_memory_and_stay_right():
    function = Captured(lambda x: (x[:, None] * torch.arange(5.0, device="cuda")).sum(1) + x.flip(0))
    source = torch.Generator("cuda").manual_seed(0)
    for _ in range(2):
        for size in np.repeat(range(1, SIZES + 4), 3).tolist():
            x = torch.randn(size, device="cuda", generator=source)
            torch.testing.assert_close(function(x), 10 * x + x.flip(0))
    assert len(function._graphs) <= SIZES
    assert all(graph is not None for graph in function._graphs.values())
    assert not function.failure


@pytest.mark.gpu
def test_a_function_that_waits_for_the_host_is_called_step_by_step():
    function = Captured(lambda x: x * float(torch.ones(1, device="cuda").item()))
    x = torch.ones(3, device="cuda")
    for _ in range(4):
        assert torch.equal(function(x), x)
    assert "_local_scalar_dense waits" in function.failure
    assert torch.equal(Captured(lambda x: 3 * x)(x), 3 * x)  # the device is as good as before


BROKEN = """
import torch
from fisherop.linearize.capture import Captured

x = torch.ones(3, device="cuda")
broken = Captured(lambda x: torch.cuda.synchronize() or 2 * x)
for function in (broken, Captured(lambda x: 3 * x), Captured(lambda x: x @ torch.ones(3, 3, device="cuda"))):
    for _ in range(3):
        assert (function(x) == function.function(x)).all()
    assert bool(function.failure) == (function is broken), function.failure
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
torch.randn(3, device="cuda")
"""


@pytest.mark.gpu
def test_after_a_capture_that_failed_the_device_is_as_good_as_before():
    found = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.gpu
def test_graphs_are_captured_after_all_of_the_others_are_gone():
    x = torch.randn(5, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for _ in range(3):
        weights = torch.randn(64, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        function = Captured(lambda x, w=weights: x @ w)
        for _ in range(3):
            torch.testing.assert_close(function(x), x @ weights)
        assert not function.failure
        del function


@pytest.mark.gpu
def test_replays_on_several_streams_wait_for_each_other():
    function = Captured(lambda x: x @ x.new_ones(256, 256) / 256)
    x = torch.randn(64, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    wanted = function(x).clone()
    results = []
    for _ in range(20):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(function(x))
    torch.cuda.synchronize()
    for result in results:
        torch.testing.assert_close(result, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_captured_products_agree_with_the_dense_matrix(name):
    F, dense = on_card(name)
    for width in (1, 1, 5, 5, 5, 7, 1, 1):
        V = block(width, len(dense), width)
        product = (F @ torch.tensor(V, dtype=torch.float32).to(F.device)).double().cpu().numpy()
        assert np.linalg.norm(product - dense @ V) <= 1e-4 * np.linalg.norm(dense @ V)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::fisherop.ConvergenceWarning")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_on_a_card_what_the_host_gives(method):
    model, image = build("conv relu pool", torch.float32)
    host = fo.eigendistortions(fo.FisherOperator(model, image), 3, "BE", method, rng=0)
    card = fo.eigendistortions(fo.FisherOperator(model.cuda(), image.cuda()), 3, "BE", method, rng=0)
    assert card.eigendistortions.is_cuda
    np.testing.assert_allclose(card.eigenvalues, host.eigenvalues, atol=3e-5 * host.lambda_max)
    assert np.array_equal(card.converged, host.converged)


# ----------------------------------------------------------------------------------------------------------------- CuPy


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy, here in CuPy's place, reads DLPack only to read it"
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_columns_are_multiplied_where_they_lie(order):
    seen = []

    def double(rows):
        seen.append(rows)
        return torch.cat([2 * rows, rows], dim=1)

    X = np.asarray(block(0, 6, 4), order=order)
    Y = gpu.multiplied(X, double, np.float64, np)
    np.testing.assert_array_equal(Y, np.concatenate([2 * X, X]))
    assert (seen[0].data_ptr() == X.ctypes.data) == (order == "F")  # columns in a row of memory are not copied
    assert Y.flags.writeable  # solvers write into what they are given
    Y[:] = 0
    assert X.any()


def test_complex_and_foreign_columns_are_multiplied_in_the_operators_dtype():
    kinds = []

    def product(rows):
        kinds.append(rows.dtype)
        return 3 * rows

    X = block(0, 6, 2) + 1j * block(1, 6, 2)
    np.testing.assert_allclose(gpu.multiplied(X, product, np.float32, np), 3 * X, rtol=1e-6)
    gpu.multiplied(np.ones((6, 1), dtype=int), product, np.float32, np)
    assert set(kinds) == {torch.float32}


def test_an_operator_on_the_host_is_refused_in_a_sentence():
    F = fo.FisherOperator(torch.square, torch.ones(3))
    for call in (F.to_cupy, fo.JacobianOperator(torch.square, torch.ones(3)).to_cupy):
        with pytest.raises(ValueError, match="on cpu, and CuPy works on CUDA devices"):
            call()
    with pytest.raises(ValueError, match="'cupyx' works on CUDA devices, and the operator is on cpu"):
        fo.eigendistortions(F, method="cupyx")


def test_without_cupy_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r'cannot be imported .*: pip install "fisherop\[gpu\]"'):
        gpu.import_cupy()


def test_what_is_cupys_is_told_by_its_class():
    for thing in (np.ones((2, 2)), torch.ones(2, 2), fo.FisherOperator(torch.square, torch.ones(2))):
        assert not gpu.is_cupys(thing)


def test_twins_of_operators_follow_cupyx(cupy):
    from cupyx.scipy.sparse.linalg import LinearOperator

    F, J = (kind(lambda x: x[..., :2] ** 2, torch.ones(3)) for kind in (fo.FisherOperator, fo.JacobianOperator))
    twin, other = (gpu._twin_class()(op) for op in (F, J))
    assert isinstance(twin, LinearOperator)
    assert (twin.shape, other.shape, twin.dtype) == ((3, 3), (2, 3), np.float32)
    assert twin.H is twin is twin.T
    assert other.H.shape == (3, 2)
    assert other.H.H.op is J
    assert gpu.is_cupys(twin)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_cupys_products_agree_with_the_dense_matrix(name, cupy):
    F, dense = on_card(name)
    J = fo.JacobianOperator(F.linearization.model, F.image)
    V, U = block(0, len(dense), 4).astype(np.float32), block(1, J.shape[0], 4).astype(np.float32)
    FV, JV, JtU = F.to_cupy() @ cupy.asarray(V), J.to_cupy() @ cupy.asarray(V), J.to_cupy().H @ cupy.asarray(U)
    assert np.linalg.norm(FV.get() - dense @ V) <= 1e-4 * np.linalg.norm(dense @ V)
    left, right = JV.get().T.astype(float) @ U, V.T.astype(float) @ JtU.get()
    assert np.linalg.norm(left - right) <= 1e-4 * np.linalg.norm(left)  # max-pooling adds up in any order
    assert (F.to_cupy() @ cupy.asarray(V[:, 0])).shape == (len(dense),)


@pytest.mark.gpu
def test_products_on_a_stream_of_cupys_own_are_right(cupy):
    F, dense = on_card("conv relu pool")
    twin = F.to_cupy()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for seed in range(20):
            V = cupy.asarray(block(seed, len(dense), 3).astype(np.float32))
            product = twin @ V
            product += 1  # on this stream, after the product
        stream.synchronize()
    wanted = dense @ V.get() + 1
    assert np.linalg.norm(product.get() - wanted) <= 1e-4 * np.linalg.norm(wanted)


@pytest.mark.gpu
def test_cupyx_solvers_reach_the_dense_truth(cupy):
    from cupyx.scipy.sparse import linalg

    F, dense = on_card("gain control", torch.float64)
    twin, n = F.to_cupy(), len(dense)
    values = np.linalg.eigvalsh(dense)
    found, _ = linalg.eigsh(twin, k=3, which="LA", ncv=n // 2)
    np.testing.assert_allclose(np.sort(found.get()), values[-3:], rtol=1e-6)
    found, _ = linalg.lobpcg(twin, cupy.asarray(block(0, n, 3)), tol=1e-8 * values[-1], maxiter=500)
    np.testing.assert_allclose(np.sort(found.get()), values[-3:], rtol=1e-5)
    J = fo.JacobianOperator(F.linearization.model, F.image).to_cupy()
    singular = linalg.svds(J, k=2, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(singular.get()) ** 2, values[-2:], rtol=1e-5)
    shift = cupy.asarray(block(1, n)[:, None])[:, 0]
    plus = twin + linalg.LinearOperator((n, n), matvec=lambda x: values[-1] * x, dtype=np.float64)
    relative = "rtol" if "rtol" in inspect.signature(linalg.cg).parameters else "tol"  # before CuPy 14
    solution, info = linalg.cg(plus, shift, **{relative: 1e-8})
    assert info == 0
    np.testing.assert_allclose(dense @ solution.get() + values[-1] * solution.get(), shift.get(), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "values",
    [
        np.linspace(1, 0.1, 300),
        1e-6 * np.linspace(1, 0.1, 300),
        np.r_[1.0, np.linspace(0.9, 0.5, 199), np.zeros(100)],
        np.r_[np.ones(4), np.linspace(0.5, 0.1, 296)],
        np.ones(300),
        np.r_[1.0, np.zeros(299)],
    ],
    ids=["plain", "small", "null space", "multiple", "identity", "rank one"],
)
def test_method_cupyx_is_right_or_says_that_it_is_not(values, cupy, recwarn):
    matrix = spectrum_operator(values)[0].cuda()
    start = torch.randn(300, dtype=torch.float64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    before = start.clone()
    for k, which in ((1, "LM"), (3, "LM"), (2, "SM"), (2, "BE")):
        result = fo.eigendistortions(matrix, k, which, "cupyx", v0=start, rng=0)
        claims = result.converged
        wanted = np.sort(values)[::-1][result.index]
        np.testing.assert_allclose(result.eigenvalues[claims], wanted[claims], atol=3e-6 * values.max())
        if values[0] != values[-1] and len(set(values)) > 100:
            assert claims.all()
    assert torch.equal(start, before)


@pytest.mark.gpu
def test_operators_of_cupys_are_solved_as_others_are(cupy):
    F, dense = on_card("gain control", torch.float64)
    values = np.linalg.eigvalsh(dense)[::-1]
    from cupyx.scipy.sparse import csr_matrix
    from cupyx.scipy.sparse.linalg import aslinearoperator

    result = fo.eigendistortions(F.to_cupy(), 3, rng=0)
    assert result.eigendistortions.shape == fo.eigendistortions(F, 3, rng=0).eigendistortions.shape
    for op in (cupy.asarray(dense), csr_matrix(cupy.asarray(dense)), aslinearoperator(cupy.asarray(dense))):
        result = fo.eigendistortions(op, 3, method="lanczos", rng=0)
        assert result.eigendistortions.is_cuda
        np.testing.assert_allclose(result.eigenvalues, values[result.index], atol=3e-6 * values[0])


# ----------------------------------------------------------------------------------------------------- the suite itself


def test_the_benchmark_says_what_it_needs_and_runs_on_the_host(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision")
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert "no CUDA device is at hand; --device cpu --tiny" in capsys.readouterr().err
    written = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--only", "truth", "product", "many", "--json", str(written)]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    with torch.random.fork_rng():
        runpy.run_path(str(script), run_name="__main__")
    figures = {figure["name"]: figure for figure in json.loads(written.read_text())["figures"]}
    assert figures["eigenvalues here and on the host: difference"]["holds"]
    assert figures["adjointness under max-pooling"]["holds"]
    assert figures["images not converged"]["value"] == 0
    assert not any("failed" in name for name in figures)


def test_require_gpu_turns_a_skip_into_a_failure():
    here = Path(__file__)
    name = f"{here}::test_a_function_that_waits_for_the_host_is_called_step_by_step"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "--require-gpu", name]
    code = f"import os, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; os.execv(sys.executable, {command!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=here.parents[1], check=False
    )
    assert done.returncode == 1, done.stdout
    assert "--require-gpu was given: Skipped: needs a CUDA device" in done.stdout
