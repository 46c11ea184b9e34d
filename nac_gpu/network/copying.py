"""Copies of models: with other tensors, or with the same values in tensors of their own.

A model's code may write to its tensors and attributes whenever it runs. So only copies are run, and the user's model is
read.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.network.deferred import Deferred
from nac_gpu.network.kept_numbers import set_number
from nac_gpu.network.layer_sizes import set_sizes
from nac_gpu.network.precision import in_dtype
from nac_gpu.network.reaching import leaves_in
from nac_gpu.network.rebinding import rebind
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.state import tensors

#: New values by (module, path of the attribute).
Attributes = Mapping[tuple[str, str], object]


def rebuild(
    model: nn.Module, state: Mapping[str, Tensor], attributes: Attributes | None = None, *, clone: bool = False
) -> nn.Module:
    """A copy of the model with other tensors, which share no memory with the model's.

    Tied parameters stay tied; mode, `requires_grad`, hooks and everything else are those of the original.

    Args:
        model: not changed.
        state: a tensor for each name of `tensors(model)`; cloned where it is the model's own.
        attributes: of modules, where they do not follow from the shape of a tensor: numbers of heads and groups, sizes
            that the user's code stores, also inside of containers (see `nac_gpu.network.kept_numbers`).
        clone: clone all tensors of `state`, because others use them, too.
    """
    memo: dict[int, Tensor] = {}
    changed: set[int] = set()
    for name, old in [*model.named_parameters(), *model.named_buffers()]:
        new = state[name].detach()
        if new.shape != old.shape:
            changed.add(id(old))
        new = new.clone() if clone or _same_memory(new, old) else new
        memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    copies: dict[int, Any] = dict(memo)
    try:
        small = copy.deepcopy(model, copies)
    except RuntimeError:  # PyTorch refuses to copy tensors with a graph, such as a penalty of the last training step
        copies = memo | {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
        small = copy.deepcopy(model, copies)
    rebind(copies, small)
    for old_module, module in zip(model.modules(), small.modules(), strict=True):
        own = [*old_module.parameters(recurse=False), *old_module.buffers(recurse=False)]
        if any(id(tensor) in changed for tensor in own):
            set_sizes(module)
    for (name, attribute), value in (attributes or {}).items():
        set_number(small.get_submodule(name), attribute, value)
    return small


def copied(model: nn.Module) -> nn.Module:
    """A copy of the model with tensors of its own, to be run."""
    return rebuild(model, tensors(model))


def converted(model: nn.Module, example_inputs: ExampleInputs, dtype: torch.dtype) -> tuple[nn.Module, ExampleInputs]:
    """A copy of the model, and its inputs, in another floating dtype."""
    own = copied(model)._apply(lambda value: in_dtype(value, dtype))
    return own, pytree.tree_map(lambda value: in_dtype(value, dtype), example_inputs)


def is_narrow(value: object) -> bool:
    """Whether a tensor, or some tensor of a model, is in a floating type of 16 bits."""
    if isinstance(value, nn.Module):
        return any(is_narrow(tensor) for tensor in tensors(value).values())
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def in_float32(model: nn.Module) -> nn.Module:
    """A copy of a model in float32."""
    return converted(model, (), torch.float32)[0]


def ordinary_model(model: nn.Module) -> nn.Module:
    """The model, or a copy with ordinary tensors if some of its own were made in inference mode."""
    own = [*model.parameters(), *model.buffers()]
    if not any(tensor.is_inference() for tensor in own):
        return model
    with torch.inference_mode(False):
        return copied(model)


def _computed(model: nn.Module) -> list[Tensor]:
    """Tensors among a model's attributes that have a graph."""
    found = (leaf for module in model.modules() for leaf in leaves_in(vars(module), use_up=False))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def _same_memory(new: Tensor, old: Tensor) -> bool:
    if isinstance(new, Deferred):  # its values are in files, and nothing can write to them
        return False
    try:
        return new.untyped_storage()._cdata == old.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse, for example: it has no storage
        return True
