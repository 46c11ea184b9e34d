import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from nac_gpu.kernels import seed_centres
from nac_gpu.kernels.seeding import seed_centres_torch


def problem(n, k, candidates, place, seed=0):
    """Squared distances, masses and draws."""
    rng = np.random.default_rng(seed)
    distances = squareform(pdist(rng.standard_normal((n, 3)), "sqeuclidean"))
    numbers = (distances, rng.uniform(0.5, 2, n), rng.uniform(size=(3, k, candidates)))
    return tuple(torch.tensor(values, device=place) for values in numbers)


@pytest.mark.parametrize(("n", "k", "candidates"), [(1, 1, 2), (2, 2, 2), (150, 40, 5), (300, 7, 3)], ids=str)
def test_equals_its_twin(n, k, candidates, place):
    arguments = problem(n, k, candidates, place)
    assert torch.equal(seed_centres(*arguments), seed_centres_torch(*arguments))


def test_each_centre_is_the_candidate_that_leaves_least(place):
    """Worked out point by point, as the paper says it."""
    distances, masses, draws = problem(60, 8, 4, place, seed=1)
    found = seed_centres(distances, masses, draws).tolist()
    far, mass = distances.cpu().numpy(), masses.cpu().numpy()
    for centres, numbers in zip(found, draws.tolist(), strict=True):
        left = None
        for centre, drawn in zip(centres, numbers, strict=True):
            share = mass if left is None else mass * left
            bounds = np.cumsum(share)
            candidates = [int(np.searchsorted(bounds, number * bounds[-1], side="right")) for number in drawn]
            after = [far[c] if left is None else np.minimum(left, far[c]) for c in candidates]
            costs = [float(mass @ one) for one in after]
            assert costs[candidates.index(centre)] == pytest.approx(min(costs), rel=1e-12)
            left = after[candidates.index(centre)]


def test_copies(place):
    """Nothing is left to draw in proportion to: any point will do."""
    zeros = torch.zeros(20, 20, dtype=torch.float64, device=place)
    draws = torch.rand(2, 5, 3, dtype=torch.float64).to(place)
    found = seed_centres(zeros, torch.ones(20, dtype=torch.float64, device=place), draws)
    assert ((found >= 0) & (found < 20)).all()
