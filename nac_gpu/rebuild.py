"""Writes merged tensors into a copy of the model, and makes the layers' attributes agree with them."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nac_gpu.forward import sent
from nac_gpu.sizes import Attributes, set_sizes

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by name (a tied one under its first name), detached."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def selected(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """The positions of a tensor along one dimension that are kept (bool [size]), in the layout that it has.

    A network in channels_last that became smaller is to be as quick as one.
    """
    small = tensor.index_select(dim, sent(kept.nonzero().flatten(), tensor.device))
    layout = _CHANNELS_LAST.get(tensor.ndim)
    if layout is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
        small = small.contiguous(memory_format=layout)
    return small


def rebuild(
    model: nn.Module, state: Mapping[str, Tensor], attributes: Attributes | None = None, *, share: bool = False
) -> nn.Module:
    """A copy of the model with other tensors.

    Ties stay ties; mode, `requires_grad`, hooks and everything else are the original's.

    Args:
        model: left as it is.
        state: a tensor for each name of `tensors(model)`.
        attributes: of modules that are no tensors' sizes: numbers of heads and groups, sizes kept by the user's code.
        share: parameters that are the model's own stay so, for a copy that is only run.
    """
    memo: dict[int, Tensor] = {}
    changed: set[int] = set()
    for name, old in [*model.named_parameters(), *model.named_buffers()]:
        new = state[name]
        if new.shape != old.shape:
            changed.add(id(old))
        parameter = isinstance(old, nn.Parameter)
        own = new.data_ptr() == old.data_ptr() and not (share and parameter)
        new = new.detach().clone() if own else new.detach()
        if parameter:
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        memo[id(old)] = new
    small = copy.deepcopy(model, memo)
    for old_module, module in zip(model.modules(), small.modules(), strict=True):
        own = [*old_module.parameters(recurse=False), *old_module.buffers(recurse=False)]
        if any(id(tensor) in changed for tensor in own):
            set_sizes(module)
    for (name, attribute), value in (attributes or {}).items():
        setattr(small.get_submodule(name), attribute, value)
    return small
