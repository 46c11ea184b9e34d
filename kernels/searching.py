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
    block_of_distances,
    close_share,
    tile_of_distances,
)

# Elements of one block of work on a CPU: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18
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
    norms = centroids.square().sum(dim=1)
    cost = centroids.new_empty(most)
    slot = rows.new_empty(most)
    m, searched = len(centroids), int(count)
    step = max(1, _BLOCK_ELEMENTS // m)
    memory, other = centroids.new_empty(min(step, m), m), centroids.new_empty(min(step, m), m)
    inverse, out_of_reach = 1 / masses, torch.zeros_like(masses).masked_fill_(masses == 0, torch.inf)
    for start in range(0, searched, step):
        own = rows[start : min(start + step, searched)]
        block = memory[: len(own)]
        block_of_distances(block, centroids, norms, own)
        block /= torch.add(inverse[own, None], inverse, out=other[: len(own)])
        block += out_of_reach
        part = slice(start, start + len(own))
        cost[part], slot[part] = block.min(dim=1)
    return cost, slot


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
