"""Ways to assign neurons to clusters, all with one signature: `nac_gpu.methods`.

Ward's method is the default of `nac_gpu.compress`; k-means and random merging are the paper's baselines, L1 is filter
pruning. Another one is a function of the signature of `AssignmentMethod`, with an entry in `METHODS` if it is to have a
name.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from nac_gpu.clustering.labels import check_cluster_count, number_by_first_appearance
from nac_gpu.clustering.linkage import ward_linkage
from nac_gpu.clustering.points import standardise
from nac_gpu.kernels import on_device, seed_centres, squared_distances

_RESTARTS = 4
_MAX_ITERATIONS = 300


class AssignmentMethod(Protocol):
    """A way to put n points into exactly k clusters."""

    def __call__(self, points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        """Assign points to clusters.

        Args:
            points: [n, d], floating, any device.
            k: number of clusters, 1 to n.
            weights: [n], positive masses of the points; None for unit masses.
            seed: of all random choices. The global random state is neither read nor changed.

        Returns:
            Labels, int64 [n], on the device of the points: exactly k clusters, none empty, numbered by first
            appearance.

        Raises:
            TypeError: points or weights are not tensors of real (points: floating) numbers, or k is not an integer.
            ValueError: points or weights have a wrong shape, device or value, or k is not in [1, n].
        """
        ...


def ward(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
    """Ward's agglomerative clustering, cut at k clusters: see `AssignmentMethod`. Exact, so `seed` changes nothing."""
    return ward_linkage(points, weights).cut(k)


@torch.no_grad()
def kmeans(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
    """Lloyd's k-means, the best of several k-means++ starts: see `AssignmentMethod`.

    Works on the matrix of squared distances, which all starts share: the squared distance to a centroid is the mean
    squared distance to its members less half their mean squared distance to each other. An iteration costs n²
    additions whatever d is; memory is that of n² float64, as for Ward.
    """
    points64, masses, _ = standardise(points, weights)
    n = len(points64)
    k = check_cluster_count(k, n)
    if k == n:
        return torch.arange(n, device=points.device)
    generator = torch.Generator().manual_seed(seed)
    # Drawn on the CPU, so that every device sees the same numbers. Several candidates for each centre.
    draws = torch.rand(_RESTARTS, k, 2 + int(math.log(k)), dtype=torch.float64, generator=generator)
    with on_device(points64):
        distances = squared_distances(points64).fill_diagonal_(0)
        starts = seed_centres(distances, masses, draws.to(points.device))
    best, best_inertia = torch.zeros(n, dtype=torch.int64, device=points.device), math.inf
    for centres in starts:
        labels, inertia = _lloyd(distances, masses, centres)
        if inertia < best_inertia:
            best, best_inertia = labels, inertia
    return number_by_first_appearance(best)


@torch.no_grad()
def random(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
    """Random merging, the paper's lower baseline: see `AssignmentMethod`. Looks at neither points nor weights.

    k points chosen at random found a cluster each, every other point joins one of them at random.
    """
    standardise(points, weights)  # the same input is wrong for every method
    n = len(points)
    k = check_cluster_count(k, n)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.empty(n, dtype=torch.int64)
    order = torch.randperm(n, generator=generator)
    labels[order[:k]] = torch.arange(k)
    labels[order[k:]] = torch.randint(k, (n - k,), generator=generator)
    return number_by_first_appearance(labels).to(points.device)


@torch.no_grad()
def l1(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
    """L1 filter pruning: the k neurons with the largest sum of absolute weights stay as they are, the others go.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017. `nac_gpu.compress` gives it bare weights. It does
    not merge: unlike `AssignmentMethod` says, neurons that are removed have the label -1.

    Args:
        points: neurons, [n, d], BatchNorm not folded in.
        k: how many stay, 1 to n.
        weights: checked, but not used.
        seed: not used.

    Returns:
        Labels, int64 [n]: 0 to k - 1 for neurons that stay, in order, -1 for those that are removed.

    >>> l1(torch.tensor([[3.0, -3.0], [1.0, 0.0], [2.0, 2.0]]), 2)
    tensor([ 0, -1,  1])
    """
    standardise(points, weights)  # the same input is wrong for every method
    k = check_cluster_count(k, len(points))
    labels = torch.full((len(points),), -1, dtype=torch.int64, device=points.device)
    kept = points.abs().sum(1).topk(k).indices.sort().values
    labels[kept] = torch.arange(k, device=points.device)
    return labels


METHODS: dict[str, AssignmentMethod] = {"ward": ward, "kmeans": kmeans, "random": random, "l1": l1}


def _lloyd(distances: Tensor, masses: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Labels [n] where Lloyd's iteration from the given points stops, and the sum of squares within their clusters."""
    k = len(centres)
    labels = _fill_empty(*_nearest(distances[centres]), masses, k)
    for _ in range(_MAX_ITERATIONS):
        to_centroids = _to_centroids(distances, masses, labels, k)
        moved = _fill_empty(*_nearest(to_centroids), masses, k)
        if torch.equal(moved, labels):
            break
        labels = moved
    own = _to_centroids(distances, masses, labels, k).gather(0, labels[None]).squeeze(0)
    return labels, float(own @ masses)


def _nearest(to_centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of every point, int64 [n], the lowest of equals, and the squared distance to it, [n]."""
    distance, label = to_centres.min(dim=0)
    return label, distance


def _to_centroids(distances: Tensor, masses: Tensor, labels: Tensor, k: int) -> Tensor:
    """Squared distances [k, n] of all points to the centroids of clusters, none empty."""
    n = len(labels)
    share = masses / masses.new_zeros(k).index_put_((labels,), masses, accumulate=True)[labels]  # [n], of its cluster
    # index_put_ adds in a fixed order on every device; index_add_ does not on CUDA.
    mean = distances.new_zeros(k, n).index_put_((labels,), distances * share[:, None], accumulate=True)
    within = mean.new_zeros(k).index_put_((labels,), mean[labels, torch.arange(n, device=labels.device)] * share, True)
    return mean.sub_(within[:, None] / 2).clamp_(min=0)


def _fill_empty(labels: Tensor, distance: Tensor, masses: Tensor, k: int) -> Tensor:
    """Labels without empty clusters: each gets the point that costs most where it is, as long as one stays behind."""
    members = torch.bincount(labels, minlength=k)
    empty = (members == 0).nonzero().squeeze(1)
    if len(empty) == 0:
        return labels
    cost = masses * distance
    # The cheapest point of each cluster stays: sort by cost, then by cluster, and it comes first.
    order = cost.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    starts = (members.cumsum(0) - members)[members > 0]
    movable = cost.index_fill(0, order[starts], -math.inf)
    dearest = movable.argsort(descending=True, stable=True)[: len(empty)]
    return labels.index_copy(0, dearest, empty)
