"""What every solver call returns: eigenpairs, and the proof that comes with them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORMAT = 1


class ConvergenceWarning(UserWarning):
    """Some pairs of a result did not reach the tolerance; its message says what to change.

    Examples
    --------
    >>> import warnings, torch, fisherop as fo
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     r = fo.eigendistortions(torch.diag(torch.linspace(1, 2, 600)), k=1, method="power", maxiter=2, rng=0)
    >>> caught[0].category.__name__, r.converged
    ('ConvergenceWarning', array([False]))
    """


@dataclass(frozen=True, eq=False)
class Eigendistortions:
    """Eigenpairs of a Fisher matrix, largest eigenvalue first, each with its residual.

    Attributes
    ----------
    eigenvalues : ndarray of float64, shape (k,)
        Descending, in units of squared response per squared image over the noise's variance; those of
        F v = lambda M v where M was given.
    eigendistortions : Tensor or ndarray, shape (k, ...)
        Unit norm, in the image's shape: k takes the place of a leading dimension of 1, else it is put in front.
    index : ndarray of int, shape (k,)
        Position in the whole spectrum of the operator, restricted if it is: 0 the largest, n - 1 the smallest.
    residuals : ndarray of float64, shape (k,)
        ``||F v - lambda v|| / lambda_max``, from products made after the solver was done. Where M was given,
        ``sqrt(r' M^-1 r) / lambda_max`` of ``r = F v - lambda M v`` at ``v'Mv = 1``, or an upper bound of it.
    converged : ndarray of bool, shape (k,)
        ``residuals <= tol``.
    eigenvalue_bounds : ndarray of float64, shape (k, 2)
        An interval that holds a true eigenvalue.
    clusters : ndarray of int, shape (k,)
        1 where a pair's vector is determined up to its sign; else the dimension (or a lower bound of it) of the
        subspace that is determined, within which the vector depends on the seed.
    n_matvec : int
        Products with F used, those of the proof included.
    method : str
        The backend that served.
    tol : float
        The tolerance that the residuals were held to.
    message : str
        What was done and found, in words.
    nullity : int
        Dimensions along which F is known to vanish; see `message` for whether there may be more.
    lambda_max : float
        The largest eigenvalue met; residuals are relative to it.
    image : Tensor or None
        A copy of the image, where the operator has one; a mean over images has none.
    n : int
        Size of the operator, restricted if it is. Where it was not given, it is what the indices tell, and the size of
        a distortion where none counts from the small end.

    Examples
    --------
    >>> import torch, fisherop as fo
    >>> r = fo.eigendistortions(fo.FisherOperator(lambda x: x**2, torch.tensor([[1.0, 2.0]])), k=2)
    >>> print(r)
       index   eigenvalue   residual  converged
           0           16    0.0e+00  yes
           1            4    0.0e+00  yes
    >>> r.eigendistortions.abs()
    tensor([[0., 1.],
            [1., 0.]])
    """

    eigenvalues: NDArray[np.float64]
    eigendistortions: Any
    index: NDArray[np.int64]
    residuals: NDArray[np.float64]
    converged: NDArray[np.bool_]
    eigenvalue_bounds: NDArray[np.float64]
    clusters: NDArray[np.int64]
    n_matvec: int
    method: str
    tol: float
    message: str
    nullity: int
    lambda_max: float
    image: Tensor | None = field(default=None, repr=False)
    n: int = 0

    def __post_init__(self) -> None:
        if not self.n:
            last = int(np.max(self.index, initial=-1))
            size = last + 1 if last >= len(self) else math.prod(self.eigendistortions.shape[1:])
            object.__setattr__(self, "n", size)
        if self.image is not None:
            object.__setattr__(self, "image", self.image.detach().clone())

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def __str__(self) -> str:
        rows = [f"{'index':>8} {'eigenvalue':>12} {'residual':>10}  converged"]
        for i, value, residual, converged in zip(
            self.index, self.eigenvalues, self.residuals, self.converged, strict=True
        ):
            rows.append(f"{i:>8} {value + 0.0:>12.5g} {residual:>10.1e}  {'yes' if converged else 'NO'}")
        return "\n".join(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a file, as NumPy arrays and text, without pickle.

        Parameters
        ----------
        path : path
            Where to write; by habit it ends in ``.npz``. An existing file is replaced once the new one is whole.

        Examples
        --------
        >>> import pathlib, tempfile, torch, fisherop as fo
        >>> r = fo.eigendistortions(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=1, which="LM")
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "result.npz"
        >>> r.save(path)
        >>> fo.Eigendistortions.load(path).eigenvalues
        array([3.])
        """
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                self.write(file)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def write(self, file: IO[bytes]) -> None:
        """Write what `save` does to an open file, which may be one in memory."""
        arrays: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in _ARRAYS}
        facts = {name: getattr(self, name) for name in _FACTS}
        facts |= {"n": self.n, "format": FORMAT, "tensor": isinstance(self.eigendistortions, Tensor)}
        arrays["eigendistortions"] = _array(self.eigendistortions)
        if self.image is not None:
            arrays["image"] = _array(self.image)
        # Numbers of NumPy's are written as Python's.
        words = json.dumps(facts, default=lambda number: number.item())
        np.savez(file, facts=np.array(words), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Eigendistortions:
        """Read a result that `save` wrote.

        Parameters
        ----------
        path : path
            The file.
        device : str or torch.device, optional
            Where the tensors go, whatever device they were computed on.

        Raises
        ------
        ValueError
            For a file that `save` did not write, or wrote in a newer format.
        OSError
            For a file that cannot be opened, or does not exist.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and not a result of fisherop: name a file in it")
        with open(path, "rb") as file:
            try:
                format, found = _read(file)
            except Exception as error:  # there is no end to the ways in which bytes are no archive of arrays
                raise ValueError(f"{path} is not a result of fisherop, or is damaged") from error
        if format > FORMAT:
            raise ValueError(f"{path} was written by a newer fisherop: update this one to read it")
        placed: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in found.items()}
        return cls(**placed)


def _read(file: IO[bytes]) -> tuple[int, dict[str, Any]]:
    """Return the format of a file and, of a format that is known, the fields of its result."""
    with np.load(file, allow_pickle=False) as entries:
        arrays = dict(entries)
    facts = json.loads(str(arrays["facts"]))
    format = int(facts["format"])
    if format > FORMAT:
        return format, {}
    found = {name: arrays[name] for name in (*_ARRAYS, "eigendistortions")}
    if {*map(len, found.values())} != {len(found["index"])}:
        raise ValueError("its entries are of different numbers of pairs")
    image = torch.from_numpy(arrays["image"]) if "image" in arrays else None
    vectors = torch.from_numpy(found["eigendistortions"])  # which refuses what is not made of numbers
    found["eigendistortions"] = vectors if facts["tensor"] else found["eigendistortions"]
    return format, found | {name: facts[name] for name in _FACTS} | {"image": image, "n": int(facts.get("n", 0))}


_ARRAYS = ("eigenvalues", "index", "residuals", "converged", "eigenvalue_bounds", "clusters")
_FACTS = ("n_matvec", "method", "tol", "message", "nullity", "lambda_max")


def _array(x: Any) -> NDArray[Any]:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
