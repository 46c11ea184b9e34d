import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from nac_gpu.kernels import squared_distances

SHAPES = [(1, 1), (2, 1), (3, 60), (63, 1), (64, 60), (65, 16), (65, 17), (123, 257)]


def normal(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]


@pytest.mark.parametrize(("n", "d"), SHAPES, ids=lambda value: str(value))
def test_equals_scipy(n, d, place):
    points = normal(n, d)
    found = squared_distances(torch.tensor(points, device=place)).cpu().numpy()
    expected = squareform(pdist(points, "sqeuclidean"))
    np.fill_diagonal(expected, np.finfo(np.float64).max)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("n", "d"), SHAPES, ids=lambda value: str(value))
def test_masses_give_wards_cost(n, d, place):
    points = torch.tensor(normal(n, d), device=place)
    masses = torch.tensor(np.random.default_rng(1).uniform(0.1, 9, n), device=place)
    reduced = masses[:, None] * masses / (masses[:, None] + masses)
    expected = off_diagonal(squared_distances(points) * reduced)
    torch.testing.assert_close(off_diagonal(squared_distances(points, masses)), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("d", [3, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_symmetric_bit_for_bit(d, weighted, place):
    points = torch.tensor(normal(150, d), device=place)
    masses = torch.rand(150, dtype=torch.float64).add(0.1).to(place) if weighted else None
    found = squared_distances(points, masses)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("d", [4, 50, 200])
def test_copies_are_at_distance_zero(d, place):
    points = torch.tensor(normal(70, d), device=place).repeat(3, 1)
    found = squared_distances(points)
    copies = torch.arange(70, device=place)
    assert (found[copies, copies + 70] == 0).all()
    assert (found[copies + 140, copies] == 0).all()
    assert (found == 0).sum() == 70 * 6


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8])
def test_near_copies_keep_their_digits(gap, place):
    # Exact in float64: a difference of powers of two on one coordinate, next to which a product would lose it all.
    base = normal(40, 64).round(1)
    near = base.copy()
    step = 2.0 ** np.round(np.log2(gap))
    base[:, 0] = np.round(base[:, 0])
    near[:, 0] = base[:, 0] + step
    found = squared_distances(torch.tensor(np.vstack((base, near)), device=place))
    assert (found[torch.arange(40), torch.arange(40) + 40] == step**2).all()


def test_accuracy_next_to_the_limit_where_differences_take_over(place):
    # Squared distances from far below to far above a thousandth of the squared norm.
    centre = normal(1, 300)
    points = centre + normal(200, 300, seed=1) * np.logspace(-4, 0, 200)[:, None]
    found = squared_distances(torch.tensor(points, device=place)).cpu().numpy()
    expected = squareform(pdist(points, "sqeuclidean"))
    np.fill_diagonal(expected, np.finfo(np.float64).max)
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_points_are_not_changed(place):
    points = torch.tensor(normal(50, 30), device=place)
    before = points.clone()
    squared_distances(points, torch.ones_like(points[:, 0]))
    assert torch.equal(points, before)
