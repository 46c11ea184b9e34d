"""The dendrogram that a linkage returns; it can be cut at any number of clusters."""

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

    Clusters are numbered as in SciPy: numbers below n are the points themselves, and row i of `merges` creates
    cluster n + i. A cluster is always created in an earlier row than the one that merges it.

    Attributes:
        merges: int64 [n - 1, 2], the two clusters that each row merges, the smaller number first.
        heights: [n - 1], non-decreasing, `sqrt(2 * cost)` in the unit of the points; equal to SciPy's heights if all
            masses are 1. float64 for float64 points, float32 for all others.
        sizes: int64 [n - 1], how many points the new cluster has.

    >>> dendrogram = nac_gpu.ward_linkage(torch.tensor([[0.0], [1.0], [5.0]]))
    >>> dendrogram.merges
    tensor([[0, 1],
            [2, 3]])
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
        """Assign every point to a cluster, by keeping only the cheapest merges.

        Args:
            k: number of clusters, 1 to n: the n - k cheapest merges are kept.
            height: merges up to and including this height are kept. Give either `k` or `height`.

        Returns:
            Labels, int64 [n]. Clusters are numbered by first appearance: label 0 holds point 0.

        Raises:
            TypeError: both or neither of `k` and `height` are given, or `k` is not an integer.
            ValueError: `k` is not in [1, n], or `height` is NaN.

        >>> dendrogram = nac_gpu.ward_linkage(torch.tensor([[0.0], [1.0], [5.0]]))
        >>> dendrogram.cut(2), dendrogram.cut(height=0.5)
        (tensor([0, 0, 1]), tensor([0, 1, 2]))
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
        """The linkage matrix of `scipy.cluster.hierarchy`: float64 [n - 1, 4], merged clusters, height, size.

        >>> nac_gpu.ward_linkage(torch.tensor([[0.0], [2.0]])).to_scipy()
        array([[0., 1., 2., 2.]])
        """
        columns = (self.merges.double(), self.heights.double()[:, None], self.sizes.double()[:, None])
        return torch.cat(columns, dim=1).cpu().numpy()

    def _roots(self, kept: int) -> Tensor:
        """The cluster that contains each cluster after the first `kept` merges, int64 [2n - 1]."""
        n = self.n
        parent = torch.arange(2 * n - 1, device=self.merges.device)
        parent[self.merges[:kept].flatten()] = parent[n : n + kept].repeat_interleave(2)
        # Pointer doubling: after t steps every pointer has moved up 2^t levels, and trees have at most `kept` levels.
        for _ in range(kept.bit_length()):
            parent = parent[parent]
        return parent


def sorted_merges(merges: Merges, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The merges of several problems, each sorted by increasing cost and numbered as in SciPy.

    A merge never costs less than the merges that made its two parts, and it happens in a later round. So sorting by
    cost, and by round among equal costs, puts every cluster after its parts.

    Args:
        merges: of all problems, concatenated; point numbers run through all of them.
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
    local = torch.arange(total, device=device) - (stop - count)[problem]  # a point's number within its problem
    # All points but the last of each problem: every other point is merged into one with a higher number at some time.
    skipped = torch.repeat_interleave(torch.arange(len(sizes), device=device), count - 1, output_size=rows)
    gone = torch.arange(rows, device=device) + skipped
    gone = gone[merges.round[gone].sort(stable=True).indices]

    order = gone[merges.cost[gone].sort(stable=True).indices]
    if len(sizes) > 1:
        order = order[problem[order].sort(stable=True).indices]
    # The cluster that each row creates: n plus the row's number within its problem.
    row_problem = problem[order]
    created = torch.arange(rows, device=device) - (stop - count - count)[row_problem] + row_problem
    number = torch.zeros(total, dtype=torch.int64, device=device).index_copy_(0, order, created)

    # Merges into the same point form a chain, in order of rounds: each one extends the cluster that the last one made.
    chain = gone[merges.partner[gone].sort(stable=True).indices]
    into = merges.partner[chain]
    follows = torch.zeros_like(into, dtype=torch.bool)
    follows[1:] = into[1:] == into[:-1]
    kept = torch.where(follows, number[chain].roll(1), local[into])
    ends = ~follows.roll(-1)  # follows[0] is always False, so the last element always ends a chain
    # The number of each point's cluster when it was merged away. The extra last element absorbs writes of inner links.
    final = torch.cat((local, local[:1])).index_copy_(0, torch.where(ends, into, total), number[chain])
    children = torch.zeros(total, 2, dtype=torch.int64, device=device)
    children[chain] = torch.stack((final[chain], kept), dim=1)

    lengths = [n - 1 for n in sizes]
    parts = (children[order].sort(dim=1).values, merges.cost[order], merges.size[order])
    return list(zip(*(part.split(lengths) for part in parts), strict=True))
