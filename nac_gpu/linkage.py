"""Exact Ward linkage where the points live, and the dendrogram it gives: cut it at any number of clusters."""

import math
import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nac_gpu.kernels import compact, merge_pairs, nearest_neighbours, reciprocal_pairs, squared_distances

# The matrix is packed when this share of its rows is alive: each packing costs a pass over what is left, each dead
# row costs its share of every search and merge. Measured at 512 to 4096 points: 0.5 is slower by a tenth, 0.8 equal.
_PACK_BELOW = 0.75


@dataclass(frozen=True, eq=False)
class Dendrogram:
    """The n - 1 merges of n points, cheapest first. All tensors are on the device of the points.

    Clusters are numbered as SciPy does: below n they are the points themselves, and row i of `merges` creates
    cluster n + i. A cluster is always created in an earlier row than it is merged in.

    Attributes:
        merges: int64 [n - 1, 2], the two clusters that each row merges, the smaller number first.
        heights: [n - 1], non-decreasing, `sqrt(2 * cost)` in the unit of the points: SciPy's height where all
            masses are 1. float64 for float64 points, float32 for all others.
        sizes: int64 [n - 1], how many points the new cluster has.
    """

    merges: Tensor
    heights: Tensor
    sizes: Tensor

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.merges) + 1

    @property
    def costs(self) -> Tensor:
        """Increase of the (mass-weighted) within-cluster sum of squares by each merge, [n - 1]: heights² / 2."""
        return self.heights.square() / 2

    def cut(self, k: int | None = None, *, height: float | None = None) -> Tensor:
        """Assignment of every point to a cluster.

        Args:
            k: number of clusters, 1 to n: the n - k cheapest merges are kept.
            height: the merges up to this height, inclusive, are kept. Give either `k` or `height`.

        Returns:
            Labels, int64 [n]. Clusters are numbered by first appearance: label 0 holds point 0.

        Raises:
            TypeError: both or neither of `k` and `height` are given, or `k` is not an integer.
            ValueError: `k` is not in [1, n], or `height` is NaN.
        """
        if (k is None) == (height is None):
            given = "neither" if k is None else "both"
            raise TypeError(f"cut takes either k or height, got {given}; write cut(10) or cut(height=0.5)")
        if height is not None:
            if height != height:
                raise ValueError("height is NaN, expected a number; give the largest merge height to keep")
            kept = int((self.heights.double() <= height).sum())
        else:
            kept = self.n - check_cluster_count(k, self.n)
        return number_by_first_appearance(self._roots(kept)[: self.n])

    def to_scipy(self) -> np.ndarray:
        """The linkage matrix of `scipy.cluster.hierarchy`: float64 [n - 1, 4], merged clusters, height, size."""
        columns = (self.merges.double(), self.heights.double()[:, None], self.sizes.double()[:, None])
        return torch.cat(columns, dim=1).cpu().numpy()

    def _roots(self, kept: int) -> Tensor:
        """For all clusters, int64 [2n - 1], the largest cluster they are in after the first `kept` merges."""
        n = self.n
        parent = torch.arange(2 * n - 1, device=self.merges.device)
        parent[self.merges[:kept].flatten()] = parent[n : n + kept].repeat_interleave(2)
        # Pointer doubling: after t steps every pointer has jumped 2^t levels, and no tree has more than `kept`.
        for _ in range(kept.bit_length()):
            parent = parent[parent]
        return parent


