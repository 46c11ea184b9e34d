import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from nac_gpu.kernels import Batch, pad_points, products, squared_distances, squared_distances_batch
from nac_gpu.kernels.products import pad_points_torch

SHAPES = [(1, 1), (2, 1), (3, 60), (63, 1), (64, 60), (65, 16), (65, 17), (123, 257)]


@pytest.fixture(params=["tiles", "panels"], autouse=True)
def way(request):
    """Who makes the products, where Triton's kernels are used."""
    with products.use_products(request.param):
        yield


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


@pytest.mark.parametrize("copies", [2, 70], ids=["few", "many"])
def test_few_and_many_close_pairs_in_a_tile(copies, place):
    """Few are computed one after the other, many all at once."""
    rng = np.random.default_rng(0)
    points = np.concatenate([normal(100, 300), normal(1, 300) + 1e-4 * rng.standard_normal((copies, 300))])
    points = points[rng.permutation(len(points))]
    masses = rng.uniform(0.5, 2, len(points))
    found = squared_distances(torch.tensor(points, device=place), torch.tensor(masses, device=place)).cpu().numpy()
    expected = squareform(pdist(points, "sqeuclidean")) * masses[:, None] * masses / (masses[:, None] + masses)
    np.fill_diagonal(expected, np.finfo(np.float64).max)
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_problems_of_a_batch_do_not_mix(place):
    shapes = [(70, 20), (1, 3), (130, 7), (2, 300)]
    parts = [normal(n, d, seed=n) for n, d in shapes]
    parts[2][5] = parts[2][100]  # a close pair in one of them
    flat = torch.tensor(np.concatenate([part.ravel() for part in parts]), device=place)
    batch = Batch.of(shapes, place)
    for found, part in zip(batch.costs(squared_distances_batch(flat, None, batch)), parts, strict=True):
        expected = squareform(pdist(part, "sqeuclidean"))
        np.fill_diagonal(expected, np.finfo(np.float64).max)
        np.testing.assert_allclose(found.cpu(), expected, rtol=1e-12)


@pytest.mark.parametrize("shapes", [[(5, 16), (3, 48)], [(5, 3), (70, 17), (1, 300), (9, 16)]], ids=["whole", "padded"])
def test_padding(shapes, place):
    flat = torch.randn(sum(n * d for n, d in shapes), dtype=torch.float64).to(place)
    batch = Batch.of(shapes, place)
    wide, norms, padded = pad_points(flat, batch)
    assert padded.shapes == tuple((n, -(-d // 16) * 16) for n, d in shapes)
    for found, part in zip(padded.points(wide), batch.points(flat), strict=True):
        assert torch.equal(found[:, : part.shape[1]], part)
        assert (found[:, part.shape[1] :] == 0).all()
    expected, expected_norms = pad_points_torch(flat, batch)
    assert torch.equal(wide, expected)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-14, atol=0)
