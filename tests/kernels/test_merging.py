import numpy as np
import pytest
import torch

from nac_gpu.kernels import merge_pairs, nearest_neighbours, reciprocal_pairs, squared_distances


def ward_costs(centroids, masses):
    reduced = masses[:, None] * masses / (masses[:, None] + masses)
    return reduced * (centroids[:, None] - centroids).square().sum(dim=2)


INPUTS = {
    "normal": lambda rng: rng.standard_normal((90, 7)),
    "many-dimensions": lambda rng: rng.standard_normal((60, 40)),
    "ties": lambda rng: rng.integers(0, 3, (80, 2)).astype(float),
    "copies": lambda rng: np.repeat(rng.standard_normal((20, 5)), 4, axis=0),
    "line": lambda rng: np.arange(70.0)[:, None],
    "two": lambda rng: rng.standard_normal((2, 3)),
}


@pytest.mark.parametrize("masses_differ", [False, True], ids=["unit", "masses"])
@pytest.mark.parametrize("name", INPUTS)
def test_rounds_keep_what_they_promise(name, masses_differ, device):
    """Down to one cluster, after each round: right costs, symmetric bits, kept neighbours right, costs monotone."""
    rng = np.random.default_rng(0)
    points = torch.tensor(INPUTS[name](rng), device=device)
    points = points - points.mean(dim=0)
    n = len(points)
    masses = torch.tensor(rng.uniform(0.2, 5, n) if masses_differ else np.ones(n), device=device)
    centroids, true_masses = points.clone(), masses.clone()
    costs = squared_distances(points, masses)
    slots = torch.arange(n, device=device)
    cost, nearest = nearest_neighbours(costs, masses, slots)
    height = torch.zeros_like(cost)
    scale = points.square().sum().item()
    while (masses > 0).sum() > 1:
        lower, upper = reciprocal_pairs(nearest)
        assert len(lower) > 0
        assert (cost[lower] >= height[lower]).all()
        assert (cost[lower] >= height[upper]).all()
        height[upper] = cost[lower]
        merge_pairs(costs, masses, lower, upper)

        total = true_masses[lower] + true_masses[upper]
        centroids[upper] = (
            true_masses[lower, None] * centroids[lower] + true_masses[upper, None] * centroids[upper]
        ) / total[:, None]
        true_masses[upper] = total
        true_masses[lower] = 0
        assert torch.equal(masses, true_masses)

        alive = (masses > 0).nonzero().squeeze(1)
        block = costs[alive[:, None], alive]
        assert torch.equal(block, block.T)
        assert (block.diagonal() == torch.finfo(torch.float64).max).all()
        expected = ward_costs(centroids[alive], masses[alive]).fill_diagonal_(torch.finfo(torch.float64).max)
        torch.testing.assert_close(block, expected, rtol=1e-11, atol=1e-15 * scale)
        assert torch.isfinite(costs[alive]).all()

        fresh_cost, fresh = nearest_neighbours(costs, masses, slots)
        gone = torch.zeros(n, dtype=torch.bool, device=device)
        gone[lower] = gone[upper] = True
        kept = (masses > 0) & ~gone[nearest]
        assert torch.equal(nearest[kept], fresh[kept])
        assert torch.equal(cost[kept], fresh_cost[kept])
        cost, nearest = fresh_cost, torch.where(masses > 0, fresh, slots)


def test_one_pair_by_hand(device):
    # 0, 2 and 6 on a line: merging 0 and 2 costs 2, and their centroid 1 with mass 2 is 5 away from 6: 2/3 of 25.
    far = torch.finfo(torch.float64).max
    costs = torch.tensor([[far, 2.0, 18.0], [2.0, far, 8.0], [18.0, 8.0, far]], dtype=torch.float64, device=device)
    masses = torch.ones(3, dtype=torch.float64, device=device)
    merge_pairs(costs, masses, torch.tensor([0], device=device), torch.tensor([1], device=device))
    assert masses.tolist() == [0, 2, 1]
    assert costs[1, 2].item() == costs[2, 1].item() == pytest.approx(50 / 3, rel=1e-15)
    assert costs[1, 1] == costs[2, 2] == far
