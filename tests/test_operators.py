"""Laws of the operators: linear, adjoint, symmetric, semidefinite, and good citizens of SciPy and torch."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from models import MODELS, build, dense_jacobian
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh
from strategies import block, fishers, operators, seeds

import fisherop as fo
from fisherop import testing
from fisherop.algebra import TensorOperator

ANY = (
    testing.assert_linear,
    testing.assert_adjoint,
    testing.assert_matmat_consistent,
    testing.assert_no_aliasing,
)


@given(operators(), seeds)
def test_a_jacobian_keeps_the_laws_of_linear_operators(J, seed):
    for law in ANY:
        law(J, rng=seed)
        law(J.T, rng=seed)
    assert J.T.T is J


@given(fishers(), seeds)
def test_a_fisher_operator_is_symmetric_and_semidefinite_besides(F, seed):
    for law in (*ANY, testing.assert_psd):
        law(F, rng=seed)
    assert F.T is F
    assert F.H is F


@given(fishers(), seeds)
def test_every_form_of_the_same_input_gives_the_same_output_to_the_bit(F, seed):
    X = block(seed, F.shape[1], 3, dtype=F.dtype)
    expected = F @ X
    wide = np.zeros((2 * len(X), 6), F.dtype)
    wide[::2, ::2] = X
    for form in (np.asfortranarray(X), wide[::2, ::2], X.astype(np.float64), sp.csr_array(X)):
        assert np.array_equal(F @ form, expected)
    assert np.array_equal((F @ torch.from_numpy(X)).numpy(), expected)
    assert np.array_equal(F @ (X + 0j), expected + 0j)


@pytest.mark.parametrize("name", MODELS)
def test_f_is_j_transpose_w_j(name):
    model, image = build(name)
    J = dense_jacobian(model, image).numpy()
    variance = np.linspace(0.5, 2, len(J))
    for covariance, weight in ((None, 1), (4.0, 0.25), (torch.from_numpy(variance), 1 / variance[:, None])):
        F = fo.FisherOperator(model, image, noise=fo.noise.Gaussian(covariance))
        dense = J.T @ (weight * J)
        assert np.linalg.norm(F @ np.eye(len(dense)) - dense) <= 1e-12 * np.linalg.norm(dense)
        L = F.factor_rows(torch.eye(len(dense), dtype=torch.float64)).numpy()
        assert np.linalg.norm(L @ L.T - dense) <= 1e-12 * np.linalg.norm(dense)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [fo.FisherOperator, fo.JacobianOperator])
def test_a_copy_by_pickle_multiplies_alike(name, kind):
    model, image = build(name, torch.float32)
    if not isinstance(model, torch.nn.Module):
        pytest.skip("a lambda cannot be pickled")
    op = kind(model, image)
    x = block(0, op.shape[1])
    for twin in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert np.array_equal(twin @ x, op @ x)
        u = block(1, op.shape[0])
        assert np.array_equal(pickle.loads(pickle.dumps(op.T)) @ u, op.T @ u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_numpy_dtype_follows_the_images(dtype):
    F = fo.FisherOperator(*build("fourier", dtype))
    expected = np.float32 if dtype == torch.float32 else np.float64
    assert F.dtype == expected
    assert (F @ np.ones(64)).dtype == expected
    assert (F @ torch.ones(64, dtype=torch.float64)).dtype == dtype


def test_a_complex_tensor_is_multiplied_by_parts():
    J = fo.JacobianOperator(*build("fourier"))
    x = torch.from_numpy(block(0, 64, 3) + 1j * block(1, 64, 3))
    torch.testing.assert_close(J @ x, torch.complex(J @ x.real, J @ x.imag))
    torch.testing.assert_close(J @ x.conj(), (J @ x).conj())
    assert torch.equal(J @ x[:, 0].imag, J @ x[:, 0].imag.clone())


def test_an_operator_that_does_not_say_how_it_multiplies_says_so():
    op = TensorOperator((2, 2), torch.float64, torch.device("cpu"))
    for product, words in ((op.matvec, "multiplies rows"), (op.rmatmat, "its transpose multiplies rows")):
        for x in (np.ones((2, 1)), torch.ones(2, 1)):
            with pytest.raises(TypeError, match=words):
                product(x[:, 0] if product == op.matvec else x)


def test_products_are_counted():
    F = fo.FisherOperator(*build("fourier"))
    assert F.n_matvec == 0
    F @ np.ones((64, 3))
    F.factor_rows(torch.ones(2, 64, dtype=torch.float64))
    assert F.n_matvec == 4
    J = fo.JacobianOperator(*build("fourier"))
    J @ np.ones(64)
    J.T @ np.ones((40, 2))
    assert (J.n_matvec, J.n_rmatvec) == (1, 2)


def test_scipy_takes_it_for_its_own():
    F = fo.FisherOperator(*build("linear m<n"))
    assert isinstance(F, LinearOperator)
    assert aslinearoperator(F) is F
    dense = F @ np.eye(25)
    np.testing.assert_allclose((2 * F + aslinearoperator(np.eye(25))) @ np.ones(25), 2 * dense.sum(1) + 1)
    np.testing.assert_allclose((F @ F) @ np.ones(25), dense @ dense.sum(1))
    np.testing.assert_allclose((F**2) @ np.ones(25), dense @ dense.sum(1))
    np.testing.assert_allclose(eigsh(F, 3, v0=np.ones(25))[0], np.linalg.eigvalsh(dense)[-3:])


def test_a_column_matrix_is_multiplied_as_one_column():
    F = fo.FisherOperator(*build("fourier"))
    column = block(0, 64, 1)
    assert (F @ column).shape == (64, 1)
    assert np.array_equal(F.matmat(column)[:, 0], F @ column[:, 0])
    assert (F @ torch.from_numpy(column)).shape == (64, 1)


def test_a_wrong_size_is_refused_by_shape():
    F = fo.FisherOperator(*build("fourier"))
    with pytest.raises(ValueError, match=r"shape \(64,\) or \(64, b\), not \(63,\)"):
        F @ torch.ones(63)
    with pytest.raises(ValueError, match="mismatch"):
        F @ np.ones(63)


def test_a_product_holds_no_gradient_of_its_input():
    F = fo.FisherOperator(*build("fourier"))
    x = torch.ones(64, dtype=torch.float64, requires_grad=True)
    assert not (F @ x).requires_grad
    assert not F.image.requires_grad
