"""Hand-written networks of many kinds, with example inputs: what a user might compress.

Sizes are taken from tensors wherever a user would reasonably do so; no network says how it must be compressed.
"""

from common.architectures import attention, constants, generators, graphs, images, norms, recurrent, vectors
from common.architectures.registry import ARCHITECTURES, Architecture

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "attention",
    "constants",
    "generators",
    "graphs",
    "images",
    "norms",
    "recurrent",
    "vectors",
]
