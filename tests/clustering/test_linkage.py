"""Ward linkage: the dendrogram that SciPy and the definition give, and its cuts."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy

from nac_gpu import Dendrogram, ward_linkage
from nac_gpu.clustering.labels import number_by_first_appearance

properties = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def blobs(n, d, count, spread, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, d))[rng.integers(0, count, n)] + spread * rng.standard_normal((n, d))


def trained_like(n, d, seed=0):
    """Rows as in a trained layer: few strong directions, norms over decades, some dead rows, some almost alike."""
    rng = np.random.default_rng(seed)
    rank = min(n, d)
    strengths = 1 / np.arange(1, rank + 1)
    rows = (rng.standard_normal((n, rank)) * strengths) @ rng.standard_normal((rank, d))
    rows *= np.exp(rng.standard_normal((n, 1)))
    rows[: n // 8] = 1e-6 * rng.standard_normal((n // 8, d))
    rows[n // 8 : n // 4] = rows[n // 4 : n // 4 + n // 4 - n // 8] * (1 + 1e-3 * rng.standard_normal(d))
    return rows.astype(np.float32).astype(np.float64)


def normal(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


INPUTS = {
    "n2-d1": lambda: normal(2, 1),
    "n3-d2": lambda: normal(3, 2),
    "n7-d60": lambda: normal(7, 60),
    "n64-d257": lambda: normal(64, 257),
    "n123-d16": lambda: normal(123, 16),
    "n123-d17": lambda: normal(123, 17),
    "n500-d2": lambda: normal(500, 2),
    "n300-d2000": lambda: normal(300, 2000),
    "n2000-d100": lambda: normal(2000, 100),
    "n2000-d3": lambda: normal(2000, 3),
    "uniform": lambda: np.random.default_rng(0).uniform(size=(800, 20)),
    "blobs": lambda: blobs(700, 40, 30, 0.1),
    "tight-blobs": lambda: blobs(300, 64, 10, 1e-4),
    "blobs-low-dimension": lambda: blobs(700, 4, 30, 1e-3),
    "duplicated": lambda: np.random.default_rng(1).permutation(np.repeat(normal(90, 33), 4, axis=0)),
    "duplicated-low-dimension": lambda: np.random.default_rng(1).permutation(np.repeat(normal(60, 2), 5, axis=0)),
    "duplicated-few": lambda: np.repeat(normal(3, 50), 40, axis=0),
    "all-equal": lambda: np.full((50, 20), 0.1),
    "collinear": lambda: normal(400, 1) * normal(1, 30, seed=1),
    "collinear-low-dimension": lambda: normal(400, 1) * np.ones((1, 5)),
    "trained": lambda: trained_like(512, 577),
    "trained-wide": lambda: trained_like(256, 1153),
    "far-from-origin": lambda: normal(200, 30) + 1e6,
    "chain": lambda: 1.1 ** np.arange(120.0)[:, None],
    "zero": lambda: np.zeros((9, 30)),
}


def first_appearance(labels):
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[first.argsort()] = np.arange(len(first))
    return rank[inverse]


def partitions(linkage):
    """For k = n, n - 1, ..., 1: the labels after n - k rows of a SciPy linkage matrix, written as a plain loop."""
    n = len(linkage) + 1
    labels = np.arange(n)
    yield n, labels
    for row, (a, b) in enumerate(linkage[:, :2].astype(int)):
        labels = np.where((labels == a) | (labels == b), n + row, labels)
        yield n - 1 - row, first_appearance(labels)


def assert_same_as_scipy(dendrogram, points):
    expected = hierarchy.linkage(points, "ward")
    found = dendrogram.to_scipy()
    assert hierarchy.is_valid_linkage(found, throw=True)
    np.testing.assert_allclose(found[:, 2], expected[:, 2], rtol=1e-10, atol=0)
    heights = np.concatenate(([-1.0], expected[:, 2], [np.inf]))
    compared = 0
    for k, labels in partitions(expected):
        kept = dendrogram.n - k
        if heights[kept + 1] > heights[kept] * (1 + 1e-9):
            np.testing.assert_array_equal(dendrogram.cut(k).cpu(), labels)
            compared += 1
    assert compared >= 1


@pytest.mark.parametrize("name", INPUTS)
def test_equals_scipy(name, device):
    points = INPUTS[name]()
    assert_same_as_scipy(ward_linkage(torch.tensor(points, device=device)), points)


def ward_by_definition(points, masses):
    """Heights and partitions of Ward's method in O(n³): look at all pairs of centroids, merge the cheapest."""
    clusters = [(mass, point, (i,)) for i, (point, mass) in enumerate(zip(points, masses, strict=True))]
    heights, members = [], []
    while len(clusters) > 1:
        mass = np.array([cluster[0] for cluster in clusters])
        centroid = np.array([cluster[1] for cluster in clusters])
        cost = mass[:, None] * mass / (mass[:, None] + mass)
        cost = cost * ((centroid[:, None] - centroid) ** 2).sum(axis=2)
        np.fill_diagonal(cost, np.inf)
        i, j = np.unravel_index(cost.argmin(), cost.shape)
        total = mass[i] + mass[j]
        joined = (
            total,
            (mass[i] * centroid[i] + mass[j] * centroid[j]) / total,
            tuple(sorted(clusters[i][2] + clusters[j][2])),
        )
        clusters = [cluster for index, cluster in enumerate(clusters) if index not in (i, j)] + [joined]
        heights.append(np.sqrt(2 * cost[i, j]))
        members.append(sorted(cluster[2] for cluster in clusters))
    return np.array(heights), members


