"""Dropping dead slots."""

from __future__ import annotations  # without Triton there is no tl.constexpr

import torch
from torch import Tensor

from .backend import jit, launch, tl, triton, uses_triton
from .clusters import Clusters, Slots

# Elements gathered at a time on a CPU: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18
# Columns a Triton program copies at a time.
_COLUMNS = 1024
# Slots a Triton program moves, one for each thread.
_SLOTS = 256
_SLOT_WARPS = 8


def pack_slots(clusters: Clusters, size: int) -> Tensor:
    """Move the clusters that are alive to the front, in their order, into `size` slots.

    Slots keep their order, and with it which of two equal neighbours comes first.

    Args:
        clusters: all their slots are renumbered. A neighbour that is dead is replaced by any slot.
        size: at least as many as are alive, at most as many as there are slots; those behind the living are dead.

    Returns:
        int64 [size], which slot each one was; for dead slots at the end, any.
    """
    if not uses_triton(clusters.masses):
        return pack_slots_torch(clusters, size)
    m = len(clusters.masses)
    position = (clusters.masses > 0).cumsum(0)
    new = Slots(*(field.new_empty(size) for field in clusters.fields()))
    keep = position.new_empty(size)
    grid, options = (triton.cdiv(m, _SLOTS),), {"num_warps": _SLOT_WARPS, "enable_fp_fusion": False}
    launch(_pack_slots_kernel, grid, clusters.fields(), position, new, keep, m, size, SLOTS=_SLOTS, **options)
    clusters.masses, clusters.nearest, clusters.nearest_cost, clusters.made_at, clusters.point, clusters.size = new
    return keep


def pack_slots_torch(clusters: Clusters, size: int) -> Tensor:
    """The plain PyTorch twin of `pack_slots`."""
    alive = clusters.masses > 0
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
    grid, arguments = (left, triton.cdiv(left, _COLUMNS)), (costs, keep, packed, len(costs), left)
    launch(_pack_kernel, grid, *arguments, COLUMNS=_COLUMNS, enable_fp_fusion=False)
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


@jit
def _pack_slots_kernel(clusters, position, after, keep, m, left, SLOTS: tl.constexpr):
    """A program some slots: each that is alive is written to its new place, and each new place behind them as dead."""
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS).to(tl.int64)
    inside = slots < m
    mass = tl.load(clusters.masses + slots, mask=inside, other=0.0)
    alive = mass > 0
    place = tl.load(position + slots, mask=inside, other=1) - 1
    near = tl.load(clusters.nearest + slots, mask=alive, other=0)
    new_near = tl.maximum(tl.load(position + near, mask=alive, other=1) - 1, 0)
    tl.store(after.masses + place, mass, mask=alive)
    tl.store(after.nearest + place, new_near, mask=alive)
    tl.store(after.nearest_cost + place, tl.load(clusters.nearest_cost + slots, mask=alive, other=0.0), mask=alive)
    tl.store(after.made_at + place, tl.load(clusters.made_at + slots, mask=alive, other=0.0), mask=alive)
    tl.store(after.point + place, tl.load(clusters.point + slots, mask=alive, other=0), mask=alive)
    tl.store(after.size + place, tl.load(clusters.size + slots, mask=alive, other=0), mask=alive)
    tl.store(keep + place, slots, mask=alive)
    dead = (slots >= tl.load(position + m - 1)) & (slots < left)
    none = tl.zeros((SLOTS,), tl.int64)
    tl.store(after.masses + slots, mass * 0, mask=dead)
    tl.store(after.nearest + slots, slots, mask=dead)
    tl.store(after.nearest_cost + slots, mass * 0, mask=dead)
    tl.store(after.made_at + slots, mass * 0, mask=dead)
    tl.store(after.point + slots, none, mask=dead)
    tl.store(after.size + slots, none, mask=dead)
    tl.store(keep + slots, none, mask=dead)
