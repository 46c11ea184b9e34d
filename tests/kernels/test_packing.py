import numpy as np
import pytest
import torch
from states import clusters_of, symmetric

from nac_gpu.kernels import pack_costs, pack_slots


@pytest.mark.parametrize(
    ("m", "left"), [(1, 1), (2, 1), (65, 64), (123, 3), (300, 220), (64, 64)], ids=lambda value: str(value)
)
def test_equals_numpy(m, left, place):
    rng = np.random.default_rng(m)
    costs = rng.uniform(size=(m, m))
    keep = np.sort(rng.permutation(m)[:left])
    packed = pack_costs(torch.tensor(costs, device=place), torch.tensor(keep, device=place))
    assert packed.is_contiguous()
    np.testing.assert_array_equal(packed.cpu(), costs[np.ix_(keep, keep)])


def test_columns_of_several_programs(place):
    costs = torch.tensor(symmetric(1100), device=place)
    keep = torch.arange(3, 1093, device=place)[:, None].flatten()[-20:]
    expected = costs[keep][:, keep]
    assert torch.equal(pack_costs(costs, keep), expected)


@pytest.mark.parametrize("front", [True, False])
def test_rows_kept_from_one_end(front, place):
    costs = torch.rand(100, 100, dtype=torch.float64).to(place)
    keep = torch.arange(0, 60, device=place) if front else torch.arange(40, 100, device=place)
    expected = costs[keep][:, keep]
    assert torch.equal(pack_costs(costs, keep), expected)


@pytest.mark.parametrize("size", [3, 4])
def test_slots_keep_their_order_and_neighbours_their_meaning(size, place):
    masses = torch.tensor([0, 2, 0, 0, 1, 3], dtype=torch.float64, device=place)
    nearest = torch.tensor([0, 5, 2, 3, 1, 1], device=place)
    clusters = clusters_of(masses, nearest, masses + 10)
    clusters.size = torch.arange(6, device=place)
    keep = pack_slots(clusters, size)
    assert keep[:3].tolist() == [1, 4, 5]
    assert clusters.masses.tolist() == [2, 1, 3, 0][:size]
    assert clusters.nearest.tolist() == [2, 0, 0, 3][:size]
    assert clusters.nearest_cost.tolist()[:3] == [12, 11, 13]
    assert clusters.point.tolist()[:3] == clusters.size.tolist()[:3] == [1, 4, 5]
    assert len(clusters.made_at) == size