@pytest.mark.parametrize(("n", "d"), [(2, 3), (17, 1), (40, 3), (90, 40)], ids=lambda value: str(value))
@pytest.mark.parametrize("spread", [1, 1e6], ids=["similar", "spread"])
def test_masses_equal_the_definition(n, d, spread, device):
    rng = np.random.default_rng(n + d)
    points = rng.standard_normal((n, d))
    masses = spread ** rng.uniform(-1, 1, n)
    dendrogram = ward_linkage(torch.tensor(points, device=device), torch.tensor(masses, device=device))
    heights, members = ward_by_definition(points, masses)
    np.testing.assert_allclose(dendrogram.heights.cpu(), heights, rtol=1e-10)
    for merged, expected in enumerate(members, start=1):
        labels = dendrogram.cut(n - merged).cpu().numpy()
        found = sorted(tuple(np.flatnonzero(labels == label).tolist()) for label in range(n - merged))
        assert found == expected


def test_one_point(device):
    dendrogram = ward_linkage(torch.ones(1, 3, device=device))
    assert dendrogram.n == 1
    assert dendrogram.merges.shape == (0, 2)
    assert dendrogram.heights.shape == dendrogram.sizes.shape == (0,)
    assert dendrogram.merges.dtype == dendrogram.sizes.dtype == torch.int64
    assert dendrogram.cut(1).tolist() == dendrogram.cut(height=0).tolist() == [0]
    assert dendrogram.to_scipy().shape == (0, 4)


def test_result_is_on_the_device_and_detached(device):
    points = torch.randn(30, 4, device=device, requires_grad=True)
    weights = torch.rand(30, device=device).add(0.5).requires_grad_()
    points_before, weights_before = points.detach().clone(), weights.detach().clone()
    dendrogram = ward_linkage(points, weights)
    for part in (dendrogram.merges, dendrogram.heights, dendrogram.sizes, dendrogram.costs, dendrogram.cut(3)):
        assert part.device.type == device.type
        assert not part.requires_grad
    assert torch.equal(points.detach(), points_before)
    assert torch.equal(weights.detach(), weights_before)
    assert points.grad is None


@pytest.mark.parametrize("weighted", [False, True])
def test_same_bits_every_time(weighted, device):
    points = torch.tensor(blobs(500, 70, 20, 0.3), device=device)
    weights = torch.linspace(1, 3, 500, device=device) if weighted else None
    first = ward_linkage(points, weights)
    for _ in range(3):
        again = ward_linkage(points.clone(), weights)
        assert torch.equal(first.merges, again.merges)
        assert torch.equal(first.heights, again.heights)


def test_inputs_that_are_not_contiguous(device):
    points = torch.tensor(normal(40, 120), device=device)
    expected = ward_linkage(points)
    strided = points.T.contiguous().T
    assert not strided.is_contiguous()
    torch.testing.assert_close(ward_linkage(strided).heights, expected.heights, rtol=1e-13, atol=0)


def test_unit_weights_change_nothing(device):
    points = torch.tensor(normal(100, 25), device=device)
    plain, weighted = ward_linkage(points), ward_linkage(points, torch.ones(100, device=device))
    assert torch.equal(plain.merges, weighted.merges)
    assert torch.equal(plain.heights, weighted.heights)


