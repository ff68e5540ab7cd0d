"""Jacobian and Fisher matrix of a model at an image, as SciPy linear operators.

>>> import torch, fisherop as fo
>>> F = fo.FisherOperator(torch.nn.Linear(3, 2), torch.zeros(3))
>>> F
<3x3 FisherOperator with dtype=float32>
>>> (F @ torch.ones(3)).shape
torch.Size([3])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherop.algebra import TensorOperator
from fisherop.linearize import Linearization, exact_arithmetic
from fisherop.noise import Noise, checked_noise, precision_at
from fisherop.restrict import subspace


class InformationOperator(TensorOperator):
    """A symmetric positive semidefinite matrix whose vectors are images: what solvers know of a Fisher operator.

    Attributes
    ----------
    factor_size : int or None
        Length of the output of L where F = L^T L is known in factored form.
    """

    factor_size: int | None

    @property
    def space(self) -> InformationOperator:
        """The operator itself."""
        return self

    @property
    def image(self) -> Tensor | None:
        """The image that the matrix belongs to, where it belongs to one."""
        raise NotImplementedError

    @property
    def image_shape(self) -> torch.Size:
        """The shape of images."""
        raise NotImplementedError

    def expand(self, block: Tensor) -> Tensor:
        """Turn the coordinates in every row into the pixels of a flattened image."""
        raise NotImplementedError

    def project(self, block: Tensor) -> Tensor:
        """Turn the flattened image in every row into the coordinates of what the operator knows of it."""
        raise NotImplementedError

    def factor_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by L."""
        raise NotImplementedError

    def factor_adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the transpose of L."""
        raise NotImplementedError

    def to_image(self, vectors: Tensor) -> Tensor:
        """Return vectors of the operator's space, the rows of (b, r), as images.

        Returns
        -------
        Tensor
            b takes the place of the image shape's leading dimension of 1, else it is put in front. Zero outside the
            restriction; norms and angles are kept.
        """
        shape = self.image_shape
        own = vectors.to(self.device, self.torch_dtype)
        with exact_arithmetic():
            images = self.expand(own)
        return images.reshape(len(vectors), *(shape[1:] if len(shape) > 1 and shape[0] == 1 else shape))

    def from_image(self, images: Tensor) -> Tensor:
        """Return images as vectors of the operator's space, rows of shape (b, r): orthogonally projected on it.

        Parameters
        ----------
        images : Tensor
            One image or several, b times as many entries as an image has.
        """
        own = images.detach().to(self.device, self.torch_dtype)
        with exact_arithmetic():
            return self.project(own.reshape(-1, self.image_shape.numel()))

    def refresh(self) -> None:
        """Linearize again, at the same image, after the model's weights were changed."""
        raise NotImplementedError

    def adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row by the transpose of F, which is F."""
        return self.rows(block)

    def _adjoint(self) -> LinearOperator:
        return self

    def _transpose(self) -> LinearOperator:
        return self


class ModelOperator(TensorOperator):
    """What the Jacobian and the Fisher operator share: a linearization, and how far it has been used."""

    def __init__(self, linearization: Linearization, shape: tuple[int, int]) -> None:
        super().__init__(shape, linearization.dtype, linearization.device)
        self._set(linearization)

    @property
    def image(self) -> Tensor:
        """The point of linearization."""
        return self.linearization.image

    @property
    def response(self) -> Tensor:
        """The model's response there, flattened to shape (m,)."""
        return self.linearization.response

    @property
    def strategy(self) -> str:
        """How the products are computed: "recorded", "forward-mode", "double-backward" or "constant"."""
        return self.linearization.strategy

    @property
    def tuning(self) -> dict[str, Any]:
        """What was measured and chosen for speed; passed to another operator, it gives the same results to the bit."""
        return dict(self.linearization.tuning)

    @property
    def memory(self) -> int:
        """Bytes held for the products, the model's own weights not counted."""
        return self.linearization.memory

    def refresh(self) -> None:
        """Linearize again, at the same image, after the model's weights were changed; counts start anew."""
        self._set(Linearization(self.linearization.model, self.image, self.tuning))

    def _set(self, linearization: Linearization) -> None:
        self.linearization = linearization


