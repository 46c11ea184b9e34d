"""Exact Ward linkage where the points live."""

import os
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from nac_gpu.clustering.dendrogram import Dendrogram, sorted_merges
from nac_gpu.clustering.points import standardise_batch
from nac_gpu.kernels import (
    MOST_SLOTS,
    Batch,
    Clusters,
    Merges,
    finish,
    merge_centroids,
    merge_pairs,
    nearest_centroids,
    on_device,
    pack_costs,
    pack_slots,
    padded_width,
    search_bytes,
    squared_distances,
    squared_distances_batch,
    update_neighbours,
    uses_triton,
)

Algorithm = Literal["auto", "batched", "resident", "matrix-free"]
# The matrix is packed when this share of its rows is alive: each packing costs a pass over what is left, each dead
# row costs its share of every search and merge. Measured on a CPU at 512 to 4096 points: 0.5 is slower by a tenth,
# 0.8 equal. On a GPU a packing costs some launches as well, and memory for a second matrix.
_PACK_BELOW = 0.75
_PACK_BELOW_ON_CUDA = 0.5
# Up to this many clusters one Triton program finishes a linkage by itself.
_FINISH_BELOW = MOST_SLOTS
# On CUDA the packed matrix has rows of a multiple of this many numbers, which are loaded 16 bytes at a time.
_ALIGNMENT = 16
# How many rounds the host is ahead of a GPU. What it knows of the number of clusters is as old, and the last
# `_ROUNDS_AHEAD` rounds before the end may find nothing to do.
_ROUNDS_AHEAD = 4
# Without a matrix at first, one is made as soon as it takes as much memory as this many copies of the points.
_MATRIX_IN_COPIES = 8
# ... or holds no more clusters than this, and than a quarter of the points.
_MATRIX_IN_ANY_CASE = 4096
_NO_PAIR = (
    "a round of merges found no two clusters that are each other's nearest neighbour, though the points are finite; "
    "this is a fault of nac_gpu or of the device: please report it, with the points"
)
# Up to this many dimensions a CPU makes the first rounds without a matrix: searching costs less than keeping it up to
# date. Measured with 4096 points: 0.08 s instead of 0.33 at 2 dimensions, 0.21 instead of 0.32 at 64, equal at 128.
_FEW_DIMENSIONS = 64


@overload
def ward_linkage(
    points: Tensor,
    weights: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    algorithm: Algorithm = "auto",
) -> Dendrogram: ...


@overload
def ward_linkage(
    points: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    algorithm: Algorithm = "auto",
) -> list[Dendrogram]: ...


