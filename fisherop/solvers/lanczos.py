"""Block Lanczos with thick restarts: both ends of the spectrum from one search space.

The space is kept as orthonormal rows U, the first `done` of which have been multiplied by F while the others are
pending. Products never leave the span of U: F U[:done] = H[:size, :done]^T U[:size] holds at all times, whatever was
expanded, injected or thrown away at a restart. So the residual of every Ritz pair is a short combination of pending
rows, and what a Davidson method does with residuals, choosing which pairs to improve and locking the rest softly, is
done on coordinates: no products are stored and no residual is formed.

1.  Wu and Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue problems". Both ends are kept at
    a restart when the small one is wanted, for its convergence lives on what is known of the large one: Stathopoulos
    and Saad (1998), "Restarting techniques for the (Jacobi-)Davidson symmetric eigenvalue methods".
2.  A Krylov space of b random rows sees b copies of a multiple eigenvalue and no more. At the small end, where null
    spaces are, the block is as wide as the pairs wanted. At the large end one row serves until the pairs have
    converged; then a new random row, orthogonal to all that was found, looks for what was missed until nothing can
    be there: van Dorsselaer, Hochstenbach and van der Vorst (2000), "Computing probabilistic bounds for extreme
    eigenvalues of symmetric matrices with the Lanczos method".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from fisherop.rows import RowOperator
from fisherop.solvers.contract import CUT, Control, Found, Matrix, Request, Steps, null_dimension, rows_in_memory, run
from fisherop.solvers.space import SearchSpace, eye, shelves

BASIS_ROWS = 1500
SAFETY = 0.9  # part of the tolerance used: tracked residuals and the certificate's differ,
ROUNDINGS = 20  # and that by up to so many units of rounding
LAST = 0.1  # of the tolerance, that the last pair of an end is brought to for what it says of those beyond it
NEAR_ZERO = 1000  # tolerances: pairs of the large end that are no larger may be null vectors in place of others
LOOKS = 3  # more that are taken at them
MISSED = 5e-5  # probability that a search for missed pairs overlooks one
SHARE = 0.05  # of its square norm that a missed eigenvector may have in what is left out of a search for it
NEAR = 100  # Ritz vectors next to those wanted that may be known well enough to be left out of a search
EXACT_EVERY = 1.1  # rows, relative to those at the last exact eigenproblem, at which to solve it again
CONFIRMED_EVERY = 1.015  # the same where the pairs seem to have converged
ESTIMATED_FROM = 30  # Ritz vectors at each end that pairs are estimated from between
SHARED_EVERY = 1.04  # the same for all judgements where products are shared, and cost less than a judgement
AWAY_EVERY = 1.1  # and on a device, where they cost less still
TINY = torch.finfo(torch.float64).tiny


def solve(
    op: RowOperator, request: Request, control: Control, *, block: int | None = None, basis: int | None = None
) -> Found:
    """Find the pairs wanted at both ends in one space, with `block` rows a step and `basis` rows in memory."""
    return run(op, steps(op, request, control, block=block, basis=basis))


def steps(
    op: RowOperator, request: Request, control: Control, *, block: int | None = None, basis: int | None = None
) -> Steps[Found]:
    """Do what `solve` does, asking for every product."""
    width = min(op.n, block or max(1, request.smallest))
    given = 0 if request.v0 is None else len(request.v0)
    room = basis or min(BASIS_ROWS, rows_in_memory(op))
    space = SearchSpace(op, (yield shelves, (op, max(room, 3 * (request.k + width + given)))))
    space.inject(request.start(op, min(op.n, width + given)))
    # Rows that the caller gave are not random: they may lack any eigenvector.
    pairs = Pairs(request, width, seen=0 if given else width, dtype=op.dtype)
    while space.pending or space.inject(op.random_rows(width, request.rng)):
        directions = pairs.directions(space)
        if space.full(directions.shape[1]):
            space.restart(pairs.kept(space))
            continue
        yield from space.expand(directions)
        pairs.follow(space)
        if control.step(pairs.residuals) or pairs.converged:
            break
    pairs.update(space)
    nullity = null_dimension(op, pairs.values, pairs.lambda_max)
    top = None if request.largest else space.combine(pairs.mix[:, -1:])
    found = Found(pairs.vectors(space), pairs.lambda_max, nullity, top=top)
    if not pairs.converged and control.ended and space.done < op.n:
        return replace(found, doubt=CUT)
    if not pairs.converged or space.done == op.n or (yield from nothing_missed(space, pairs, room, control)):
        return found
    if control.ended:
        return replace(found, doubt="stopped before it was certain that no copy of a multiple eigenvalue was missed")
    return (yield from steps(op, replace(request, v0=None), control, block=max(request.largest, width), basis=basis))


def nothing_missed(space: SearchSpace, pairs: Pairs, room: int, control: Control) -> Steps[bool]:
    """Search what is orthogonal to all that is known, by Lanczos from a random row, for pairs that were missed.

    The polynomial of a Lanczos run cannot be large at an eigenvalue, unless the start row all but lacks its vector.
    """
    doubts = pairs.doubts()
    if not doubts:
        return True
    kept, shift = pairs.known(space, doubts)
    known = space.combine(pairs.mix[:, kept])
    rest = SearchSpace(space.op, (yield shelves, (space.op, len(known) + room // 2)))
    rest.lock(known)
    rest.inject(space.op.random_rows(1, pairs.request.rng))
    enough = math.log(math.sqrt(2 * space.op.n / math.pi) / MISSED)
    stop, judged = False, 0
    while rest.pending and doubts and not rest.full(1) and not stop:
        yield from rest.expand(eye(1))
        stop = control.step(pairs.residuals)
        steps = rest.done - len(known)
        if steps < CONFIRMED_EVERY * judged and not stop:
            continue
        judged = steps
        run = rest.matrix()[len(known) :, len(known) :]
        values, vectors = torch.linalg.eigh(run)
        left = float(rest.coupling()[:, -1].norm())
        spread = float(run.diagonal(-1).log().sum()) + math.log(max(left, TINY))
        for doubt in doubts.copy():
            best = int((doubt.sign * values).argmax())
            distances = doubt.sign * (doubt.value - values) - shift
            if doubt.sign * (values[best] - doubt.last) > pairs.slack:
                return False
            bounded = distances[best] > 0 and float(distances.log().sum()) - spread >= enough
            if bounded or left * abs(float(vectors[-1, best])) <= pairs.limit * pairs.lambda_max:
                doubts.remove(doubt)
    return not doubts or not rest.pending


@dataclass(frozen=True)
class Doubt:
    """An end, 1 the large or -1 the small one; the least value there that a miss would have; the last one found."""

    sign: int
    value: float
    last: float


class Pairs:
    """The Ritz pairs wanted of a search space, and what they ask for next."""

    def __init__(self, request: Request, width: int, seen: int, dtype: torch.dtype) -> None:
        self.request, self.width, self.seen = request, width, seen
        self.rounding = ROUNDINGS * torch.finfo(dtype).eps
        self.limit = min(SAFETY * request.tol, max(request.tol - self.rounding, request.tol / 2))
        self.lambda_max = 0.0
        self.residuals = torch.full((request.k,), math.inf, dtype=torch.float64, device="cpu")
        self.values: Matrix = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.mix: Matrix = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self.current = self.mix
        self.ends = math.inf, math.inf
        self.looks = 0
        self.converged = False

    @property
    def slack(self) -> float:
        """The difference of eigenvalues that does not matter."""
        return self.request.tol * self.lambda_max

    def follow(self, space: SearchSpace) -> None:
        """Bring the wanted pairs up to date after products: exactly where it is time, or where they may be there."""
        host = space.op.device.type == "cpu"
        every = (SHARED_EVERY if space.op.sharers > 1 else 1.0) if host else AWAY_EVERY
        if space.pending == 1 and len(self.current) < space.done < every * len(self.current):
            return
        fresh, due = space.done / max(len(self.values), 1), EXACT_EVERY
        if space.chain and space.done > self.request.k:
            self._follow_chain(space)
            due = math.inf  # these are no estimates
        elif fresh < due:
            self._estimate(space)
        if fresh >= (CONFIRMED_EVERY if self._within_limit() else due):
            self.update(space)

    def update(self, space: SearchSpace) -> None:
        """Solve the small eigenproblem."""
        if len(self.values) < space.done:
            self.values, self.mix = torch.linalg.eigh(space.matrix())
            self.lambda_max = max(self.lambda_max, float(self.values[-1]))
            first = self._first(space.done)
            self._judge(space, self.mix[:, first], self.values[first])
            self.converged = self._settled()

    def _follow_chain(self, space: SearchSpace) -> None:
        """Compute the wanted pairs alone, of a tridiagonal matrix: far less work than its whole eigenproblem."""
        diagonal, beside = space.tridiagonal()
        solve = partial(eigh_tridiagonal, diagonal, beside, select="i")
        top, bottom, size = self.request.largest, self.request.smallest, space.done
        try:
            values, high = solve(select_range=(size - max(top, 1), size - 1))
            few, low = solve(select_range=(0, bottom - 1)) if bottom else (values[:0], high[:, :0])
        except np.linalg.LinAlgError:  # inverse iteration does not always come to an end
            return self.update(space)
        self.lambda_max = max(self.lambda_max, float(values[-1]) * space.scale)
        found = np.hstack([values[::-1][:top], few[::-1]]) * space.scale
        self._judge(space, torch.from_numpy(np.hstack([high[:, ::-1][:, :top], low[:, ::-1]])), torch.from_numpy(found))

    def _estimate(self, space: SearchSpace) -> None:
        """Approximate the pairs from the Ritz vectors next to them when last computed, and the rows multiplied since.

        The whole eigenproblem costs the cube of the rows, and would otherwise take longer than the products.
        """
        old, nearest = len(self.values), self._first(len(self.values), ESTIMATED_FROM)
        since = slice(old, space.done)
        known = torch.cat([self.mix[:, nearest], self.mix.new_zeros(space.done - old, len(nearest))])
        parts = torch.cat([known, eye(space.done)[:, since]], dim=1)
        products = torch.cat([known * self.values[nearest], space.h[: space.done, since]], dim=1)
        products[since, : len(nearest)] = space.h[:old, since].T @ known[:old]
        values, mix = torch.linalg.eigh(parts.T @ products)
        first = self._first(len(mix))
        self._judge(space, parts @ mix[:, first], values[first])

    def _judge(self, space: SearchSpace, current: Matrix, values: Matrix) -> None:
        """Take vectors for the current ones; residuals are relative to the largest Ritz value so far."""
        self.current = current
        top, few = self.request.largest, len(values) < self.request.k
        self.ends = (math.inf, math.inf) if few else (float(values[max(top, 1) - 1]), float(values[self.request.k - 1]))
        self.residuals[:] = math.inf
        norms = self._norms(space, current)[: self.request.k]
        self.residuals[: len(norms)] = norms

    def _within_limit(self) -> bool:
        """Tell whether the wanted pairs are within the tolerance, and the last of each end well within.

        Where the next eigenvalues are a crowd, the Ritz vector is theirs for long, with a residual of no more than its
        small part of the vector sought: the nearer to it, the better they are told apart. Nothing is beyond zero.
        """
        limits = torch.full_like(self.residuals, self.limit)
        strict = max(LAST * self.limit, min(self.limit, self.rounding))
        if self.request.largest:
            limits[self.request.largest - 1] = strict
        if self.request.smallest and self.ends[1] > self.slack:
            limits[-1] = strict
        return bool((self.residuals <= limits).all())

    def _settled(self) -> bool:
        """Tell whether the pairs are within their limits, after another look where null vectors may stand for some."""
        if not self._within_limit():
            return False
        self.looks += 1
        return not self.request.largest or self.ends[0] > NEAR_ZERO * self.slack or self.looks > LOOKS

    def directions(self, space: SearchSpace) -> Matrix:
        """Return the combinations of pending rows that improve the first pairs not yet converged."""
        everything = eye(space.pending)
        if not space.done or space.pending == 1:
            return everything
        missing = self.current[:, self._norms(space, self.current) > self.limit][:, : self.width]
        if space.pending <= missing.shape[1] or missing.shape[1] == 0:
            return everything[:, : self.width]
        residuals = space.coupling() @ missing
        span, size, _ = torch.linalg.svd(residuals / residuals.norm(dim=0), full_matrices=False)
        needed: Matrix = span[:, size > 0.1]
        return needed

    def kept(self, space: SearchSpace) -> Matrix:
        """Return the Ritz vectors that survive a restart."""
        self.update(space)
        spare = max(0, (len(space.rows) - self.request.k - space.pending) * 3 // 5)
        bottom = spare // 4 if self.request.smallest else 0
        kept = sorted(self._order(self.request.largest + spare - bottom, self.request.smallest + bottom))
        mix, self.values, self.mix = self.mix[:, kept], self.values[kept], eye(len(kept))
        self.current = self.mix[:, self._first(len(kept))]
        return mix

    def doubts(self) -> list[Doubt]:
        """Return what the random rows at the start cannot vouch for.

        They miss copies of a value found more often than there are rows, and a copy of the last one changes nothing.
        """
        doubts = []
        for sign, wanted in ((1, self.request.largest), (-1, self.request.smallest)):
            found = self.values.flip(0) if sign > 0 else self.values
            vouched = wanted <= self.seen or (sign < 0 and found[wanted - 1] <= self.slack)  # nothing is below zero
            if not vouched:
                value = found[wanted - 2] - sign * self.slack if self.seen else found[wanted - 1] + sign * self.slack
                doubts.append(Doubt(sign, float(value), float(found[wanted - 1])))
        return doubts

    def known(self, space: SearchSpace, doubts: list[Doubt]) -> tuple[list[int], float]:
        """Return which Ritz vectors can be left out of a search, and by how much that moves what is searched for.

        A missed eigenvector has in a Ritz vector no more than its residual over the distance of their values. It
        outlives the projection as a vector whose Rayleigh quotient is nearer to those by the squares times distances.
        """
        near = {1: 0, -1: 0} | {doubt.sign: NEAR for doubt in doubts}
        order = self._order(self.request.largest + near[1], self.request.smallest + near[-1])
        distances = torch.stack([abs(doubt.value - self.values[order]) for doubt in doubts]).amin(0)
        shares = (self._norms(space, self.mix[:, order]) * self.lambda_max / distances.clamp(min=TINY)) ** 2
        asked = set(self._order(self.request.largest, self.request.smallest))
        wanted = torch.tensor([i in asked for i in order], device="cpu")
        shares[wanted] = 0  # these have converged: where the values meet, what was missed is orthogonal by choice
        surest = shares.argsort(stable=True)
        shares, distances = shares[surest], distances[surest]
        shifts = (shares * distances).cumsum(0) / (1 - SHARE)
        # What is left out should leave the rest far from the value sought, and move that little.
        far = torch.cat([distances.flip(0).cummin(0).values.flip(0)[1:], distances.max()[None]]) - shifts
        far[shares.cumsum(0) > SHARE] = -math.inf
        best = max(int(far.argmax()), len(asked) - 1)
        return sorted(order[i] for i in surest[: best + 1].tolist()), float(shifts[best])

    def vectors(self, space: SearchSpace) -> Tensor:
        """Return the wanted vectors, descending."""
        return space.combine(self.mix[:, self._order(self.request.largest, self.request.smallest)])

    def _order(self, largest: int, smallest: int) -> list[int]:
        return self.request.places(len(self.values), largest, smallest)

    def _first(self, size: int, beside: int = 0) -> list[int]:
        """Return the places of the wanted pairs, then of those that fill up a block, and of some beside at each end."""
        largest, smallest = self.request.largest, self.request.smallest
        wanted = self.request.places(size, largest, smallest)
        spare = max(0, self.width - self.request.k) + beside
        more = self.request.places(size, largest + (spare if largest else 0), smallest + (spare if smallest else 0))
        return wanted + [i for i in more if i not in wanted]

    def _norms(self, space: SearchSpace, mix: Matrix) -> Tensor:
        norms: Tensor = (space.coupling() @ mix).norm(dim=0)
        return norms / (self.lambda_max or 1.0)