class JacobianOperator(ModelOperator):
    """How a model's response changes with its image: the m x n matrix of derivatives, never stored.

    Parameters
    ----------
    model : callable
        An ``nn.Module`` in evaluation mode or any function of one tensor. It returns a real or complex tensor, or a
        tuple, list or dict of them: flattened and concatenated to m real numbers, a complex number as (real,
        imaginary).
    image : Tensor
        float32 or float64, any shape, n entries; a 4-D image has a batch dimension of 1.
    tuning : mapping, optional
        The `tuning` of an earlier operator, to be used instead of measuring again.

    Raises
    ------
    TypeError, ValueError
        Where the model cannot be linearized at this image; the message says why and what to do.

    Notes
    -----
    The operator is the Jacobian at the time it was made. Written weights are noticed at the next product, which raises
    RuntimeError; `refresh` linearizes again. A pickled operator carries model and image, and linearizes again where it
    is loaded.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> J = fo.JacobianOperator(lambda x: x**2, torch.tensor([1.0, 2.0]))
    >>> J @ torch.eye(2)
    tensor([[2., 0.],
            [0., 4.]])
    """

    def __init__(
        self, model: Callable[[Tensor], Any], image: Tensor, *, tuning: Mapping[str, Any] | None = None
    ) -> None:
        linearization = Linearization(model, image, tuning)
        super().__init__(linearization, linearization.shape)

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row of a (b, n) tensor by J: returns (b, m)."""
        return self.linearization.jvp(block)

    def adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row of a (b, m) tensor by the transpose of J: returns (b, n)."""
        return self.linearization.vjp(block)

    @property
    def n_matvec(self) -> int:
        """Vectors multiplied so far by J."""
        return self.linearization.n_jvp

    @property
    def n_rmatvec(self) -> int:
        """Vectors multiplied so far by the transpose of J."""
        return self.linearization.n_vjp

    def __reduce__(self) -> tuple[Any, ...]:
        return _tuned, (JacobianOperator, self.tuning, self.linearization.model, self.image)


