import numpy as np
import pytest
import torch
from states import LARGEST, clusters_of

from nac_gpu.kernels import Clusters, merge_centroids, merge_pairs, squared_distances, update_neighbours


def ward_costs(centroids, masses):
    reduced = masses[:, None] * masses / (masses[:, None] + masses)
    return reduced * (centroids[:, None] - centroids).square().sum(dim=2)


INPUTS = {
    "normal": lambda rng: rng.standard_normal((23, 7)),
    "many-dimensions": lambda rng: rng.standard_normal((20, 40)),
    "ties": lambda rng: rng.integers(0, 3, (27, 2)).astype(float),
    "copies": lambda rng: np.repeat(rng.standard_normal((6, 5)), 4, axis=0),
    "line": lambda rng: np.arange(19.0)[:, None],
    "two": lambda rng: rng.standard_normal((2, 3)),
}


@pytest.mark.parametrize("masses_differ", [False, True], ids=["unit", "masses"])
@pytest.mark.parametrize("name", INPUTS)
def test_rounds_keep_what_they_promise(name, masses_differ, place):
    """Down to one cluster, after each round: right costs, symmetric bits, kept neighbours right, costs monotone."""
    rng = np.random.default_rng(0)
    points = torch.tensor(INPUTS[name](rng), device=place)
    points = points - points.mean(dim=0)
    n = len(points)
    masses = torch.tensor(rng.uniform(0.2, 5, n) if masses_differ else np.ones(n), device=place)
    centroids, true_masses, sizes = points.clone(), masses.clone(), torch.ones(n, dtype=torch.int64, device=place)
    costs = squared_distances(points, masses)
    clusters = Clusters.of_points(masses)
    update_neighbours(costs, clusters, every=True)
    height = torch.zeros_like(masses)
    scale = points.square().sum().item()
    while (clusters.masses > 0).sum() > 1:
        lower, upper = clusters.pairs()
        cost, nearest = clusters.nearest_cost.clone(), clusters.nearest.clone()
        assert len(lower) > 0
        assert (cost[lower] >= height[lower]).all()
        assert (cost[lower] >= height[upper]).all()
        height[upper] = cost[lower]
        number = clusters.rounds
        merge_pairs(costs, clusters)

        total = true_masses[lower] + true_masses[upper]
        centroids[upper] = (
            true_masses[lower, None] * centroids[lower] + true_masses[upper, None] * centroids[upper]
        ) / total[:, None]
        true_masses[upper] = total
        true_masses[lower] = 0
        sizes[upper] += sizes[lower]
        assert torch.equal(clusters.masses, true_masses)
        assert torch.equal(clusters.size[true_masses > 0], sizes[true_masses > 0])
        assert clusters.alive.item() == (true_masses > 0).sum()
        assert clusters.rounds == number + 1
        merges = clusters.merges
        assert torch.equal(merges.partner[lower], upper)
        assert torch.equal(merges.cost[lower], cost[lower])
        assert torch.equal(merges.size[lower], sizes[upper])
        assert (merges.round[lower] == number).all()

        alive = (true_masses > 0).nonzero().squeeze(1)
        block = costs[alive[:, None], alive]
        assert torch.equal(block, block.T)
        assert (block.diagonal() == LARGEST).all()
        expected = ward_costs(centroids[alive], true_masses[alive]).fill_diagonal_(LARGEST)
        torch.testing.assert_close(block, expected, rtol=1e-11, atol=1e-15 * scale)
        assert torch.isfinite(costs[alive]).all()

        fresh = clusters_of(true_masses)
        update_neighbours(costs, fresh, every=True)
        gone = torch.zeros(n, dtype=torch.bool, device=place)
        gone[lower] = gone[upper] = True
        kept = (true_masses > 0) & ~gone[nearest]
        assert torch.equal(nearest[kept], fresh.nearest[kept])
        assert torch.equal(cost[kept], fresh.nearest_cost[kept])
        update_neighbours(costs, clusters)
        if len(alive) > 1:
            assert torch.equal(clusters.nearest[alive], fresh.nearest[alive])
            assert torch.equal(clusters.nearest_cost[alive], fresh.nearest_cost[alive])
    assert torch.equal(clusters.merges.partner[:-1].sort().values[-1:], torch.tensor([n - 1], device=place))