@torch.no_grad()
def ward_linkage(points: Tensor, weights: Tensor | None = None) -> Dendrogram:
    """Exact Ward linkage on the device of the points, by rounds of reciprocal nearest neighbours.

    Merging clusters A and B with masses m and centroids c costs `m_A m_B / (m_A + m_B) * |c_A - c_B|²`, the increase of
    the within-cluster sum of squares. Ward's method always takes the cheapest merge. Its cost is reducible (a merged
    cluster is never nearer to a third than both of its parts were), so all pairs that are each other's nearest
    neighbour can merge at once and the dendrogram is the same (Murtagh, "A survey of recent advances in hierarchical
    clustering algorithms", The Computer Journal 1983, 26, 354), up to ties.

    Ties: of equally near neighbours the one with the lowest index is taken, where the index of a cluster is that of
    its last point. The result is the same run after run, bit for bit.

    All arithmetic is float64 whatever the dtype of the points, because float32 distances give wrong merges at near
    ties. Heights are float64 for float64 points and float32 for float32, bfloat16 and float16 points.

    Args:
        points: [n, d], floating, n and d at least 1. Memory is that of n² float64.
        weights: [n], the mass of every point, positive; None for unit masses. A point of mass 3 counts as
            three equal points.

    Returns:
        The dendrogram, on the device of the points, without autograd history.

    Raises:
        TypeError: points or weights are not tensors of real (points: floating) numbers.
        ValueError: the shape, device or values of points or weights are not as above, or a height overflows the dtype
            of the result.
    """
    points64, masses, unit = standardise(points, weights)
    merges, costs, sizes = _sorted_merges(*_merge_all(points64, masses), n=len(points))
    heights = (costs * 2).sqrt() * unit
    heights = heights.to(torch.float64 if points.dtype == torch.float64 else torch.float32)
    if not torch.isfinite(heights[-1:]).all():
        raise ValueError(
            f"the last merge is higher than the largest {heights.dtype}; give float64 points, or scale them down"
        )
    return Dendrogram(merges=merges, heights=heights, sizes=sizes)


