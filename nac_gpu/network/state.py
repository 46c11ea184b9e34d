"""A model's tensors by name: parameters and buffers, their shapes, their bytes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.network.deferred import Deferred, loaded
from nac_gpu.network.moving import sent

_CHUNK = 1 << 20  # how many numbers are summed at once; limits temporary memory
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by name, detached; a tied one appears once, under its first name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def selected(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Select the positions to keep (bool [size]) along one dimension, and preserve the memory format.

    Otherwise a channels_last network would become contiguous, and slower, when it is compressed.
    """
    small = tensor.index_select(dim, sent(kept.nonzero().flatten(), tensor.device))
    layout = _CHANNELS_LAST.get(tensor.ndim)
    if layout is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
        small = small.contiguous(memory_format=layout)
    return small


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values."""
    return loaded(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data


def is_open(model: nn.Module) -> bool:
    """Whether tensors of a model are still in files: see `nac_gpu.open_model`."""
    return any(isinstance(tensor, Deferred) for tensor in tensors(model).values())


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and buffers by name; tied ones appear once."""
    return {name: tuple(tensor.shape) for name, tensor in tensors(model).items()}


def fingerprint(model: nn.Module, inputs: Any) -> tuple[object, ...] | None:
    """A value that changes if the model or its inputs change; None if some tensor is of a kind that has no checksum.

    It covers the classes, plain attributes, configurations and number of hooks of all modules, and dtype, shape, device
    and a checksum of the bits of all tensors. Training mode and the values of tensors in files are not covered.
    """
    leaves, structure = pytree.tree_flatten(inputs)
    found = [*tensors(model).items(), *((str(place), leaf) for place, leaf in enumerate(leaves))]
    forms = [
        (name, str(value.dtype), tuple(value.shape), str(value.device)) if isinstance(value, Tensor) else (name, value)
        for name, value in found
    ]
    sums: dict[torch.device, list[Tensor]] = {}
    for value in (value for _, value in found if isinstance(value, Tensor) and not isinstance(value, Deferred)):
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            return None
        sums.setdefault(value.device, []).append(_checksum(value))
    bits = [torch.stack(own).tolist() for own in sums.values()]  # the host waits once for each device
    modules = [(name, type(module).__qualname__, _plain(module)) for name, module in model.named_modules()]
    configs: dict[int, Any] = {id(config): config for config in (getattr(m, "config", None) for m in model.modules())}
    told = [config.to_dict() for config in configs.values() if hasattr(config, "to_dict")]
    return repr(structure), repr(forms), repr(bits), repr(modules), repr(told)


def _plain(module: nn.Module) -> dict[str, object]:
    """A module's attributes that are numbers, strings or tuples, and how many hooks it has."""
    own: dict[str, object] = {
        name: value for name, value in vars(module).items() if isinstance(value, int | float | str | tuple)
    }
    own.pop("training", None)
    hooks = {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks")}
    return own | hooks


def _checksum(tensor: Tensor) -> Tensor:
    """A checksum, int64 [], that any single changed bit changes, and several changed bits almost certainly."""
    flat = tensor.detach().contiguous().flatten()
    if not flat.numel():
        return torch.zeros((), dtype=torch.int64, device=flat.device)
    words = flat.view(torch.uint8) if flat.numel() * flat.element_size() % 4 else flat.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    odd = torch.arange(1, 2 * min(len(words), _CHUNK), 2, device=words.device)  # odd factors lose no bit modulo 2^64
    for number, part in enumerate(words.split(_CHUNK)):
        total += (part * odd[: len(part)]).sum() * (2 * number + 1)
    return total
