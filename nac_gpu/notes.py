"""What the record notes down while it watches a forward pass: the words in which the rules speak.

A rule is a function `(notes, call) -> labels of the outputs`. It reads the labels of what the operation reads, and
notes equations, roles, productions and freezes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nac_gpu.labels import MEAN, SUM, Atoms, Labels, varying


@dataclass(frozen=True)
class Production:
    """One use of a parameter that makes channels: a matrix product, a convolution, an embedding.

    Attributes:
        atoms: int64 [channels], the atoms of the weight that name the channels.
        bias: int64 [channels] atoms of the bias added in the same operation, or None.
    """

    atoms: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Normalisation:
    """One BatchNorm in eval mode.

    Attributes:
        channels: int64 [channels] atoms that it normalises.
        tensors: names of weight, bias, running mean and running variance (None where there is none).
        eps: added to the variance.
        source: number of the production whose bare result it normalises, or None.
    """

    channels: Tensor
    tensors: tuple[str | None, str | None, str | None, str | None]
    eps: float
    source: int | None


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
        """Its name, the same for the in-place form (`relu_` is `relu`)."""
        name = self.func.overloadpacket.__name__
        return name[:-1] if name.endswith("_") and not name.endswith("__") else name

    @property
    def in_place(self) -> bool:
        """It writes into one of its arguments."""
        return self.func._schema.is_mutable

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it reads, flattened."""
        return [value for value in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(value, Tensor)]

    @property
    def given(self) -> dict[str, Any]:
        """All arguments by name."""
        names = [argument.name for argument in self.func._schema.arguments]
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    def each(self, labels: Labels) -> list[Labels]:
        """The same labels for every output."""
        return [labels] * len(self.outputs)


@dataclass
class Notes:
    """Everything noted so far.

    Attributes:
        atoms: filled by the rules.
        name_of: the name of a parameter or buffer of the model, None for other tensors.
        labels_of: the labels of a tensor that an operation reads.
        module: the name of the module that is running.
        productions: in the order of the pass.
        normalisations: in the order of the pass.
        uses: how often a production's bare result is read by anything but movement.
    """

    atoms: Atoms
    name_of: Callable[[Tensor], str | None]
    labels_of: Callable[[Tensor], Labels]
    module: Callable[[], str]
    productions: list[Production] = field(default_factory=list)
    normalisations: list[Normalisation] = field(default_factory=list)
    uses: dict[int, int] = field(default_factory=dict)

    def freeze(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Freeze every label of these tensors, with the running module's name in the reason."""
        for tensor in tensors:
            self.freeze_planes(self.labels_of(tensor).planes, reason)

    def freeze_planes(self, planes: Sequence[Tensor], reason: str) -> None:
        """Freeze these atoms, with the running module's name in the reason."""
        for plane in planes:
            self.atoms.freeze(plane, f"{reason} in {self.module()}")

    def count_use(self, tensors: Iterable[Tensor]) -> None:
        """These tensors are read by an operation that does more than move them."""
        for source in {self.labels_of(tensor).source for tensor in tensors}:
            if source is not None:
                self.uses[source] = self.uses.get(source, 0) + 1

    def along(self, tensor: Tensor, dim: int) -> Tensor | None:
        """The atoms along one dimension, int64 [size]; None if unlabelled, or if they differ elsewhere too (frozen)."""
        dim %= tensor.ndim
        for plane in self.labels_of(tensor).planes:
            dims = varying(plane)
            single = not dims and tensor.shape[dim] == 1 and self._home(plane, tensor) == dim
            if dims == (dim,) or single:
                return plane.flatten()
            if dim in dims:
                self.freeze_planes([plane], "channels are laid out in a way that is not known")
        return None

    def _home(self, plane: Tensor, tensor: Tensor) -> int:
        """Where a plane of a single atom belongs: a parameter's own dimension, else the channel dimension 1."""
        if self.labels_of(tensor).parameter:
            return self.atoms.slot_at(int(plane.flatten()[0])).dim
        return min(1, tensor.ndim - 1)

    def meet(self, left: Tensor, right: Tensor) -> Tensor:
        """One plane for two operands of an elementwise operation; channels that meet are united."""
        left, right = torch.broadcast_tensors(left, right)
        both = (left >= 0) & (right >= 0)
        self.atoms.unite(left[both], right[both])
        self.freeze_planes([left[~both], right[~both]], "channels meet values that are not channels")
        return torch.where(left >= 0, left, right)

    def check_context(self, tensor: Tensor, plane: Tensor) -> None:
        """An unlabelled operand that differs along labelled channels keeps them from being merged.

        Args:
            tensor: the operand.
            plane: of the channels, with as many dimensions as the result.
        """
        offset = plane.ndim - tensor.ndim
        labelled = {dim + offset for p in self.labels_of(tensor).planes for dim in varying(p)}
        for dim in set(varying(plane)) - labelled:
            own = dim - offset
            if own >= 0 and tensor.shape[own] > 1 and tensor.stride(own) != 0:  # stride 0: one value, expanded
                self.freeze_planes([plane], "channels meet values that differ between them and are not channels")

    def per_channel(self, atoms: Tensor, channels: Tensor) -> None:
        """A parameter with one value (or kernel) for each channel: both int64 [channels]."""
        self.atoms.role(atoms, MEAN)
        known = channels >= 0
        self.atoms.unite(atoms[known], channels[known])
        self.freeze_planes([atoms[~known]], "acts on values that are not channels")

    def produce(self, atoms: Tensor, bias: Tensor | None) -> int:
        """Channels are made, named by these atoms [channels]; gives the production's number."""
        self.atoms.role(atoms[atoms >= 0], MEAN)
        bias_atoms = self.along(bias, -1) if bias is not None and self.labels_of(bias).parameter else None
        self.productions.append(Production(atoms, bias_atoms))
        return len(self.productions) - 1

    def contract(self, a: Tensor, in_a: Tensor | None, b: Tensor, in_b: Tensor | None) -> None:
        """A sum over a dimension that two tensors share: a consumer, where one of them is a parameter.

        Args:
            a: a tensor.
            in_a: its atoms along the shared dimension.
            b: the other one.
            in_b: its atoms along the shared dimension.
        """
        for weight, columns, value, channels in ((b, in_b, a, in_a), (a, in_a, b, in_b)):
            if columns is None or not self.labels_of(weight).parameter or self.labels_of(value).parameter:
                continue
            self.atoms.role(columns[columns >= 0], SUM)
            if channels is None:
                self.freeze_planes([columns], "reads values that are not channels")
                return
            known = (channels >= 0) & (columns >= 0)
            self.atoms.unite(channels[known], columns[known])
            self.freeze_planes([columns[~known]], "reads values that are not channels")
            self.freeze_planes([channels[~known]], "read by values that are not a parameter")
            return
        atoms = [found for found in (in_a, in_b) if found is not None]
        self.freeze_planes(atoms, "multiplied by values that are not a parameter")
