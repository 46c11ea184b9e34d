import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import nac_gpu
from nac_gpu import ward_linkage
from nac_gpu.clustering.labels import number_by_first_appearance
from nac_gpu.clustering.methods import METHODS, kmeans, l1, random, ward

every_method = pytest.mark.parametrize("method", [ward, kmeans, random], ids=("ward", "kmeans", "random"))


def blobs(n, d, count, spread, device, seed=0):
    rng = np.random.default_rng(seed)
    source = np.concatenate((np.arange(count), rng.integers(0, count, n - count)))
    points = rng.standard_normal((count, d))[source] + spread * rng.standard_normal((n, d))
    return torch.tensor(points, device=device), torch.tensor(source, device=device)


def within(points, labels, weights=None):
    """Weighted sum of squares within clusters, written as a loop."""
    weights = torch.ones_like(points[:, 0]) if weights is None else weights
    total = 0.0
    for label in labels.unique():
        members, mass = points[labels == label], weights[labels == label, None]
        total += (mass * (members - (mass * members).sum(dim=0) / mass.sum()) ** 2).sum().item()
    return total


def test_the_methods():
    assert list(METHODS.items()) == [("ward", ward), ("kmeans", kmeans), ("random", random), ("l1", l1)]
    assert nac_gpu.methods.METHODS is METHODS


def test_l1_keeps_the_neurons_with_the_largest_weights(device):
    points = torch.tensor([[3.0, -3.0], [1.0, 0.0], [2.0, 2.0], [0.5, 0.5]], device=device)
    assert l1(points, 2).tolist() == [0, -1, 1, -1]
    assert l1(points, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="expected 1 to 4"):
        l1(points, 5)


@every_method
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_exactly_k_clusters_numbered_by_first_appearance(method, n, device):
    points = torch.tensor(np.random.default_rng(n).standard_normal((n, 3)), device=device)
    for k in range(1, n + 1):
        labels = method(points, k)
        assert labels.shape == (n,)
        assert labels.dtype == torch.int64
        assert labels.device.type == device.type
        assert labels.unique().tolist() == list(range(k))
        assert torch.equal(labels, number_by_first_appearance(labels))


@every_method
def test_exactly_k_clusters_of_copies(method, device):
    """More clusters than different points: copies must part."""
    points = torch.tensor(np.random.default_rng(0).standard_normal((4, 30)), device=device).repeat_interleave(10, 0)
    for k in (1, 3, 4, 5, 17, 39, 40):
        assert method(points, k).unique().tolist() == list(range(k))
    assert method(torch.zeros(20, 2, device=device), 7).unique().tolist() == list(range(7))


@pytest.mark.parametrize("method", [ward, kmeans], ids=["ward", "kmeans"])
def test_copies_stay_together(method, device):
    rng = np.random.default_rng(0)
    source = rng.permutation(np.repeat(np.arange(50), 4))
    points = torch.tensor(rng.standard_normal((50, 70))[source], device=device)
    expected = number_by_first_appearance(torch.tensor(source, device=device))
    assert torch.equal(method(points, 50), expected)


@pytest.mark.parametrize("method", [ward, kmeans], ids=["ward", "kmeans"])
@pytest.mark.parametrize("d", [5, 100])
def test_blobs_are_found(method, d, device):
    points, source = blobs(400, d, 12, 0.05, device)
    assert torch.equal(method(points, 12), number_by_first_appearance(source))


def test_random_finds_nothing(device):
    points, source = blobs(1000, 20, 10, 0.01, device)
    assert abs(adjusted_rand_score(source.cpu(), random(points, 10).cpu())) < 0.02


@pytest.mark.parametrize("weighted", [False, True])
def test_ward_and_kmeans_are_far_below_random(weighted, device):
    points, _ = blobs(600, 40, 30, 0.3, device)
    weights = torch.linspace(0.1, 3, 600, dtype=torch.float64, device=device) if weighted else None
    ward_cost, kmeans_cost, random_cost = (
        within(points, method(points, 30, weights=weights), weights) for method in (ward, kmeans, random)
    )
    assert max(ward_cost, kmeans_cost) < 0.2 * random_cost
    assert ward_cost == pytest.approx(kmeans_cost, rel=0.2)


def test_ward_is_the_cut_of_the_linkage(device):
    points, _ = blobs(200, 10, 9, 0.5, device)
    weights = torch.linspace(1, 2, 200, device=device)
    assert torch.equal(ward(points, 9, weights=weights, seed=5), ward_linkage(points, weights).cut(9))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [2, 20, 150])
def test_kmeans_has_converged(k, weighted, device):
    """Every point is in the cluster whose centroid is nearest, and no centroid would move: Lloyd's fixed point."""
    points, _ = blobs(300, 30, 25, 1, device)
    weights = torch.linspace(0.1, 5, 300, dtype=torch.float64, device=device)
    labels = kmeans(points, k, weights=weights if weighted else None)
    mass = weights if weighted else torch.ones_like(weights)
    membership = torch.nn.functional.one_hot(labels, k).double() * mass[:, None]
    centroids = (membership.T @ points) / membership.sum(dim=0)[:, None]
    assert torch.equal(torch.cdist(points, centroids).argmin(dim=1), labels)


