"""Which points bench_linkage.py clusters."""

from dataclasses import dataclass
from typing import Literal

Preset = Literal["neurons", "low", "large", "growth", "vgg16", "quick"]


@dataclass(frozen=True)
class Workload:
    """Point sets that are clustered in one call: mostly a single one.

    Attributes:
        name: in the table.
        shapes: (n, d) of every set.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]

    @property
    def largest(self) -> int:
        """Points of the largest set."""
        return max(n for n, _ in self.shapes)


def single(*shapes: tuple[int, int]) -> tuple[Workload, ...]:
    """One workload for each shape."""
    return tuple(Workload(f"{n}x{d}", ((n, d),)) for n, d in shapes)


#: Hidden layers of VGG-16: neurons, and their incoming weights with bias.
VGG16 = ((64, 28), (64, 577), (128, 577), (128, 1153), (256, 1153), *((256, 2305),) * 2, (512, 2305))
VGG16 += (*((512, 4609),) * 5, (4096, 513), (4096, 4097))
PRESETS: dict[Preset, tuple[Workload, ...]] = {
    "neurons": single((512, 4609), (2048, 2048), (4096, 513), (4096, 4097)),
    "low": single(*((n, d) for d in (2, 3, 8, 16) for n in (1024, 4096))),
    "large": single(*((2**power, 512) for power in range(10, 18))),
    "growth": single(*((2**power, 512) for power in range(8, 13))),
    "vgg16": (Workload("vgg16", VGG16),),
    "quick": single((64, 8), (128, 8)),
}
