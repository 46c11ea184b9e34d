import numpy as np
import pytest
import torch
from states import LARGEST, clusters_of, symmetric

from nac_gpu.kernels import update_neighbours


def ones(m, place):
    return torch.ones(m, dtype=torch.float64, device=place)


@pytest.mark.parametrize("m", [2, 3, 65, 123])
def test_equals_numpy(m, place):
    costs = symmetric(m)
    clusters = clusters_of(ones(m, place))
    update_neighbours(torch.tensor(costs, device=place), clusters, every=True)
    np.testing.assert_array_equal(clusters.nearest.cpu(), costs.argmin(axis=1))
    np.testing.assert_array_equal(clusters.nearest_cost.cpu(), costs.min(axis=1))


def test_wide_rows(place):
    costs = symmetric(1100)[:1100]
    masses = torch.zeros(1100, dtype=torch.float64, device=place)
    masses[[5, 600, 1030, 1099]] = 1.0
    clusters = clusters_of(masses)
    update_neighbours(torch.tensor(costs, device=place), clusters, every=True)
    alive = [5, 600, 1030, 1099]
    expected = [alive[i] for i in costs[np.ix_(alive, alive)].argmin(axis=1)]
    assert clusters.nearest[alive].tolist() == expected


def test_only_those_whose_neighbour_was_merged(place):
    # 0 and 1 merged into 1. 2 pointed at 0, 3 at 4 (which takes no part: 4 points at 2), 5 at 1.
    costs = symmetric(6)
    masses = torch.tensor([0.0, 2, 1, 1, 1, 1], dtype=torch.float64, device=place)
    nearest = torch.tensor([1, 0, 0, 4, 2, 1], device=place)
    clusters = clusters_of(masses, nearest, torch.full_like(masses, 7.0))
    update_neighbours(torch.tensor(costs, device=place), clusters)
    alive = np.where(np.arange(6) == 0, LARGEST, costs)
    expected = alive.argmin(axis=1)
    assert clusters.nearest.tolist() == [0, expected[1], expected[2], 4, 2, expected[5]]
    found = clusters.nearest_cost.cpu()[1:]
    np.testing.assert_array_equal(found, [alive[1].min(), alive[2].min(), 7, 7, alive[5].min()])


def test_lowest_slot_wins(place):
    # Few values, so every row has many minima; numpy's argmin takes the first.
    costs = symmetric(100, values=[0.0, 1.0, 2.0])
    clusters = clusters_of(ones(100, place))
    update_neighbours(torch.tensor(costs, device=place), clusters, every=True)
    np.testing.assert_array_equal(clusters.nearest.cpu(), costs.argmin(axis=1))


def test_dead_slots_are_nobodys_neighbour(place):
    rng = np.random.default_rng(0)
    costs = symmetric(90) + 1
    dead = rng.uniform(size=90) < 0.5
    tempting = costs - dead  # out of date, and cheaper than all others
    np.fill_diagonal(tempting, LARGEST)
    masses = np.where(dead, 0.0, rng.uniform(1e-300, 1, 90))
    expected = np.where(dead, LARGEST, costs)
    clusters = clusters_of(torch.tensor(masses, device=place))
    update_neighbours(torch.tensor(tempting, device=place), clusters, every=True)
    np.testing.assert_array_equal(clusters.nearest.cpu()[~dead], expected.argmin(axis=1)[~dead])
    np.testing.assert_array_equal(clusters.nearest_cost.cpu()[~dead], expected.min(axis=1)[~dead])


def test_costs_are_not_changed(place):
    costs = torch.tensor(symmetric(20), device=place)
    before = costs.clone()
    masses = ones(20, place)
    masses[::3] = 0
    update_neighbours(costs, clusters_of(masses), every=True)
    assert torch.equal(costs, before)