def test_kmeans_is_as_good_as_scikit_learns(device):
    from sklearn.cluster import KMeans

    points, _ = blobs(500, 20, 40, 0.8, device)
    theirs = KMeans(40, n_init=4, random_state=0).fit(points.cpu().numpy()).inertia_
    assert within(points, kmeans(points, 40)) < 1.03 * theirs


def test_kmeans_weights_are_repeated_points(device):
    """A heavy point holds its centroid: two light points between heavy ones go to the nearer, wherever seeds fall."""
    points = torch.tensor([[0.0], [4.0], [6.0], [10.0]], dtype=torch.float64, device=device)
    heavy_ends = torch.tensor([100.0, 1, 1, 100], device=device)
    heavy_middle = torch.tensor([1.0, 100, 100, 1], device=device)
    assert kmeans(points, 2, weights=heavy_ends).tolist() == [0, 0, 1, 1]
    assert kmeans(points, 3, weights=heavy_middle).tolist() in ([0, 0, 1, 2], [0, 1, 2, 2])
    assert kmeans(points, 3, weights=heavy_ends).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("method", [kmeans, random], ids=["kmeans", "random"])
def test_seed_decides(method, device):
    points = torch.tensor(np.random.default_rng(0).standard_normal((200, 10)), device=device)
    first = method(points, 20, seed=1)
    assert torch.equal(method(points, 20, seed=1), first)
    assert not torch.equal(method(points, 20, seed=2), first)
    assert torch.equal(method(points, 20), method(points, 20, seed=0))


def test_random_depends_on_the_number_of_points_only(device):
    points, _ = blobs(100, 10, 5, 0.1, device)
    weights = torch.linspace(1, 9, 100, device=device)
    expected = random(points, 7, seed=3)
    assert torch.equal(random(points * 5 + 1, 7, weights=weights, seed=3), expected)
    assert torch.equal(random(torch.zeros(100, 1), 7, seed=3), expected.cpu())


def test_random_is_even(device):
    """Beyond the founder, every point joins every cluster with the same chance."""
    sizes = torch.bincount(random(torch.zeros(10_000, 1, device=device), 10))
    assert (sizes - 1000).abs().max() < 5 * 30


@every_method
def test_global_random_state_is_left_alone(method, device):
    points, _ = blobs(60, 5, 4, 0.5, device)
    torch.manual_seed(7)
    expected = torch.rand(3, device=device)
    torch.manual_seed(7)
    first = method(points, 4)
    assert torch.equal(torch.rand(3, device=device), expected)
    torch.manual_seed(8)
    assert torch.equal(method(points, 4), first)


@every_method
def test_inputs_are_left_alone(method, device):
    points, _ = blobs(60, 5, 4, 0.5, device)
    weights = torch.linspace(1, 2, 60, device=device)
    points_before, weights_before = points.clone(), weights.clone()
    points.requires_grad_()
    labels = method(points, 4, weights=weights)
    assert not labels.requires_grad
    assert torch.equal(points.detach(), points_before)
    assert torch.equal(weights, weights_before)


@pytest.mark.parametrize("method", [ward, kmeans], ids=["ward", "kmeans"])
@pytest.mark.parametrize("magnitude", [2.0**-664, 2.0**664], ids=["1e-200", "1e200"])
def test_any_magnitude(method, magnitude, device):
    points, _ = blobs(150, 20, 10, 0.5, device)
    assert torch.equal(method(points * magnitude, 10), method(points, 10))


@pytest.mark.parametrize("method", [ward, kmeans], ids=["ward", "kmeans"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_points_are_computed_in_float64(method, dtype, device):
    points = blobs(150, 20, 10, 0.5, device)[0].to(dtype)
    assert torch.equal(method(points, 10), method(points.double(), 10))


@every_method
@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k is 0, expected 1 to 5, the number of points; choose k in that range"),
        (6, ValueError, "k is 6, expected 1 to 5"),
        (2.0, TypeError, "k is 2.0, expected an integer from 1 to 5"),
    ],
)
def test_bad_k(method, k, error, message, device):
    with pytest.raises(error, match=message):
        method(torch.rand(5, 2).to(device), k)


@every_method
def test_bad_points_and_weights(method, device):
    points = torch.rand(5, 2).to(device)
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(n, d\)"):
        method(points[0], 1)
    with pytest.raises(TypeError, match=r"dtype torch.int64, expected a floating dtype"):
        method(points.long(), 1)
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(5,\), one mass per point"):
        method(points, 1, weights=points[:4, 0])
    with pytest.raises(ValueError, match=r"weights\[0\] is -1.0, expected a positive finite mass"):
        method(points, 1, weights=points[:, 0] * 0 - 1)
    points[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity, first in row 3"):
        method(points, 1)
