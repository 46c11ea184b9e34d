import numpy as np
import pytest
import torch

from nac_gpu.kernels import nearest_centroids, products, squared_distances


@pytest.fixture(params=["tiles", "panels"], autouse=True)
def way(request):
    """Who makes the products, where Triton's kernels are used."""
    with products.use_products(request.param):
        yield


def search(centroids, masses, rows, place):
    """For these rows: smallest costs and slots."""
    padded = torch.zeros(len(centroids), dtype=torch.int64, device=place)
    padded[: len(rows)] = torch.tensor(rows, device=place)
    count = torch.tensor([len(rows)], device=place)
    most = min(len(centroids), len(rows) + 3)
    cost, slot = nearest_centroids(centroids, masses, padded, count, most)
    assert len(cost) == len(slot) == most
    return cost[: len(rows)], slot[: len(rows)]


@pytest.mark.parametrize(("m", "d"), [(2, 1), (3, 60), (65, 5), (130, 257)], ids=lambda value: str(value))
def test_equals_the_matrix(m, d, place):
    rng = np.random.default_rng(m)
    centroids = torch.tensor(rng.standard_normal((m, d)), device=place)
    masses = torch.tensor(np.where(rng.uniform(size=m) < 0.3, 0.0, rng.uniform(1, 5, m)), device=place)
    masses[:2] = 1.0
    rows = rng.permutation(np.flatnonzero(masses.cpu().numpy()))[: m // 2 + 1].tolist()
    cost, slot = search(centroids, masses, rows, place)
    matrix = squared_distances(centroids, masses.clamp(min=1e-300))
    matrix[:, masses == 0] = torch.inf
    smallest, column = matrix[rows].min(dim=1)
    assert torch.equal(slot, column)
    torch.testing.assert_close(cost, smallest, rtol=1e-12, atol=0)


def test_lowest_slot_wins_also_far_apart(place):
    """Copies of one point lie in tiles that different programs look at."""
    centroids = torch.tensor(np.random.default_rng(0).standard_normal((200, 40)), device=place)
    centroids[[70, 130, 199]] = centroids[3].clone()
    masses = torch.ones(200, dtype=torch.float64, device=place)
    cost, slot = search(centroids, masses, [199, 3, 130, 70], place)
    assert slot.tolist() == [3, 70, 3, 3]
    assert (cost == 0).all()


def test_nobody_else_alive(place):
    centroids = torch.randn(5, 20, dtype=torch.float64).to(place)
    masses = torch.tensor([0.0, 0, 3, 0, 0], dtype=torch.float64, device=place)
    cost, _ = search(centroids, masses, [2], place)
    assert cost.isinf().all()


def test_near_centroids_keep_their_digits(place):
    """Some rows have a neighbour so near that a product does not tell its distance, and others do not."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((150, 60))
    for i in range(0, 60, 2):
        points[i + 1] = points[i] + 10.0 ** -rng.integers(3, 9) * rng.standard_normal(60)
    masses = rng.uniform(0.5, 5, 150)
    rows = rng.permutation(150)[:100]
    cost, slot = search(torch.tensor(points, device=place), torch.tensor(masses, device=place), rows, place)
    reduced = masses[:, None] * masses / (masses[:, None] + masses)
    expected = reduced * ((points[:, None] - points) ** 2).sum(axis=2)
    np.fill_diagonal(expected, np.inf)
    np.testing.assert_array_equal(slot.cpu(), expected[rows].argmin(axis=1))
    np.testing.assert_allclose(cost.cpu(), expected[rows].min(axis=1), rtol=1e-10)


def test_panels_of_few_rows(place, monkeypatch):
    """As many panels as a large problem has."""
    from nac_gpu.kernels import searching

    monkeypatch.setattr(searching, "_PANEL_ELEMENTS", 150 * 32)
    test_equals_the_matrix(130, 257, place)
