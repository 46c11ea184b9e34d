"""Gradients where the model's own code switches them off, as for a frozen backbone."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class GradientsKept(TorchFunctionMode):
    """A context in which `torch.no_grad()` has no effect: gradients stay on if they are on.

    Not for optimizers, which switch gradients off for good reasons. `torch.inference_mode()` cannot be overruled.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Skip the call that switches gradients off; pass on every other one."""
        if func is torch._C._set_grad_enabled and not args[0]:
            return None
        return func(*args, **(kwargs or {}))
