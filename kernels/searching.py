"""The nearest neighbour of clusters without a cost matrix: products of blocks of centroids, kept only as row minima."""

from __future__ import annotations  # without Triton there is no tl.constexpr

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import products as tiles
from .backend import jit, launch, tl, triton, uses_triton
from .batch import Batch
from .distances import tile_of_reduced_masses
from .products import TILE, pad_points, tile_of_products

# Elements of one block of work on a CPU: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18
# A row whose smallest squared distance is below this share of |x|² is computed again from differences. What a product
# leaves is then right to 1e-10 in float64, 1e-4 in float32.
_EXACT = {torch.float64: 1e-5, torch.float32: 3e-3}
# Parts into which a row of tiles is divided, so that a search for few rows keeps a large GPU busy as well.
_PARTS = 64
# Elements of a panel of products on a GPU: 256 MiB of float64.
_PANEL_ELEMENTS = 2**25
# Sides of a program's tile of a panel: a larger one needs more registers than there are.
_PANEL_TILE = 32


def search_bytes(m: int, like: Tensor) -> int:
    """Memory that `nearest_centroids` needs for m centroids of the dtype and device of a tensor, at most."""
    panel = _PANEL_ELEMENTS * like.element_size() if uses_triton(like) and tiles.products(like) == "panels" else 0
    return m * _PARTS * 16 + panel


