"""Orthonormal rows and what F makes of them: the search space of a Krylov method, alone or beside others.

A product is orthogonalized first against the last few rows, where nearly all of it lies, then against all, until that
takes little away: the accuracy of two passes for little more memory traffic than one.

On a GPU launching an operation on one row takes longer than the operation. Spaces of operators that are solved side by
side therefore keep their rows in one piece of memory, a shelf for each, and products of one row for each of them are
taken in by as few operations as for one space, with a single wait for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.rows import RowOperator, finite, row_norms, unit
from fisherop.solvers.contract import Matrix, Steps, gram, least

COLUMNS = 1 << 14
"""Entries of all rows that a restart combines at a time."""

ROOMS = 128
"""Rows that a shelf is rounded up to a multiple of, for spaces of about one size to lie side by side."""

Floats = NDArray[np.float64]


class SearchSpace:
    """Orthonormal rows and F in them: F rows[:done] = h[:size, :done]^T rows[:size]."""

    def __init__(self, op: RowOperator, shelf: Shelf) -> None:
        self.op, self.shelf = op, shelf
        self.rows = shelf.rows
        self.h: Matrix = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64, device="cpu")
        self.done = self.size = self.near = 0
        self.scale = 0.0
        self.chain = True  # all of it is one Lanczos run, from one row: F is tridiagonal in it

    @property
    def pending(self) -> int:
        """Rows not yet multiplied."""
        return self.size - self.done

    def full(self, count: int) -> bool:
        """Tell whether the products of `count` more rows might not find room."""
        return bool(self.size + count > len(self.rows) < self.op.n)

    def matrix(self) -> Matrix:
        """Return F in the multiplied rows."""
        h = self.h[: self.done, : self.done]
        return (h + h.T) / 2

    def coupling(self) -> Matrix:
        """Return what F makes of the multiplied rows in the pending ones."""
        return self.h[self.done : self.size, : self.done]

    def combine(self, mix: Matrix) -> Tensor:
        """Return combinations of the multiplied rows."""
        return mix.T.to(self.rows) @ self.rows[: self.done]

    def inject(self, rows: Tensor) -> int:
        """Add what is new in `rows` to the pending ones, and return how many rows that gave."""
        _, fresh, _ = self._split(unit(rows), 0, floor=1e-5)
        self.chain = self.size == 0 and len(fresh) == 1
        return self._append(fresh)

    def tridiagonal(self) -> tuple[Floats, Floats]:
        """Return the diagonal of F in the multiplied rows of a chain, and what is beside it, in units of `scale`."""
        diagonal, beside = (self.h.diagonal(-i)[: self.done - i].numpy() / (self.scale or 1.0) for i in (0, 1))
        return diagonal, beside

    def lock(self, rows: Tensor) -> None:
        """Take orthonormal rows for eigenvectors, which need no product."""
        self.rows[: len(rows)] = rows
        self.done = self.size = self.near = len(rows)
        self.chain = False

    def expand(self, directions: Matrix) -> Steps[None]:
        """Multiply combinations of the pending rows by F."""
        self._turn(directions)
        products = yield "unchecked", self.rows[self.done : self.done + directions.shape[1]]
        # A Krylov product lies in the rows of the last step, those of this one and the pending ones.
        if len(products) == 1:
            yield absorb, (self, products)
        else:
            self._notice(products, float(row_norms(products).max()))
            self._take(*self._split(products, self.near, self._floor()))

    def _notice(self, products: Tensor, size: float) -> None:
        """Take note of the largest norm of products, and refuse them where it shows NaN or infinity."""
        if not math.isfinite(size):
            finite(products)
        self.scale = max(self.scale, size)

    def restart(self, mix: Matrix) -> None:
        """Keep of the multiplied rows the combinations `mix`, which must be Ritz vectors, and all pending rows."""
        kept, pending = mix.shape[1], self.pending
        inner, outer = mix.T @ self.matrix() @ mix, self.coupling() @ mix
        turn = mix.T.to(self.rows)
        for columns in torch.split(self.rows, COLUMNS, dim=1):  # in pieces: no second basis in memory
            columns[: kept + pending] = torch.cat([turn @ columns[: self.done], columns[self.done : self.size]])
            if not self.shelf.apart:
                columns[kept + pending : self.size] = 0
        self.done, self.size, self.near, self.chain = kept, kept + pending, 0, False
        self.h[:kept, :kept], self.h[kept : self.size, :kept] = inner, outer

    def _append(self, fresh: Tensor, *, shelved: bool = False) -> int:
        """Add as many orthonormal rows as there is room for, which may have been written to their place."""
        first, last = self.size, min(self.size + len(fresh), len(self.rows))
        if not shelved:
            self.rows[first:last] = fresh[: last - first]
        self.h[first:last, :first] = 0
        self.size = last
        return last - first

    def _take(self, inside: Matrix, fresh: Tensor, outside: Matrix, *, shelved: bool = False) -> None:
        """Enter products with the first pending rows: their parts in the rows, and in fresh ones that are added."""
        first, last = self.done, self.done + inside.shape[1]
        self.h[: self.size, first:last] = inside
        count = self._append(fresh, shelved=shelved)
        self.h[self.size - count : self.size, first:last] = outside[:count]
        self.near, self.done = first, last

    def _turn(self, directions: Matrix) -> None:
        """Turn the pending rows so that the combinations `directions` come first."""
        if len(directions) == 1 or torch.equal(directions, eye(len(directions))[:, : directions.shape[1]]):
            return
        turn = torch.linalg.qr(directions, mode="complete")[0]
        turn[:, : directions.shape[1]] = directions
        pending = slice(self.done, self.size)
        self.rows[pending] = turn.T.to(self.rows) @ self.rows[pending]
        self.h[pending, : self.done] = turn.T @ self.coupling()

    def _floor(self) -> float:
        """Return the norm at which what is left of a product is rounding."""
        return max(2 * torch.finfo(self.op.dtype).eps * self.scale, least(self.op.dtype))

    def _split(self, block: Tensor, near: int, floor: float) -> tuple[Matrix, Tensor, Matrix]:
        """Write block = inside^T rows + outside^T fresh, fresh rows orthonormal; what is below floor is dropped."""
        inside = torch.zeros(self.size, len(block), dtype=torch.float64, device="cpu")
        fresh, outside, _ = _normalized(block, eye(len(block)), floor)
        for first in (near, 0, 0, 0) if near else (0, 0, 0):
            rows = self.rows[first : self.size]
            part = rows @ fresh.T
            fresh = fresh - part.T @ rows
            inside[first:] += part.double().cpu() @ outside
            fresh, outside, least = _normalized(fresh, outside, floor)
            if first == 0 and least > 0.5:
                break
        return inside, fresh, outside


# ------------------------------------------------------------------------------------------------ many side by side


@dataclass(frozen=True)
class Shelf:
    """Memory for the rows of one search space, in one piece with that of others: (spaces, rows, n).

    On a device rows that are not in use are zero, so that those of all spaces can be multiplied at once.
    """

    together: Tensor
    place: int
    room: int

    @property
    def rows(self) -> Tensor:
        """The memory of this space, (room, n)."""
        return self.together[self.place, : self.room]

    @property
    def apart(self) -> bool:
        """Tell whether this space is better worked on by itself: it is alone, or on the host, where nothing waits."""
        return len(self.together) == 1 or self.together.device.type == "cpu"


def shelves(asked: list[tuple[RowOperator, int]]) -> list[Shelf]:
    """Return memory for as many rows as each operator asks for, side by side for those that ask for about as many."""
    op = asked[0][0]
    rooms = [min(op.n, room) for _, room in asked]
    sizes = [min(op.n, -(-room // ROOMS) * ROOMS) for room in rooms]
    found: dict[int, Shelf] = {}
    for size in set(sizes):
        owners = [i for i, other in enumerate(sizes) if other == size]
        together = torch.empty(len(owners), size, op.n, dtype=op.dtype, device=op.device)
        found |= {i: Shelf(together, place, rooms[i]) for place, i in enumerate(owners)}
        if not found[owners[0]].apart:
            together.zero_()
    return [found[i] for i in range(len(asked))]


def absorb(asked: list[tuple[SearchSpace, Tensor]]) -> list[None]:
    """Take in a product of the first pending row of each space, those that share a piece of memory at once."""
    neighbours: dict[int, list[tuple[SearchSpace, Tensor]]] = {}
    for space, product in asked:
        neighbours.setdefault(id(space.shelf.together), []).append((space, product))
    for group in neighbours.values():
        _absorb([space for space, _ in group], torch.cat([product for _, product in group]))
    return [None] * len(asked)


def _absorb(spaces: list[SearchSpace], products: Tensor) -> None:
    """Do to a product of each space what `_split` does to a block, in two passes and with one wait for the device.

    Where nothing is left of a product, its numbers are NaN from there on, and are not used.
    """
    places, rows = _beside(spaces, products)
    near = min((space.near for space in spaces if space.near), default=0)
    norms, parts, fresh = [row_norms(rows)[:, None]], [], rows
    for first in (near, 0) if near else (0,):
        part, fresh = _project(spaces, first, fresh / norms[-1].to(fresh))
        parts.append(part.double())
        norms.append(row_norms(fresh)[:, None])
    fresh = fresh / norms[-1].to(fresh)
    table = torch.cat([*norms, *parts], dim=1).cpu().numpy()[places]
    sizes, table = table[:, : len(norms)], table[:, len(norms) :]
    for i, space in enumerate(spaces):
        space._notice(products[i : i + 1], float(sizes[i, 0]))
    floors = np.array([space._floor() for space in spaces])
    inside, outside, start = np.zeros((len(spaces), parts[-1].shape[1])), sizes[:, 0], 0
    for part, left in zip(parts, sizes[:, 1:].T, strict=True):
        width, some = part.shape[1], outside > floors
        inside[some, -width:] += table[some, start : start + width] * outside[some, None]
        outside, start = outside * np.where(some, left, 1), start + width
    new, clean = outside > floors, sizes[:, -1] > 0.5
    kept = [i for i, space in enumerate(spaces) if new[i] and clean[i] and space.size < len(space.rows)]
    _shelve([spaces[i] for i in kept], [places[i] for i in kept], fresh)
    for i, space in enumerate(spaces):
        row, own = fresh[places[i]][None], torch.from_numpy(inside[i, : space.size, None])
        beyond = torch.from_numpy(outside[i : i + 1, None])
        if new[i] and not clean[i]:
            more, row, left = space._split(row, 0, float(floors[i] / outside[i]))
            space._take(own + more * beyond, row, left * beyond)
        else:
            space._take(own, row[: int(new[i])], beyond[: int(new[i])], shelved=True)


def _beside(spaces: list[SearchSpace], products: Tensor) -> tuple[list[int], Tensor]:
    """Return the products with a row for every space of the shelf where those are worked on at once, and their places.

    Rows of spaces that have none, which are done or busy elsewhere, are zero.
    """
    shelf = spaces[0].shelf
    if shelf.apart or len(spaces) == len(shelf.together):
        return list(range(len(spaces))), products
    places = [space.shelf.place for space in spaces]
    beside = products.new_zeros(len(shelf.together), products.shape[1])
    return places, beside.index_copy_(0, _index(places, products), products)


def _project(spaces: list[SearchSpace], first: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products of a row with each space's rows from `first` on, zero where it has none, and what is left."""
    shelf, end = spaces[0].shelf, max(space.size for space in spaces)
    if len(spaces) == len(rows) == 1:
        own = spaces[0].rows[first:end]
        part = rows @ own.T
        return part, rows - part @ own
    if shelf.apart:
        apart = [_project([space], first, rows[i : i + 1]) for i, space in enumerate(spaces)]
        wide = [torch.nn.functional.pad(part, (0, end - first - part.shape[1])) for part, _ in apart]
        return torch.cat(wide), torch.cat([fresh for _, fresh in apart])
    together = shelf.together[:, first:end]
    part = torch.bmm(rows[:, None], together.mT)
    return part[:, 0], torch.baddbmm(rows[:, None], part, together, alpha=-1)[:, 0]


