"""One backend a file, one signature, one registry: `solve(op, request, control) -> Found`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fisherop.rows import RowOperator
from fisherop.solvers import arpack, cupyx, davidson, exact, lanczos, lobpcg, nullspace, power, primme, randomized_svd
from fisherop.solvers.contract import Control, Found, Progress, Request, Steps

__all__ = ["BACKENDS", "ON_CUDA", "Backend", "Control", "Found", "Progress", "Request", "Steps"]


@dataclass(frozen=True)
class Backend:
    """A solver, how many steps it may take unless told otherwise, and what it can do.

    It may reach the small end, it may solve F v = lambda M v from products with M, and it may ask for its products one
    by one, in `steps`, so that many images can share them.
    """

    solve: Callable[[RowOperator, Request, Control], Found]
    maxiter: int
    smallest: bool = True
    metric: bool = False
    steps: Callable[[RowOperator, Request, Control], Steps[Found]] | None = None


BACKENDS = {
    "exact": Backend(exact.solve, maxiter=1, steps=exact.steps),
    "lanczos": Backend(lanczos.solve, maxiter=5000, steps=lanczos.steps),
    "davidson": Backend(davidson.solve, maxiter=2000, metric=True),
    "nullspace": Backend(nullspace.solve, maxiter=nullspace.MAXITER),
    "arpack": Backend(arpack.solve, maxiter=5000),
    "lobpcg": Backend(lobpcg.solve, maxiter=1000, metric=True),
    "primme": Backend(primme.solve, maxiter=5000),
    "power": Backend(power.solve, maxiter=1000),
    "randomized_svd": Backend(randomized_svd.solve, maxiter=100, smallest=False),
}

ON_CUDA = {"cupyx": Backend(cupyx.solve, maxiter=5000)}
"""Backends that serve operators on CUDA devices only."""