def nearest_centroids(
    centroids: Tensor, masses: Tensor, rows: Tensor, count: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Cheapest merge of some clusters, and with whom. Of equal costs the lowest slot wins.

    Args:
        centroids: [m, d], floating, contiguous.
        masses: [m], 0 for dead slots.
        rows: int64 [m], of which the first `count` are the slots to search for, all different and alive.
        count: int64 [1].
        most: an upper bound of `count` that the host knows.

    Returns:
        The smallest cost [most] and its slot, int64 [most]; behind `count` anything.
    """
    if not uses_triton(centroids):
        return nearest_centroids_torch(centroids, masses, rows, count, most)
    search = _Search.of(centroids, masses, rows, count, most)
    smallest, lowest = search.by_products()
    near = smallest < 0
    places = near.sort(descending=True, stable=True).indices
    number = near.sum()[None]
    exact = search.by_differences(rows[places], number)
    again = torch.arange(most, device=rows.device) < number
    for known, new in zip((smallest, lowest), exact, strict=True):
        known.index_copy_(0, places, torch.where(again, new, known[places]))
    return smallest, lowest


class _Inputs(NamedTuple):
    """What the kernels of a search read.

    Attributes:
        centroids: [m, d], padded.
        norms: [m], their squared lengths.
        masses: [m].
        rows: int64, of which the first are searched for.
        searched: int64 [1], how many.
    """

    centroids: Tensor
    norms: Tensor
    masses: Tensor
    rows: Tensor
    searched: Tensor


class _Outputs(NamedTuple):
    """What they write: the cheapest merge of every row with each part of the columns [rows of whole tiles, parts]."""

    cost: Tensor
    slot: Tensor


@dataclass(frozen=True)
class _Search:
    """One search on a GPU.

    Attributes:
        inputs: what it reads.
        most: an upper bound of the rows searched for.
        panels: whether products are made by torch.mm, panel by panel.
        tile: sides of a program's tile.
        parts: into how many parts the columns are divided.
    """

    inputs: _Inputs
    most: int
    panels: bool
    tile: int
    parts: int

    @staticmethod
    def of(centroids: Tensor, masses: Tensor, rows: Tensor, count: Tensor, most: int) -> _Search:
        """A search as `nearest_centroids` is asked for."""
        m, d = centroids.shape
        points, norms, padded = pad_points(centroids.view(-1), Batch.of([(m, d)], centroids.device))
        inputs = _Inputs(points.view(m, padded.shapes[0][1]), norms, masses, rows, count)
        panels = tiles.products(centroids) == "panels"
        tile = _PANEL_TILE if panels else TILE
        return _Search(inputs, most, panels, tile, min(triton.cdiv(m, tile), _PARTS))

    def by_products(self) -> tuple[Tensor, Tensor]:
        """The smallest costs [most] and their slots; the cost is -1 where a product does not tell it."""
        wide, rows, found = self.inputs.centroids, self.inputs.rows, self._outputs()
        if not self.panels:
            self._launch_on_products(wide, found, 0, self.most)
            return self._cheapest(found)
        m = len(wide)
        searched = int(self.inputs.searched)  # the host waits: products that nobody needs would cost more
        step = max(self.tile, _PANEL_ELEMENTS // m // self.tile * self.tile)
        memory = wide.new_empty(min(step, max(searched, 1)), m)
        for start in range(0, searched, step):
            own = rows[start : min(start + step, searched)]
            products = torch.mm(wide[own], wide.T, out=memory[: len(own)])
            self._launch_on_products(products, found, start, start + len(own))
        return self._cheapest(found)

    def by_differences(self, rows: Tensor, searched: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest costs [most] of other rows, to the last digit, and their slots."""
        inputs, found = self.inputs._replace(rows=rows, searched=searched), self._outputs()
        launch(_exact_search_kernel, self._grid(self.most), inputs, found, *self._sizes(), **self._options())
        return self._cheapest(found)

    def _launch_on_products(self, products: Tensor, found: _Outputs, start: int, stop: int) -> None:
        """The rows in these places of the list. Where a tile makes its own products, those given are any tensor."""
        launch(
            _search_kernel,
            self._grid(stop - start),
            self.inputs,
            products,
            found,
            *self._sizes(),
            start,
            PANELS=self.panels,
            EXACT=_EXACT[products.dtype],
            DEPTH=tiles.DEPTH,
            num_stages=tiles.STAGES,
            **self._options(),
        )

    def _grid(self, count: int) -> tuple[int, int]:
        return self.parts, triton.cdiv(count, self.tile)

    def _sizes(self) -> tuple[int, int, int]:
        """Centroids, their dimensions, and tiles in a part of the columns."""
        m, d = self.inputs.centroids.shape
        return m, d, triton.cdiv(triton.cdiv(m, self.tile), self.parts)

    def _options(self) -> dict[str, object]:
        return {"TILE": self.tile, "num_warps": tiles.WARPS, "enable_fp_fusion": True}

    def _outputs(self) -> _Outputs:
        """Costs and slots to be written, for every row of a tile and each part of the columns."""
        shape = (self._grid(self.most)[1] * self.tile, self.parts)
        return _Outputs(self.inputs.centroids.new_full(shape, torch.inf), self.inputs.rows.new_zeros(shape))

    def _cheapest(self, found: _Outputs) -> tuple[Tensor, Tensor]:
        """The smallest cost of each row, and its slot, the lowest of equals."""
        cost, slot = found.cost[: self.most], found.slot[: self.most]
        smallest = cost.amin(dim=1)
        m = len(self.inputs.centroids)
        return smallest, torch.where(cost == smallest[:, None], slot, m).amin(dim=1)


def nearest_centroids_torch(
    centroids: Tensor, masses: Tensor, rows: Tensor, count: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """The plain PyTorch twin of `nearest_centroids`. The host waits for the count."""
    m, searched = len(centroids), int(count)
    cost = centroids.new_empty(most)
    slot = rows.new_empty(most)
    step = max(1, _BLOCK_ELEMENTS // m)
    memory, sums = centroids.new_empty(min(step, m), m), centroids.new_empty(min(step, m), m)
    # (-2 x, 1, |x|²) · (y, |y|², 1) is the squared distance, and infinite where y is dead.
    norms, one = centroids.square().sum(dim=1, keepdim=True), torch.ones_like(masses)[:, None]
    left = torch.cat((-2 * centroids, one, norms), dim=1)
    right = torch.cat((centroids, norms.masked_fill(masses[:, None] == 0, torch.inf), one), dim=1).T
    inverse = (1 / masses).masked_fill_(masses == 0, 0)  # infinity stays infinity when divided by a number
    alike = masses[masses > 0].unique()
    for start in range(0, searched, step):
        own = rows[start : min(start + step, searched)]
        block = torch.mm(left[own], right, out=memory[: len(own)])
        block.scatter_(1, own[:, None], torch.inf)
        near = (block.amin(dim=1) < _EXACT[block.dtype] * norms[own, 0]).nonzero().squeeze(1)
        if len(near) > 0:
            block[near] = _by_differences(centroids, masses, own[near])
        if len(alike) > 1:
            block /= torch.add(inverse[own, None], inverse, out=sums[: len(own)])
        part = slice(start, start + len(own))
        cost[part], slot[part] = block.min(dim=1)
    return (cost * (alike / 2) if len(alike) == 1 else cost), slot


def _by_differences(centroids: Tensor, masses: Tensor, rows: Tensor) -> Tensor:
    """Squared distances [r, m] of some clusters to all, to the last digit; infinity to themselves and the dead."""
    distances = torch.cdist(centroids[rows], centroids, compute_mode="donot_use_mm_for_euclid_dist").square_()
    return distances.masked_fill_(masses == 0, torch.inf).scatter_(1, rows[:, None], torch.inf)


@jit
def _search_kernel(
    inputs,
    products,
    outputs,
    m,
    d,
    tiles,
    first,
    TILE: tl.constexpr,
    PANELS: tl.constexpr,
    EXACT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program a tile of rows, from place `first` of the list on, and a part of the columns, of `tiles` tiles.

    Where a centroid is so near that a product does not tell its distance, the cost is -1.
    """
    part = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    place = first + local
    searched = tl.load(inputs.searched)
    if first + tl.program_id(1) * TILE >= searched:
        return
    d = tl.multiple_of(d, DEPTH)
    row_inside = place < searched
    own = tl.load(inputs.rows + place, mask=row_inside, other=0)
    own_norm = tl.load(inputs.norms + own)
    best = tl.full((TILE,), float("inf"), inputs.centroids.dtype.element_ty)
    best_slot = tl.zeros((TILE,), tl.int64)
    nearest = best
    for tile in range(part * tiles, part * tiles + tiles):
        columns = tile * TILE + tl.arange(0, TILE)
        column_inside = columns < m
        if PANELS:
            inside = row_inside[:, None] & column_inside[None, :]
            product = tl.load(products + local[:, None] * m + columns[None, :], mask=inside, other=0.0)
        else:
            product = tile_of_products(inputs.centroids, own, columns, row_inside, column_inside, d, TILE, DEPTH)
        norm = tl.load(inputs.norms + columns, mask=column_inside, other=0.0)
        block = own_norm[:, None] + norm[None, :] - 2 * product
        best, best_slot, shortest = nearer(best, best_slot, block, inputs.masses, own, columns, row_inside, m)
        nearest = tl.minimum(nearest, shortest)
    best = tl.where(nearest < EXACT * own_norm, -1.0, best)
    parts = tl.num_programs(0)
    tl.store(outputs.cost + place * parts + part, best, mask=row_inside)
    tl.store(outputs.slot + place * parts + part, best_slot, mask=row_inside)


@jit
def nearer(best, best_slot, block, masses, own, columns, row_inside, m):
    """The cheapest merges so far, [r] with their slots, and those of a further tile of squared distances [r, c].

    Returns:
        The cheapest of both, their slots, and the shortest distance in the tile, all [r].
    """
    mass = tl.load(masses + columns, mask=columns < m, other=0.0)
    alive = mass > 0
    there = alive[None, :] & (own[:, None] != columns[None, :])
    shortest = tl.min(tl.where(there, block, float("inf")), axis=1)
    block *= tile_of_reduced_masses(masses, own, columns, row_inside, alive)
    block = tl.where(there, block, float("inf"))
    smallest = tl.min(block, axis=1)
    lowest = tl.min(tl.where(block == smallest[:, None], columns[None, :], m), axis=1)  # pyright: ignore
    return tl.minimum(smallest, best), tl.where(smallest < best, lowest, best_slot), shortest


@jit
def _exact_search_kernel(inputs, outputs, m, d, tiles, TILE: tl.constexpr):
    """As `_search_kernel`, with distances from differences."""
    part = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    searched = tl.load(inputs.searched)
    if tl.program_id(1) * TILE >= searched:
        return
    row_inside = place < searched
    own = tl.load(inputs.rows + place, mask=row_inside, other=0)
    dtype = inputs.centroids.dtype.element_ty
    best = tl.full((TILE,), float("inf"), dtype)
    best_slot = tl.zeros((TILE,), tl.int64)
    for tile in range(part * tiles, part * tiles + tiles):
        columns = tile * TILE + tl.arange(0, TILE)
        row_points = inputs.centroids + own * d
        column_points = inputs.centroids + tl.where(columns < m, columns, 0) * d
        block = tl.zeros((TILE, TILE), dtype)
        for k in range(0, d):
            difference = tl.load(row_points + k)[:, None] - tl.load(column_points + k)[None, :]
            block += difference * difference
        best, best_slot, _ = nearer(best, best_slot, block, inputs.masses, own, columns, row_inside, m)
    parts = tl.num_programs(0)
    tl.store(outputs.cost + place * parts + part, best, mask=row_inside)
    tl.store(outputs.slot + place * parts + part, best_slot, mask=row_inside)