@torch.no_grad()
def ward_linkage(
    points: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor | None] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    algorithm: Algorithm = "auto",
) -> Dendrogram | list[Dendrogram]:
    """Exact Ward linkage on the device of the points, by rounds of reciprocal nearest neighbours.

    Merging clusters A and B with masses m and centroids c costs `m_A m_B / (m_A + m_B) * |c_A - c_B|²`, the increase of
    the within-cluster sum of squares. Ward's method always takes the cheapest merge. Its cost is reducible (a merged
    cluster is never nearer to a third than both of its parts were), so all pairs that are each other's nearest
    neighbour can merge at once and the dendrogram is the same (Murtagh, "A survey of recent advances in hierarchical
    clustering algorithms", The Computer Journal 1983, 26, 354), up to ties.

    Ties: of equally near neighbours the one with the lowest index is taken, where the index of a cluster is that of
    its last point. The result is the same run after run, bit for bit.

    Args:
        points: [n, d], floating, n and d at least 1; or a sequence of such sets, of any sizes, on one device: the
            small ones (up to 512 points) are clustered side by side on a GPU.
        weights: [n], the mass of every point, positive; None for unit masses. A point of mass 3 counts as
            three equal points. For a sequence of sets: a sequence of such masses or None.
        dtype: of the arithmetic, float64 or float32, whatever the dtype of the points; bfloat16 and float16 points
            are converted. float32 halves the memory, but its distances merge wrongly at near ties.
        algorithm: `"auto"` chooses by size and free memory; the result is the same up to rounding.
            `"batched"`: one GPU program a set, for small ones; on a CPU the same as resident.
            `"resident"`: the cost matrix is kept, n² numbers (up to 1.25 n² on a GPU).
            `"matrix-free"`: only centroids are kept, O(n d) numbers, and costs are computed again when needed.

    Returns:
        The dendrogram, on the device of the points, without autograd history; for a sequence, a list of them. Heights
        are float64 for float64 points and float32 for float32, bfloat16 and float16 points.

    Raises:
        TypeError: points or weights are not tensors of real (points: floating) numbers.
        ValueError: the shape, device or values of points or weights are not as above; the weights of a sequence are
            one tensor, or not as many as the sets; dtype or algorithm is none of those above; a set has too many points
            for "batched"; or a height overflows the dtype of the result.
        MemoryError: not even the matrix-free algorithm fits.
        RuntimeError: a round of merges found no pair, which finite points never lead to; please report it.
    """
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype is {dtype}, expected torch.float64 or torch.float32")
    if algorithm not in ("auto", "batched", "resident", "matrix-free"):
        raise ValueError(f'algorithm is {algorithm!r}, expected "auto", "batched", "resident" or "matrix-free"')
    if isinstance(points, Tensor) or not isinstance(points, Sequence):
        return _linkages([points], [weights], dtype, algorithm)[0]  # pyright: ignore[reportArgumentType]
    if isinstance(weights, Tensor) or (weights is not None and len(weights) != len(points)):
        given = "one tensor" if isinstance(weights, Tensor) else f"{len(weights)} items"
        raise ValueError(f"weights is {given}, expected one item, masses or None, for each of {len(points)} sets")
    return _linkages(points, [None] * len(points) if weights is None else weights, dtype, algorithm)


def _linkages(
    points: Sequence[Tensor], weights: Sequence[Tensor | None], dtype: torch.dtype, algorithm: Algorithm
) -> list[Dendrogram]:
    if not points:
        return []
    flat, masses, units = standardise_batch(points, weights, dtype)
    shapes = [(len(part), part.shape[1]) for part in points]
    with on_device(flat):
        results = _all_merges(flat, masses, shapes, algorithm)
    dendrograms = []
    for part, unit, (merged, costs, sizes) in zip(points, units, results, strict=True):
        heights = (costs.to(torch.float64) * 2).sqrt() * unit
        heights = heights.to(torch.float64 if part.dtype == torch.float64 else torch.float32)
        dendrograms.append(Dendrogram(merges=merged, heights=heights, sizes=sizes))
    last = torch.cat([dendrogram.heights[-1:].double() for dendrogram in dendrograms])
    if not torch.isfinite(last).all():
        if last.isnan().any():  # what was never merged
            raise RuntimeError(_NO_PAIR)
        bad = next(dendrogram.heights.dtype for dendrogram in dendrograms if not dendrogram.heights.isfinite().all())
        raise ValueError(f"the last merge is higher than the largest {bad}; give float64 points, or scale them down")
    return dendrograms