def test_lowest_index_wins_ties(device):
    def merges(*points):
        return ward_linkage(torch.tensor(points, dtype=torch.float64, device=device)).merges.tolist()

    assert merges([0.0], [1.0], [2.0], [3.0]) == [[0, 1], [2, 3], [4, 5]]
    assert merges([0.0], [1.0], [2.0]) == [[0, 1], [2, 3]]
    assert merges([2.0], [1.0], [0.0]) == [[0, 1], [2, 3]]
    assert merges([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]) == [[0, 1], [2, 3], [4, 5]]
    assert merges(*[[7.0]] * 4) == [[0, 1], [2, 4], [3, 5]]


def test_costs_add_up_to_the_sum_of_squares(device):
    points = torch.tensor(blobs(300, 30, 7, 0.5), device=device)
    weights = torch.linspace(0.5, 2, 300, dtype=torch.float64, device=device)
    dendrogram = ward_linkage(points, weights)
    torch.testing.assert_close(dendrogram.costs, dendrogram.heights**2 / 2, rtol=1e-15, atol=0)
    for k in (1, 5, 100, 299):
        labels = dendrogram.cut(k)
        within = 0.0
        for label in range(k):
            members, mass = points[labels == label], weights[labels == label, None]
            within += (mass * (members - (mass * members).sum(dim=0) / mass.sum()) ** 2).sum().item()
        assert dendrogram.costs[: 300 - k].sum().item() == pytest.approx(within, rel=1e-11)


def test_sizes_and_numbering(device):
    dendrogram = ward_linkage(torch.tensor(normal(200, 10), device=device))
    sizes = [1] * 200
    for row, (a, b) in enumerate(dendrogram.merges.tolist()):
        assert a < b < 200 + row
        sizes.append(sizes[a] + sizes[b])
    assert sizes[200:] == dendrogram.sizes.tolist()
    assert sorted(dendrogram.merges.flatten().tolist()) == list(range(398))
    assert (dendrogram.heights.diff() >= 0).all()


def test_cut_by_k_equals_fcluster(device):
    points = normal(150, 8)
    dendrogram = ward_linkage(torch.tensor(points, device=device))
    linkage = hierarchy.linkage(points, "ward")
    for k in range(1, 151):
        labels = dendrogram.cut(k)
        assert labels.dtype == torch.int64
        assert labels.max() == k - 1
        np.testing.assert_array_equal(labels.cpu(), first_appearance(hierarchy.fcluster(linkage, k, "maxclust")))


def test_cut_by_height_equals_fcluster(device):
    points = normal(150, 8)
    dendrogram = ward_linkage(torch.tensor(points, device=device))
    linkage = dendrogram.to_scipy()
    exact = dendrogram.heights[[0, 1, 70, 148]].tolist()
    for height in [0.0, 1e9, *exact, *(np.nextafter(h, 0) for h in exact), *np.linspace(0.5, 30, 20)]:
        expected = first_appearance(hierarchy.fcluster(linkage, height, "distance"))
        np.testing.assert_array_equal(dendrogram.cut(height=height).cpu(), expected)


def test_cut_by_height_is_inclusive_and_exact_in_float32(device):
    dendrogram = ward_linkage(torch.tensor([[0.0], [0.1], [5.0]], device=device))
    height = dendrogram.heights[0].item()
    assert dendrogram.cut(height=height).tolist() == [0, 0, 1]
    assert dendrogram.cut(height=float(np.nextafter(height, 0))).tolist() == [0, 1, 2]
    assert dendrogram.cut(height=-1.0).tolist() == [0, 1, 2]
    assert dendrogram.cut(height=float("inf")).tolist() == [0, 0, 0]


def test_cut_of_a_chain_of_full_depth(device):
    """Every merge adds one point: the deepest tree there is, at every cut."""
    merges = torch.tensor([[0, 1], *([i + 1, 100 + i - 1] for i in range(1, 99))], device=device)
    chain = Dendrogram(merges, torch.arange(99.0, device=device), torch.arange(2, 101, device=device))
    for k in range(1, 101):
        assert chain.cut(k).tolist() == [max(0, i - (100 - k)) for i in range(100)]


def test_cut_takes_any_integer(device):
    dendrogram = ward_linkage(torch.tensor(normal(9, 2), device=device))
    for k in (np.int32(4), torch.tensor(4)):
        assert torch.equal(dendrogram.cut(k), dendrogram.cut(4))


