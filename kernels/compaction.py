"""Dropping the dead slots of the cost matrix."""

from torch import Tensor

# Elements gathered at a time: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18


def compact(costs: Tensor, keep: Tensor) -> Tensor:
    """The rows and columns of the clusters that are left, packed into the memory of the matrix they come from.

    Args:
        costs: [m, m], contiguous; not to be used afterwards.
        keep: int64 [l], ascending: slots keep their order, and with it which of two equal neighbours comes first.

    Returns:
        [l, l], contiguous, at the front of the memory of `costs`: touching fresh pages would cost more than the copy.
    """
    return compact_torch(costs, keep)


def compact_torch(costs: Tensor, keep: Tensor) -> Tensor:
    """The plain PyTorch twin of `compact`."""
    left = len(keep)
    packed = costs.view(-1)[: left * left].view(left, left)
    step = max(1, _BLOCK_ELEMENTS // costs.shape[1])
    for start in range(0, left, step):
        # Packed row i ends before row keep[i] begins, so nothing is overwritten that is still to be read.
        rows = costs.index_select(0, keep[start : start + step])
        packed[start : start + step] = rows.gather(1, keep.expand(len(rows), left))
    return packed