def _all_merges(
    flat: Tensor, masses: Tensor, shapes: list[tuple[int, int]], algorithm: Algorithm
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For every set of points: merged clusters, costs and sizes, as `sorted_merges` gives them."""
    ways = [_way(shape, flat, algorithm) for shape in shapes]
    parts = list(zip(flat.split([n * d for n, d in shapes]), masses.split([n for n, _ in shapes]), strict=True))
    results: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    small = [i for i, way in enumerate(ways) if way == "batched"]
    if small:
        batch = Batch.of([shapes[i] for i in small], flat.device)
        merges = _batched(torch.cat([parts[i][0] for i in small]), torch.cat([parts[i][1] for i in small]), batch)
        results |= zip(small, sorted_merges(merges, [shapes[i][0] for i in small]), strict=True)
    for i, way in enumerate(ways):
        if way != "batched":
            run = _resident if way == "resident" else _matrix_free
            merges = run(parts[i][0].view(shapes[i]), parts[i][1])
            results |= {i: sorted_merges(merges, [shapes[i][0]])[0]}
    return [results[i] for i in range(len(shapes))]


def _way(shape: tuple[int, int], flat: Tensor, algorithm: Algorithm) -> Algorithm:
    """The algorithm for one set of points.

    Raises:
        ValueError: "batched" was asked for and the set is too large for it.
        MemoryError: nothing fits.
    """
    n, d = shape
    if algorithm == "batched" and n > _FINISH_BELOW:
        raise ValueError(f'{n} points are too many for algorithm="batched", expected at most {_FINISH_BELOW}')
    if algorithm in ("auto", "batched") and n <= _FINISH_BELOW:
        return "batched" if uses_triton(flat) else "resident"
    if algorithm != "auto":
        return algorithm
    free = _free_bytes(flat.device)
    searching_is_cheaper = flat.device.type == "cpu" and d <= _FEW_DIMENSIONS
    copy = n * _width(d, flat) * flat.element_size()
    copy_for_matrix = copy if d < _width(d, flat) else 0
    if _matrix_bytes(n, flat) + copy_for_matrix <= 0.9 * free and not searching_is_cheaper:
        return "resident"
    # Another copy of the points, partial results of a search, the matrix at the end.
    needed = copy + search_bytes(n, flat) + _matrix_bytes(_enough_for_matrix(n, d), flat)
    if needed > free:
        raise MemoryError(
            f"{n} points of {d} dimensions need {needed / 2**30:.1f} GiB on {flat.device} even without a cost matrix, "
            f"and {free / 2**30:.1f} GiB are free; use another device, or fewer points"
        )
    return "matrix-free"


def _width(d: int, like: Tensor) -> int:
    """How many numbers a point of d dimensions takes where its products are made."""
    return padded_width(d) if uses_triton(like) else d


def _matrix_bytes(n: int, like: Tensor) -> int:
    """Memory of the cost matrix of n clusters. On CUDA the packed matrix is a second one for a moment."""
    copies = 1 + _PACK_BELOW_ON_CUDA**2 if like.is_cuda else 1.0
    return int(copies * n * n * like.element_size())


def _enough_for_matrix(n: int, d: int) -> int:
    """How few clusters n points must have become before the matrix-free algorithm makes a matrix after all."""
    return min(n, max(1, min(_MATRIX_IN_ANY_CASE, n // 4), int((_MATRIX_IN_COPIES * n * d) ** 0.5)))


def _free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 2**40


def _batched(points: Tensor, masses: Tensor, batch: Batch) -> Merges:
    """All merges of small problems, side by side."""
    costs = squared_distances_batch(points, masses, batch)
    clusters = Clusters.of_points(masses)
    finish(costs, clusters, batch)
    return clusters.merges


def _resident(points: Tensor, masses: Tensor) -> Merges:
    """All merges, by rounds on the matrix of costs."""
    clusters = Clusters.of_points(masses)
    _finish_on_matrix(squared_distances(points, masses), clusters)
    return clusters.merges


def _matrix_free(points: Tensor, masses: Tensor) -> Merges:
    """All merges: rounds on the centroids until the matrix of costs is small, then rounds on that."""
    n, d = points.shape
    enough = _enough_for_matrix(n, d)
    # Padded once, not for each search.
    centroids, clusters = torch.nn.functional.pad(points, (0, _width(d, points) - d)), Clusters.of_points(masses)
    stale = torch.ones_like(masses, dtype=torch.bool)
    count, most = _Count(), n
    while most > enough:
        _search(centroids, clusters, stale, most)
        if _worth_packing(most, centroids):
            centroids = centroids[pack_slots(clusters, most)]
        stale = clusters.mutual()[clusters.nearest]
        merge_centroids(centroids, clusters)
        stale &= clusters.masses > 0
        most = count.after_round(clusters)
    centroids = centroids[pack_slots(clusters, most)]
    tiny = torch.finfo(masses.dtype).tiny  # the dead are in the matrix, and must not fill it with NaN
    costs = squared_distances(centroids, clusters.masses.clamp(min=tiny))
    del centroids
    _finish_on_matrix(costs, clusters)
    return clusters.merges


def _finish_on_matrix(costs: Tensor, clusters: Clusters) -> None:
    """Make all merges that are left. No neighbours are known yet."""
    count, most = _Count(), len(costs)
    new = True
    while most > 1:
        if uses_triton(costs) and most <= _FINISH_BELOW:
            if most < len(costs):
                costs = pack_costs(costs, pack_slots(clusters, most))
            finish(costs.view(-1), clusters, Batch.of([(most, 0)], costs.device))
            return
        if new:
            update_neighbours(costs, clusters, every=True)
            new = False
        merge_pairs(costs, clusters)
        update_neighbours(costs, clusters)
        most = count.after_round(clusters)
        if _worth_packing(most, costs):
            size = min(len(costs), -(-most // _ALIGNMENT) * _ALIGNMENT) if uses_triton(costs) else most
            costs = pack_costs(costs, pack_slots(clusters, size))


def _worth_packing(most: int, rows: Tensor) -> bool:
    return most <= (_PACK_BELOW_ON_CUDA if rows.is_cuda else _PACK_BELOW) * len(rows)


def _search(centroids: Tensor, clusters: Clusters, stale: Tensor, most: int) -> None:
    """Find the nearest neighbours of stale clusters, and make sure that the round will merge some pair.

    Costs are computed again in every search, so rounding may let three clusters chase each other. Where no two agree,
    the cheapest merge that anyone has found is made mutual.
    """
    rows = stale.sort(descending=True, stable=True).indices
    found = stale.sum()[None]
    cost, slot = nearest_centroids(centroids, clusters.masses, rows, found, most)
    rows, searched = rows[:most], torch.arange(most, device=rows.device) < found
    slots = torch.arange(len(stale), device=rows.device)
    alive = clusters.masses > 0
    nearest = torch.where(alive, clusters.nearest, slots)
    clusters.nearest = nearest.index_copy(0, rows, torch.where(searched, slot, nearest[rows]))
    nearest_cost = clusters.nearest_cost
    clusters.nearest_cost = nearest_cost.index_copy(0, rows, torch.where(searched, cost, nearest_cost[rows]))

    agreed = clusters.mutual().any()
    one = torch.where(alive, clusters.nearest_cost, torch.inf).argmin()[None]
    other = clusters.nearest[one]
    clusters.nearest[other] = torch.where(agreed, clusters.nearest[other], one)
    clusters.nearest_cost[other] = torch.where(agreed, clusters.nearest_cost[other], clusters.nearest_cost[one])


class _Count:
    """How many clusters there are at most. On CUDA the host learns it some rounds late, and the GPU does not wait."""

    def __init__(self) -> None:
        self._asked = 0
        self._known: int | None = None
        self._answers: Tensor | None = None  # int64 [_ROUNDS_AHEAD + 1, 1], of the latest rounds in turn
        self._events: list[torch.cuda.Event] = []

    def after_round(self, clusters: Clusters) -> int:
        """An upper bound of the number of clusters, exact on a CPU. The bound of a round is always the same.

        Raises:
            RuntimeError: a round that the host has heard of merged nothing, and further ones would not either.
        """
        if not clusters.alive.is_cuda:
            return self._fewer(int(clusters.alive), clusters)
        if self._answers is None:
            self._answers = torch.empty(_ROUNDS_AHEAD + 1, 1, dtype=torch.int64, pin_memory=True)
            self._events = [torch.cuda.Event() for _ in range(_ROUNDS_AHEAD + 1)]
        newest = self._asked % (_ROUNDS_AHEAD + 1)
        self._answers[newest].copy_(clusters.alive, non_blocking=True)
        self._events[newest].record()
        self._asked += 1
        if self._asked <= _ROUNDS_AHEAD:
            return len(clusters.masses) if self._known is None else self._known
        oldest = self._asked % (_ROUNDS_AHEAD + 1)
        self._events[oldest].synchronize()
        return self._fewer(int(self._answers[oldest]), clusters)

    def _fewer(self, count: int, clusters: Clusters) -> int:
        if count > 1 and count >= (len(clusters.merges.cost) if self._known is None else self._known):
            raise RuntimeError(_NO_PAIR)
        self._known = count
        return count
