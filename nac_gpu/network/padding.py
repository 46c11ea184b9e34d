"""Padding: positions of a batch that fill a sequence up, and do not count."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nac_gpu.network.running import ExampleInputs


def padding_of(batch: ExampleInputs) -> Tensor | None:
    """Which positions count, bool [batch, length]; None if all do.

    Known are Hugging Face's `attention_mask` (0 where a position is padding) and PyTorch's `*key_padding_mask` (true
    where it is).
    """
    if not isinstance(batch, Mapping):
        return None
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or value.is_floating_point():
            continue
        if name == "attention_mask":
            mask = value != 0
        elif str(name).endswith("key_padding_mask"):
            mask = value == 0
        else:
            continue
        return None if bool(mask.all()) or not bool(mask.any()) else mask
    return None


def counted(module: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """What a layer is called with, without padding: [positions, channels], or the inputs if they have another shape.

    Args:
        module: the layer.
        inputs: what it is called with.
        mask: which positions count, as `padding_of` gives it.
    """
    if mask is None or isinstance(module, nn.modules.conv._ConvNd) or inputs.ndim < 3:
        return inputs
    return inputs[mask.to(inputs.device)] if inputs.shape[:2] == mask.shape else inputs


def without_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """Outputs [batch, length, ...] of a model, without padding: [positions, ...]; others unchanged."""
    if mask is None or values.ndim < 3 or values.shape[:2] != mask.shape:
        return values
    return values[torch.as_tensor(mask, device=values.device)]


def mean_of_positions(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of outputs [batch, length, channels] over the positions that count: [batch, channels]."""
    if mask is None or values.shape[:2] != mask.shape:
        return values.mean(1)
    counting = torch.as_tensor(mask, device=values.device)[..., None].to(values.dtype)
    return (values * counting).sum(1) / counting.sum(1).clamp_min(1)