def _merge_all(points: Tensor, masses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All merges in the order of the rounds: children int64 [n - 1, 2], costs [n - 1], sizes int64 [n - 1].

    Children are numbered as in SciPy, but for this order. A cluster lives in a slot, a row and column of the cost
    matrix: first slot i holds point i, then a merged cluster takes the higher slot of its parts.
    """
    n = len(points)
    costs = squared_distances(points, masses)
    cluster = torch.arange(n, device=points.device)  # [slots] number of the cluster in each slot
    size = torch.ones_like(cluster)
    nearest_cost, nearest = nearest_neighbours(costs, masses, cluster)
    masses = masses.clone()
    children, child_costs, sizes = [cluster.new_empty(0, 2)], [costs.new_empty(0)], [size[:0]]
    alive = n
    while alive > 1:
        lower, upper = reciprocal_pairs(nearest)
        assert len(lower) > 0, "a round without a merge: the cost matrix is not symmetric"
        size[upper] += size[lower]
        children.append(torch.stack((cluster[lower], cluster[upper]), dim=1))
        child_costs.append(nearest_cost[lower])
        sizes.append(size[upper])

        merge_pairs(costs, masses, lower, upper)
        cluster[upper] = torch.arange(2 * n - alive, 2 * n - alive + len(lower), device=cluster.device)
        nearest[lower] = lower  # the dead name themselves, and so take part in no pair
        alive -= len(lower)

        merged = torch.zeros_like(masses, dtype=torch.bool)
        merged[lower] = merged[upper] = True
        stale = merged[nearest] & (masses > 0)
        if alive < _PACK_BELOW * len(masses):
            kept = masses > 0
            keep = kept.nonzero().squeeze(1)
            position = kept.cumsum(0) - 1
            # A stale row may point at a slot that is gone; it is searched below before anyone looks.
            nearest = position[nearest[keep]]
            costs = compact(costs, keep)
            masses, cluster, size, nearest_cost, stale = (
                part[keep] for part in (masses, cluster, size, nearest_cost, stale)
            )
        rows = stale.nonzero().squeeze(1)
        nearest_cost[rows], nearest[rows] = nearest_neighbours(costs, masses, rows)
    return torch.cat(children), torch.cat(child_costs), torch.cat(sizes)


def _sorted_merges(children: Tensor, costs: Tensor, sizes: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The merges from cheapest to dearest, and clusters numbered in that order.

    A merge never costs less than those that made its parts, to the last bit (see `merge_pairs`), and comes in a later
    round. A stable sort by cost therefore puts every cluster behind its parts.
    """
    costs, order = costs.sort(stable=True)
    number = torch.arange(2 * n - 1, device=order.device)
    number[n + order] = number[n:].clone()
    merges = number[children[order]].sort(dim=1).values
    return merges, costs, sizes[order]


def standardise(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Check points and weights and bring them to where float64 arithmetic is safe.

    The points are centred, because a matrix product loses the digits of a common offset, and brought to entries near
    1, because squares of 1e-200 or 1e200 are no numbers any more; so are the masses. Both units are powers of two,
    which rounds nothing.

    Args:
        points: as `ward_linkage`.
        weights: as `ward_linkage`.

    Returns:
        Points, float64 [n, d], new; masses, float64 [n], new; and the factor that brings a height (the square root of
        a mass times a squared distance) back to the given points and weights.

    Raises:
        TypeError: as `ward_linkage`.
        ValueError: as `ward_linkage`.
    """
    _check_points(points)
    points64 = points.detach().to(torch.float64)
    if weights is None:
        masses, mass_unit = points64.new_ones(len(points)), 1.0
    else:
        _check_weights(weights, points)
        masses = weights.detach().to(torch.float64)
        mass_unit = _power_of_two_below(float(masses.max()))
        masses = (masses / mass_unit).clamp_(min=torch.finfo(torch.float64).tiny)  # 0 would mean a dead slot
    unit = _power_of_two_below(float(points64.abs().max()))
    points64 = points64 / unit
    centre = (masses @ points64) / masses.sum()
    return points64.sub_(centre), masses, unit * mass_unit**0.5


def _power_of_two_below(number: float) -> float:
    """The largest power of two that is not above a positive number; for 0 any will do."""
    return math.ldexp(1.0, max(math.frexp(number)[1] - 1, -1074))


def check_cluster_count(k: object, n: int) -> int:
    """The number of clusters as an int in [1, n].

    Raises:
        TypeError: k is not an integer.
        ValueError: k is not in [1, n].
    """
    try:
        if isinstance(k, bool):
            raise TypeError
        count = operator.index(k)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"k is {k!r}, expected an integer from 1 to {n}, the number of points") from None
    if not 1 <= count <= n:
        raise ValueError(f"k is {count}, expected 1 to {n}, the number of points; choose k in that range")
    return count


def number_by_first_appearance(labels: Tensor) -> Tensor:
    """Rename labels to 0, 1, 2, ... in the order in which they first appear.

    Args:
        labels: integer [n], any values.

    Returns:
        int64 [n], the same partition.
    """
    names, compact_labels = torch.unique(labels, return_inverse=True)
    positions = torch.arange(len(labels), device=labels.device)
    first = positions.new_full(names.shape, len(labels)).scatter_reduce_(0, compact_labels, positions, "amin")
    number = torch.empty_like(first)
    number[first.argsort()] = positions[: len(first)]
    return number[compact_labels]


def _check_points(points: Tensor) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"points is a {type(points).__name__}, expected a torch.Tensor; use torch.as_tensor(points)")
    if not points.is_floating_point():
        raise TypeError(f"points has dtype {points.dtype}, expected a floating dtype; use points.double()")
    if points.ndim != 2:
        raise ValueError(f"points has shape {tuple(points.shape)}, expected (n, d); use points.reshape(n, -1)")
    if points.shape[0] == 0 or points.shape[1] == 0:
        raise ValueError(f"points has shape {tuple(points.shape)}, expected at least one point and one dimension")
    finite = torch.isfinite(points).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"points has NaN or infinity, first in row {row}; remove such rows or repair them")


def _check_weights(weights: Tensor, points: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is a {type(weights).__name__}, expected a torch.Tensor; use torch.as_tensor(weights)")
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"weights has dtype {weights.dtype}, expected real numbers; use weights.double()")
    if weights.shape != points.shape[:1]:
        raise ValueError(f"weights has shape {tuple(weights.shape)}, expected ({len(points)},), one mass per point")
    if weights.device != points.device:
        raise ValueError(f"weights is on {weights.device}, points on {points.device}; use weights.to(points.device)")
    allowed = torch.isfinite(weights) & (weights > 0)
    if not allowed.all():
        row = int((~allowed).nonzero()[0])
        raise ValueError(
            f"weights[{row}] is {weights[row].item()}, expected a positive finite mass; drop points without mass"
        )
