"""Device operations: each file a public launcher and its plain PyTorch twin, `name_torch`, of the same signature."""

from .compaction import compact
from .distances import squared_distances
from .merging import merge_pairs
from .neighbours import nearest_neighbours
from .pairs import reciprocal_pairs

__all__ = ["compact", "merge_pairs", "nearest_neighbours", "reciprocal_pairs", "squared_distances"]
