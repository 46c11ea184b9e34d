"""Lazy tensors: each holds a function that produces its values, and calls it whenever an operation reads them.

A model of such tensors runs with only the weights in memory that the current operation reads. Merging appends a step to
the function, so a weight need not stay in memory until all groups that contain it are merged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_aten = torch.ops.aten
_SAME = frozenset({_aten.alias, _aten.detach})
#: Operations, besides views, whose results are deferred as well. All other operations read the values at once.
_WAITING = frozenset({_aten.index_select, _aten._to_copy, _aten._unsafe_view, _aten.clone})


class Deferred(Tensor):
    """A tensor that produces its values anew each time an operation reads them, and stores none."""

    _make: Callable[[], Tensor]  # returns the values
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def of(cls, make: Callable[[], Tensor], like: Tensor, device: torch.device) -> "Deferred":
        """A deferred tensor.

        Args:
            make: returns the values, in memory that nothing else uses.
            like: a tensor of the same shape, strides and dtype.
            device: of the values.
        """
        strides = like.stride()
        made = Tensor._make_wrapper_subclass(cls, like.shape, strides=strides, dtype=like.dtype, device=device)
        made._make = make
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Deferred({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def load(self) -> Tensor:
        """The values, as an ordinary tensor."""
        return self._make()

    def _again(self) -> "Deferred":
        """Another deferred tensor with the same function; it keeps this one even if `data` of the original is set."""
        return Deferred.of(self._make, self, self.device)

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As for any tensor; `module.to(...)` sets it."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Deferred):
            raise _written("setting data", self)
        Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
        self._make = value._make

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check_reads_only(func, args, kwargs)
        first = args[0] if args else None
        if isinstance(first, Deferred) and func.overloadpacket in _SAME:
            return first._again()
        if isinstance(first, Deferred) and (func.is_view or func.overloadpacket in _WAITING):
            return cls._waiting(func, first, args, kwargs)
        return func(*pytree.tree_map(loaded, args), **pytree.tree_map(loaded, kwargs))

    @classmethod
    def _waiting(cls, func: Any, first: "Deferred", args: Any, kwargs: Any) -> Any:
        """The results of an operation as deferred tensors, which run it when they are read."""
        given = kwargs.get("device")
        device = first.device if given is None else torch.device(given)
        on_meta = {**kwargs, "device": torch.device("meta")} if given is not None else kwargs
        likes, form = pytree.tree_flatten(func(*pytree.tree_map(_on_meta, args), **on_meta))
        args = pytree.tree_map_only(Deferred, cls._again, args)

        def make(number: int) -> Tensor:
            return pytree.tree_leaves(func(*pytree.tree_map(loaded, args), **kwargs))[number]

        made = [cls.of(lambda number=number: make(number), like, device) for number, like in enumerate(likes)]
        return pytree.tree_unflatten(made, form)


def after(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(tensor)`; deferred if the tensor is.

    Args:
        tensor: not changed.
        function: deterministic, for tensors on any device.
    """
    if not isinstance(tensor, Deferred):
        return function(tensor)
    make = tensor._make
    return Deferred.of(lambda: function(make()), function(_on_meta(tensor)), tensor.device)


def loaded(value: Any) -> Any:
    """The values of a deferred tensor; anything else unchanged."""
    return value.load() if isinstance(value, Deferred) else value


def _on_meta(value: Any) -> Any:
    """A meta tensor with a tensor's shape, strides and dtype; anything else unchanged."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _check_reads_only(func: Any, args: Any, kwargs: Any) -> None:
    """Reject operations that write into a deferred tensor: it stores no values, so the result would be lost."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for tensor in pytree.tree_leaves(given.get(argument.name)):
                if isinstance(tensor, Deferred):
                    raise _written(func.overloadpacket.__name__, tensor)


def _written(what: str, tensor: Tensor) -> RuntimeError:
    return RuntimeError(
        f"{what} writes into a tensor of the shape {tuple(tensor.shape)} whose values are in a file that is only read; "
        "save the compressed model with nac_gpu.save, and train the model that nac_gpu.load returns"
    )