def _shelve(spaces: list[SearchSpace], places: list[int], rows: Tensor) -> None:
    """Write the rows at some places to the next places of the spaces."""
    sizes = [space.size for space in spaces]
    if not spaces or spaces[0].shelf.apart:
        for space, place in zip(spaces, places, strict=True):
            space.rows[space.size] = rows[place]
    elif len(set(sizes)) == 1 and len(spaces) == len(rows):
        spaces[0].shelf.together[:, sizes[0]] = rows
    else:
        chosen = _index(places, rows)
        spaces[0].shelf.together[chosen, _index(sizes, rows)] = rows[chosen]


def _index(numbers: list[int], like: Tensor) -> Tensor:
    """Return indices on a device, which nobody waits for."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(like.device, non_blocking=True)


def eye(size: int) -> Matrix:
    """Return the unit matrix."""
    return torch.eye(size, dtype=torch.float64, device="cpu")


def _normalized(block: Tensor, mix: Matrix, floor: float) -> tuple[Tensor, Matrix, float]:
    """Write block^T mix = fresh^T outside with orthonormal fresh rows; rows that matter less than floor are dropped.

    The last value tells how much of the smallest remaining row was left of norm 1. Stathopoulos and Wu (2002), "A block
    orthogonalization procedure with constant synchronization requirements", algorithm SVQB.
    """
    if len(block) == 1:  # the common case, without a product in double precision
        size = block.norm(dtype=torch.float64).cpu()
        outside = size * mix
        kept = int(outside.norm() > floor)
        return block[:kept] / size.to(block), outside[:kept], float(size) if kept else 1.0
    values, vectors = torch.linalg.eigh(gram(block, block))
    size = values.clamp(min=0).sqrt()
    outside = (vectors * size).T @ mix
    kept = outside.norm(dim=1) > floor
    if not kept.any():
        return block[:0], outside[:0], 1.0
    turn = (vectors[:, kept] / size[kept]).T.to(block)
    return turn @ block, outside[kept], float(size[kept].min())
