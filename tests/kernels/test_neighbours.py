import numpy as np
import pytest
import torch

from nac_gpu.kernels import nearest_neighbours


@pytest.mark.parametrize("m", [1, 2, 3, 65, 700])
def test_equals_numpy(m, device):
    costs = np.random.default_rng(m).uniform(size=(m, m))
    cost, slot = nearest_neighbours(
        torch.tensor(costs, device=device),
        torch.ones(m, dtype=torch.float64, device=device),
        torch.arange(m, device=device),
    )
    np.testing.assert_array_equal(slot.cpu(), costs.argmin(axis=1))
    np.testing.assert_array_equal(cost.cpu(), costs.min(axis=1))


def test_only_the_rows_asked_for_in_their_order(device):
    costs = torch.tensor(np.random.default_rng(0).uniform(size=(600, 600)), device=device)
    rows = torch.tensor([599, 3, 77, 3], device=device)
    cost, slot = nearest_neighbours(costs, torch.ones_like(costs[0]), rows)
    assert torch.equal(slot, costs[rows].argmin(dim=1))
    assert torch.equal(cost, costs[rows].amin(dim=1))


def test_lowest_slot_wins(device):
    # Few values, so every row has many minima; numpy's argmin takes the first.
    costs = np.random.default_rng(0).integers(0, 3, (300, 300)).astype(np.float64)
    _, slot = nearest_neighbours(
        torch.tensor(costs, device=device),
        torch.ones(300, dtype=torch.float64, device=device),
        torch.arange(300, device=device),
    )
    np.testing.assert_array_equal(slot.cpu(), costs.argmin(axis=1))


def test_dead_slots_are_nobodys_neighbour(device):
    rng = np.random.default_rng(0)
    costs = rng.uniform(1, 2, (90, 90))
    dead = rng.uniform(size=90) < 0.5
    costs[:, dead] -= 1  # stale and tempting
    masses = np.where(dead, 0.0, rng.uniform(1e-300, 1, 90))
    expected = np.where(dead, np.inf, costs)
    cost, slot = nearest_neighbours(
        torch.tensor(costs, device=device), torch.tensor(masses, device=device), torch.arange(90, device=device)
    )
    np.testing.assert_array_equal(slot.cpu(), expected.argmin(axis=1))
    np.testing.assert_array_equal(cost.cpu(), expected.min(axis=1))


def test_costs_are_not_changed(device):
    costs = torch.rand(20, 20, dtype=torch.float64).to(device)
    before = costs.clone()
    masses = torch.ones(20, dtype=torch.float64, device=device)
    masses[::3] = 0
    nearest_neighbours(costs, masses, torch.arange(20, device=device))
    assert torch.equal(costs, before)
