"""Gathers parameters that are sharded across ranks (DTensor, FSDP2) into full ones."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.state import tensors

_OF_FSDP = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "__composable_api")  # prefixes of FSDP's attributes


def unsharded(model: nn.Module, ranks: Ranks) -> tuple[nn.Module, tuple[str, ...]]:
    """Gather sharded parameters into full ones.

    Args:
        model: not changed.
        ranks: the processes; all processes of the parameters' device mesh must call this.

    Returns:
        A copy with full parameters, or the model itself if none is sharded; and a line that says what was changed.

    Raises:
        ValueError: parameters are sharded, but no process group was given to gather them with.
    """
    divided = {name: tensor for name, tensor in tensors(model).items() if hasattr(tensor, "full_tensor")}
    if not divided:
        return model, ()
    if ranks is ALONE:
        raise ValueError(
            f"{next(iter(divided))} is divided among ranks, and all of them must help to gather it: call this "
            "on every rank with process_group=torch.distributed.group.WORLD"
        )
    ranks.gathered(None)  # fails early if a rank is missing; the gathering below would wait for the mesh's own timeout
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if hasattr(tensor, "full_tensor"):
            full: Tensor = tensor.detach().full_tensor()
            memo[id(tensor)] = nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full
    with _plain(model):
        whole = copy.deepcopy(model, memo)
    said = f"{len(divided)} tensors divided among ranks were put together; shard the smaller network again"
    return whole, (said,)


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Temporarily remove what `torch.distributed` added to the modules: classes that cannot be copied, hooks, state."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        for module, kind, own in before:
            if _distributed(kind.__bases__[0]):  # FSDP inserts its class before the module's own class
                module.__class__ = kind.__bases__[1]
            for name, value in own.items():
                if name.startswith(_OF_FSDP):
                    del vars(module)[name]
                elif name.endswith("_hooks") and isinstance(value, dict):
                    hooks = {key: hook for key, hook in value.items() if not _distributed(hook)}
                    vars(module)[name] = type(value)(hooks)
        yield
    finally:
        for module, kind, own in before:
            module.__class__ = kind
            vars(module).update(own)


def _distributed(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("torch.distributed.")
