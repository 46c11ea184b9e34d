"""Methods that assign neurons to clusters, all with the signature of `AssignmentMethod`: `nac_gpu.methods`.

Ward's method is the default of `nac_gpu.compress`; k-means and random merging are the paper's baselines, L1 is filter
pruning. To add a method, write a function with this signature; an entry in `METHODS` gives it a name.
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
    """Ward's agglomerative clustering, cut at k clusters: see `AssignmentMethod`. Exact, so `seed` has no effect.

    >>> nac_gpu.methods.ward(torch.tensor([[0.0], [1.0], [5.0]]), 2)
    tensor([0, 0, 1])
    """
    return ward_linkage(points, weights).cut(k)


@torch.no_grad()
def kmeans(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
    """Lloyd's k-means, the best of several k-means++ initialisations: see `AssignmentMethod`.

    All runs share the matrix of squared distances between points: the squared distance to a centroid is the mean
    squared distance to its members minus half of their mean squared distance to each other. An iteration costs n²
    additions, independent of d; memory is that of n² float64, as for Ward.

    >>> nac_gpu.methods.kmeans(torch.tensor([[0.0], [1.0], [5.0]]), 2)
    tensor([0, 0, 1])
    """
    points64, masses, _ = standardise(points, weights)
    n = len(points64)
    k = check_cluster_count(k, n)
    if k == n:
        return torch.arange(n, device=points.device)
    generator = torch.Generator().manual_seed(seed)
    # Drawn on the CPU, so that all devices use the same numbers. Greedy k-means++ tries several candidates per centre.
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
    """Random merging, the paper's lower baseline: see `AssignmentMethod`. Values of points and weights have no effect.

    k points chosen at random start one cluster each; every other point joins one of these at random.

    >>> labels = nac_gpu.methods.random(torch.ones(5, 3), 2, seed=0)
    >>> labels.unique()
    tensor([0, 1])
    """
    standardise(points, weights)  # only to reject the same invalid input as every other method
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
    """L1 filter pruning: the k neurons with the largest sum of absolute weights are kept, all others removed.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017. Nothing is merged: unlike in other methods, removed
    neurons have the label -1. `nac_gpu.compress` passes the weights of the layer without BatchNorm folded in.

    Args:
        points: neurons, [n, d], BatchNorm not folded in.
        k: how many are kept, 1 to n.
        weights: checked, but not used.
        seed: not used.

    Returns:
        Labels, int64 [n]: 0 to k - 1 for neurons that are kept, in order, -1 for those that are removed.

    >>> nac_gpu.methods.l1(torch.tensor([[3.0, -3.0], [1.0, 0.0], [2.0, 2.0]]), 2)
    tensor([ 0, -1,  1])
    """
    standardise(points, weights)  # only to reject the same invalid input as every other method
    k = check_cluster_count(k, len(points))
    labels = torch.full((len(points),), -1, dtype=torch.int64, device=points.device)
    kept = points.abs().sum(1).topk(k).indices.sort().values
    labels[kept] = torch.arange(k, device=points.device)
    return labels


METHODS: dict[str, AssignmentMethod] = {"ward": ward, "kmeans": kmeans, "random": random, "l1": l1}


def _lloyd(distances: Tensor, masses: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Run Lloyd's iteration from centres at these points: final labels [n], and their within-cluster sum of squares."""
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
    """The nearest centre of every point, int64 [n] (the lowest index on ties), and its squared distance, [n]."""
    distance, label = to_centres.min(dim=0)
    return label, distance


def _to_centroids(distances: Tensor, masses: Tensor, labels: Tensor, k: int) -> Tensor:
    """Squared distances [k, n] of all points to the centroids of the clusters, none of which is empty."""
    n = len(labels)
    # A point's share in the mass of its cluster, [n]. index_put_ adds in a fixed order on every device, but index_add_
    # does not on CUDA.
    share = masses / masses.new_zeros(k).index_put_((labels,), masses, accumulate=True)[labels]
    mean = distances.new_zeros(k, n).index_put_((labels,), distances * share[:, None], accumulate=True)
    within = mean.new_zeros(k).index_put_((labels,), mean[labels, torch.arange(n, device=labels.device)] * share, True)
    return mean.sub_(within[:, None] / 2).clamp_(min=0)


def _fill_empty(labels: Tensor, distance: Tensor, masses: Tensor, k: int) -> Tensor:
    """Labels without empty clusters: each empty one takes the costliest point that is not the last of its cluster."""
    members = torch.bincount(labels, minlength=k)
    empty = (members == 0).nonzero().squeeze(1)
    if len(empty) == 0:
        return labels
    cost = masses * distance
    # The cheapest point of each cluster must stay. After sorting by cluster and then by cost it comes first.
    order = cost.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    starts = (members.cumsum(0) - members)[members > 0]
    movable = cost.index_fill(0, order[starts], -math.inf)
    dearest = movable.argsort(descending=True, stable=True)[: len(empty)]
    return labels.index_copy(0, dearest, empty)
