"""Several problems of different sizes, one behind the other in flat memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Where every problem lies: its points [n, d], its slots [n], its cost matrix [n, n].

    Attributes:
        shapes: (n, d) of every problem.
        table: int64 [problems, 5], on the device: n, d, and the first element of its points, slots and cost matrix.
    """

    shapes: tuple[tuple[int, int], ...]
    table: Tensor

    @staticmethod
    def of(shapes: Sequence[tuple[int, int]], device: torch.device) -> "Batch":
        """Lay out problems of these shapes."""
        rows, points, slots, costs = [], 0, 0, 0
        for n, d in shapes:
            rows.append((n, d, points, slots, costs))
            points, slots, costs = points + n * d, slots + n, costs + n * n
        table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        return Batch(tuple(shapes), table)

    def __len__(self) -> int:
        """Number of problems."""
        return len(self.shapes)

    @property
    def largest(self) -> int:
        """The most points a problem has."""
        return max(n for n, _ in self.shapes)

    def points(self, flat: Tensor) -> list[Tensor]:
        """Views [n, d] of the points of every problem."""
        parts = flat.split([n * d for n, d in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def slots(self, flat: Tensor) -> list[Tensor]:
        """Views [n] of what every problem keeps per point."""
        return list(flat.split([n for n, _ in self.shapes]))

    def costs(self, flat: Tensor) -> list[Tensor]:
        """Views [n, n] of every problem's cost matrix."""
        parts = flat.split([n * n for n, _ in self.shapes])
        return [part.view(n, n) for part, (n, _) in zip(parts, self.shapes, strict=True)]
