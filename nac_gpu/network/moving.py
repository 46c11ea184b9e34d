"""Transfers of tensors between devices."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. Transfers from the CPU to a GPU use pinned memory, and the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def to_device(value: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """Nested inputs with all their tensors on a device; everything else unchanged.

    Args:
        value: a tensor, or tensors in sequences, mappings and other containers that `torch.utils._pytree` supports.
        device: the target.
        non_blocking: the host does not wait for transfers from pinned memory.
    """
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=non_blocking), value)
