"""One round of merges without a cost matrix: pairs of mutual nearest neighbours, on their centroids."""

from __future__ import annotations  # without Triton there is no tl.constexpr

import torch
from torch import Tensor

from .backend import jit, launch, tl, uses_triton
from .clusters import Clusters
from .merging import join

# Dimensions a Triton program averages at a time.
_DIMENSIONS = 512


def merge_centroids(centroids: Tensor, clusters: Clusters) -> None:
    """Merge all pairs of clusters that are each other's nearest neighbour, in place: as `merge_pairs`.

    Args:
        centroids: [m, d], contiguous. Those of the dead stay behind.
        clusters: in the slots of the centroids.
    """
    if not uses_triton(centroids):
        return merge_centroids_torch(centroids, clusters)
    m, d = centroids.shape
    masses = torch.empty_like(clusters.masses)
    launch(
        _merge_centroids_kernel,
        (m,),
        centroids,
        clusters.fields(),
        masses,
        clusters.alive,
        clusters.merges,
        d,
        clusters.rounds,
        DIMENSIONS=_DIMENSIONS,
        enable_fp_fusion=False,
    )
    clusters.masses = masses
    clusters.rounds += 1
    return None


def merge_centroids_torch(centroids: Tensor, clusters: Clusters) -> None:
    """The plain PyTorch twin of `merge_centroids`."""
    lower, upper = clusters.pairs()
    share = clusters.masses[upper] / (clusters.masses[lower] + clusters.masses[upper])
    centroids[upper] = torch.lerp(centroids[lower], centroids[upper], share[:, None])
    clusters.record(lower, upper)


@jit
def _merge_centroids_kernel(
    centroids, clusters, masses_after, alive, merges, d, round_number, DIMENSIONS: tl.constexpr
):
    """A program a slot."""
    slot = tl.program_id(0).to(tl.int64)
    near = tl.load(clusters.nearest + slot)
    mass = tl.load(clusters.masses + slot)
    mass_near = tl.load(clusters.masses + near)
    grows = join(slot, near, mass, mass_near, clusters, masses_after, alive, merges, round_number)
    if grows == 0:
        return
    share = mass / (mass + mass_near)
    for start in range(0, d, DIMENSIONS):
        dimensions = start + tl.arange(0, DIMENSIONS)
        inside = dimensions < d
        low = tl.load(centroids + near * d + dimensions, mask=inside, other=0.0)
        high = tl.load(centroids + slot * d + dimensions, mask=inside, other=0.0)
        mean = tl.where(share < 0.5, low + share * (high - low), high - (high - low) * (1 - share))
        tl.store(centroids + slot * d + dimensions, mean, mask=inside)
