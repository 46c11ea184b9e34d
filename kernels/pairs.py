"""The pairs that merge in one round: clusters that are each other's nearest neighbour."""

import torch
from torch import Tensor


def reciprocal_pairs(neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of clusters that are each other's nearest neighbour.

    Args:
        neighbours: int64 [m], the nearest neighbour of every slot; a slot that names itself takes no part.

    Returns:
        The lower and the higher slot of every pair, each int64 [p], in ascending order of the lower one.
    """
    return reciprocal_pairs_torch(neighbours)


def reciprocal_pairs_torch(neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """The plain PyTorch twin of `reciprocal_pairs`."""
    slots = torch.arange(len(neighbours), device=neighbours.device)
    mutual = (neighbours[neighbours] == slots) & (slots < neighbours)
    lower = mutual.nonzero().squeeze(1)
    return lower, neighbours[lower]
