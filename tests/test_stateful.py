"""An operator through any sequence of products, copies, solver calls and changes of weights is a dense matrix still."""

import copy
import pickle
import warnings
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import assume, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import build, dense_jacobian
from noises import NOISES
from scipy.sparse.linalg import aslinearoperator

import fisherop as fo
from fisherop import testing
from fisherop.testing import strategies

PICKLED = ("conv relu pool", "gain control", "attention", "fourier", "dict", "linear m<n")
KINDS = sorted(set(NOISES) - {"poisson", "gains", "custom functions", "precision", "custom root"})


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default float32": lambda: default_dtype(torch.float32),
}


FORMS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
    "whole numbers": lambda x: np.rint(5 * x).astype(int),
    "float32": lambda x: x.astype(np.float32),
    "complex": lambda x: x + 1j * x[::-1],
    "sparse": sp.csr_array,
    "tensor": torch.from_numpy,
    "tensor with gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    **({"tensor on the GPU": lambda x: torch.from_numpy(x).cuda()} if torch.cuda.is_available() else {}),
}
LAWS = (
    testing.assert_linear,
    testing.assert_adjoint,
    testing.assert_symmetric,
    testing.assert_psd,
    testing.assert_matmat_consistent,
    testing.assert_no_aliasing,
)


def named_models():
    return st.builds(build, st.sampled_from(PICKLED), strategies.dtypes(), strategies.seeds())


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


