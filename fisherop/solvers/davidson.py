"""Block Davidson with thick restarts, for F v = lambda M v where only products with F and M are to be had.

The search space V is orthonormal in the inner product of M and grows by the residuals F x - theta M x of all wanted
pairs that have not converged: one product with F and one with M for each, and no solves with M. Golub and Ye (2002),
"An inverse free preconditioned Krylov subspace method for symmetric generalized eigenvalue problems", without their
preconditioner and with a space that is kept from step to step. Restarts keep Ritz vectors of both ends where the small
one is wanted, for its convergence lives on what is known of the large one, and the wanted vectors of the step before:
Stathopoulos and Saad (1998), "Restarting techniques for the (Jacobi-)Davidson symmetric eigenvalue methods".

Without M it solves the standard problem, where `lanczos` does the same with less memory traffic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherop.rows import RowOperator, row_norms, unit
from fisherop.solvers.contract import (
    CUT,
    Control,
    Found,
    Matrix,
    Request,
    gram,
    null_dimension,
    orthonormal,
    rows_in_memory,
    symmetric,
)

SAFETY = 0.7  # part of the tolerance used: tracked residuals and the certificate's differ by rounding
GUARD = 5  # steps for the next pairs before those that came with v0 are believed
SPREAD = 1.1  # by how much a residual's ratio of norms may exceed those seen so far before it is measured again


def solve(op: RowOperator, request: Request, control: Control, *, basis: int | None = None) -> Found:
    """Find the pairs wanted at both ends in one space of at most `basis` rows."""
    given = 0 if request.v0 is None else len(request.v0)
    room = basis or min(20 * request.k + 200, rows_in_memory(op) // 3)
    space = SearchSpace(op, max(room, 5 * request.k + given))
    pairs = Pairs(request, space)
    space.extend(request.start(op, min(op.n, max(request.k, given + 1))))
    searched = 0
    while True:
        pairs.update()
        believed = converged = pairs.converged
        if converged and given:
            beside, rivals = pairs.beside(given + 1)
            believed = searched >= GUARD and not rivals
            searched += 1
        if control.step(pairs.residuals) or believed or space.size == op.n:
            break
        if space.size + request.k > len(space.rows) < op.n:
            space.restart(pairs.kept())
            pairs.update()
        # Eigenvectors to start from have converged as they are: the pairs next to them go on, and may turn out better.
        directions = beside if converged else pairs.directions()
        if not space.extend(unit(directions)) and not space.extend(op.random_rows(request.k, request.rng)):
            break
    nullity = null_dimension(op, pairs.values, pairs.lambda_max)
    doubt = CUT if control.ended and not believed and space.size < op.n else ""
    return Found(pairs.vectors, pairs.lambda_max, nullity, doubt=doubt, top=pairs.top())


def scale(op: RowOperator, request: Request, steps: int = 12) -> tuple[float, Tensor]:
    """Estimate the largest eigenvalue from below by a few steps with one row, and return its Ritz vector as one row."""
    found = solve(op, Request(1, 0, 0.5, request.rng), Control(op, steps))
    return found.lambda_max, found.vectors


class SearchSpace:
    """Rows V that M makes orthonormal, F V, M V (which is V where there is no M), and the matrix V^T F V."""

    def __init__(self, op: RowOperator, room: int) -> None:
        self.op, self.size = op, 0
        self.rows = torch.empty(min(op.n, room), op.n, dtype=op.dtype, device=op.device)
        self.products = torch.empty_like(self.rows)
        self.images = self.rows if op.metric is None else torch.empty_like(self.rows)
        self.h: Matrix = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64, device="cpu")

    def extend(self, block: Tensor) -> int:
        """Add what is new in the block, multiply it, and return how many rows that gave."""
        old = slice(0, self.size)
        fresh = orthonormal(block, self.rows[old], self.images[old])[: len(self.rows) - self.size]
        if not len(fresh):
            return 0
        images = fresh
        if self.op.metric is not None:
            images = self.op.metric.rows(fresh)
            inside = images @ self.rows[old].T  # what cancellation left in the old rows
            fresh, images = fresh - inside @ self.rows[old], images - inside @ self.images[old]
            fresh, images = self.op.metric.orthonormalized(fresh, images)
        new = slice(self.size, self.size + len(fresh))
        self.rows[new], self.products[new] = fresh, self.op.rows(fresh)
        if self.op.metric is not None:
            self.images[new] = images
        self.size = new.stop
        coupling = gram(self.rows[: self.size], self.products[new])
        self.h[: self.size, new], self.h[new, : self.size] = coupling, coupling.T
        return len(fresh)

    def matrix(self) -> Matrix:
        """Return F in the space."""
        return symmetric(self.h[: self.size, : self.size])

    def restart(self, mix: Matrix) -> None:
        """Keep the orthonormal combinations `mix` only."""
        kept, h = mix.shape[1], mix.T @ self.matrix() @ mix
        turn = mix.T.to(self.rows)
        for block in (self.rows, self.products, self.images)[: 2 if self.op.metric is None else 3]:
            block[:kept] = turn @ block[: self.size]
        self.h[:kept, :kept], self.size = h, kept


class Pairs:
    """The Ritz pairs wanted of a search space, and the residuals that extend it."""

    def __init__(self, request: Request, space: SearchSpace) -> None:
        self.request, self.space = request, space
        self.limit = SAFETY * request.tol
        self.lambda_max = 0.0
        self.ratio = 1.0 if space.op.metric is None else (space.op.metric.low * space.op.metric.high) ** -0.25
        self.before: Matrix = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self.wanted: Matrix = torch.zeros(0, 0, dtype=torch.float64, device="cpu")

    @property
    def converged(self) -> bool:
        """Tell whether all residuals are within the tolerance."""
        return bool((self.residuals <= self.limit).all()) and len(self.vectors) == self.request.k

    def update(self) -> None:
        """Solve the small problem, and measure its residuals in the norm that the inverse of M gives."""
        space = self.space
        self.values, self.mix = torch.linalg.eigh(space.matrix())
        self.lambda_max = max(self.lambda_max, float(self.values[-1]))
        order = self.request.places(space.size, self.request.largest, self.request.smallest)
        self.before, self.wanted = self.wanted, self.mix[:, order]
        self.vectors, self.residual_rows = self._residual_rows(order)
        self.residuals = self._norms()

    def top(self) -> Tensor:
        """Return the Ritz vector of the largest value."""
        highest: Tensor = self.mix[:, -1:].T.to(self.space.rows) @ self.space.rows[: self.space.size]
        return highest

    def directions(self) -> Tensor:
        """Return the residuals of the pairs that have not converged."""
        return self.residual_rows[(self.residuals > self.limit).to(self.residual_rows.device)]

    def beside(self, count: int) -> tuple[Tensor, bool]:
        """Return the residuals of the first pair at each end, of so many next to those wanted, that has not converged.

        And whether one of these is a rival, which may, for all that its residual says, turn out better than those.
        """
        size, rows, rivals = self.space.size, [self.residual_rows[:0]], False
        for sign, wanted in ((1, self.request.largest), (-1, self.request.smallest)):
            order = range(size - 1, -1, -1) if sign > 0 else range(size)
            places = [*order[wanted : wanted + count]] if wanted else []
            residuals = self._residual_rows(places)[1]
            norms = self.ratio * row_norms(residuals).cpu()
            last, slack = self.values[order[wanted - 1]], self.request.tol * self.lambda_max
            for i in (norms > self.limit * self.lambda_max).nonzero().flatten().tolist()[:1]:
                rows.append(residuals[i : i + 1])
                above_zero = sign > 0 or bool(last > slack)  # nothing is below
                rivals |= above_zero and bool(sign * (self.values[places[i]] - last) + norms[i] > slack)
        return torch.cat(rows), rivals

    def _residual_rows(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """Return the Ritz vectors at some places, and their residuals."""
        space = self.space
        turn = self.mix[:, places].T.to(space.rows)
        vectors, images = turn @ space.rows[: space.size], turn @ space.images[: space.size]
        values = self.values[places, None].to(images)
        return vectors, turn @ space.products[: space.size] - values * images

    def kept(self) -> Matrix:
        """Return the combinations that survive a restart: Ritz vectors, and the wanted ones of the step before."""
        spare = (len(self.space.rows) - 2 * self.request.k) // 2
        bottom = spare // 4 if self.request.smallest else 0
        order = self.request.places(
            len(self.values), self.request.largest + spare - bottom, self.request.smallest + bottom
        )
        kept = self.mix[:, order]
        padded = torch.nn.functional.pad(self.before, (0, 0, 0, len(self.mix) - len(self.before)))
        for _ in range(2):
            padded = padded - kept @ (kept.T @ padded)
        left, size, _ = torch.linalg.svd(padded, full_matrices=False)
        combinations: Matrix = torch.cat([kept, left[:, size > 1e-8]], dim=1)
        return combinations

    def _norms(self) -> Tensor:
        """Return residual norms relative to the largest value: measured once an estimate says that all are small.

        The ratio of a residual's norm in the inverse of M to its usual norm changes little from step to step.
        """
        top = self.lambda_max or 1.0
        plain = row_norms(self.residual_rows).cpu() / top
        if self.space.op.metric is None or bool((plain * self.ratio > self.limit).any()):
            estimate: Tensor = plain * self.ratio
            return estimate
        norms: Tensor = self.space.op.metric.dual_norms(self.residual_rows, self.limit * top).cpu() / top
        if bool((norms > self.limit).any()):
            self.ratio = SPREAD * float((norms / plain.clamp(min=torch.finfo(plain.dtype).tiny)).max())
        return norms