def test_one_pair_by_hand(place):
    # 0, 2 and 6 on a line: merging 0 and 2 costs 2, and their centroid 1 with mass 2 is 5 away from 6: 2/3 of 25.
    far = LARGEST
    costs = torch.tensor([[far, 2.0, 18.0], [2.0, far, 8.0], [18.0, 8.0, far]], dtype=torch.float64, device=place)
    clusters = Clusters.of_points(torch.ones(3, dtype=torch.float64, device=place))
    update_neighbours(costs, clusters, every=True)
    assert clusters.nearest.tolist() == [1, 0, 1]
    merge_pairs(costs, clusters)
    assert clusters.masses.tolist() == [0, 2, 1]
    assert costs[1, 2].item() == costs[2, 1].item() == pytest.approx(50 / 3, rel=1e-15)
    assert costs[1, 1] == costs[2, 2] == far


def test_pairs(place):
    # 0 names itself and takes no part; 4 and 5, 1 and 2 agree; 3 and 6 name somebody who names another.
    clusters = clusters_of(
        torch.ones(7, dtype=torch.float64, device=place), torch.tensor([0, 2, 1, 0, 5, 4, 0], device=place)
    )
    lower, upper = clusters.pairs()
    assert lower.tolist() == [1, 4]
    assert upper.tolist() == [2, 5]
    ring = clusters_of(torch.ones(3, dtype=torch.float64, device=place), torch.tensor([1, 2, 0], device=place))
    assert len(ring.pairs()[0]) == 0


@pytest.mark.parametrize("d", [1, 60, 1100])
def test_centroids_of_merged_clusters(d, place):
    rng = np.random.default_rng(0)
    masses = torch.tensor([1.0, 3, 2, 2, 5], dtype=torch.float64, device=place)
    points = torch.tensor(rng.standard_normal((5, d)), device=place)
    cost = torch.tensor([1.0, 2, 2, 1, 1], dtype=torch.float64, device=place)
    clusters = clusters_of(masses, torch.tensor([3, 2, 1, 0, 0], device=place), cost)
    clusters.made_at[:] = torch.tensor([0.5, 2.5, 7, 1.25, 9], device=place)
    centroids = points.clone()
    merge_centroids(centroids, clusters)
    assert clusters.masses.tolist() == [0, 0, 5, 3, 5]
    torch.testing.assert_close(centroids[3], (points[0] + 2 * points[3]) / 3, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(centroids[2], (3 * points[1] + 2 * points[2]) / 5, rtol=1e-13, atol=1e-15)
    assert torch.equal(centroids[4], points[4])
    assert clusters.merges.partner[:2].tolist() == [3, 2]
    # 0 and 3 merge at 1, below the 1.25 that 3 was made at; 1 and 2 at 2, below the 2.5 of 1 and the 7 of 2.
    assert clusters.merges.cost[:2].tolist() == [1.25, 7]
    assert clusters.made_at[2:].tolist() == [7, 1.25, 9]
    assert clusters.alive.item() == 3


@pytest.mark.parametrize("made_at", [(5.0, 0.0), (0.0, 5.0), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "centroids"])
def test_no_merge_is_lower_than_those_before_it(matrix, made_at, place):
    """Rounding may make a merge cheaper than the one that made a part of it; its height is then that one's."""
    points = torch.tensor([[0.0], [2.0]], dtype=torch.float64, device=place)
    clusters = Clusters.of_points(torch.ones(2, dtype=torch.float64, device=place))
    costs = squared_distances(points, clusters.masses)
    update_neighbours(costs, clusters, every=True)
    clusters.made_at[:] = torch.tensor(made_at, device=place)
    if matrix:
        merge_pairs(costs, clusters)
    else:
        merge_centroids(points, clusters)
    assert clusters.merges.cost[0].item() == clusters.made_at[1].item() == max(2.0, *made_at)
