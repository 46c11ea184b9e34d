import numpy as np
import pytest
import torch

from nac_gpu.kernels import reciprocal_pairs


def pairs_by_loop(neighbours):
    return [(i, j) for i, j in enumerate(neighbours) if i < j and neighbours[j] == i]


@pytest.mark.parametrize("m", [1, 2, 3, 64, 500])
def test_equals_a_loop(m, device):
    rng = np.random.default_rng(m)
    points = rng.standard_normal(m)
    distances = np.abs(points[:, None] - points)
    np.fill_diagonal(distances, np.inf)
    neighbours = distances.argmin(axis=1)
    lower, upper = reciprocal_pairs(torch.tensor(neighbours, device=device))
    expected = pairs_by_loop(neighbours.tolist())
    assert list(zip(lower.tolist(), upper.tolist(), strict=True)) == expected
    assert len(expected) > 0 or m == 1


def test_a_slot_that_names_itself_takes_no_part(device):
    lower, upper = reciprocal_pairs(torch.tensor([0, 2, 1, 3, 5, 4, 0], device=device))
    assert lower.tolist() == [1, 4]
    assert upper.tolist() == [2, 5]


def test_a_ring_has_no_pair(device):
    lower, upper = reciprocal_pairs(torch.tensor([1, 2, 0], device=device))
    assert len(lower) == len(upper) == 0
