"""The dendrogram that a linkage gives: cut it at any number of clusters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nac_gpu.clustering.labels import check_cluster_count, number_by_first_appearance
from nac_gpu.kernels import Merges


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


def sorted_merges(merges: Merges, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The merges of problems from cheapest to dearest, numbered as SciPy does.

    A merge never costs less than those that made its parts, and comes in a later round. Sorting by cost and then by
    round therefore puts every cluster behind its parts.

    Args:
        merges: of all problems, one behind the other; points count through all of them.
        sizes: how many points each problem has.

    Returns:
        For each problem: merged clusters, int64 [n - 1, 2], the smaller number first; costs [n - 1]; and how many
        points the new cluster has, int64 [n - 1].
    """
    device = merges.partner.device
    count = torch.tensor(sizes, dtype=torch.int64).to(device, non_blocking=True)
    total, rows = sum(sizes), sum(sizes) - len(sizes)
    stop = count.cumsum(0)
    problem = torch.repeat_interleave(torch.arange(len(sizes), device=device), count, output_size=total)
    local = torch.arange(total, device=device) - (stop - count)[problem]  # a point's number in its problem
    # All points but the last of each problem, which nothing swallows.
    skipped = torch.repeat_interleave(torch.arange(len(sizes), device=device), count - 1, output_size=rows)
    gone = torch.arange(rows, device=device) + skipped
    gone = gone[merges.round[gone].sort(stable=True).indices]

    order = gone[merges.cost[gone].sort(stable=True).indices]
    if len(sizes) > 1:
        order = order[problem[order].sort(stable=True).indices]
    # Row r of all problems is row r - (points before) + (problems before), and makes the cluster of this number:
    row_problem = problem[order]
    created = torch.arange(rows, device=device) - (stop - count - count)[row_problem] + row_problem
    number = torch.zeros(total, dtype=torch.int64, device=device).index_copy_(0, order, created)

    # The merges into one point follow each other round by round. Each merges what the one before it made.
    chain = gone[merges.partner[gone].sort(stable=True).indices]
    into = merges.partner[chain]
    follows = torch.zeros_like(into, dtype=torch.bool)
    follows[1:] = into[1:] == into[:-1]
    kept = torch.where(follows, number[chain].roll(1), local[into])
    ends = ~follows.roll(-1)  # the first of all follows nobody, so the last of all ends its chain
    # What each point's cluster had become when it was merged away; a place behind the last takes what ends nothing.
    final = torch.cat((local, local[:1])).index_copy_(0, torch.where(ends, into, total), number[chain])
    children = torch.zeros(total, 2, dtype=torch.int64, device=device)
    children[chain] = torch.stack((final[chain], kept), dim=1)

    lengths = [n - 1 for n in sizes]
    parts = (children[order].sort(dim=1).values, merges.cost[order], merges.size[order])
    return list(zip(*(part.split(lengths) for part in parts), strict=True))
