"""The nearest neighbour of clusters without a cost matrix: products of blocks of centroids, kept only as row minima."""

from __future__ import annotations  # without Triton there is no tl.constexpr

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
    m, d = centroids.shape
    points, norms, padded = pad_points(centroids.view(-1), Batch.of([(m, d)], centroids.device))
    wide = points.view(m, padded.shapes[0][1])
    panels = tiles.products(centroids) == "panels"
    tile = _PANEL_TILE if panels else TILE
    column_tiles = triton.cdiv(m, tile)
    parts = min(column_tiles, _PARTS)
    sizes = (m, wide.shape[1], triton.cdiv(column_tiles, parts))
    options = {"TILE": tile, "num_warps": tiles.WARPS, "enable_fp_fusion": True}

    def grid(count: int) -> tuple[int, int]:
        return parts, triton.cdiv(count, tile)

    def found() -> tuple[Tensor, Tensor]:
        """Costs and slots to be written, for every row of a tile and each part of the columns."""
        shape = (grid(most)[1] * tile, parts)
        return centroids.new_full(shape, torch.inf), rows.new_zeros(shape)

    def search(start: int, stop: int, products: Tensor) -> None:
        """The rows in these places of the list."""
        launch(
            _search_kernel,
            grid(stop - start),
            wide,
            products,
            norms,
            masses,
            rows,
            count,
            cost,
            slot,
            *sizes,
            start,
            PANELS=panels,
            EXACT=_EXACT[centroids.dtype],
            DEPTH=tiles.DEPTH,
            num_stages=tiles.STAGES,
            **options,
        )

    cost, slot = found()
    if not panels:
        search(0, most, wide)
    else:
        searched = int(count)  # the host waits: products that nobody needs would cost more
        step = max(tile, _PANEL_ELEMENTS // m // tile * tile)
        memory = wide.new_empty(min(step, max(searched, 1)), m)
        for start in range(0, searched, step):
            own = rows[start : min(start + step, searched)]
            search(start, start + len(own), torch.mm(wide[own], wide.T, out=memory[: len(own)]))
    smallest, lowest = _cheapest(cost[:most], slot[:most], m)

    near = smallest < 0
    places = near.sort(descending=True, stable=True).indices
    number = near.sum()[None]
    cost, slot = found()
    launch(_exact_search_kernel, grid(most), wide, masses, rows[places], number, cost, slot, *sizes, **options)
    again = torch.arange(most, device=rows.device) < number
    for known, new in zip((smallest, lowest), _cheapest(cost[:most], slot[:most], m), strict=True):
        known.index_copy_(0, places, torch.where(again, new, known[places]))
    return smallest, lowest


def _cheapest(cost: Tensor, slot: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The smallest cost of each row [r, parts], and its slot, the lowest of equals."""
    smallest = cost.amin(dim=1)
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
    centroids,
    products,
    norms,
    masses,
    rows,
    count,
    cost,
    slot,
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
    searched = tl.load(count)
    if first + tl.program_id(1) * TILE >= searched:
        return
    d = tl.multiple_of(d, DEPTH)
    row_inside = place < searched
    own = tl.load(rows + place, mask=row_inside, other=0)
    own_norm = tl.load(norms + own)
    best = tl.full((TILE,), float("inf"), centroids.dtype.element_ty)
    best_slot = tl.zeros((TILE,), tl.int64)
    nearest = best
    for tile in range(part * tiles, part * tiles + tiles):
        columns = tile * TILE + tl.arange(0, TILE)
        column_inside = columns < m
        if PANELS:
            inside = row_inside[:, None] & column_inside[None, :]
            product = tl.load(products + local[:, None] * m + columns[None, :], mask=inside, other=0.0)
        else:
            product = tile_of_products(centroids, own, columns, row_inside, column_inside, d, TILE, DEPTH)
        norm = tl.load(norms + columns, mask=column_inside, other=0.0)
        block = own_norm[:, None] + norm[None, :] - 2 * product
        best, best_slot, shortest = nearer(best, best_slot, block, masses, own, columns, row_inside, m)
        nearest = tl.minimum(nearest, shortest)
    best = tl.where(nearest < EXACT * own_norm, -1.0, best)
    parts = tl.num_programs(0)
    tl.store(cost + place * parts + part, best, mask=row_inside)
    tl.store(slot + place * parts + part, best_slot, mask=row_inside)


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
def _exact_search_kernel(centroids, masses, rows, count, cost, slot, m, d, tiles, TILE: tl.constexpr):
    """As `_search_kernel`, with distances from differences."""
    part = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    searched = tl.load(count)
    if tl.program_id(1) * TILE >= searched:
        return
    row_inside = place < searched
    own = tl.load(rows + place, mask=row_inside, other=0)
    dtype = centroids.dtype.element_ty
    best = tl.full((TILE,), float("inf"), dtype)
    best_slot = tl.zeros((TILE,), tl.int64)
    for tile in range(part * tiles, part * tiles + tiles):
        columns = tile * TILE + tl.arange(0, TILE)
        row_points = centroids + own * d
        column_points = centroids + tl.where(columns < m, columns, 0) * d
        block = tl.zeros((TILE, TILE), dtype)
        for k in range(0, d):
            difference = tl.load(row_points + k)[:, None] - tl.load(column_points + k)[None, :]
            block += difference * difference
        best, best_slot, _ = nearer(best, best_slot, block, masses, own, columns, row_inside, m)
    parts = tl.num_programs(0)
    tl.store(cost + place * parts + part, best, mask=row_inside)
    tl.store(slot + place * parts + part, best_slot, mask=row_inside)
