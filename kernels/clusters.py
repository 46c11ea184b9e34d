"""A linkage under way: the clusters there are now, and the merges that made them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Merges(NamedTuple):
    """The merges so far, each kept under the last point of the cluster that gave up its slot: no two are the same.

    Attributes:
        partner: int64 [n], the last point of the cluster it was merged into.
        cost: [n], the increase of the within-cluster sum of squares; NaN where nothing was merged.
        round: int64 [n], in which round of merges; merges of one round are independent.
        size: int64 [n], how many points the new cluster has.
    """

    partner: Tensor
    cost: Tensor
    round: Tensor
    size: Tensor


class Slots(NamedTuple):
    """What `Clusters` keeps per slot, as kernels take it: one argument, of which they read and write the fields."""

    masses: Tensor
    nearest: Tensor
    nearest_cost: Tensor
    made_at: Tensor
    point: Tensor
    size: Tensor


@dataclass
class Clusters:
    """The clusters in their slots. A slot is a row and column of the cost matrix, or a row of the centroids.

    First slot i holds point i. A merged cluster takes the higher slot of its parts, so the order of slots is that of
    the clusters' last points; packing keeps it.

    Attributes:
        masses: [m], 0 for dead slots.
        nearest: int64 [m], the slot that is cheapest to merge with, the lowest of equals; a dead slot names itself.
        nearest_cost: [m], the cost of that merge.
        made_at: [m], the cost of the merge that made the cluster, 0 for points.
        point: int64 [m], the cluster's last point.
        size: int64 [m], how many points it has.
        alive: int64 [1], how many clusters there are.
        rounds: how many rounds have been made.
        merges: what was merged.
    """

    masses: Tensor
    nearest: Tensor
    nearest_cost: Tensor
    made_at: Tensor
    point: Tensor
    size: Tensor
    alive: Tensor
    rounds: int
    merges: Merges

    @staticmethod
    def of_points(masses: Tensor) -> "Clusters":
        """Every point is a cluster of its own, and nobody has looked for neighbours yet.

        Args:
            masses: [n], positive.
        """
        slots = torch.arange(len(masses), device=masses.device)
        return Clusters(
            masses=masses.clone(),
            nearest=slots.clone(),
            nearest_cost=torch.zeros_like(masses),
            made_at=torch.zeros_like(masses),
            point=slots,
            size=torch.ones_like(slots),
            alive=torch.full((1,), len(masses), device=masses.device),
            rounds=0,
            merges=Merges(
                partner=torch.zeros_like(slots),
                cost=torch.full_like(masses, torch.nan),
                round=torch.zeros_like(slots),
                size=torch.zeros_like(slots),
            ),
        )

    def fields(self) -> Slots:
        """What is kept per slot."""
        return Slots(self.masses, self.nearest, self.nearest_cost, self.made_at, self.point, self.size)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The lower and the higher slot of every pair of mutual nearest neighbours, int64 [p], lower ones ascending."""
        lower = (self.mutual() & (self.nearest > self._slots())).nonzero().squeeze(1)
        return lower, self.nearest[lower]

    def mutual(self) -> Tensor:
        """Whether a slot's nearest neighbour has it as its own nearest neighbour, bool [m]."""
        slots = self._slots()
        return (self.nearest[self.nearest] == slots) & (self.nearest != slots)

    def record(self, lower: Tensor, upper: Tensor) -> None:
        """Note down a round of merges, and bring everything but the neighbours up to date.

        Args:
            lower: int64 [p], the slots that die.
            upper: int64 [p], the slots they merge into.
        """
        gone, merges = self.point[lower], self.merges
        self.size[upper] += self.size[lower]
        self.made_at[upper] = torch.maximum(
            self.nearest_cost[lower], torch.maximum(self.made_at[lower], self.made_at[upper])
        )
        merges.partner[gone] = self.point[upper]
        merges.cost[gone] = self.made_at[upper]
        merges.round[gone] = self.rounds
        merges.size[gone] = self.size[upper]
        self.masses[upper] += self.masses[lower]
        self.masses[lower] = 0
        self.alive -= len(lower)
        self.rounds += 1

    def _slots(self) -> Tensor:
        return torch.arange(len(self.nearest), device=self.nearest.device)
