"""Every kernel against its plain PyTorch twin, and linkages against SciPy: what must hold before anything is timed."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nac_gpu as nac
from common.providers import disagreement, read
from common.runner import Check
from nac_gpu.kernels import (
    Batch,
    Clusters,
    finish,
    merge_centroids,
    merge_pairs,
    nearest_centroids,
    pack_costs,
    pack_slots,
    pad_points,
    products,
    seed_centres,
    squared_distances_batch,
    update_neighbours,
    use_backend,
)

_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}


def draw(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal points [n, d] on the CPU, centred; some are copies, and some nearly."""
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    near = n // 8
    points[near : 2 * near] = points[:near]
    points[2 * near : 3 * near] = points[:near] + 1e-3 * points[3 * near : 4 * near]
    return (points - points.mean(0)).to(dtype)


def compared(work: Callable[[torch.device], list[Tensor]], device: torch.device, dtype: torch.dtype) -> str:
    """Run work by the kernels and by the twins, on the device and on the CPU, and compare what it gives.

    Raises:
        AssertionError: they differ.
    """
    with use_backend("triton"):
        found = work(device)
    worst = 0.0
    for place in dict.fromkeys([device, torch.device("cpu")]):
        with use_backend("torch"):
            expected = work(place)
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            ours, theirs = ours.cpu(), theirs.cpu()
            assert ours.shape == theirs.shape, f"result {number}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
            if not ours.is_floating_point():
                assert torch.equal(ours, theirs), f"result {number}: {int((ours != theirs).sum())} numbers differ"
                continue
            error = (ours.double() - theirs.double()).abs() / theirs.double().abs().clamp(min=1e-300)
            error = float(torch.where(ours == theirs, 0.0, error).max())
            assert error <= _TOLERANCE[dtype], f"result {number} is off by {error:.1e} of itself, on {place}"
            worst = max(worst, error)
    return f"largest relative difference {worst:.1e}"


def kernel_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """Each kernel in both types, at shapes with and without a remainder."""
    shapes = [(70, 20)] if small else [(70, 20), (600, 300), (513, 4609)]
    for dtype in (torch.float64, torch.float32):
        label = str(dtype).removeprefix("torch.")
        for n, d in shapes:
            works: dict[str, Any] = {
                "padding": _padding,
                "neighbours": _neighbours,
                "merging": _merging,
                "centroids": _centroids,
                "packing": _packing,
                "finishing": _finishing,
                "seeding": _seeding,
            }
            for name, work in works.items():
                if not (name == "finishing" and n > 512):
                    made = partial(compared, partial(work, n, d, dtype), device, dtype)
                    yield f"{name} {label} {n}x{d}", made
            for way in ("tiles", "panels"):
                if (dtype, way) != (torch.float32, "panels"):  # never chosen: cuBLAS may round to TF32
                    for name, work in {"distances": _distances, "search": _search}.items():
                        yield f"{name} by {way} {label} {n}x{d}", partial(_by, way, work, n, d, dtype, device)


def _by(way: Any, work: Any, n: int, d: int, dtype: torch.dtype, device: torch.device) -> str:
    with products.use_products(way):
        return compared(partial(work, n, d, dtype), device, dtype)


def _masses(n: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5).to(dtype)