class Operators(RuleBasedStateMachine):
    """One operator, the dense matrix that it is, and copies made on the way with theirs."""

    @initialize(
        subject=st.one_of(strategies.models(), named_models()),
        kind=st.sampled_from(["Jacobian", "Fisher"]),
        noise=st.sampled_from(["unit", *KINDS]),
        within=st.sampled_from([None, "mask", "basis", "band"]),
        seed=strategies.seeds(),
        place=st.sampled_from(sorted(CONTEXTS)),
    )
    def build(self, subject, kind, noise, within, seed, place):
        self.model, self.image = subject
        self.kind, self.noise = kind, noise
        n, m = self.image.numel(), len(self.jacobian(self.model, self.image))
        if within == "mask":
            mask = torch.arange(n) % 3 != 1
            within = mask.reshape(self.image.shape)
        elif within == "basis":
            within = gaussian(seed, n, 1 + seed % n)
        elif within == "band":
            within = fo.restrict.Band(0.0, 0.4)
        with CONTEXTS[place]():
            if kind == "Jacobian":
                self.op = fo.JacobianOperator(self.model, self.image)
            else:
                self.op = fo.FisherOperator(self.model, self.image, NOISES[noise][0](m), within)
        self.copies = []
        self.settle()

    def settle(self):
        """Note the matrix that the operator is now."""
        self.dense, self.result = self.matrix(self.op), None
        self.stale = self.replaced = False
        self.count = self.op.n_matvec

    def jacobian(self, model, image):
        """Return the Jacobian by formula, or entry by entry by autograd."""
        if isinstance(model, testing.DenseModel):
            return model.jacobian(image).numpy()
        return dense_jacobian(model, image).double().numpy()

    def matrix(self, op):
        """Return the matrix that an operator should be after it was made or refreshed."""
        J = self.jacobian(op.linearization.model, op.image)
        if self.kind == "Jacobian":
            return J
        W = NOISES[self.noise][1](op.response.double()).double().numpy()
        B = op.to_image(torch.eye(op.shape[0])).reshape(op.shape[0], -1).double().numpy()
        return B @ J.T @ W @ J @ B.T

    def near(self, found, expected, size):
        eps = np.finfo(self.op.dtype).eps
        found = np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found)
        assert found.shape == expected.shape
        assert np.linalg.norm(found - expected) <= 5e3 * eps * size, (found, expected)

    def multiplies(self, op, dense, x):
        """Compare a product with the dense one."""
        wide = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x.toarray() if sp.issparse(x) else x
        self.near(op @ x, dense @ wide, np.linalg.norm(dense) * np.linalg.norm(wide))

    @rule(
        columns=st.sampled_from([None, 0, 1, 3, 20]),
        form=st.sampled_from(sorted(FORMS)),
        adjoint=st.booleans(),
        seed=strategies.seeds(),
        place=st.sampled_from(sorted(CONTEXTS)),
    )
    @precondition(lambda self: not self.stale)
    def multiply(self, columns, form, adjoint, seed, place):
        op, dense = (self.op.T, self.dense.T) if adjoint else (self.op, self.dense)
        assume(columns or form != "sparse")
        x = FORMS[form](gaussian(seed, dense.shape[1], *([] if columns is None else [columns])))
        with CONTEXTS[place]():
            self.multiplies(op, dense, x)

    @rule(law=st.sampled_from(LAWS), seed=strategies.seeds())
    @precondition(lambda self: not self.stale)
    def keep_a_law(self, law, seed):
        assume(self.kind == "Fisher" or law not in (testing.assert_symmetric, testing.assert_psd))
        law(self.op, rng=seed)

    @rule(way=st.sampled_from([lambda op: pickle.loads(pickle.dumps(op)), copy.deepcopy]), swap=st.booleans())
    def copy(self, way, swap):
        twin = way(self.op)
        assert twin.linearization.model is not self.model
        assert twin.tuning == self.op.tuning
        if self.stale or self.replaced:  # a copy has the weights of now
            dense = self.matrix(twin)
        else:
            dense, x = self.dense, gaussian(0, self.op.shape[1])
            assert np.array_equal(twin @ x, self.op @ x)
        self.copies.append((twin, dense))
        if swap and not self.stale:
            self.copies[-1] = (self.op, self.dense)
            self.op, self.model = twin, twin.linearization.model
            self.settle()

    @rule(place=st.integers(0, 3), seed=strategies.seeds())
    @precondition(lambda self: self.copies)
    def multiply_a_copy(self, place, seed):
        op, dense = self.copies[place % len(self.copies)]
        self.multiplies(op, dense, gaussian(seed, dense.shape[1], 2))

    @rule(way=st.sampled_from(["mul_", "load_state_dict", "optimizer", "inference"]))
    @precondition(lambda self: list(self.model.parameters()))
    def write_weights(self, way):
        weights = list(self.model.parameters())
        if way == "mul_":
            with torch.no_grad():
                weights[0].mul_(0.75)
        elif way == "inference":
            with torch.inference_mode():
                weights[0].mul_(0.75)
        elif way == "load_state_dict":
            self.model.load_state_dict({name: 0.75 * value for name, value in self.model.state_dict().items()})
        else:
            for weight in weights:
                weight.grad = torch.ones_like(weight) / 16
            torch.optim.SGD(weights, lr=0.5).step()
        self.stale = not self.replaced

    @rule()
    @precondition(lambda self: self.stale)
    def refuse_to_multiply_with_old_weights(self):
        with pytest.raises(RuntimeError, match="call refresh"):
            self.op @ np.ones(self.op.shape[1])

    @rule()
    def refresh(self):
        self.op.refresh()
        self.settle()

    @rule(way=st.sampled_from(["replace", "image", "freeze", "train", "gradient"]))
    @precondition(lambda self: not self.stale)
    def change_what_the_operator_does_not_read(self, way):
        if way == "replace":
            for name, weight in list(self.model.named_parameters()):
                path, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(path), last, torch.nn.Parameter(0.5 * weight.detach()))
            self.replaced = True
        elif way == "image":
            self.image.add_(1)
        elif way == "freeze":
            self.model.requires_grad_(False)
        elif way == "train":
            self.model.train()
            self.op @ np.ones(self.op.shape[1])
            self.model.eval()
        else:
            for weight in self.model.parameters():
                weight.grad = torch.ones_like(weight)
            self.model.zero_grad()

    @rule(
        which=st.sampled_from(["LM", "SM", "BE"]),
        method=st.sampled_from(["auto", "exact", "lanczos", "arpack", "lobpcg", "nullspace", "power"]),
        k=st.integers(1, 3),
        resume=st.booleans(),
        place=st.sampled_from(sorted(CONTEXTS)),
    )
    @precondition(lambda self: self.kind == "Fisher" and not self.stale)
    def solve(self, which, method, k, resume, place):
        n = self.op.shape[0]
        v0 = self.result.eigendistortions if resume and self.result is not None else None
        with warnings.catch_warnings(), CONTEXTS[place]():
            warnings.simplefilter("ignore")
            r = fo.eigendistortions(self.op, min(k, n), which, method, rng=0, v0=v0, maxiter=300)
        values = np.linalg.eigvalsh(self.dense)[::-1]
        eps = np.finfo(self.op.dtype).eps
        note(r.message)
        error = abs(r.eigenvalues - values[r.index])[r.converged]
        assert (error <= (r.tol + 5e3 * eps) * max(values[0], 0)).all()
        if method in ("auto", "exact"):
            assert r.converged.all()
        if r.converged.all() and r.lambda_max > 0:
            vectors = self.op.from_image(r.eigendistortions)
            testing.assert_eigenpairs(self.op, r.eigenvalues, vectors, tol=max(2 * r.tol, 5e3 * eps))
        self.result = r

    @rule(seed=strategies.seeds(), place=st.sampled_from(sorted(CONTEXTS)))
    @precondition(lambda self: self.kind == "Fisher" and not self.stale)
    def project_on_the_null_space(self, seed, place):
        picture = torch.from_numpy(gaussian(seed, *self.op.image.shape)).to(self.op.image)
        assume(self.op.from_image(picture).any())
        with CONTEXTS[place]():
            p = fo.project_to_null(self.op, picture)
        z = self.op.from_image(p.image).double().numpy()[0]
        top = np.linalg.eigvalsh(self.dense)[-1]
        if p.converged:
            tol = max(1e-6, 100 * np.finfo(self.op.dtype).eps)
            assert np.linalg.norm(self.dense @ z) <= 1.1 * tol * max(top, 0) * np.linalg.norm(z) + 1e-30

    @rule(seed=strategies.seeds())
    @precondition(lambda self: not self.stale)
    def combine(self, seed):
        F, A = self.op, self.dense
        x, u = gaussian(seed, A.shape[1]), gaussian(seed, A.shape[0])
        size = np.linalg.norm(A)
        self.near((2.0 * F) @ x, 2 * A @ x, size * np.linalg.norm(x))
        self.near((-F + 3 * F) @ x, 2 * A @ x, 4 * size * np.linalg.norm(x))
        self.near((F.T @ F) @ x, A.T @ A @ x, size**2 * np.linalg.norm(x))
        self.near((F @ F.H).T @ u, A @ A.T @ u, size**2 * np.linalg.norm(u))
        self.near(u @ F, u @ A, size * np.linalg.norm(u))
        if self.kind == "Fisher":
            shifted = F - 0.5 * aslinearoperator(np.eye(len(A)))
            self.near(shifted @ x, A @ x - 0.5 * x, (size + 1) * np.linalg.norm(x))
            self.near((F**2) @ x, A @ A @ x, size**2 * np.linalg.norm(x))
            both = fo.sum_fisher([F, F], [1.0, 0.5])
            self.near(both @ x, 1.5 * A @ x, size * np.linalg.norm(x))

    @rule(seed=strategies.seeds())
    @precondition(lambda self: self.kind == "Fisher" and not self.stale and self.op.factor_size is not None)
    def factor(self, seed):
        x = torch.from_numpy(gaussian(seed, 3, self.op.shape[0])).to(self.op.torch_dtype)
        L = self.op.factor_rows(x).double().numpy()
        wide = x.double().numpy()
        self.near(L @ L.T, wide @ self.dense @ wide.T, np.linalg.norm(self.dense) * np.linalg.norm(wide) ** 2)
        self.near(
            self.op.factor_adjoint_rows(torch.from_numpy(L).to(x)),
            wide @ self.dense,
            np.linalg.norm(self.dense) * np.linalg.norm(wide),
        )

    @rule(seed=strategies.seeds())
    @precondition(lambda self: self.kind == "Fisher")
    def go_to_images_and_back(self, seed):
        z = gaussian(seed, 2, self.op.shape[0])
        self.near(self.op.from_image(self.op.to_image(torch.from_numpy(z))), z, np.linalg.norm(z))

    @invariant()
    def count_no_fewer_products_than_before(self):
        if hasattr(self, "op"):
            assert self.op.n_matvec >= self.count
            self.count = self.op.n_matvec


TestOperators = Operators.TestCase
TestOperators.settings = settings(stateful_step_count=15)
