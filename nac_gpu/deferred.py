"""Tensors whose values are not in memory: each says how its values are made, and makes them whenever they are read.

A model of such tensors runs with no more of its weights in memory than one operation reads. Merging puts one more step
behind what makes a tensor, so nothing has to be kept until all groups that touch it are merged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_aten = torch.ops.aten
#: Operations that give the same values, which are new ones each time anyhow.
_SAME = frozenset({_aten.alias, _aten.clone, _aten.detach})
#: Operations that wait until the values of their result are read; all others read them now.
_WAITING = frozenset({_aten.index_select, _aten._to_copy})


class Deferred(Tensor):
    """A tensor that makes its values anew each time an operation reads them, and keeps none."""

    _make: Callable[[], Tensor]  # gives the values
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def of(cls, make: Callable[[], Tensor], like: Tensor, device: torch.device) -> "Deferred":
        """A deferred tensor.

        Args:
            make: gives the values, in memory of their own.
            like: a tensor of the same shape and dtype.
            device: where the values will be.
        """
        made = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)
        made._make = make
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Deferred({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def load(self) -> Tensor:
        """The values, as an ordinary tensor."""
        return self._make()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check_reads_only(func, args, kwargs)
        first = args[0] if args else None
        if func.overloadpacket in _SAME and isinstance(first, Deferred):
            return cls.of(first._make, _on_meta(first), first.device)
        if func.overloadpacket in _WAITING and isinstance(first, Deferred):
            if kwargs.get("device") == first.device:
                kwargs = {name: value for name, value in kwargs.items() if name != "device"}
            if kwargs.get("device") is None:
                like = func(*pytree.tree_map(_on_meta, args), **kwargs)
                return cls.of(lambda: func(*pytree.tree_map(loaded, args), **kwargs), like, first.device)
        return func(*pytree.tree_map(loaded, args), **pytree.tree_map(loaded, kwargs))


def after(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(tensor)`; of a deferred tensor it is deferred.

    Args:
        tensor: not changed.
        function: gives the same each time, for tensors on any device.
    """
    if not isinstance(tensor, Deferred):
        return function(tensor)
    return Deferred.of(lambda: function(tensor.load()), function(_on_meta(tensor)), tensor.device)


def loaded(value: Any) -> Any:
    """The values of a deferred tensor; anything else as it is."""
    return value.load() if isinstance(value, Deferred) else value


def _on_meta(value: Any) -> Any:
    """A tensor's shape and dtype without values; anything else as it is."""
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _check_reads_only(func: Any, args: Any, kwargs: Any) -> None:
    """What would be written into values that nobody keeps would be lost."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(given.get(argument.name), Deferred):
            raise RuntimeError(
                f"{func.overloadpacket.__name__} writes into a tensor of the shape "
                f"{tuple(given[argument.name].shape)} whose values are in a file, where they stay as they are; save "
                "the compressed model with nac_gpu.save, and train what nac_gpu.load reads"
            )
