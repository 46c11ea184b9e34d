"""Labels: which cluster each point is in."""

import operator

import torch
from torch import Tensor


def check_cluster_count(k: object, n: int) -> int:
    """The number of clusters as an int in [1, n].

    Raises:
        TypeError: k is not an integer.
        ValueError: k is not in [1, n].
    """
    try:
        if isinstance(k, bool):
            raise TypeError
        count = operator.index(k)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"k is {k!r}, expected an integer from 1 to {n}, the number of points") from None
    if not 1 <= count <= n:
        raise ValueError(f"k is {count}, expected 1 to {n}, the number of points; choose k in that range")
    return count


def number_by_first_appearance(labels: Tensor) -> Tensor:
    """Rename labels to 0, 1, 2, ... in the order in which they first appear.

    Args:
        labels: integer [n], any values.

    Returns:
        int64 [n], the same clusters.
    """
    names, compact_labels = torch.unique(labels, return_inverse=True)
    positions = torch.arange(len(labels), device=labels.device)
    first = positions.new_full(names.shape, len(labels)).scatter_reduce_(0, compact_labels, positions, "amin")
    number = torch.empty_like(first)
    number[first.argsort()] = positions[: len(first)]
    return number[compact_labels]


def first_of_each(labels: Tensor) -> Tensor:
    """The index of the first point of each cluster, int64 [k], on the device of the labels.

    Args:
        labels: int64 [n], 0 to k - 1, each at least once; -1 for points in no cluster.

    >>> nac_gpu.clustering.labels.first_of_each(torch.tensor([1, -1, 0, 1]))
    tensor([2, 0])
    """
    places = torch.arange(len(labels), device=labels.device)
    first = places.new_full((int(labels.max()) + 1,), len(labels))
    inside = labels >= 0
    return first.scatter_reduce_(0, labels[inside], places[inside], "amin")
