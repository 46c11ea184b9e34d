"""All rounds of small problems in one launch: a program takes a whole linkage, so that many run side by side."""

from __future__ import annotations  # without Triton there is no tl.constexpr

import torch
from torch import Tensor

from .backend import jit, launch, tl, uses_triton
from .batch import Batch
from .clusters import Clusters, Slots
from .merging import Pair, merge_pairs_torch, merged_costs
from .neighbours import row_minima, update_neighbours_torch

#: The most points of a problem: one for each thread, and a matrix of 2 MiB in float64, which a GPU's second-level cache
#: holds. A round costs a program less than launching kernels for it would.
MOST_SLOTS = 512
# A program has a thread for each slot: it merges one pair at a time, whole rows, without an exchange between threads.
_WARPS = 16
# Rows and columns that it searches at a time, four entries for each thread. Most rounds have several rows to search.
_ROWS = 16
_COLUMNS = 128


def finish(costs: Tensor, clusters: Clusters, batch: Batch) -> None:
    """Make all merges that are left, down to one cluster a problem.

    Args:
        costs: the cost matrices of all problems, flat; not to be used afterwards.
        clusters: the slots of all problems, flat, numbered from 0 in each, `point` counting through all of them.
            Without neighbours yet, or with: they are searched anew. `alive` is not kept up to date. Costs of merges
            that cannot be made, because costs are not numbers, stay as they were.
        batch: where each problem lies, none of more than `MOST_SLOTS` points; d does not matter.
    """
    if not uses_triton(costs):
        return finish_torch(costs, clusters, batch)
    listed = torch.empty_like(clusters.nearest)
    launch(
        _finish_kernel,
        (len(batch),),
        costs,
        clusters.fields(),
        listed,
        clusters.merges,
        batch.table,
        clusters.rounds,
        SLOTS=MOST_SLOTS,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return None


def finish_torch(costs: Tensor, clusters: Clusters, batch: Batch) -> None:
    """The plain PyTorch twin of `finish`: one problem after the other, a round at a time."""
    for matrix, *slots in zip(batch.costs(costs), *map(batch.slots, clusters.fields()), strict=True):
        one = Clusters(*slots, alive=clusters.alive.clone(), rounds=clusters.rounds, merges=clusters.merges)
        update_neighbours_torch(matrix, one, every=True)
        while (one.masses > 0).sum() > 1:
            merge_pairs_torch(matrix, one)
            update_neighbours_torch(matrix, one)


@jit
def _finish_kernel(
    costs,
    clusters,
    listed,
    merges,
    table,
    first_round,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program a problem. Threads of a program see each other's writes after a barrier, and only then."""
    problem = table + tl.program_id(0) * 5
    m = tl.load(problem)
    first_slot = tl.load(problem + 3)
    costs += tl.load(problem + 4)
    clusters = Slots(
        clusters.masses + first_slot,
        clusters.nearest + first_slot,
        clusters.nearest_cost + first_slot,
        clusters.made_at + first_slot,
        clusters.point + first_slot,
        clusters.size + first_slot,
    )
    listed += first_slot
    slots = tl.arange(0, SLOTS).to(tl.int64)
    inside = slots < m
    one = tl.zeros((1, 1), tl.int64)

    mass = tl.load(clusters.masses + slots, mask=inside, other=0.0)
    alive = tl.sum((mass > 0).to(tl.int64), axis=0)
    stale = mass > 0
    tl.store(clusters.nearest + slots, slots, mask=inside)
    round_number = tl.full((), 0, tl.int64) + first_round
    tl.debug_barrier()
    _search(costs, m, stale, slots, clusters, listed, ROWS, COLUMNS)
    tl.debug_barrier()
    while alive > 1:  # pyright: ignore[reportOperatorIssue]
        near = tl.load(clusters.nearest + slots, mask=inside, other=0)
        back = tl.load(clusters.nearest + near, mask=inside, other=-1)
        mutual = (back == slots) & (near != slots)
        upper = mutual & (near < slots)
        pairs = _list(upper, slots, listed)
        for number in range(0, pairs):
            high = tl.load(listed + number + one)
            low = tl.load(clusters.nearest + high)
            within = tl.load(clusters.nearest_cost + high)
            mass_low = tl.load(clusters.masses + low)
            mass_high = tl.load(clusters.masses + high)
            columns = slots[None, :]
            pair = Pair(low, high, within, mass_low, mass_high)
            merged, valid, joined = merged_costs(costs, m, pair, columns, clusters)
            tl.store(costs + high * m + columns, merged, mask=valid)
            tl.store(costs + columns * m + high, merged, mask=valid & (joined == 0))

        # Who merged, before anything of it is overwritten.
        mass_near = tl.load(clusters.masses + near, mask=upper, other=0.0)
        gone = tl.load(clusters.point + near, mask=upper, other=0)
        members = tl.load(clusters.size + slots, mask=upper, other=0) + tl.load(
            clusters.size + near, mask=upper, other=0
        )
        height = tl.load(clusters.nearest_cost + slots, mask=upper, other=0.0)
        height = tl.maximum(height, tl.load(clusters.made_at + slots, mask=upper, other=0.0))
        height = tl.maximum(height, tl.load(clusters.made_at + near, mask=upper, other=0.0))
        own = tl.load(clusters.point + slots, mask=upper, other=0)
        back_again = tl.load(clusters.nearest + back, mask=inside & (back >= 0), other=-1)
        mass = tl.where(upper, mass + mass_near, tl.where(mutual, 0.0, mass))
        stale = (back_again == near) & (back != near) & (mass > 0)
        tl.debug_barrier()
        tl.store(clusters.masses + slots, mass, mask=inside)
        tl.store(clusters.size + slots, members, mask=upper)
        tl.store(clusters.made_at + slots, height, mask=upper)
        tl.store(clusters.nearest + slots, slots, mask=mutual & (near > slots))
        tl.store(merges.partner + gone, own, mask=upper)
        tl.store(merges.cost + gone, height, mask=upper)
        tl.store(merges.round + gone, round_number, mask=upper)
        tl.store(merges.size + gone, members, mask=upper)
        tl.debug_barrier()
        # Without a pair costs are not numbers: end, do not hang.
        alive = tl.where(pairs > 0, alive - pairs, 0)
        round_number += 1
        _search(costs, m, stale, slots, clusters, listed, ROWS, COLUMNS)
        tl.debug_barrier()


@jit
def _list(chosen, slots, listed):
    """Write the chosen slots one behind the other, and say how many they are."""
    place = tl.cumsum(chosen.to(tl.int64), axis=0) - 1
    tl.store(listed + place, slots, mask=chosen)
    tl.debug_barrier()
    return tl.sum(chosen.to(tl.int64), axis=0)


@jit
def _search(costs, m, stale, slots, clusters, listed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Find the nearest neighbours of the stale slots."""
    count = _list(stale, slots, listed)
    for start in range(0, count, ROWS):
        there = start + tl.arange(0, ROWS) < count
        rows = tl.load(listed + start + tl.arange(0, ROWS), mask=there, other=0)
        cost, column = row_minima(costs, m, rows[:, None], clusters.masses, COLUMNS)
        tl.store(clusters.nearest_cost + rows, cost, mask=there)
        tl.store(clusters.nearest + rows, column, mask=there)
