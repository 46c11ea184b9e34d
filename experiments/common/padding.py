"""Faster training of odd widths on a CPU: dead channels are added, up to a multiple of 16, and cut off again.

In bfloat16 with channels last, a CPU works on 16 channels at a time: ResNet-56 with 14, 28 and 55 channels takes 2.2
times as long as with 16, 32 and 64. Channels whose weights, scales and shifts are zeros change nothing and get no
gradients, so they stay zeros, and what is trained beside them is what would be trained without them.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

_MULTIPLE = 16


def train_padded(model: nn.Module, train: Callable[[nn.Module], float]) -> float:
    """Train a copy with dead channels in place of a network, and take over what it learned.

    Args:
        model: a VGG or ResNet of `common.models`, of any widths: convolutions with a BatchNorm behind each, and linear
            layers, the first of which reads the channels of the last convolution. What it learned is written into it.
        train: changes a network in place; its optimiser leaves weights alone that are zero and have no gradients.

    Returns:
        What `train` returns.
    """
    wide = padded(model)
    found = train(wide)
    learned = wide.state_dict()
    model.to(next(wide.parameters()).device)
    model.load_state_dict(
        {name: learned[name][tuple(map(slice, value.shape))] for name, value in model.state_dict().items()}
    )
    model.train(wide.training)
    return found


def padded(model: nn.Module) -> nn.Module:
    """The copy: the last channels of its convolutions are dead, and their number is a multiple of 16."""
    wide = copy.deepcopy(model)
    channels = 0  # of the last convolution
    for module in wide.modules():
        if isinstance(module, nn.Conv2d):
            inputs = module.in_channels if channels else 0  # colours stay
            channels = module.out_channels
            _pad(module, ["weight"], _dead(channels), _dead(inputs))
            _pad(module, ["bias"], _dead(channels))
            module.out_channels += _dead(channels)
            module.in_channels += _dead(inputs)
        elif isinstance(module, nn.BatchNorm2d):
            _pad(module, ["weight", "bias", "running_mean", "running_var"], _dead(module.num_features))
            module.num_features += _dead(module.num_features)
        elif isinstance(module, nn.Linear) and channels:
            dead = _dead(channels) * (module.in_features // channels)  # pixels follow each other within a channel
            _pad(module, ["weight"], 0, dead)
            module.in_features += dead
            channels = 0
    return wide


def _dead(channels: int) -> int:
    return -channels % _MULTIPLE


@torch.no_grad()
def _pad(module: nn.Module, names: list[str], *dead: int) -> None:
    """Zeros behind the ends of a module's tensors, in their first dimensions."""
    for name in names:
        value: Tensor | None = getattr(module, name)
        if value is None or not any(dead):
            continue
        sizes = [n + more for n, more in zip(value.shape, dead, strict=False)]
        wide = value.new_zeros(*sizes, *value.shape[len(dead) :])
        wide[tuple(map(slice, value.shape))] = value
        if isinstance(value, nn.Parameter):
            wide = nn.Parameter(wide, value.requires_grad)
        setattr(module, name, wide)
