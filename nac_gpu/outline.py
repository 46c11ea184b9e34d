"""A forward pass in outline: every operation is seen, but products are not computed.

The record asks which operations read which tensors, and of what shape. Products, and all that follows from them, give
memory that is never filled: only their shapes are worked out, on PyTorch's meta device. Sizes, positions and masks are
computed as ever. Once an open value would decide what happens next (a number that the host reads, a mask, an index),
`ValuesNeededError` says that the pass has to be made with all values.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry


class ValuesNeededError(RuntimeError):
    """What happens next depends on values that were not computed."""


class Outline:
    """Runs operations without their arithmetic.

    Attributes:
        failed: values were needed. The model's own code may have caught the error.
    """

    def __init__(self) -> None:
        self.failed = False
        self._open: dict[int, Tensor] = {}  # by storage, tensors without values; held, so that ids stay their own

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operation returns, with or without values."""
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        unknown = [tensor for tensor in tensors if tensor.untyped_storage()._cdata in self._open]
        movement = func.is_view or torch.Tag.inplace_view in func.tags
        if movement or not (unknown or func._overloadpacket in flop_registry):
            return func(*args, **kwargs)
        try:
            return self._outlined(func, args, kwargs, tensors, unknown)
        except Exception as error:
            self.failed = True
            raise ValuesNeededError(str(func)) from error

    def _outlined(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], unknown: list[Tensor]) -> Any:
        if any(not tensor.is_floating_point() for tensor in unknown):
            raise ValuesNeededError("a mask or an index")
        device = (unknown or tensors)[0].device
        with _disable_current_modes():
            given, named = pytree.tree_map_only(Tensor, _shape_of, (args, kwargs))
        if named.get("device") is not None:
            named["device"] = torch.device("meta")
        out = func(*given, **named)
        if func._schema.is_mutable:
            if out is not given[0] or out.shape != args[0].shape:
                raise ValuesNeededError("more is changed than the values of the first argument")
            self._open[args[0].untyped_storage()._cdata] = args[0]
            return args[0]
        if not all(isinstance(value, Tensor) for value in pytree.tree_leaves(out)):
            raise ValuesNeededError("a number")
        with _disable_current_modes():
            return pytree.tree_map_only(Tensor, lambda value: self._unfilled(value, device), out)

    def _unfilled(self, like: Tensor, device: torch.device) -> Tensor:
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        self._open[tensor.untyped_storage()._cdata] = tensor
        return tensor


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