def test_number_by_first_appearance(device):
    labels = torch.tensor([7, -2, 7, 100, -2, 0], device=device)
    assert number_by_first_appearance(labels).tolist() == [0, 1, 0, 2, 1, 3]
    assert number_by_first_appearance(labels[:0]).tolist() == []


@properties
@given(n=st.integers(2, 12), d=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_integer_masses_are_repeated_points(n, d, seed, device):
    rng = np.random.default_rng(seed)
    points, masses = rng.standard_normal((n, d)), rng.integers(1, 5, n)
    repeated = ward_linkage(torch.tensor(points.repeat(masses, axis=0), device=device)).heights.cpu().numpy()
    weighted = ward_linkage(torch.tensor(points, device=device), torch.tensor(masses, device=device))
    copies = masses.sum() - n
    assert (repeated[:copies] == 0).all()
    np.testing.assert_allclose(weighted.heights.cpu(), repeated[copies:], rtol=1e-11)


@properties
@given(n=st.integers(1, 60), d=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_order_of_points_does_not_matter(n, d, seed, device):
    rng = np.random.default_rng(seed)
    points, order = rng.standard_normal((n, d)), rng.permutation(n)
    plain = ward_linkage(torch.tensor(points, device=device))
    shuffled = ward_linkage(torch.tensor(points[order], device=device))
    np.testing.assert_allclose(shuffled.heights.cpu(), plain.heights.cpu(), rtol=1e-11)
    k = int(rng.integers(1, n + 1))
    expected = number_by_first_appearance(plain.cut(k)[torch.tensor(order, device=device)])
    assert torch.equal(shuffled.cut(k), expected)


@properties
@given(
    points=st.integers(1, 4).flatmap(
        lambda d: st.lists(st.lists(st.integers(-3, 3), min_size=d, max_size=d), min_size=1, max_size=40)
    ),
    data=st.data(),
)
def test_any_ties_give_a_valid_dendrogram(points, data, device):
    """On a small grid everything ties: heights stay monotone, the first is the least distance, the costs add up."""
    masses = data.draw(st.lists(st.integers(1, 3), min_size=len(points), max_size=len(points)))
    values = torch.tensor(points, dtype=torch.float64, device=device)
    weights = torch.tensor(masses, dtype=torch.float64, device=device)
    dendrogram = ward_linkage(values, weights)
    n = len(points)
    assert (dendrogram.heights.diff() >= 0).all()
    centre = (weights[:, None] * values).sum(dim=0) / weights.sum()
    total = (weights[:, None] * (values - centre) ** 2).sum().item()
    assert dendrogram.costs.sum().item() == pytest.approx(total, rel=1e-12, abs=1e-12)
    for k in range(1, n + 1):
        assert dendrogram.cut(k).unique().tolist() == list(range(k))
    if n > 1:
        assert hierarchy.is_valid_linkage(dendrogram.to_scipy(), throw=True)
        pairs = weights[:, None] * weights / (weights[:, None] + weights) * torch.cdist(values, values).square()
        least = pairs[~torch.eye(n, dtype=torch.bool, device=device)].min().item()
        assert dendrogram.costs[0].item() == pytest.approx(least, rel=1e-12)
        copies = n - len({tuple(point) for point in points})
        assert (dendrogram.heights == 0).sum() == copies


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k is 0, expected 1 to 5, the number of points; choose k in that range"),
        (-1, ValueError, "k is -1, expected 1 to 5"),
        (6, ValueError, "k is 6, expected 1 to 5"),
        (2.0, TypeError, "k is 2.0, expected an integer from 1 to 5"),
        (True, TypeError, "k is True, expected an integer from 1 to 5"),
        ("3", TypeError, "k is '3', expected an integer from 1 to 5"),
    ],
)
def test_bad_k(k, error, message, device):
    with pytest.raises(error, match=message):
        ward_linkage(torch.tensor(normal(5, 2), device=device)).cut(k)


def test_cut_takes_one_of_k_and_height(device):
    dendrogram = ward_linkage(torch.tensor(normal(5, 2), device=device))
    with pytest.raises(TypeError, match=r"cut takes either k or height, got neither; write cut\(10\)"):
        dendrogram.cut()
    with pytest.raises(TypeError, match="cut takes either k or height, got both"):
        dendrogram.cut(2, height=1.0)
    with pytest.raises(ValueError, match="height is NaN, expected a number"):
        dendrogram.cut(height=float("nan"))
