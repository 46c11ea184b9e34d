"""The notes of a recorded forward pass, and the operations with which rules write them.

A rule is a function `(notes, call) -> labels of the outputs`. It looks up the labels of an operation's inputs, and
notes equations, roles, productions and freezes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nac_gpu.tracing.atoms import (
    BOTH,
    CHANNELS,
    FILLED,
    MEAN,
    NONE,
    UNITS,
    Atoms,
    Labels,
    Separation,
    numbered,
    numbers_along,
    varying,
)


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
        source: number of the production whose direct output it normalises, or None.
    """

    channels: Tensor
    tensors: tuple[str | None, str | None, str | None, str | None]
    eps: float
    source: int | None


@dataclass
class Notes:
    """Everything noted so far in a recorded pass.

    Attributes:
        atoms: atoms, equations, roles and separations.
        name_of: returns the name of a parameter or buffer of the model, None for other tensors.
        labels_of: returns the labels of a tensor.
        put: stores the labels of a tensor.
        module: returns the name of the module that is running.
        productions: in the order of the pass.
        normalisations: in the order of the pass.
        uses: how many operations, except those that only move data, read the output of each production.
        shapers: the module that gave channels more dimensions, by the first atom of their slot.
        changed: how often the labels of a tensor were changed by writing into it.
        read: after which of these changes a view of the tensor was read last.
    """

    atoms: Atoms
    name_of: Callable[[Tensor], str | None]
    labels_of: Callable[[Tensor], Labels]
    put: Callable[[Tensor, Labels], None]
    module: Callable[[], str]
    productions: list[Production] = field(default_factory=list)
    normalisations: list[Normalisation] = field(default_factory=list)
    uses: dict[int, int] = field(default_factory=dict)
    shapers: dict[int, str] = field(default_factory=dict)
    changed: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    read: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def planes(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The planes of a tensor."""
        return self.labels_of(tensor).planes

    def freeze(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Freeze all atoms of these tensors; the reason gets the running module's name."""
        for tensor in tensors:
            self.freeze_planes(self.planes(tensor), reason)

    def awake(self, tensors: Iterable[Tensor], chosen: Callable[[Tensor], bool] | None = None) -> "Notes":
        """The same notes, in which the latent planes of some tensors are labels of parameters.

        Args:
            tensors: operands of one operation.
            chosen: whether a plane becomes a label; by default all do.
        """
        found: dict[int, Labels] = {}
        for tensor in tensors:
            labels = self.labels_of(tensor)
            planes = tuple(plane for plane in labels.latent if chosen is None or chosen(plane))
            if planes:
                found[id(tensor)] = replace(labels, planes=planes, latent=(), parameter=True)
        known = self.labels_of
        return replace(self, labels_of=lambda tensor: found.get(id(tensor)) or known(tensor)) if found else self

    def freeze_latent(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Freeze what is latent in these tensors; the reason gets the running module's name."""
        for tensor in tensors:
            self.freeze_planes(self.labels_of(tensor).latent, reason)

    def freeze_planes(self, planes: Iterable[Tensor], reason: str, level: int = BOTH) -> None:
        """Freeze the atoms of these planes; the reason gets the running module's name."""
        for plane in planes:
            self.atoms.freeze(plane, f"{reason} in {self.module()}", level)

    def separate(self, plane: Tensor, dims: Sequence[int], reason: str, level: int = BOTH) -> None:
        """Keep atoms apart along these dimensions; the reason gets the running module's name."""
        self.atoms.separate(plane, dims, f"{reason} in {self.module()}", level)

    def count_use(self, tensors: Iterable[Tensor]) -> None:
        """Note that an operation that does more than move data reads these tensors."""
        for source in {self.labels_of(tensor).source for tensor in tensors}:
            if source is not None:
                self.uses[source] = self.uses.get(source, 0) + 1

    def along(self, tensor: Tensor, dim: int) -> Tensor | None:
        """The atoms along one dimension, int64 [size]; None if it has no labels.

        If their plane also varies along other dimensions, all atoms at one position of this dimension are one channel.
        Where channels merge along another dimension (see `inner_axis`), the positions of this one are units.
        """
        dim %= tensor.ndim
        for plane in self.planes(tensor):
            dims = varying(plane)
            if dims == (dim,) or (not dims and tensor.shape[dim] == 1 and self._home(plane, tensor) == dim):
                return plane.flatten()
            if dim in dims:
                others = set(dims) - {dim}
                if inner_axis(plane) != dim:
                    reason = "each channel is spread over other dimensions"
                    return self.mix([plane], others, reason, shaped=True)[0].flatten()
                first = plane
                for other in others:
                    first = first.narrow(other, 0, 1)
                self.atoms.unite(plane, first, CHANNELS)
                self.freeze_planes([plane], "channels are laid out in a way that is not known", UNITS)
                return first.flatten()
        return None

    def _home(self, plane: Tensor, tensor: Tensor) -> int:
        """The dimension of a plane with a single atom: that of the parameter, else the channel dimension 1."""
        if self.labels_of(tensor).parameter:
            return self.atoms.slot_at(int(plane.flatten()[0])).dim
        return min(1, tensor.ndim - 1)

    def regroup(self, before: Tensor, after: Tensor) -> None:
        """Channels reshaped from C to (h, d): all rows h get the same assignment along d, as the code keeps h fixed."""
        dims = varying(after)
        if len(dims) > max(1, len(varying(before))):
            self.shapers[self.atoms.slot_at(int(after.max())).first] = self.module()
            first = after
            for dim in dims[:-1]:
                first = first.narrow(dim, 0, 1)
            self.atoms.unite(first, after, CHANNELS)

    def mix(
        self,
        planes: Iterable[Tensor],
        dims: Iterable[int],
        reason: str,
        level: int = BOTH,
        pending: list[Separation] | None = None,
        shaped: bool = False,
    ) -> list[Tensor]:
        """Note that an operation combines values along these dimensions, as softmax or a mean does.

        Channels that vary along these dimensions are separated. If their plane also varies along other dimensions, the
        rows along those are units, which can still be merged as a whole. If channels merge along one of the others, in
        the same way at all positions of these dimensions, they still do.

        Args:
            planes: of one tensor.
            dims: along which values are combined.
            reason: shown to the user.
            level: of the separation; `UNITS` if the caller notes the equations between channels itself.
            pending: a list that receives the separations if they take effect only once the result is read.
            shaped: units belong to the module that gave their channels more dimensions, not to the running one.

        Returns:
            The planes that remain when these dimensions are reduced: those that do not vary along them, units, and
            channels that merge along another dimension.
        """
        mixed, left = set(dims), []
        for plane in planes:
            own = [dim for dim in varying(plane) if dim in mixed]
            if not own:
                left.append(plane)
                continue
            along = len(own) < len(varying(plane)) and level == BOTH and inner_axis(plane) not in own
            apart = UNITS if along else level
            if pending is None:
                self.separate(plane, own, reason, apart)
            else:
                pending.append(self.atoms.separation(plane, own, f"{reason} in {self.module()}", apart))
            if len(own) == len(varying(plane)):
                continue
            largest = plane.amax(own, keepdim=True)  # some of its positions may have no label
            known, row = torch.unique(largest, return_inverse=True)
            slot, module = self.atoms.slot_at(int(plane.max())).first, self.module()
            units = self.atoms.units(len(known), self.shapers.get(slot, module) if shaped else module)[row]
            units = units.masked_fill(largest < 0, NONE)
            self.atoms.unite(plane, units, UNITS)
            if along:
                self.atoms.unite(plane, largest, CHANNELS)
            left.append(largest if along else units)
        return left

    def meet(self, left: Tensor, right: Tensor) -> Tensor:
        """Combine two planes that vary along the same dimensions into one; atoms at the same position are united."""
        left, right = torch.broadcast_tensors(left, right)
        both = (left >= 0) & (right >= 0)
        self.atoms.unite(left[both], right[both])
        alone = [left[~both & (right != FILLED)], right[~both & (left != FILLED)]]
        self.freeze_planes(alone, "channels meet values that are not channels")
        self._fill_up(left, right == FILLED)
        self._fill_up(right, left == FILLED)
        return torch.where(both, left, torch.maximum(left, right))

    def _fill_up(self, plane: Tensor, filled: Tensor) -> None:
        """Channels meet a constant that fills up fewer channels: they merge among themselves, at each end in step.

        The constant is the same for all of them, so it keeps none of them apart. But the code that adds it puts equal
        numbers at both ends, or a number at one end, so channels of different places must not merge with each other.

        Args:
            plane: of the channels.
            filled: bool, of the same shape: where the constant is.
        """
        filled = filled & (plane >= 0)
        if not bool(filled.any()):
            return
        if len(varying(plane)) != 1:
            self.freeze_planes([plane[filled]], "channels meet values that are not channels")
            return
        places = filled.flatten().nonzero().flatten()
        ends = (places.diff() != 1).nonzero().flatten() + 1
        parts = [plane.flatten()[part] for part in places.tensor_split(ends)]
        if len({len(part) for part in parts}) == 1:
            parts = [torch.stack(parts)]
            self.atoms.unite(parts[0], parts[0][:1])
        for part in parts:
            self.separate(part, [], "channels are filled up with a constant")

    def join(self, planes: Iterable[Tensor]) -> list[Tensor]:
        """The planes of an elementwise result, from the planes of all operands aligned to its dimensions."""
        found: dict[tuple[int, ...], Tensor] = {}
        for plane in planes:
            dims = varying(plane)
            found[dims] = self.meet(found[dims], plane) if dims in found else plane
        for dims in sorted(found, key=len):
            if dims not in found:
                continue
            plane = found[dims]
            over = [other for other in found if other != dims and set(other) & set(dims)]
            if not over:
                continue
            del found[dims]
            larger = next((other for other in over if set(other) > set(dims)), None)
            if larger is None:
                self.freeze_planes([plane, *(found.pop(other) for other in over)], "layouts of channels differ")
            else:
                self._absorb(plane, found[larger])
        return list(found.values())

    def _absorb(self, small: Tensor, large: Tensor) -> None:
        """Unite a plane with one that varies along more dimensions.

        If the small plane varies along the axis of `inner_axis`, its channels share an assignment with the channels of
        the large one; otherwise with its units.
        """
        dims, reason = varying(small), "channels meet values that are laid out in another way"
        if self.is_units(small):
            self.atoms.unite(small, large, UNITS)
            return
        level = CHANNELS if inner_axis(large) in dims else UNITS
        self.atoms.unite(small, large, level)
        self.freeze_planes([small], reason, BOTH - level)
        self.separate(large, dims, reason, BOTH - level)

    def is_units(self, plane: Tensor) -> bool:
        """Whether the plane's atoms are units, not channels."""
        return not self.atoms.slot_at(int(plane.max())).tensor

    def check_context(self, tensor: Tensor, plane: Tensor) -> list[int]:
        """Separate channels if an operand without labels has different values for them.

        Args:
            tensor: the operand.
            plane: of the channels, with as many dimensions as the result.

        Returns:
            The dimensions of the plane along which the operand has different values.
        """
        offset = plane.ndim - tensor.ndim
        labelled = {dim + offset for own in self.planes(tensor) for dim in varying(own)}
        dims = [dim for dim in varying(plane) if dim not in labelled and dim >= offset]
        reason = "channels meet values that differ between them and are not channels"
        return self.keep_apart(plane, dims, tensor, [dim - offset for dim in dims], reason)

    def keep_apart(
        self, plane: Tensor, dims: Sequence[int], tensor: Tensor, places: Sequence[int], reason: str
    ) -> list[int]:
        """Separate channels where the values of a tensor differ, unless they only repeat values.

        Args:
            plane: of the channels.
            dims: dimensions of the plane.
            tensor: without labels along these dimensions.
            places: the dimensions of the tensor that meet these dimensions.
            reason: shown to the user.

        Returns:
            The dimensions of the plane along which channels were separated.
        """
        labels = self.labels_of(tensor)
        numbers = numbered(tensor, labels)
        pairs = [pair for pair in zip(dims, places, strict=True) if any(pair[1] in varying(own) for own in numbers)]
        differs = [dim for dim, _ in pairs]
        if not differs:
            return []
        if labels.repeats is None:
            self.separate(plane, differs, reason)
            return differs
        own = numbers_along(numbers, [place for _, place in pairs])
        shape = [1] * plane.ndim
        for dim, size in zip(differs, own.shape, strict=True):
            shape[dim] = size
        found = self.atoms.separation_by(plane, own.reshape(shape), f"{reason} in {self.module()}")
        if not found.parts:
            return []
        self.atoms.separations.append(found)
        return differs

    def differs(self, tensor: Tensor, dim: int) -> bool:
        """Whether the values of a tensor may differ along a dimension: not if one value was expanded or repeated."""
        return any(dim in varying(plane) for plane in numbered(tensor, self.labels_of(tensor)))

    def per_channel(self, atoms: Tensor, channels: Tensor) -> None:
        """Note a parameter with one value (or kernel) per channel, by its and the channels' atoms, int64 [channels]."""
        self.atoms.role(atoms, MEAN)
        self.atoms.unite(atoms, channels)
        self.freeze_planes([atoms[channels < 0]], "acts on values that are not channels")

    def produce(self, atoms: Tensor, bias: Tensor | None) -> int:
        """Note a production of channels, named by these atoms, int64 [channels]; returns the production's number."""
        atoms = atoms.flatten()
        self.atoms.role(atoms, MEAN)
        bias_atoms = self.along(bias, -1) if bias is not None and self.labels_of(bias).parameter else None
        self.productions.append(Production(atoms[atoms >= 0], bias_atoms))
        return len(self.productions) - 1


def unfilled(plane: Tensor) -> Tensor:
    """The plane without the marks of positions that were filled with a constant."""
    return plane.clamp_min(NONE)


def aligned(plane: Tensor, ndim: int) -> Tensor:
    """The plane with leading dimensions of size 1 added, as in broadcasting to `ndim` dimensions."""
    return plane.reshape((1,) * (ndim - plane.ndim) + plane.shape)


def inner_axis(plane: Tensor) -> int:
    """The axis along which channels merge if a plane varies along several: the one with the smallest step of atoms."""

    def step(dim: int) -> int:
        if bool((plane < 0).any()):  # padded, so that the first may be no channels
            near, far = plane.narrow(dim, 0, plane.shape[dim] - 1), plane.narrow(dim, 1, plane.shape[dim] - 1)
            steps = (far - near)[(near >= 0) & (far >= 0) & (near != far)].abs()
            return int(steps.min()) if len(steps) else plane.numel()
        return abs(int(plane.select(dim, 1).flatten()[0] - plane.flatten()[0])) or plane.numel()

    return min(varying(plane), key=step)
