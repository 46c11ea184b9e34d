"""The nearest neighbour of clusters: the minimum of rows of the cost matrix over the clusters that are alive."""

import torch
from torch import Tensor

# Elements gathered at a time: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18


def nearest_neighbours(costs: Tensor, masses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cheapest merge of some clusters, and with whom. Of equal costs the lowest slot wins.

    Args:
        costs: [m, m], the diagonal holding the dtype's largest finite number. Columns of dead slots may hold any
            finite number.
        masses: [m], 0 for dead slots.
        rows: int64 [r], the slots to search for: all of them, or those whose neighbour is out of date.

    Returns:
        The smallest cost [r] and its slot, int64 [r].
    """
    return nearest_neighbours_torch(costs, masses, rows)


def nearest_neighbours_torch(costs: Tensor, masses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The plain PyTorch twin of `nearest_neighbours`; `torch.min` documents that the first minimum wins."""
    # Adding one number to a row that is in the cache is cheaper than overwriting a column of the matrix for every
    # slot that dies.
    out_of_reach = torch.zeros_like(masses).masked_fill_(masses == 0, torch.finfo(costs.dtype).max)
    cost = costs.new_empty(rows.shape)
    neighbour = torch.empty_like(rows)
    step = max(1, _BLOCK_ELEMENTS // costs.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        block = costs.index_select(0, rows[part]).add_(out_of_reach)
        cost[part], neighbour[part] = block.min(dim=1)
    return cost, neighbour
