"""Copies of models and inputs on which a change shows: in a wider type, with nothing constant."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.network.deferred import after, loaded
from nac_gpu.network.running import ExampleInputs


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another type, anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def converted(model: nn.Module, example_inputs: ExampleInputs, dtype: torch.dtype) -> tuple[nn.Module, ExampleInputs]:
    """A copy of the model, and its inputs, in another floating type."""
    return copy.deepcopy(model).to(dtype), pytree.tree_map(lambda value: in_dtype(value, dtype), example_inputs)


def lively(tensor: Any, generator: torch.Generator) -> Any:
    """The tensor, or random numbers of its shape where it holds one constant.

    Zero-initialised heads, layer scales of 1e-6 and inputs of zeros hide what merging does; none may make the trial
    vacuous.
    """
    if not isinstance(tensor, Tensor) or tensor.numel() < 2 or not tensor.is_floating_point():
        return tensor
    if not _constant(loaded(tensor)):
        return tensor
    fan_in = math.prod(tensor.shape[1:])
    seed = int(torch.randint(2**62, (), generator=generator))

    def drawn(like: Tensor) -> Tensor:
        own = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=own, dtype=torch.float64).to(like) / fan_in**0.5

    return after(tensor, drawn)


def _constant(tensor: Tensor) -> bool:
    flat = tensor.flatten()
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())
