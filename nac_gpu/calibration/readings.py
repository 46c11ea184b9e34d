"""The observable consumers of a group, and the activations that they read."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nac_gpu.network.moving import sent
from nac_gpu.tracing.graph import Group, Member


@dataclass(frozen=True)
class Reading:
    """A consumer of a group.

    Attributes:
        layer: name of the module.
        member: the columns of its weight that read the group.
    """

    layer: str
    member: Member


def readings(model: nn.Module, group: Group) -> tuple[Reading, ...]:
    """The consumers of a group whose inputs can be observed: linear layers and convolutions without groups."""
    modules = dict(model.named_modules())
    found = []
    for member in group.members:
        layer = member.tensor.removesuffix(".weight")
        module = modules.get(layer)
        if member.role == "sum" and layer != member.tensor and module is not None and member.dim == columns_of(module):
            found.append(Reading(layer, member))
    return tuple(found)


def columns_of(module: nn.Module) -> int | None:
    """The input dimension of the weight of a plain linear layer or convolution; None for any other module."""
    plain = type(module).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    if plain and getattr(module, "groups", 1) == 1:
        return 1
    return 0 if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None  # Hugging Face's


def by_channel(module: nn.Module, inputs: Tensor) -> Tensor:
    """A layer's input with its channels last: [..., channels]."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return inputs.movedim(-1 - len(module.kernel_size), -1)
    return inputs


def samples(module: nn.Module, inputs: Tensor, index: Tensor) -> Tensor:
    """A layer's input as activations of neurons: [samples, n].

    Args:
        module: the layer.
        inputs: what it was called with.
        index: int64 [n, m], the channels of each neuron; each of the m channels counts as a sample of its own.
    """
    channels = by_channel(module, inputs).flatten(0, -2)
    return channels[:, sent(index, inputs.device)].transpose(1, 2).flatten(0, 1)


def outgoing(weight: Tensor, member: Member) -> Tensor:
    """The columns of a weight that read each neuron: [n, m, ...]."""
    return weight.movedim(member.dim, 0)[sent(member.index, weight.device)]


def row_weights(rows: Tensor) -> Tensor:
    """Weights of samples, [rows], at most 1: those of a huge norm count as one of four times the mean norm's square.

    Some tokens have a norm a thousand times that of others. A normalisation follows, so that they matter no more.
    """
    norms = rows.float().norm(dim=1)
    most = 4 * norms.mean().square()
    return torch.where(norms.square() > most, most / norms.square(), 1.0)
