"""Device operations: each file a public launcher and its plain PyTorch twin, `name_torch`, of the same signature."""

from .backend import on_device, use_backend, uses_triton
from .batch import Batch
from .centroids import merge_centroids
from .clusters import Clusters, Merges
from .distances import squared_distances, squared_distances_batch
from .finishing import MOST_SLOTS, finish
from .merging import merge_pairs
from .neighbours import update_neighbours
from .packing import pack_costs, pack_slots
from .searching import nearest_centroids

__all__ = [
    "MOST_SLOTS",
    "Batch",
    "Clusters",
    "Merges",
    "finish",
    "merge_centroids",
    "merge_pairs",
    "nearest_centroids",
    "on_device",
    "pack_costs",
    "pack_slots",
    "squared_distances",
    "squared_distances_batch",
    "update_neighbours",
    "use_backend",
    "uses_triton",
]
