"""The nearest neighbour of clusters without a cost matrix: products of blocks of centroids, kept only as row minima."""

from __future__ import annotations  # without Triton there is no tl.constexpr

import torch
from torch import Tensor

from .backend import jit, tl, triton, uses_triton
from .distances import (
    TILE,
    TILE_DEPTH,
    TILE_STAGES,
    TILE_WARPS,
    close_share,
    tile_of_distances,
)

# Elements of one block of work on a CPU: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18
# A row whose smallest squared distance is below this share of |x|² is computed again from differences. What a product
# leaves is then right to 1e-10 in float64, 1e-4 in float32.
_EXACT = {torch.float64: 1e-5, torch.float32: 3e-3}
# Parts into which a row of tiles is divided, so that a search for few rows keeps a large GPU busy as well.
_PARTS = 64


def nearest_centroids(
    centroids: Tensor, masses: Tensor, rows: Tensor, count: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Cheapest merge of some clusters, and with whom. Of equal costs the lowest slot wins. Memory is that of 64 n.

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
    row_tiles, column_tiles = triton.cdiv(most, TILE), triton.cdiv(m, TILE)
    parts = min(column_tiles, _PARTS)
    cost = centroids.new_full((row_tiles * TILE, parts), torch.inf)
    slot = rows.new_zeros((row_tiles * TILE, parts))
    _search_kernel[(parts, row_tiles)](
        centroids,
        masses,
        rows,
        count,
        cost,
        slot,
        m,
        d,
        triton.cdiv(column_tiles, parts),
        CLOSE=close_share(centroids.dtype),
        TILE=TILE,
        DEPTH=TILE_DEPTH,
        num_warps=TILE_WARPS,
        num_stages=TILE_STAGES,
        enable_fp_fusion=True,
    )
    cost, slot = cost[:most], slot[:most]
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
    masses,
    rows,
    count,
    cost,
    slot,
    m,
    d,
    tiles,
    CLOSE: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program a tile of rows and a part of the columns, of `tiles` tiles."""
    part = tl.program_id(0).to(tl.int64)
    parts = tl.num_programs(0)
    place = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    searched = tl.load(count)
    if tl.program_id(1) * TILE >= searched:
        return
    own = tl.load(rows + place, mask=place < searched, other=m)
    own_mass = tl.load(masses + own, mask=own < m, other=1.0)[:, None]
    best = tl.full((TILE,), float("inf"), centroids.dtype.element_ty)
    best_slot = tl.zeros((TILE,), tl.int64)
    for tile in range(part * tiles, part * tiles + tiles):
        columns = tile * TILE + tl.arange(0, TILE)
        mass = tl.load(masses + columns, mask=columns < m, other=0.0)[None, :]
        block = tile_of_distances(centroids, own, columns, m, d, CLOSE, TILE, DEPTH)
        block *= mass / (own_mass + mass) * own_mass
        block = tl.where((mass > 0) & (own[:, None] != columns[None, :]), block, float("inf"))
        smallest = tl.min(block, axis=1)
        first = tl.min(tl.where(block == smallest[:, None], columns[None, :], m), axis=1)  # pyright: ignore
        best_slot = tl.where(smallest < best, first, best_slot)
        best = tl.minimum(smallest, best)
    tl.store(cost + place * parts + part, best)
    tl.store(slot + place * parts + part, best_slot)
