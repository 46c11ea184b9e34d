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
from .products import pad_points, padded_width
from .searching import nearest_centroids, search_bytes
from .seeding import seed_centres

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
    "pad_points",
    "padded_width",
    "search_bytes",
    "seed_centres",
    "squared_distances",
    "squared_distances_batch",
    "update_neighbours",
    "use_backend",
    "uses_triton",
]
