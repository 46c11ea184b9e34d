"""Writes merged tensors into a copy of the model, and updates the attributes of its layers (`out_features`, ...)."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from nac_gpu.network.kept_numbers import set_number
from nac_gpu.network.layer_sizes import set_sizes

#: New values by (module, path of the attribute).
Attributes = Mapping[tuple[str, str], object]


def rebuild(
    model: nn.Module, state: Mapping[str, Tensor], attributes: Attributes | None = None, *, share: bool = False
) -> nn.Module:
    """A copy of the model with other tensors.

    Tied parameters stay tied; mode, `requires_grad`, hooks and everything else are those of the original.

    Args:
        model: not changed.
        state: a tensor for each name of `tensors(model)`.
        attributes: of modules, where they do not follow from the shape of a tensor: numbers of heads and groups, sizes
            that the user's code stores, also inside of containers (see `nac_gpu.network.kept_numbers`).
        share: unchanged parameters share memory with the model's, for a copy that is only run and never trained.
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
        set_number(small.get_submodule(name), attribute, value)
    return small
