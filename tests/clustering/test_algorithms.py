"""Every way to the same dendrogram: one program a problem, rounds on the matrix, rounds without one; and batches."""

import numpy as np
import pytest
import torch
from scipy.cluster import hierarchy
from test_linkage import INPUTS, assert_same_as_scipy, blobs, normal, ward_by_definition

from nac_gpu import ward_linkage
from nac_gpu.clustering import linkage
from nac_gpu.clustering.labels import number_by_first_appearance
from nac_gpu.kernels import backend

SMALL = {
    "n1-d1": lambda: normal(1, 1),
    "n2-d1": lambda: normal(2, 1),
    "n3-d60": lambda: normal(3, 60),
    "n63-d1": lambda: normal(63, 1),
    "n64-d60": lambda: normal(64, 60),
    "n65-d257": lambda: normal(65, 257),
    "n123-d16": lambda: normal(123, 16),
    "ties": lambda: np.random.default_rng(0).integers(0, 3, (60, 2)).astype(float),
    "grid": lambda: np.stack(np.meshgrid(np.arange(8.0), np.arange(7.0)), -1).reshape(-1, 2),
    "duplicates": lambda: np.repeat(normal(12, 60), 5, axis=0),
    "all-equal": lambda: np.full((30, 20), 0.1),
    "tight-blobs": lambda: blobs(100, 64, 10, 1e-4),
}


@pytest.fixture(params=["batched", "resident", "matrix-free"])
def algorithm(request, monkeypatch):
    """An algorithm, made to do all of its work: nothing is handed on to another that would suit better."""
    if request.param != "batched":
        monkeypatch.setattr(linkage, "_FINISH_BELOW", 1)
    monkeypatch.setattr(linkage, "_MATRIX_IN_COPIES", 0)
    monkeypatch.setattr(linkage, "_MATRIX_IN_ANY_CASE", 1)
    return request.param


def assert_always_the_cheapest(dendrogram, points):
    """Every merge costs what it says, and no two clusters there at the time would have cost less."""
    linkage_matrix = dendrogram.to_scipy()
    assert hierarchy.is_valid_linkage(linkage_matrix, throw=True)
    clusters = {i: (1.0, point) for i, point in enumerate(points)}
    for row, (one, other, height, _) in enumerate(linkage_matrix):
        mass = np.array([mass for mass, _ in clusters.values()])
        centroid = np.array([centroid for _, centroid in clusters.values()])
        costs = mass[:, None] * mass / (mass[:, None] + mass) * ((centroid[:, None] - centroid) ** 2).sum(axis=2)
        np.fill_diagonal(costs, np.inf)
        (mass_one, centroid_one), (mass_other, centroid_other) = clusters.pop(int(one)), clusters.pop(int(other))
        total = mass_one + mass_other
        cost = mass_one * mass_other / total * ((centroid_one - centroid_other) ** 2).sum()
        assert cost == pytest.approx(height**2 / 2, rel=1e-9, abs=1e-14)
        assert cost <= costs.min() * (1 + 1e-9) + 1e-14
        clusters[len(points) + row] = (total, (mass_one * centroid_one + mass_other * centroid_other) / total)


@pytest.mark.parametrize("name", SMALL)
def test_equals_scipy(name, algorithm, place):
    points = SMALL[name]()
    tensor = torch.tensor(points, device=place)
    dendrogram = ward_linkage(tensor, algorithm=algorithm)
    if len(points) == 1:
        assert dendrogram.n == 1
    elif name in ("ties", "grid"):  # broken otherwise by SciPy, and the choice matters for all that follows
        assert_always_the_cheapest(dendrogram, points)
    else:
        assert_same_as_scipy(dendrogram, points)


@pytest.mark.parametrize("name", ["n500-d2", "blobs", "duplicated", "trained", "far-from-origin", "chain", "zero"])
@pytest.mark.parametrize("way", ["resident", "matrix-free"])
def test_larger_problems_with_the_implementation_of_the_device(name, way, device, monkeypatch):
    monkeypatch.setattr(linkage, "_MATRIX_IN_COPIES", 0)
    monkeypatch.setattr(linkage, "_MATRIX_IN_ANY_CASE", 50)
    points = INPUTS[name]()
    assert_same_as_scipy(ward_linkage(torch.tensor(points, device=device), algorithm=way), points)


