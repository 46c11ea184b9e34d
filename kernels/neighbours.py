"""The nearest neighbour of clusters: the minimum of rows of the cost matrix over the clusters that are alive."""

from __future__ import annotations  # without Triton there is no tl.constexpr

import torch
from torch import Tensor

from .backend import jit, launch, tl, uses_triton
from .clusters import Clusters

# Elements gathered at a time on a CPU: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18
# Columns a Triton program looks at a time.
_COLUMNS = 1024


def update_neighbours(costs: Tensor, clusters: Clusters, every: bool = False) -> None:
    """Search again for those whose nearest neighbour was merged in the round just made; the others keep theirs.

    Of equal costs the lowest slot wins.

    Args:
        costs: [m, m], the diagonal holding the dtype's largest finite number. Rows and columns of dead slots may hold
            any finite number.
        clusters: after `merge_pairs`, or new; `nearest` and `nearest_cost` are brought up to date.
        every: search for all, as is needed once at the beginning.
    """
    if not uses_triton(costs):
        return update_neighbours_torch(costs, clusters, every)
    m = len(costs)
    nearest, nearest_cost = torch.empty_like(clusters.nearest), torch.empty_like(clusters.nearest_cost)
    launch(
        _update_kernel,
        (m,),
        costs,
        clusters.masses,
        clusters.nearest,
        clusters.nearest_cost,
        nearest,
        nearest_cost,
        m,
        EVERY=every,
        COLUMNS=_COLUMNS,
        enable_fp_fusion=False,
    )
    clusters.nearest, clusters.nearest_cost = nearest, nearest_cost
    return None


def update_neighbours_torch(costs: Tensor, clusters: Clusters, every: bool = False) -> None:
    """The plain PyTorch twin of `update_neighbours`; `torch.min` documents that the first minimum wins."""
    masses, nearest = clusters.masses, clusters.nearest
    stale = masses > 0
    if not every:
        stale &= clusters.mutual()[nearest]
        nearest = torch.where(masses > 0, nearest, torch.arange(len(nearest), device=nearest.device))
    rows = stale.nonzero().squeeze(1)
    # Adding one number to a row that is in the cache is cheaper than overwriting a column of the matrix for every
    # slot that dies.
    out_of_reach = torch.zeros_like(masses).masked_fill_(masses == 0, torch.finfo(costs.dtype).max)
    step = max(1, _BLOCK_ELEMENTS // costs.shape[1])
    cost, found = masses.new_empty(rows.shape), torch.empty_like(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        block = costs.index_select(0, rows[part]).add_(out_of_reach)
        cost[part], found[part] = block.min(dim=1)
    clusters.nearest_cost = clusters.nearest_cost.index_copy(0, rows, cost)
    clusters.nearest = nearest.index_copy(0, rows, found)


@jit
def row_minima(costs, m, rows, masses, COLUMNS: tl.constexpr):
    """The smallest cost in rows, int64 [r, 1], over columns that are alive, and its column, the lowest of equals.

    Returns:
        [r] and int64 [r]; infinity where nobody else is alive.
    """
    dtype = costs.dtype.element_ty
    lane = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    best = tl.full(rows.shape, float("inf"), dtype) + tl.zeros(lane.shape, dtype)
    best_column = tl.zeros(rows.shape, tl.int64) + tl.zeros(lane.shape, tl.int64)
    for start in range(0, m, COLUMNS):
        columns = start + lane
        alive = tl.load(masses + columns, mask=columns < m, other=0.0) > 0
        alive = alive & (columns != rows)
        cost = tl.load(costs + rows * m + columns, mask=alive, other=float("inf"))
        best_column = tl.where(cost < best, columns, best_column)
        best = tl.minimum(cost, best)
    smallest = tl.min(best, axis=1)
    column = tl.min(tl.where(best == smallest[:, None], best_column, m), axis=1)  # pyright: ignore
    return smallest, column


@jit
def _update_kernel(
    costs,
    masses,
    nearest,
    nearest_cost,
    nearest_after,
    nearest_cost_after,
    m,
    EVERY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program a slot."""
    slot = tl.program_id(0).to(tl.int64)
    if tl.load(masses + slot) == 0:
        tl.store(nearest_after + slot, slot)  # the dead name themselves, and so take part in no pair
        return
    if not EVERY:
        near = tl.load(nearest + slot)
        back = tl.load(nearest + near)
        if (tl.load(nearest + back) != near) | (back == near):
            tl.store(nearest_after + slot, near)
            tl.store(nearest_cost_after + slot, tl.load(nearest_cost + slot))
            return
    row = tl.full((1, 1), 0, tl.int64) + slot
    cost, column = row_minima(costs, m, row, masses, COLUMNS)
    one = slot + tl.arange(0, 1)
    tl.store(nearest_cost_after + one, cost)
    tl.store(nearest_after + one, column)