def _problems(n: int, d: int, dtype: torch.dtype, place: torch.device) -> tuple[Tensor, Tensor, Batch]:
    """Two problems of different sizes."""
    parts = [draw(n, d, dtype), draw(n // 3, d + 5, dtype, seed=2)]
    masses = torch.cat([_masses(len(part), dtype) for part in parts])
    batch = Batch.of([(len(part), part.shape[1]) for part in parts], place)
    return torch.cat([part.flatten() for part in parts]).to(place), masses.to(place), batch


def _padding(n: int, d: int, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    points, _, batch = _problems(n, d, dtype, place)
    wide, norms, _ = pad_points(points, batch)
    return [wide, norms]


def _distances(n: int, d: int, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    return [squared_distances_batch(*_problems(n, d, dtype, place))]


def _state(n: int, d: int, dtype: torch.dtype, place: torch.device) -> tuple[Tensor, Clusters]:
    """Costs that are the same bits wherever they are needed, and clusters that know their neighbours."""
    with use_backend("torch"):
        masses = _masses(n, dtype)
        points = draw(n, d, dtype)
        costs = squared_distances_batch(points.flatten(), masses, Batch.of([(n, d)], points.device)).view(n, n)
        clusters = Clusters.of_points(masses.to(place))
        costs = costs.to(place)
        update_neighbours(costs, clusters, every=True)
    return costs, clusters


def _fields(clusters: Clusters) -> list[Tensor]:
    """What is known of clusters that are alive; the dead name themselves or nobody."""
    alive = clusters.masses > 0
    return [clusters.alive, clusters.masses, *(field[alive] for field in clusters.fields()[1:])]


def _merges(clusters: Clusters) -> list[Tensor]:
    """What was merged, and how."""
    merges = clusters.merges
    made = merges.cost.isfinite()
    return [made, merges.partner[made], merges.cost[made], merges.round[made], merges.size[made]]


def _neighbours(n: int, d: int, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    costs, clusters = _state(n, d, dtype, place)
    update_neighbours(costs, clusters, every=True)
    return _fields(clusters)


def _merging(n: int, d: int, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    """Two rounds."""
    costs, clusters = _state(n, d, dtype, place)
    for _ in range(2):
        merge_pairs(costs, clusters)
        update_neighbours(costs, clusters)
    alive = clusters.masses > 0
    return [costs[alive][:, alive], *_fields(clusters), *_merges(clusters)]


def _centroids(n: int, d: int, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    _, clusters = _state(n, d, dtype, place)
    points = draw(n, d, dtype).to(place)
    merge_centroids(points, clusters)
    # A mean of numbers of both signs may be next to nothing: compare with what was averaged.
    return [points[clusters.masses > 0] + 10, *_merges(clusters)]


def _packing(n: int, d: int, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    costs, clusters = _state(n, d, dtype, place)
    with use_backend("torch"):
        merge_pairs(costs, clusters)
        update_neighbours(costs, clusters)
    keep = pack_slots(clusters, int(clusters.alive))
    return [keep, pack_costs(costs, keep), *_fields(clusters)]


def _finishing(n: int, d: int, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    costs, clusters = _state(n, d, dtype, place)
    finish(costs.view(-1), clusters, Batch.of([(n, 0)], place))
    return _merges(clusters)


def _search(n: int, d: int, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    count = torch.tensor([n // 2])
    points = draw(n, d, dtype)
    points = points[torch.randperm(n, generator=torch.Generator().manual_seed(4))].to(place)
    cost, slot = nearest_centroids(points, _masses(n, dtype).to(place), rows.to(place), count.to(place), n // 2 + 3)
    if dtype == torch.float32:  # rounding may choose another of two that are about as near
        return [cost[: n // 2]]
    # Of several copies any may be meant: their costs are zero.
    return [cost[: n // 2], torch.where(cost == 0, -1, slot)[: n // 2]]


def _seeding(n: int, d: int, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    distances = torch.cdist(draw(n, d, dtype), draw(n, d, dtype)).square_().fill_diagonal_(0)
    draws = torch.rand(3, min(n, 40), 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    return [seed_centres(distances.to(place), _masses(n, dtype).to(place), draws.to(place))]


def linkage_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """Whole linkages: against SciPy, the same bits again and again, and several at once."""
    for n, d in [(40, 8)] if small else [(64, 28), (600, 300), (2048, 512)]:
        for algorithm in ("batched", "resident", "matrix-free"):
            if algorithm != "batched" or n <= 512:
                yield f"{algorithm} {n}x{d} against SciPy", partial(_against_scipy, n, d, algorithm, device)
        yield f"{n}x{d}: the same bits 20 times", partial(_same_bits, n, d, device, 3 if small else 20)
    yield (
        "several at once",
        partial(_several, device, [(20, 5), (33, 70)] if small else [(512, 4609), (64, 28), (700, 40)]),
    )


def _scipy(points: Tensor) -> Any:
    from scipy.cluster.hierarchy import linkage

    return read(linkage(points.double().numpy(), "ward"))


def _against_scipy(n: int, d: int, algorithm: Any, device: torch.device) -> str:
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = read(nac.ward_linkage(points.to(device), algorithm=algorithm))
    expected = _scipy(points)
    complaint = disagreement(found, expected, 1e-9)
    assert not complaint, complaint
    return f"largest relative difference of a height {np.abs(found[1] / expected[1] - 1).max():.1e}"


def _same_bits(n: int, d: int, device: torch.device, times: int) -> str:
    points = draw(n, d).to(device)
    first = nac.ward_linkage(points)
    for number in range(1, times):
        again = nac.ward_linkage(points)
        assert torch.equal(first.merges, again.merges), f"run {number}: other merges"
        assert torch.equal(first.heights, again.heights), f"run {number}: other heights"
    return f"{times} runs"


def _several(device: torch.device, shapes: list[tuple[int, int]]) -> str:
    batch = [draw(n, d).to(device) for n, d in shapes]
    for one, points in zip(nac.ward_linkage(batch), batch, strict=True):
        alone = nac.ward_linkage(points)
        assert torch.equal(one.merges, alone.merges), f"{tuple(points.shape)}: other merges than alone"
        assert torch.equal(one.heights, alone.heights), f"{tuple(points.shape)}: other heights than alone"
    return f"{len(batch)} sets"