@pytest.mark.parametrize("way", ["resident", "matrix-free"])
@pytest.mark.parametrize(("n", "d"), [(300, 4609), (4096, 3), (1500, 60)], ids=lambda value: str(value))
def test_heights_of_large_problems(n, d, way, device, monkeypatch):
    monkeypatch.setattr(linkage, "_MATRIX_IN_COPIES", 0)
    monkeypatch.setattr(linkage, "_MATRIX_IN_ANY_CASE", n // 4)
    points = blobs(n, d, 40, 0.5)
    dendrogram = ward_linkage(torch.tensor(points, device=device), algorithm=way)
    expected = hierarchy.linkage(points, "ward")
    np.testing.assert_allclose(dendrogram.heights.cpu(), expected[:, 2], rtol=1e-9)
    for k in (2, 40, n // 2):
        labels = hierarchy.cut_tree(expected, k)[:, 0]
        assert torch.equal(dendrogram.cut(k).cpu(), number_by_first_appearance(torch.tensor(labels)))


def test_masses(algorithm, place):
    rng = np.random.default_rng(0)
    points, masses = rng.standard_normal((37, 4)), 10 ** rng.uniform(-2, 2, 37)
    dendrogram = ward_linkage(
        torch.tensor(points, device=place), torch.tensor(masses, device=place), algorithm=algorithm
    )
    heights, members = ward_by_definition(points, masses)
    np.testing.assert_allclose(dendrogram.heights.cpu(), heights, rtol=1e-10)
    labels = dendrogram.cut(9).cpu().numpy()
    assert sorted(tuple(np.flatnonzero(labels == label).tolist()) for label in range(9)) == members[37 - 9 - 1]


def test_the_algorithms_agree_to_the_last_bit(place, monkeypatch):
    """Batched and resident make the same numbers in the same order, so nothing depends on when one hands over."""
    points = torch.tensor(normal(60, 5), device=place)
    batched = ward_linkage(points, algorithm="batched")
    monkeypatch.setattr(linkage, "_FINISH_BELOW", 20)
    handed_over = ward_linkage(points, algorithm="resident")
    assert torch.equal(batched.merges, handed_over.merges)
    assert torch.equal(batched.heights, handed_over.heights)


def test_a_round_without_a_pair_ends_with_an_error(algorithm, place, monkeypatch):
    """Costs that are not numbers make no pair: rounds must not go on for ever, nor end in what looks like a result."""

    def without_numbers(costs):
        return lambda *arguments: torch.full_like(costs(*arguments), torch.nan)

    monkeypatch.setattr(linkage, "_MATRIX_IN_ANY_CASE", 20)
    for name in ("squared_distances", "squared_distances_batch"):
        monkeypatch.setattr(linkage, name, without_numbers(getattr(linkage, name)))
    with pytest.raises(RuntimeError, match="found no two clusters that are each other's nearest neighbour"):
        ward_linkage(torch.tensor(normal(40, 5), device=place), algorithm=algorithm)


class Late(linkage._Count):
    """What the host knows on a GPU: the count of four rounds ago."""

    def __init__(self):
        self.counts = []

    def after_round(self, clusters):
        self.counts += [int(clusters.alive)] if self.counts else [len(clusters.masses)] * 4 + [int(clusters.alive)]
        return self.counts[-5]


@pytest.mark.parametrize("name", ["n64-d60", "duplicates", "n2-d1"])
def test_the_result_does_not_depend_on_what_the_host_knows(name, algorithm, place, monkeypatch):
    """Late counts leave dead slots in what is packed, and rounds in which there is nothing to do any more."""
    points = torch.tensor(SMALL[name]()[:40], device=place)
    expected = ward_linkage(points, algorithm=algorithm)
    monkeypatch.setattr(linkage, "_Count", Late)
    monkeypatch.setattr(linkage, "_ALIGNMENT", 4)
    found = ward_linkage(points, algorithm=algorithm)
    assert torch.equal(found.merges, expected.merges)
    last_bit = 1e-14 if algorithm == "matrix-free" else 0  # a BLAS rounds by the shapes that it is given
    torch.testing.assert_close(found.heights, expected.heights, rtol=last_bit, atol=0)


def test_clusters_that_chase_each_other(place):
    """Where rounding leaves no two that agree, the cheapest merge found is made."""
    clusters = linkage.Clusters.of_points(torch.ones(3, dtype=torch.float64, device=place))
    clusters.nearest = torch.tensor([1, 2, 0], device=place)
    clusters.nearest_cost = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64, device=place)
    nobody = torch.zeros(3, dtype=torch.bool, device=place)
    linkage._search(torch.randn(3, 2, dtype=torch.float64).to(place), clusters, nobody, 3)
    assert clusters.nearest.tolist() == [1, 2, 1]
    assert clusters.nearest_cost.tolist() == [3, 1, 1]


SHAPES = [(5, 3), (1, 7), (40, 60), (2, 1), (23, 20)]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_equals_its_parts(weighted, place):
    batch = [torch.tensor(normal(n, d, seed=n), device=place) for n, d in SHAPES]
    weights = [torch.linspace(1, 2, n, device=place) if n > 4 else None for n, _ in SHAPES] if weighted else None
    together = ward_linkage(batch, weights)
    assert isinstance(together, list)
    assert [dendrogram.n for dendrogram in together] == [n for n, _ in SHAPES]
    for i, dendrogram in enumerate(together):
        alone = ward_linkage(batch[i], weights[i] if weights else None)
        assert torch.equal(dendrogram.merges, alone.merges)
        assert torch.equal(dendrogram.heights, alone.heights)
        assert torch.equal(dendrogram.sizes, alone.sizes)


def test_a_batch_of_small_and_large(place, monkeypatch):
    monkeypatch.setattr(linkage, "_FINISH_BELOW", 10)
    points = [normal(n, 4, seed=n) for n in (6, 30, 9, 11)]
    for found, part in zip(ward_linkage([torch.tensor(p, device=place) for p in points]), points, strict=True):
        assert_same_as_scipy(found, part)


def test_an_empty_batch_and_mixed_dtypes(device):
    assert ward_linkage([]) == []
    points = [torch.randn(6, 3, device=device, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    assert [dendrogram.heights.dtype for dendrogram in ward_linkage(points)] == [torch.float32, torch.float64]


@pytest.mark.parametrize("d", [3, 100])
def test_float32_arithmetic(d, algorithm, place):
    points = normal(50, d).astype(np.float32)
    found = ward_linkage(torch.tensor(points, device=place), dtype=torch.float32, algorithm=algorithm)
    expected = hierarchy.linkage(points.astype(np.float64), "ward")[:, 2]
    np.testing.assert_allclose(found.heights.cpu(), expected, rtol=2e-5)


def test_bad_batches(device):
    good = torch.randn(4, 2, device=device)
    with pytest.raises(ValueError, match=r"points\[1\] has NaN or infinity, first in row 3"):
        ward_linkage([good, torch.tensor([[1.0], [2], [3], [float("inf")]], device=device)])
    with pytest.raises(ValueError, match=r"points\[0\] has shape \(0, 2\), expected at least one point"):
        ward_linkage([good[:0], good])
    with pytest.raises(ValueError, match=r"weights\[1\]\[2\] is -1.0, expected a positive finite mass"):
        ward_linkage([good, good], [None, torch.tensor([1.0, 1, -1, 1], device=device)])
    with pytest.raises(ValueError, match="weights is 1 items, expected one item, masses or None, for each of 2 sets"):
        ward_linkage([good, good], [None])
    with pytest.raises(ValueError, match="weights is one tensor, expected one item"):
        ward_linkage([good, good], torch.ones(4))  # pyright: ignore
    with pytest.raises(ValueError, match=r"points\[1\] is on meta, points\[0\] on"):
        ward_linkage([good, good.to("meta")])


def test_bad_options(device):
    points = torch.randn(600, 2, device=device)
    with pytest.raises(ValueError, match=r"expected torch\.float64 or torch\.float32"):
        ward_linkage(points, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="algorithm is 'fast', expected"):
        ward_linkage(points, algorithm="fast")  # pyright: ignore
    with pytest.raises(ValueError, match='600 points are too many for algorithm="batched", expected at most 512'):
        ward_linkage(points, algorithm="batched")


def test_what_does_not_fit_goes_without_a_matrix(device, monkeypatch):
    points = normal(600, 3)
    called = []
    real = linkage._matrix_free
    monkeypatch.setattr(linkage, "_matrix_free", lambda *args: called.append(1) or real(*args))
    monkeypatch.setattr(linkage, "_free_bytes", lambda device: 2_000_000)
    assert_same_as_scipy(ward_linkage(torch.tensor(points, device=device)), points)
    assert called
    monkeypatch.setattr(linkage, "_free_bytes", lambda device: 100_000)
    with pytest.raises(MemoryError, match=r"600 points of 3 dimensions need 0.0 GiB on .* even without a cost matrix"):
        ward_linkage(torch.tensor(points, device=device))


def test_free_memory_is_a_plausible_number(device):
    assert 2**20 < linkage._free_bytes(device) < 2**50


def test_a_gpu_that_is_too_old_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    backend._supported.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Old GPU has compute capability 7.5, expected 8.0 or newer"):
            assert not backend._supported(torch.device("cuda", 0))
        assert not backend._supported(torch.device("cuda", 0))
    finally:
        backend._supported.cache_clear()


def test_the_host_is_some_rounds_behind(monkeypatch):
    """What the host is told of the count, on a device that answers late."""

    class Late(torch.Tensor):
        is_cuda = True

    class Event:
        def record(self):
            pass

        def synchronize(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **more: empty(*size, **more))
    clusters = linkage.Clusters.of_points(torch.ones(100, dtype=torch.float64))
    count, known = linkage._Count(), []
    for left in range(90, 20, -10):
        clusters.alive = torch.tensor([left]).as_subclass(Late)
        known.append(count.after_round(clusters))
    assert known == [100, 100, 100, 100, 90, 80, 70]
