"""Writes merged tensors into a copy of the model, and makes the layers' attributes agree with them."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by name (a tied one under its first name), detached."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def rebuild(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with other tensors.

    Ties stay ties; mode, `requires_grad`, hooks and everything else are the original's.

    Args:
        model: left as it is.
        state: a tensor for each name of `tensors(model)`.
    """
    memo: dict[int, Tensor] = {}
    changed: set[int] = set()
    for name, old in [*model.named_parameters(), *model.named_buffers()]:
        new = state[name]
        if new.shape != old.shape:
            changed.add(id(old))
        new = new.detach().clone() if new.data_ptr() == old.data_ptr() else new.detach()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        memo[id(old)] = new
    small = copy.deepcopy(model, memo)
    for old_module, module in zip(model.modules(), small.modules(), strict=True):
        own = [*old_module.parameters(recurse=False), *old_module.buffers(recurse=False)]
        if any(id(tensor) in changed for tensor in own):
            set_sizes(module)
    return small


def set_sizes(module: nn.Module) -> None:
    """Make a layer's attributes (`in_features`, `out_channels`, ...) say what its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 and module.weight.shape[1] == 1:  # depthwise
            module.groups = module.weight.shape[0]
        rows, columns = (1, 0) if module.transposed else (0, 1)
        module.out_channels, module.in_channels = module.weight.shape[rows], module.weight.shape[columns]
        if module.transposed:
            module.out_channels *= module.groups
        else:
            module.in_channels *= module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.running_mean if module.running_mean is not None else module.weight
        assert isinstance(tensor, Tensor), "a normalisation without tensors has no sizes"
        module.num_features = len(tensor)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
