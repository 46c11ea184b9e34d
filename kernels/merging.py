"""One round of merges: every reciprocal pair becomes one cluster, by the Lance-Williams update of Ward's costs."""

import torch
from torch import Tensor

# Elements updated at a time: 1 MiB of float64 in each of several operands, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**17
# Fewer elements than this cost less than the calls that update them.
_BLOCK_MIN_ELEMENTS = 2**14


def merge_pairs(costs: Tensor, masses: Tensor, lower: Tensor, upper: Tensor) -> None:
    """Merge pairs of clusters in place, all of them at once.

    The merged cluster takes the higher slot of the pair, so a cluster's slot is that of its last point; the lower
    slot dies: its mass becomes 0. Its row and column stay behind, finite and out of date.

    The update of cost(A+B, C) is written as a mean of cost(A, C) and cost(B, C) plus something that is not negative,
    so that even after rounding it is not below both of them. With the choice of the slot this keeps every nearest
    neighbour that was not merged exactly right, lowest index included (there is nothing to search again), and makes
    the costs of successive merges monotone.

    Args:
        costs: [m, m] Ward costs, symmetric bit for bit where alive; the diagonal holds the dtype's largest number.
        masses: [m], 0 for dead slots.
        lower: int64 [p], one cluster of each pair.
        upper: int64 [p], the other, `lower < upper`. The two are each other's nearest neighbours.
    """
    merge_pairs_torch(costs, masses, lower, upper)


def merge_pairs_torch(costs: Tensor, masses: Tensor, lower: Tensor, upper: Tensor) -> None:
    """The plain PyTorch twin of `merge_pairs`."""
    within = costs[lower, upper]  # [p]
    mass_upper = masses[upper]
    mass_merged = masses[lower] + mass_upper
    _merge_rows(costs, masses, lower, upper, within, mass_upper, mass_merged)
    _merge_columns_of_merged_rows(costs, lower, upper, within, mass_upper, mass_merged)
    _copy_to_columns(costs, upper)
    masses[upper] = mass_merged
    masses[lower] = 0


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


def _copy_to_columns(costs: Tensor, slots: Tensor) -> None:
    """Make the columns `slots` equal to the rows `slots`, where the costs among them are symmetric already."""
    m = costs.shape[0]
    step = max(1, _BLOCK_ELEMENTS // m, _BLOCK_MIN_ELEMENTS // len(slots))
    for start in range(0, m, step):
        part = slice(start, start + step)
        costs[part].index_copy_(1, slots, costs[:, part].index_select(0, slots).T.contiguous())


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
