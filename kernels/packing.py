"""Dropping dead slots."""

from __future__ import annotations  # without Triton there is no tl.constexpr

import torch
from torch import Tensor

from .backend import jit, tl, triton, uses_triton
from .clusters import Clusters

# Elements gathered at a time on a CPU: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18
# Columns a Triton program copies at a time.
_COLUMNS = 1024


def pack_slots(clusters: Clusters, size: int) -> Tensor:
    """Move the clusters that are alive to the front, in their order, into `size` slots.

    Args:
        clusters: all their slots are renumbered. A neighbour that is dead is replaced by any slot.
        size: at least as many as are alive; the slots behind them are dead.

    Returns:
        int64 [size], which slot each one was; dead slots at the end are any that were dead.
    """
    alive = clusters.masses > 0
    # Stable, so that slots keep their order, and with it which of two equal neighbours comes first.
    keep = torch.sort(alive, descending=True, stable=True).indices[:size]
    position = (alive.cumsum(0) - 1).clamp_(min=0)
    slots = torch.arange(size, device=keep.device)
    clusters.masses = clusters.masses[keep]
    clusters.nearest = torch.where(clusters.masses > 0, position[clusters.nearest[keep]], slots)
    clusters.nearest_cost = clusters.nearest_cost[keep]
    clusters.made_at = clusters.made_at[keep]
    clusters.point = clusters.point[keep]
    clusters.size = clusters.size[keep]
    return keep


def pack_costs(costs: Tensor, keep: Tensor) -> Tensor:
    """The rows and columns of some slots.

    Args:
        costs: [m, m], contiguous; not to be used afterwards.
        keep: int64 [l], ascending but for dead slots at the end.

    Returns:
        [l, l], contiguous. On a CPU it lies in the memory of `costs`: touching fresh pages would cost more than the
        copy.
    """
    if not uses_triton(costs):
        return pack_costs_torch(costs, keep)
    left = len(keep)
    packed = costs.new_empty(left, left)
    columns = min(_COLUMNS, triton.next_power_of_2(left))
    _pack_kernel[(left, triton.cdiv(left, columns))](
        costs, keep, packed, len(costs), left, COLUMNS=columns, enable_fp_fusion=False
    )
    return packed


def pack_costs_torch(costs: Tensor, keep: Tensor) -> Tensor:
    """The plain PyTorch twin of `pack_costs`."""
    left = len(keep)
    if costs.is_cuda:
        return costs[keep[:, None], keep]
    packed = costs.view(-1)[: left * left].view(left, left)
    step = max(1, _BLOCK_ELEMENTS // costs.shape[1])
    for start in range(0, left, step):
        # Packed row i ends before row keep[i] begins, so nothing is overwritten that is still to be read.
        rows = costs.index_select(0, keep[start : start + step])
        packed[start : start + step] = rows.gather(1, keep.expand(len(rows), left))
    return packed


@jit
def _pack_kernel(costs, keep, packed, m, left, COLUMNS: tl.constexpr):
    """A program a part of a packed row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < left
    source = tl.load(keep + row) * m + tl.load(keep + columns, mask=inside, other=0)
    tl.store(packed + row * left + columns, tl.load(costs + source, mask=inside), mask=inside)
