"""The copies test: networks with duplicated neurons, and the smaller networks that merging them must result in."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from nac_gpu.clustering.labels import first_of_each
from nac_gpu.network.deferred import after
from nac_gpu.network.moving import sent
from nac_gpu.network.state import selected
from nac_gpu.network.sums import add_rows
from nac_gpu.tracing.graph import Choice, Group


def copy_neurons(state: Mapping[str, Tensor], group: Group, labels: Tensor) -> dict[str, Tensor]:
    """Tensors in which all neurons of a cluster are copies of its first neuron.

    Args:
        state: tensors by name; not changed.
        group: the group.
        labels: int64 [n].
    """
    home = first_of_each(labels)[labels]
    copies = dict(state)
    for member in group.members:
        if member.role == "mean":
            read = torch.arange(state[member.tensor].shape[member.dim])
            read[member.index.flatten()] = member.index[home].flatten()
            copies[member.tensor] = copies[member.tensor].index_select(
                member.dim, sent(read, copies[member.tensor].device)
            )
    return copies


def random_labels(size: int, clusters: int, generator: torch.Generator) -> Tensor:
    """A random assignment of `size` neurons to exactly `clusters` clusters, int64 [size]."""
    labels = torch.cat([torch.arange(clusters), torch.randint(clusters, (size - clusters,), generator=generator)])
    return labels[torch.randperm(size, generator=generator)]


def random_assignments(choices: Sequence[Choice], seed: int) -> list[Tensor]:
    """A random assignment for each choice, int64 [n] each, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [random_labels(choice.group.size, choice.width, generator) for choice in choices]


def merged_copies(state: Mapping[str, Tensor], groups: Sequence[Group], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Smaller tensors in which every cluster of identical neurons is one neuron, with summed outgoing weights.

    Args:
        state: tensors by name; not changed.
        groups: the groups.
        labels: for each group, int64 [n].
    """
    small = dict(state)
    all_moves: dict[tuple[str, int], list[tuple[Tensor, Tensor, bool]]] = {}
    for group, chosen in zip(groups, labels, strict=True):
        home = first_of_each(chosen)[chosen]
        away = home != torch.arange(group.size)
        for member in group.members:
            moved = member.index[away].flatten(), member.index[home][away].flatten()
            all_moves.setdefault((member.tensor, member.dim), []).append((*moved, member.role == "sum"))
    for (name, dim), moves in sorted(
        all_moves.items(), key=lambda item: any(added for _, _, added in item[1])
    ):  # first the tensors that only lose positions
        small[name] = after(small[name], partial(_moved, dim=dim, moves=moves))
    return small


def _moved(old: Tensor, dim: int, moves: Sequence[tuple[Tensor, Tensor, bool]]) -> Tensor:
    """A tensor without the positions that move away along one dimension.

    Args:
        old: the tensor.
        dim: the dimension.
        moves: source and target positions, int64, and whether sources are added to their targets or dropped.
    """
    kept = torch.ones(old.shape[dim], dtype=torch.bool)
    for source, _, _ in moves:
        kept[source] = False
    place = kept.cumsum(0) - 1
    new = selected(old, dim, kept)
    for source, target, added in moves:
        if added:
            add_rows(new, dim, sent(place[target], old.device), old.index_select(dim, sent(source, old.device)))
    return new
