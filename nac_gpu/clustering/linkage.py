"""Exact Ward linkage on the device of the points."""

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
# The cost matrix is packed (rows and columns of merged clusters are dropped) once at most this share of its rows is
# alive. Packing costs one pass over the remaining rows, but dead rows slow down every search and merge. Measured on a
# CPU at 512 to 4096 points: 0.5 is 10 % slower, 0.8 equally fast. On a GPU, packing also costs kernel launches and
# memory for a second matrix.
_PACK_BELOW = 0.75
_PACK_BELOW_ON_CUDA = 0.5
# At most this many clusters can be linked to the end by a single Triton program.
_FINISH_BELOW = MOST_SLOTS
# On CUDA the rows of a packed matrix are a multiple of this many numbers long, so that loads are 16 bytes wide.
_ALIGNMENT = 16
# How many rounds the host launches ahead of the GPU. So its cluster count is this many rounds old, and up to this many
# rounds at the end may have nothing left to merge.
_ROUNDS_AHEAD = 4
# The matrix-free algorithm switches to a cost matrix once that takes at most the memory of this many copies of the
# points ...
_MATRIX_IN_COPIES = 8
# ... and at most this many clusters are left, and at most a quarter of the points.
_MATRIX_IN_ANY_CASE = 4096
_NO_PAIR = (
    "a round of merges found no two clusters that are each other's nearest neighbour, though the points are finite; "
    "this is a fault of nac_gpu or of the device: please report it, with the points"
)
# Up to this many dimensions, the first rounds on a CPU are matrix-free, because searching is faster than updating the
# matrix. Measured with 4096 points: 0.08 s instead of 0.33 at 2 dimensions, 0.21 instead of 0.32 at 64, equal at 128.
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
    the within-cluster sum of squares. This cost is reducible: a merged cluster is never nearer to a third one than the
    nearer of its parts was. So all reciprocal pairs can merge at once, and up to ties the dendrogram is that of always
    taking the cheapest merge (Murtagh, "A survey of recent advances in hierarchical clustering algorithms", The
    Computer Journal 1983, 26, 354). Among equally near neighbours the one with the lowest index wins, where the index
    of a cluster is that of its last point. Results are reproducible bit for bit.

    Args:
        points: [n, d], floating, n and d at least 1; or a sequence of such sets, of any sizes, on one device. Sets of
            up to 512 points are clustered in parallel on a GPU.
        weights: [n], the mass of every point, positive; None for unit masses. A point of mass 3 counts as three equal
            points. For a sequence of sets: a sequence of such masses or None.
        dtype: of the arithmetic, float64 or float32, whatever the dtype of the points. float32 halves the memory, but
            may merge near ties in the wrong order.
        algorithm: `"auto"` chooses by size and free memory; all give the same result up to rounding.
            `"batched"`: one GPU program per set of up to 512 points; on a CPU the same as resident.
            `"resident"`: keeps the cost matrix, n² numbers (up to 1.25 n² on a GPU).
            `"matrix-free"`: keeps only centroids, O(n d) numbers, and recomputes costs when needed.

    Returns:
        The dendrogram, on the device of the points, without autograd history; for a sequence, a list of them. Heights
        are float64 for float64 points and float32 for all others.

    Raises:
        TypeError: points or weights are not tensors of real (points: floating) numbers.
        ValueError: the shape, device or values of an argument are not as described, a set has too many points for
            "batched", or a height overflows the dtype of the result.
        MemoryError: not even the matrix-free algorithm fits.
        RuntimeError: a round of merges found no pair. This never happens with finite points; please report it.

    >>> nac_gpu.ward_linkage(torch.tensor([[0.0], [1.0], [5.0]])).cut(2)
    tensor([0, 0, 1])
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
        if last.isnan().any():  # points that were never merged have NaN as cost
            raise RuntimeError(_NO_PAIR)
        bad = next(dendrogram.heights.dtype for dendrogram in dendrograms if not dendrogram.heights.isfinite().all())
        raise ValueError(f"the last merge is higher than the largest {bad}; give float64 points, or scale them down")
    return dendrograms