class FisherOperator(ModelOperator, InformationOperator):
    """Fisher information of a model about its image: F = J^T W J, n x n, symmetric, positive semidefinite.

    Its eigenvectors are the distortions of the image that the model notices most (largest eigenvalue) and least
    (smallest). A product costs one pass forward and one backward through the linearized model.

    Restricted to distortions within a subspace with orthonormal basis B, of shape (n, r), the operator is B^T F B, of
    shape (r, r): `to_image` makes images of its vectors, `from_image` vectors of images.

    Parameters
    ----------
    model : callable
        An ``nn.Module`` in evaluation mode or any function of one tensor; see `JacobianOperator`.
    image : Tensor
        float32 or float64, any shape, n entries; a 4-D image has a batch dimension of 1.
    noise : optional
        The noise of the responses, which gives their precision W: one of `fisherop.noise`, by default
        ``Gaussian()``, for which W is the identity.
    within : optional
        The distortions allowed, by default all: a boolean mask, a list of pixels, a matrix or LinearOperator of shape
        (n, r) whose range they are, or one of `fisherop.restrict`; see `fisherop.restrict.subspace`.
    tuning : mapping, optional
        The `tuning` of an earlier operator, to be used instead of measuring again.

    Raises
    ------
    TypeError, ValueError
        Where the model cannot be linearized at this image; the message says why and what to do.

    Notes
    -----
    The operator is the Fisher matrix at the time it was made. Weights written in place, wherever the model keeps them,
    are noticed at the next product, which raises RuntimeError; `refresh` linearizes again. Weights replaced by other
    tensors change nothing before that, nor does what the model itself writes at every call, such as a counter. Weights
    written through ``.data`` are not noticed, and products then mix old weights with new ones. A pickled operator
    carries model, image, noise and restriction, and linearizes again where it is loaded.

    References
    ----------
    Berardino, Laparra, Balle, Simoncelli (2017), "Eigen-distortions of hierarchical representations", eq. 2.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> F = fo.FisherOperator(lambda x: x**2, torch.tensor([1.0, 2.0]))
    >>> F @ torch.eye(2)
    tensor([[ 4.,  0.],
            [ 0., 16.]])

    What the model notices of the second number alone:

    >>> fo.FisherOperator(lambda x: x**2, torch.tensor([1.0, 2.0]), within=[1]) @ torch.eye(1)
    tensor([[16.]])

    A generator is composed with the model by plain composition: F is then the information about its latent variables,
    of the manifold of images that it makes.

    >>> decoder = torch.nn.Sequential(torch.nn.Linear(3, 1024), torch.nn.Unflatten(0, (1, 1, 32, 32)))
    >>> latent, model = torch.zeros(3), fo.OnOff()
    >>> F = fo.FisherOperator(lambda z: model(decoder(z)), latent)
    >>> most, least = fo.eigendistortions(F, k=2).eigendistortions
    >>> change = fo.JacobianOperator(decoder, latent) @ most
    >>> change.reshape(1, 1, 32, 32).shape
    torch.Size([1, 1, 32, 32])
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        image: Tensor,
        noise: Noise | None = None,
        within: Any = None,
        *,
        tuning: Mapping[str, Any] | None = None,
    ) -> None:
        self.noise = checked_noise(noise)
        self.within = within
        linearization = Linearization(model, image, tuning)
        self.subspace = subspace(within, linearization.image)
        super().__init__(linearization, (self.subspace.size, self.subspace.size))

    def _set(self, linearization: Linearization) -> None:
        self.precision, self.factor_size = precision_at(self.noise, linearization.response)
        self.linearization = linearization

    @property
    def image_shape(self) -> torch.Size:
        """The shape of the image."""
        return self.linearization.image.shape

    def expand(self, block: Tensor) -> Tensor:
        """Multiply every row of (b, r) by the restriction's basis B: returns flattened images, (b, n)."""
        return self.subspace.expand(block)

    def project(self, block: Tensor) -> Tensor:
        """Multiply every row of (b, n) by the transpose of B: returns (b, r)."""
        return self.subspace.project(block)

    def rows(self, block: Tensor) -> Tensor:
        """Multiply every row of a (b, r) tensor by F; r is n where there is no restriction."""
        change = self.linearization.jvp(self.expand(block))
        return self.project(self.linearization.vjp(self.precision.apply(change)))

    def factor_rows(self, block: Tensor) -> Tensor:
        """Multiply every row of a (b, r) tensor by L = W^(1/2) J B, the factor of F = L^T L."""
        return self.precision.root(self.linearization.jvp(self.expand(block)))

    def factor_adjoint_rows(self, block: Tensor) -> Tensor:
        """Multiply every row of a (b, `factor_size`) tensor by the transpose of W^(1/2) J B."""
        return self.project(self.linearization.vjp(self.precision.root_transpose(block)))

    @property
    def n_matvec(self) -> int:
        """Products with F so far; half a product, a pass in one direction, is rounded up."""
        return (self.linearization.n_jvp + self.linearization.n_vjp + 1) // 2

    def __reduce__(self) -> tuple[Any, ...]:
        return _tuned, (FisherOperator, self.tuning, self.linearization.model, self.image, self.noise, self.within)


def _tuned(kind: type[ModelOperator], tuning: dict[str, Any], *args: Any) -> ModelOperator:
    """Make an unpickled operator, which computes as the pickled one did."""
    return kind(*args, tuning=tuning)  # type: ignore[call-arg]
