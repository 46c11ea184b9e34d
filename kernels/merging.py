"""One round of merges: every pair of mutual nearest neighbours becomes one cluster, by Lance-Williams updates."""

from __future__ import annotations  # without Triton there is no tl.constexpr

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import jit, launch, tl, uses_triton
from .clusters import Clusters

# Elements updated at a time on a CPU: 1 MiB of float64 in each of several operands, what one core's cache holds.
_BLOCK_ELEMENTS = 2**17
# Columns a Triton program updates at a time: one for each thread, so that writing a column needs no exchange between
# threads.
_COLUMNS = 256
_WARPS = 8


def merge_pairs(costs: Tensor, clusters: Clusters) -> None:
    """Merge all pairs of clusters that are each other's nearest neighbour, in place.

    The merged cluster takes the higher slot of the pair, so a cluster's slot is that of its last point; the lower
    slot dies: its mass becomes 0. Its row and column stay behind, out of date. `nearest` is left as it was: it tells
    `update_neighbours` who merged.

    The update of cost(A+B, C) is written as a mean of cost(A, C) and cost(B, C) plus something that is not negative,
    so that even after rounding it is not below both of them. With the choice of the slot this keeps every nearest
    neighbour that was not merged exactly right, lowest index included (there is nothing to search again), and makes
    the costs of successive merges monotone.

    Args:
        costs: [m, m] Ward costs, symmetric bit for bit where alive; the diagonal holds the dtype's largest number.
        clusters: in the slots of the matrix; their masses, sizes, count and record of merges are brought up to date.
    """
    if not uses_triton(costs):
        return merge_pairs_torch(costs, clusters)
    m = len(costs)
    masses = torch.empty_like(clusters.masses)
    launch(
        _merge_kernel,
        (m,),
        costs,
        clusters.fields(),
        masses,
        clusters.alive,
        clusters.merges,
        m,
        clusters.rounds,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    clusters.masses = masses
    clusters.rounds += 1
    return None


def merge_pairs_torch(costs: Tensor, clusters: Clusters) -> None:
    """The plain PyTorch twin of `merge_pairs`."""
    lower, upper = clusters.pairs()
    within = clusters.nearest_cost[lower]  # [p]
    mass_upper = clusters.masses[upper]
    mass_merged = clusters.masses[lower] + mass_upper
    _merge_rows(costs, clusters.masses, lower, upper, within, mass_upper, mass_merged)
    _merge_columns_of_merged_rows(costs, lower, upper, within, mass_upper, mass_merged)
    costs[:, upper] = costs[upper].T  # where both merged, the two agree already
    clusters.record(lower, upper)


def _merge_rows(
    costs: Tensor,
    masses: Tensor,
    lower: Tensor,
    upper: Tensor,
    within: Tensor,
    mass_upper: Tensor,
    mass_merged: Tensor,
) -> None:
    """Overwrite the rows `upper` with the costs of the merged clusters to all clusters as they were before."""
    step = max(1, _BLOCK_ELEMENTS // costs.shape[1])
    for start in range(0, len(lower), step):
        part = slice(start, start + step)
        rows = _lance_williams(
            costs.index_select(0, lower[part]),
            costs.index_select(0, upper[part]),
            within[part, None],
            mass_upper[part, None],
            mass_merged[part, None],
            masses,
        )
        costs.index_copy_(0, upper[part], rows)


def _merge_columns_of_merged_rows(
    costs: Tensor, lower: Tensor, upper: Tensor, within: Tensor, mass_upper: Tensor, mass_merged: Tensor
) -> None:
    """Give the rows `upper` the costs of the merged clusters among themselves: there the columns merge as well.

    Which of two pairs went first shows in the last bit, so one half is computed and mirrored.
    """
    pairs = len(lower)
    among = costs.new_empty(pairs, pairs)
    step = max(1, _BLOCK_ELEMENTS // costs.shape[1])
    for start in range(0, pairs, step):
        stop = min(start + step, pairs)
        rows = costs.index_select(0, upper[start:stop])
        among[start:stop, :stop] = _lance_williams(
            rows.gather(1, lower[:stop].expand(stop - start, stop)),
            rows.gather(1, upper[:stop].expand(stop - start, stop)),
            within[:stop],
            mass_upper[:stop],
            mass_merged[:stop],
            mass_merged[start:stop, None],
        )
    among.tril_(-1)
    among += among.T.clone()
    costs[upper[:, None], upper] = among.fill_diagonal_(torch.finfo(costs.dtype).max)


def _lance_williams(
    to_lower: Tensor, to_upper: Tensor, within: Tensor, mass_upper: Tensor, mass_merged: Tensor, mass_other: Tensor
) -> Tensor:
    """Cost of merging pairs with other clusters, from the costs of both parts; shapes broadcast to [p, m].

    The textbook form `((m_a + m_c) D_ac + (m_b + m_c) D_bc - m_c D_ab) / (m_a + m_b + m_c)`, rearranged into
    `lerp(D_ac, D_bc, m_b / m_abc) + m_c / m_abc (D_bc - D_ab)`; D_bc >= D_ab because A is B's nearest neighbour.
    Where C is dead, m_c is 0 and a mean of two finite numbers stays finite.
    """
    total = mass_merged + mass_other
    cost = torch.lerp(to_lower, to_upper, mass_upper / total)
    return cost.addcmul_(mass_other / total, to_upper.sub_(within))


@jit
def lance_williams(to_lower, to_upper, within, mass_upper, mass_merged, mass_other):
    """As `_lance_williams`; the mean is taken from whichever end is nearer, so that it does not leave the interval."""
    one_share = reciprocal(mass_merged + mass_other)
    share = mass_upper * one_share  # at most 1, rounded or not: it is x * (1 / x) where it is largest
    rise = to_upper - to_lower
    mean = tl.where(share < 0.5, to_lower + share * rise, to_upper - rise * (1 - share))
    return mean + mass_other * one_share * (to_upper - within)


@jit
def reciprocal(number):
    """1 / number, rounded to the nearest; plain division of float32 is approximate on a GPU."""
    if number.dtype == tl.float32:
        return tl.div_rn(1.0, number)
    else:
        return 1.0 / number


class Pair(NamedTuple):
    """Two clusters that merge, in a kernel: their slots, the cost of their merge, and their masses; of each [r, 1]."""

    lower: Any
    upper: Any
    within: Any
    mass_lower: Any
    mass_upper: Any


@jit
def merged_costs(costs, m, pair, columns, clusters):
    """Costs of merging the clusters of a `Pair` with all clusters as they are after the round.

    Where a column's cluster merges as well, both merges are applied, in an order that the two rows agree on: the pair
    with the higher lower slot first. `columns` is [1, c], `clusters` their `Slots`.

    Returns:
        The costs [r, c]; whether the column is alive afterwards and not the cluster itself, [r, c]; and whether it
        was merged as well, [1, c].
    """
    lower, upper, within, mass_lower, mass_upper = pair
    inside = columns < m
    mass = tl.load(clusters.masses + columns, mask=inside, other=0.0)
    near = tl.load(clusters.nearest + columns, mask=inside, other=0)
    back = tl.load(clusters.nearest + near, mask=inside, other=-1)
    mutual = (back == columns) & (near != columns)
    joined = mutual & (near < columns)
    there = (mass > 0) & ((near <= columns) | (back != columns)) & (columns != upper) & (lower < upper)
    both = there & joined
    lower_row = costs + lower * m
    upper_row = costs + upper * m
    to_lower = tl.load(lower_row + columns, mask=there, other=0.0)
    to_upper = tl.load(upper_row + columns, mask=there, other=0.0)
    mass_merged = mass_lower + mass_upper
    once = lance_williams(to_lower, to_upper, within, mass_upper, mass_merged, mass)

    to_lower_near = tl.load(lower_row + near, mask=both, other=0.0)
    to_upper_near = tl.load(upper_row + near, mask=both, other=0.0)
    mass_near = tl.load(clusters.masses + near, mask=joined, other=0.0)
    within_column = tl.load(clusters.nearest_cost + columns, mask=joined, other=0.0)
    mass_joined = mass + mass_near
    first = lower > near  # whether this pair goes first
    within_first = tl.where(first, within, within_column)
    upper_first = tl.where(first, mass_upper, mass)
    merged_first = tl.where(first, mass_merged, mass_joined)
    one = lance_williams(
        to_lower_near,
        tl.where(first, to_upper_near, to_lower),
        within_first,
        upper_first,
        merged_first,
        tl.where(first, mass_near, mass_lower),
    )
    other = lance_williams(
        tl.where(first, to_lower, to_upper_near),
        to_upper,
        within_first,
        upper_first,
        merged_first,
        tl.where(first, mass, mass_upper),
    )
    twice = lance_williams(
        one,
        other,
        tl.where(first, within_column, within),
        tl.where(first, mass, mass_upper),
        tl.where(first, mass_joined, mass_merged),
        tl.where(first, mass_merged, mass_joined),
    )
    return tl.where(both, twice, once), there, joined


@jit
def join(slot, near, mass, mass_near, clusters, masses_after, alive, merges, round_number):
    """Bring a slot's entries up to date, and note down its merge if it is the higher slot of a pair: 1, else 0."""
    mutual = (tl.load(clusters.nearest + near) == slot) & (near != slot)
    grows = mutual & (near < slot)
    dies = mutual & (near > slot)
    after = tl.where(grows, mass + mass_near, tl.where(dies, 0.0, mass))
    tl.store(masses_after + slot, after)
    if dies:
        tl.atomic_add(alive, -1, sem="relaxed")
    if grows:
        gone = tl.load(clusters.point + near)
        members = tl.load(clusters.size + near) + tl.load(clusters.size + slot)
        height = tl.load(clusters.nearest_cost + slot)
        height = tl.maximum(height, tl.maximum(tl.load(clusters.made_at + near), tl.load(clusters.made_at + slot)))
        tl.store(clusters.size + slot, members)
        tl.store(clusters.made_at + slot, height)
        tl.store(merges.partner + gone, tl.load(clusters.point + slot))
        tl.store(merges.cost + gone, height)
        tl.store(merges.round + gone, round_number)
        tl.store(merges.size + gone, members)
    return grows.to(tl.int32)


@jit
def _merge_kernel(costs, clusters, masses_after, alive, merges, m, round_number, COLUMNS: tl.constexpr):
    """A program a slot. Only those of a higher slot of a pair have much to do.

    A program reads two rows that nobody else reads or writes, and writes its row and, in rows that take no part in the
    round, its column: nothing is read after another program wrote it.
    """
    slot = tl.program_id(0).to(tl.int64)
    near = tl.load(clusters.nearest + slot)
    mass = tl.load(clusters.masses + slot)
    mass_near = tl.load(clusters.masses + near)
    grows = join(slot, near, mass, mass_near, clusters, masses_after, alive, merges, round_number)
    if grows == 0:
        return
    within = tl.load(clusters.nearest_cost + slot)
    lower = tl.full((1, 1), 0, tl.int64) + near
    upper = tl.full((1, 1), 0, tl.int64) + slot
    pair = Pair(lower, upper, within, mass_near, mass)
    for start in range(0, m, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        merged, there, joined = merged_costs(costs, m, pair, columns, clusters)
        tl.store(costs + upper * m + columns, merged, mask=there)
        tl.store(costs + columns * m + upper, merged, mask=there & (joined == 0))
