"""Who clusters by Ward's method, and whether two of them agree: what bench_linkage.py times."""

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nac_gpu
from common.device import synchronise

Linkage = tuple[np.ndarray, np.ndarray]  # clusters merged, int64 [n - 1, 2], numbered as SciPy does; heights [n - 1]


def scipy_ward(points: np.ndarray) -> np.ndarray:
    """SciPy: the condensed distance matrix, then nearest-neighbour chains."""
    from scipy.cluster.hierarchy import linkage

    return linkage(points, "ward")


def fastcluster_ward(points: np.ndarray) -> np.ndarray:
    """Fastcluster on the condensed distance matrix."""
    import fastcluster  # pyright: ignore[reportMissingImports] -- optional

    return fastcluster.linkage(points, "ward")


def fastcluster_vector_ward(points: np.ndarray) -> np.ndarray:
    """Fastcluster without a matrix: memory of n·d, distances computed when needed."""
    import fastcluster  # pyright: ignore[reportMissingImports] -- optional

    return fastcluster.linkage_vector(points, "ward")


def sklearn_ward(points: np.ndarray) -> np.ndarray:
    """scikit-learn's full tree with distances: what `AgglomerativeClustering(compute_full_tree=True)` calls."""
    from sklearn.cluster import ward_tree

    children, *_, heights = ward_tree(points, return_distance=True)
    return np.column_stack((children, heights))


def naive_ward(points: Tensor) -> tuple[Tensor, Tensor]:
    """The plain loop: n - 1 times the smallest entry of the matrix, and Lance and Williams' update of a row and column.

    Indices stay on the device in tensors of one element, so that nothing waits for the host.
    """
    n = len(points)
    points = points.double()
    squared = torch.cdist(points, points).square_().fill_diagonal_(math.inf)
    size, cluster = points.new_ones(n), torch.arange(n, device=points.device)
    merges, heights = cluster.new_empty(n - 1, 2), points.new_empty(n - 1)
    for step in range(n - 1):
        best = squared.argmin().view(1)
        i, j = best // n, best % n
        height = squared.view(-1)[best]
        row, other = squared.index_select(0, i), squared.index_select(0, j)
        masses = size[i] + size[j] + size
        row = ((size[i] + size) * row + (size[j] + size) * other - size * height) / masses  # infinite stays infinite
        squared.index_copy_(0, i, row).index_copy_(1, i, row.T)
        squared.index_fill_(0, j, math.inf).index_fill_(1, j, math.inf)
        merges[step], heights[step] = torch.cat((cluster[i], cluster[j])), height.squeeze()
        size.index_add_(0, i, size[j])
        cluster.index_fill_(0, i, n + step)
    return merges, heights.sqrt()


def nac_ward(batch: list[Tensor]) -> list[nac_gpu.Dendrogram]:
    """This library: several point sets in one call."""
    linkage: Any = nac_gpu.ward_linkage
    return [linkage(batch[0])] if len(batch) == 1 else linkage(batch)


def one_by_one(linkage: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    """What clusters one point set, for a list of them."""
    return lambda batch: [linkage(points) for points in batch]


@dataclass(frozen=True)
class Provider:
    """Someone who clusters.

    Attributes:
        run: what is timed: a list of point sets [n, d] to a list of linkages.
        module: needed for it.
        on_device: whether it takes tensors on the device, or float64 arrays.
    """

    run: Callable[[list[Any]], Sequence[Any]]
    module: str
    on_device: bool = False

    @property
    def installed(self) -> bool:
        """Whether its module is here."""
        return importlib.util.find_spec(self.module) is not None


PROVIDERS: dict[str, Provider] = {  # the first that is installed is the oracle
    "scipy": Provider(one_by_one(scipy_ward), "scipy"),
    "fastcluster": Provider(one_by_one(fastcluster_ward), "fastcluster"),
    "fastcluster_vector": Provider(one_by_one(fastcluster_vector_ward), "fastcluster"),
    "sklearn": Provider(one_by_one(sklearn_ward), "sklearn"),
    "naive": Provider(one_by_one(naive_ward), "torch", on_device=True),
    "nac_gpu": Provider(nac_ward, "nac_gpu", on_device=True),
}
PEERS = tuple(name for name, provider in PROVIDERS.items() if not provider.on_device)


class Inputs:
    """The same point sets as every provider takes them."""

    def __init__(self, batch: list[Tensor], device: torch.device) -> None:
        """Copy them to the device.

        Args:
            batch: [n, d] each, on the CPU.
            device: where the tensors go.
        """
        self.device = device
        self.tensors = [points.to(device) for points in batch]
        self.arrays = [points.double().numpy() for points in batch]

    def run(self, name: str) -> tuple[float, Sequence[Any]]:
        """Seconds and result of a provider. The device has finished before and after."""
        provider = PROVIDERS[name]
        batch = self.tensors if provider.on_device else self.arrays
        synchronise(self.device)
        start = time.perf_counter()
        found = provider.run(batch)
        synchronise(self.device)
        return time.perf_counter() - start, found


def read(found: Any) -> Linkage:
    """Merges and heights of a linkage, in whichever form a provider gives it."""
    if isinstance(found, np.ndarray):
        return found[:, :2].astype(np.int64), found[:, 2]
    merges, heights = (found.merges, found.heights) if isinstance(found, nac_gpu.Dendrogram) else found
    return merges.cpu().numpy(), heights.double().cpu().numpy()


def labels(merges: np.ndarray, k: int) -> np.ndarray:
    """The cluster, int64 [n], that each point is in when k are left."""
    n = len(merges) + 1
    parent = np.arange(2 * n - k)
    for row, pair in enumerate(merges[: n - k]):
        parent[pair] = n + row
    for cluster in range(len(parent) - 1, -1, -1):  # from the top: a parent comes after its children
        parent[cluster] = parent[parent[cluster]]
    return parent[:n]


def disagreement(found: Linkage, expected: Linkage, tolerance: float) -> str:
    """Where a linkage differs from the oracle's: in a height, or in a partition that no near tie excuses; or ""."""
    heights, right = found[1], expected[1]
    if heights.shape != right.shape:
        return f"{len(heights)} merges instead of {len(right)}"
    error = (np.abs(heights - right) / np.where(right > 0, right, 1)).max(initial=0)
    if not error <= tolerance:  # NaN is an error too
        return f"a height is off by {error:.1e} of itself"
    n = len(right) + 1
    for k in {2, n // 8, n // 2} & set(range(2, n)):
        if right[n - k] - right[n - k - 1] <= 4 * tolerance * right[n - k]:
            continue
        both = np.unique(np.stack((labels(found[0], k), labels(expected[0], k))), axis=1)
        if both.shape[1] != k:
            return f"the partition into {k} clusters is another"
    return ""
