"""Hypothesis strategies: images, small models with known Jacobians, spectra, and operators that have them.

>>> from hypothesis import given
>>> import fisherop as fo
>>> @given(models("fewer"))
... def test_the_null_space_is_reported(subject):
...     model, image = subject
...     F = fo.FisherOperator(model, image)
...     assert fo.eigendistortions(F, k=1, which="SM").nullity >= image.numel() - len(model(image))
>>> test_the_null_space_is_reported()

Shapes, kinds and seeds are drawn, and well-scaled numbers made from them, so that no test fails for the sake of 1e308.
Failures shrink to few pixels, to grey images, and to weights and eigenvectors that are those of the identity.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    from hypothesis import settings
    from hypothesis import strategies as st
    from hypothesis.strategies import DrawFn, SearchStrategy
except ImportError as error:
    raise ImportError('strategies are drawn by Hypothesis: pip install "fisherop[testing]"') from error

from fisherop.testing.known import NONLINEARITIES, SPECTRA, DenseModel, SpectralOperator, spectrum

__all__ = ["dtypes", "images", "models", "psd_operators", "register_profiles", "seeds", "spectra"]

RELATIONS = ("equal", "fewer", "more")


def register_profiles() -> None:
    """Register the profiles "dev", "ci" and "nightly" with Hypothesis, and load the first or, where CI is set, "ci".

    "dev" tries 20 random examples of each test, "ci" 50 that are always the same, and "nightly" 1000 random ones, by
    ``pytest --hypothesis-profile=nightly``. None has a deadline: a first call of torch may take long. Call it in
    ``conftest.py``.

    Examples
    --------
    >>> from hypothesis import settings
    >>> register_profiles()
    >>> settings.get_profile("nightly").max_examples
    1000
    """
    settings.register_profile("dev", max_examples=20, deadline=None, derandomize=False)
    settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
    settings.register_profile("nightly", max_examples=1000, deadline=None, derandomize=False, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")


def seeds() -> SearchStrategy[int]:
    """Draw seeds of random generators.

    Returns
    -------
    strategy of int
        From 0 to 2**32 - 1.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(seeds())
    ... def test_a_seed_makes_one_generator(seed):
    ...     assert np.random.default_rng(seed).random() == np.random.default_rng(seed).random()
    >>> test_a_seed_makes_one_generator()
    """
    return st.integers(0, 2**32 - 1)


def dtypes() -> SearchStrategy[torch.dtype]:
    """Draw torch.float64 or torch.float32, the dtypes of images and operators.

    Returns
    -------
    strategy of torch.dtype
        One of the two.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(dtypes())
    ... def test_it_is_a_real_number_s(dtype):
    ...     assert dtype.is_floating_point
    >>> test_it_is_a_real_number_s()
    """
    return st.sampled_from([torch.float64, torch.float32])


@st.composite
def images(draw: DrawFn, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Draw images with values between 0 and 1, grey all over or random.

    Parameters
    ----------
    shape : tuple of int, optional
        By default vectors, matrices, and 4-D images of one or three channels, of 1 to 75 entries.
    dtype : torch.dtype, optional
        By default float64 or float32.

    Returns
    -------
    strategy of Tensor
        Of that shape.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(images((1, 1, 4, 4)))
    ... def test_pixels_lie_between_0_and_1(image):
    ...     assert 0 <= image.min() <= image.max() <= 1
    >>> test_pixels_lie_between_0_and_1()
    """
    side = st.integers(1, 5)
    if shape is None:
        shapes = [st.tuples(side), st.tuples(side, side), st.tuples(st.just(1), st.sampled_from([1, 3]), side, side)]
        shape = draw(st.one_of(shapes))
    dtype = dtype or draw(dtypes())
    seed = draw(st.none() | seeds())
    entries = np.full(shape, 0.5) if seed is None else np.random.default_rng(seed).uniform(0, 1, shape)
    return torch.from_numpy(entries).to(dtype)


@st.composite
def models(
    draw: DrawFn,
    m_vs_n: str | None = None,
    *,
    nonlinearity: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[DenseModel, Tensor]:
    """Draw small models, with an image for each and a Jacobian known by formula.

    Parameters
    ----------
    m_vs_n : {"fewer", "equal", "more"}, optional
        How many responses there are beside pixels. By default any of these.
    nonlinearity : {"linear", "square", "tanh", "softplus", "gain control"}, optional
        By default any of these.
    dtype : torch.dtype, optional
        By default float64 or float32.

    Returns
    -------
    strategy of (DenseModel, Tensor)
        The model in evaluation mode, and an image of its dtype.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(models("more", nonlinearity="tanh"))
    ... def test_there_are_more_responses_than_pixels(subject):
    ...     model, image = subject
    ...     assert model.jacobian(image).shape == (len(model(image)), image.numel())
    >>> test_there_are_more_responses_than_pixels()
    """
    relation = _one_of(draw, m_vs_n, RELATIONS, "m_vs_n")
    nonlinearity = _one_of(draw, nonlinearity, tuple(NONLINEARITIES), "nonlinearity")
    image = draw(images(dtype=dtype).filter(lambda x: relation != "fewer" or x.numel() > 1))
    n = image.numel()
    m = draw({"equal": st.just(n), "fewer": st.integers(1, n - 1), "more": st.integers(n + 1, 2 * n + 1)}[relation])
    model = DenseModel(m, n, nonlinearity, draw(st.none() | seeds()))
    return model.to(image.dtype).eval(), image


@st.composite
def spectra(draw: DrawFn, kind: str | None = None, max_size: int = 30) -> NDArray[np.float64]:
    """Draw eigenvalues, descending and not negative, at several scales.

    Parameters
    ----------
    kind : str, optional
        Of `fisherop.testing.spectrum`; by default any.
    max_size : int, optional
        The most to draw.

    Returns
    -------
    strategy of ndarray of float64, shape (n,)
        Between 1 and `max_size` of them.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(spectra("clustered", max_size=8))
    ... def test_eigenvalues_descend(values):
    ...     assert (np.diff(values) <= 0).all()
    >>> test_eigenvalues_descend()
    """
    kind = _one_of(draw, kind, tuple(SPECTRA), "kind")
    values: NDArray[np.float64] = draw(st.sampled_from([1.0, 1e-9, 1e9])) * spectrum(
        kind, draw(st.integers(1, max_size))
    )
    return values


@st.composite
def psd_operators(
    draw: DrawFn, kind: str | None = None, max_size: int = 30, dtype: torch.dtype | None = None
) -> SpectralOperator:
    """Draw symmetric positive semidefinite operators whose eigenvalues and eigenvectors are known.

    Parameters
    ----------
    kind : str, optional
        Of `fisherop.testing.spectrum`; by default any.
    max_size : int, optional
        Largest n.
    dtype : torch.dtype, optional
        By default float64 or float32.

    Returns
    -------
    strategy of SpectralOperator
        Of order 1 to `max_size`.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(psd_operators("null space", dtype=torch.float64))
    ... def test_the_trace_is_the_sum_of_the_eigenvalues(op):
    ...     np.testing.assert_allclose((op @ np.eye(len(op.values))).trace(), op.values.sum())
    >>> test_the_trace_is_the_sum_of_the_eigenvalues()
    """
    values = draw(spectra(kind, max_size))
    name = str(dtype or draw(dtypes())).removeprefix("torch.")
    return SpectralOperator(values, draw(st.none() | seeds()), name)


def _one_of(draw: DrawFn, given: str | None, names: tuple[str, ...], what: str) -> str:
    if given is None:
        return draw(st.sampled_from(names))
    if given not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}, not {given!r}")
    return given
