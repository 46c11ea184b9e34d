"""The network with whole parameters in place of those that are divided among ranks (DTensor, FSDP2)."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.state import tensors

_OF_FSDP = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "__composable_api")  # attributes that start so


def unsharded(model: nn.Module, ranks: Ranks) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy with whole parameters, and what was changed; the model itself where no parameter is divided.

    Args:
        model: left as it is.
        ranks: the processes; all those of the parameters' device mesh come here.

    Raises:
        ValueError: there are divided parameters, and no process group to put them together with.
    """
    divided = {name: tensor for name, tensor in tensors(model).items() if hasattr(tensor, "full_tensor")}
    if not divided:
        return model, ()
    if ranks is ALONE:
        raise ValueError(
            f"{next(iter(divided))} is divided among ranks, and all of them must help to put it together: call this on "
            "every rank with process_group=torch.distributed.group.WORLD"
        )
    ranks.gathered(None)  # nobody is missing; what follows waits for as long as the mesh's own timeout
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
    """Without what `torch.distributed` put on the modules: classes that cannot be copied, hooks, its own state."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        for module, kind, own in before:
            if _distributed(kind.__bases__[0]):  # FSDP puts itself before the module's own class
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
