"""The copies test: networks with duplicated neurons, and the smaller networks that merging them must result in."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nac_gpu.clustering.labels import first_of_each
from nac_gpu.network.moving import sent
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
