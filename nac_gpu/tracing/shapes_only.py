"""A forward pass that computes shapes only: every operation is recorded, but matrix products are not computed.

Recording only needs to know which operations read which tensors, and their shapes. Products, and everything computed
from them, return uninitialised memory; their shapes come from PyTorch's meta device. Sizes, positions and masks are
computed as usual. If an uncomputed value would decide what happens next (a number read by the host, a mask, an index),
`ValuesNeededError` says that the pass must be repeated with all values.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry


class ValuesNeededError(RuntimeError):
    """The next step of the model depends on values that were not computed."""


class Outline:
    """Runs operations, but computes only the shapes of products and of everything that depends on them.

    Attributes:
        failed: whether uncomputed values were needed. Needed because the model's own code may catch the error.
    """

    def __init__(self) -> None:
        self.failed = False
        # Storages without values, by id. The weak reference lets their memory be freed, but keeps the id from being
        # reused for another storage.
        self._open: dict[int, StorageWeakRef] = {}
        self._known: dict[Any, Any] = {}  # cache of result shapes, because PyTorch computes some of them in slow Python

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation, with or without values."""
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
        if any(not (tensor.is_floating_point() or tensor.is_complex()) for tensor in unknown):
            raise ValuesNeededError("a mask or an index")
        device = (unknown or tensors)[0].device
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("meta")}
        leaves, form = pytree.tree_flatten((args, kwargs))
        given = tuple(_Shape.of(value) if isinstance(value, Tensor) else value for value in leaves)
        if func._overloadpacket in flop_registry or _is_composite(func):
            out = _shapes_of_result(func, given, form)  # not cached, so that the FLOP counter sees every call
        else:
            with _disable_current_modes():
                key = (func, given, str(form))
                if key not in self._known:
                    self._known[key] = _shapes_of_result(func, given, form)
                out = self._known[key]
        if func._schema.is_mutable:
            if out != given[0]:
                raise ValuesNeededError("more is changed than the values of the first argument")
            self._keep_open(args[0])
            return args[0]
        with _disable_current_modes():
            return pytree.tree_map_only(_Shape, lambda shape: self._unfilled(shape, device), out)

    def _unfilled(self, shape: "_Shape", device: torch.device) -> Tensor:
        tensor = shape.empty(device)
        self._keep_open(tensor)
        return tensor

    def _keep_open(self, tensor: Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._open[reference.cdata] = reference


@dataclass(frozen=True)  # not a named tuple, which pytree would flatten
class _Shape:
    """Sizes, strides and dtype of a tensor without values."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> "_Shape":
        return _Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=device)


def _shapes_of_result(func: Any, given: tuple[Any, ...], form: pytree.TreeSpec) -> Any:
    """The result of an operation, with a `_Shape` in place of every tensor, from its flattened arguments."""
    meta = torch.device("meta")
    with _disable_current_modes():
        leaves = [value.empty(meta) if isinstance(value, _Shape) else value for value in given]
    args, kwargs = pytree.tree_unflatten(leaves, form)
    out = func(*args, **kwargs)
    if not all(isinstance(value, Tensor) for value in pytree.tree_leaves(out)):
        raise ValuesNeededError("a number")
    return pytree.tree_map_only(Tensor, _Shape.of, out)


@cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    """Whether the operation is a composite of other operations, which may include products."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
