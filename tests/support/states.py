"""States of a linkage made by hand or at random."""

import numpy as np
import torch

from nac_gpu.kernels import Clusters

LARGEST = torch.finfo(torch.float64).max


def clusters_of(masses, nearest=None, nearest_cost=None):
    """Clusters with these masses, some of them dead, and these neighbours."""
    clusters = Clusters.of_points(masses)
    clusters.alive.fill_(int((masses > 0).sum()))
    if nearest is not None:
        clusters.nearest = nearest.clone()
    if nearest_cost is not None:
        clusters.nearest_cost = nearest_cost.clone()
    return clusters


def symmetric(m, seed=0, values=None):
    """A random cost matrix with the largest number on its diagonal; of few values, if they are given."""
    rng = np.random.default_rng(seed)
    costs = rng.uniform(size=(m, m)) if values is None else rng.choice(values, (m, m))
    costs = np.tril(costs, -1)
    costs += costs.T
    np.fill_diagonal(costs, LARGEST)
    return costs
