"""One operation of a recorded pass."""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nac_gpu.tracing.atoms import Labels


@dataclass(frozen=True)
class Call:
    """One operation of the pass.

    Attributes:
        func: the ATen operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        outputs: the tensors that it returned, flattened.
    """

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]

    @property
    def name(self) -> str:
        """The operation's name: see `name_of`."""
        return name_of(self.func)

    @property
    def in_place(self) -> bool:
        """Whether the operation writes into one of its arguments."""
        return self.func._schema.is_mutable

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, flattened."""
        return [value for value in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(value, Tensor)]

    @cached_property
    def written(self) -> list[Tensor]:
        """The arguments that the operation writes into."""
        changed = [argument.name for argument in self.func._schema.arguments if argument.is_write]
        return [self.given[name] for name in changed if isinstance(self.given.get(name), Tensor)]

    @cached_property
    def given(self) -> dict[str, Any]:
        """All arguments by name."""
        names = [argument.name for argument in self.func._schema.arguments]
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    def default(self, name: str) -> Any:
        """The value of an argument that is not given; None if the operation has no such argument."""
        return next((a.default_value for a in self.func._schema.arguments if a.name == name), None)

    def each(self, labels: Labels) -> list[Labels]:
        """The same labels for every output."""
        return [labels] * len(self.outputs)


@cache
def name_of(func: torch._ops.OpOverload) -> str:
    """An operation's name; the in-place form has the same (`relu` for `relu_`)."""
    name = func.overloadpacket.__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