def _all_merges(
    flat: Tensor, masses: Tensor, shapes: list[tuple[int, int]], algorithm: Algorithm
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For every set of points: merged clusters, costs and sizes, as `sorted_merges` returns them."""
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
        ValueError: "batched" was requested and the set is too large for it.
        MemoryError: no algorithm fits into the free memory.
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
    # A padded copy of the points, partial results of a search, and the matrix at the end.
    needed = copy + search_bytes(n, flat) + _matrix_bytes(_enough_for_matrix(n, d), flat)
    if needed > free:
        raise MemoryError(
            f"{n} points of {d} dimensions need {needed / 2**30:.1f} GiB on {flat.device} even without a cost matrix, "
            f"and {free / 2**30:.1f} GiB are free; use another device, or fewer points"
        )
    return "matrix-free"


def _width(d: int, like: Tensor) -> int:
    """How many numbers a point of d dimensions takes once it is padded for the Triton kernels."""
    return padded_width(d) if uses_triton(like) else d


def _matrix_bytes(n: int, like: Tensor) -> int:
    """Bytes of the cost matrix of n clusters. On CUDA this includes the packed copy, which exists beside it."""
    copies = 1 + _PACK_BELOW_ON_CUDA**2 if like.is_cuda else 1.0
    return int(copies * n * n * like.element_size())


def _enough_for_matrix(n: int, d: int) -> int:
    """The number of clusters at which the matrix-free algorithm switches to a cost matrix."""
    return min(n, max(1, min(_MATRIX_IN_ANY_CASE, n // 4), int((_MATRIX_IN_COPIES * n * d) ** 0.5)))


def _free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of the whole memory, or 1 TiB where even that is unknown
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 2**40


def _batched(points: Tensor, masses: Tensor, batch: Batch) -> Merges:
    """All merges of small problems, one GPU program per problem."""
    costs = squared_distances_batch(points, masses, batch)
    clusters = Clusters.of_points(masses)
    finish(costs, clusters, batch)
    return clusters.merges


def _resident(points: Tensor, masses: Tensor) -> Merges:
    """All merges, by rounds on the cost matrix."""
    clusters = Clusters.of_points(masses)
    _finish_on_matrix(squared_distances(points, masses), clusters)
    return clusters.merges


def _matrix_free(points: Tensor, masses: Tensor) -> Merges:
    """All merges: rounds on the centroids until the cost matrix is small, then rounds on the matrix."""
    n, d = points.shape
    enough = _enough_for_matrix(n, d)
    # Padded once here instead of in each search.
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
    tiny = torch.finfo(masses.dtype).tiny  # dead slots have mass 0, which would fill their rows with NaN
    costs = squared_distances(centroids, clusters.masses.clamp(min=tiny))
    del centroids
    _finish_on_matrix(costs, clusters)
    return clusters.merges


def _finish_on_matrix(costs: Tensor, clusters: Clusters) -> None:
    """Make all remaining merges on the cost matrix. Nearest neighbours are computed first."""
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
    """Find the nearest neighbours of stale clusters, and make sure that the round will merge at least one pair.

    Costs are recomputed in every search, so rounding may produce a cycle A → B → C → A of nearest neighbours. If no
    pair is reciprocal, the cheapest merge that was found is made reciprocal.
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
    """An upper bound of the number of clusters. On CUDA it lags some rounds behind, so that the GPU never waits."""

    def __init__(self) -> None:
        self._asked = 0
        self._known: int | None = None
        self._answers: Tensor | None = None  # int64 [_ROUNDS_AHEAD + 1, 1], ring buffer of the latest counts
        self._events: list[torch.cuda.Event] = []

    def after_round(self, clusters: Clusters) -> int:
        """An upper bound of the number of clusters after this round, reproducible on CUDA and exact on a CPU.

        Raises:
            RuntimeError: a round merged nothing, so no later round would either.
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
