"""Tracks channels through a forward pass: atoms in a union-find, and planes of atoms that label tensors.

An *atom* is one index of one dimension of a parameter or buffer, `(tensor name, dim, index)`, numbered by an int64. For
example, `("0.weight", 0, 5)` is row 5 of the first layer: its neuron 5. A *slot* is one `(tensor name, dim)`, a
contiguous range of atoms. A *plane* is an int64 tensor of atoms that broadcasts to the tensor it describes (size 1
along every dimension where it does not vary); `NONE` marks positions without a label, and `FILLED` those that were
filled with one constant.

Where the model reshapes channels from C to (h, d), they can be merged along either axis. At the level `CHANNELS`,
channels merge along d, with the same assignment in all rows h. At the level `UNITS`, whole rows h merge: attention
heads, groups of a convolution. Each equation holds at one of the levels or at both. A unit has an atom of its own, in a
slot without a tensor.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NONE = -1
FILLED = -2
MEAN = 1  # role of a slot: merged neurons keep the mean (rows of a producer, per-channel parameters)
SUM = 2  # role of a slot: merged neurons are summed (columns of a consumer), Eq. (9) of the paper
CHANNELS = 1
UNITS = 2
BOTH = CHANNELS | UNITS


@dataclass(frozen=True)
class Labels:
    """What is known about one tensor of the forward pass.

    Attributes:
        planes: each an int64 tensor broadcastable to the tensor's shape, no two varying along the same dimension.
        parameter: the tensor is a parameter, or a view or rearrangement of one.
        source: number of the production whose output this tensor is, unchanged except for views and rearrangements;
            None for all other tensors.
        uniform: the tensor was created in the pass with one constant value that does not depend on its size, such as
            the initial state of an LSTM.
        pending: separations that take effect once an operation reads the tensor. A mean that is computed but never
            used must not prevent merging.
        repeats: of a tensor without planes, planes of numbers: positions with the same numbers hold the same value,
            because it was expanded or repeated (see `nac_gpu.tracing.repeats`); None if only its strides tell.
        latent: planes of a tensor that was computed from buffers alone. They become labels where the tensor meets
            channels: a buffer may also be a mask or a table, whose dimensions are not channels.
        constant: the tensor was computed from parameters and buffers alone.
    """

    planes: tuple[Tensor, ...] = ()
    parameter: bool = False
    source: int | None = None
    uniform: bool = False
    pending: tuple["Separation", ...] = ()
    repeats: tuple[Tensor, ...] | None = None
    latent: tuple[Tensor, ...] = ()
    constant: bool = False


def compact(plane: Tensor) -> Tensor | None:
    """The plane with size 1 along every dimension where it does not vary; None if it has no label at all."""
    for dim in range(plane.ndim):
        if plane.stride(dim) == 0:  # expanded
            plane = plane.narrow(dim, 0, min(1, plane.shape[dim]))
    if not (plane >= 0).any():
        return None
    for dim in range(plane.ndim):
        if plane.shape[dim] > 1:
            first = plane.narrow(dim, 0, 1)
            if bool((plane == first).all()):
                plane = first
    return plane


def varying(plane: Tensor) -> tuple[int, ...]:
    """Dimensions along which a compact plane varies; none for a plane of a single atom."""
    return tuple(dim for dim, size in enumerate(plane.shape) if size > 1)


def plane_along(atoms: Tensor, dim: int, ndim: int) -> Tensor:
    """Atoms [size] as a plane that varies along one dimension."""
    shape = [1] * ndim
    shape[dim] = len(atoms)
    return atoms.reshape(shape)


def numbered(tensor: Tensor, labels: Labels) -> tuple[Tensor, ...]:
    """Planes of numbers: those of the labels, else one for each dimension, except where one value was expanded."""
    if labels.uniform:
        return ()
    if labels.repeats is not None:
        return labels.repeats
    dims = [dim for dim, size in enumerate(tensor.shape) if size > 1 and tensor.stride(dim)]
    return tuple(plane_along(torch.arange(tensor.shape[dim]), dim, tensor.ndim) for dim in dims)


def product(planes: Sequence[Tensor]) -> Tensor:
    """One plane of numbers that differ where those of any of the planes differ."""
    result = torch.zeros((), dtype=torch.int64)
    for plane in planes:
        both = result * (int(plane.max()) + 1) + plane
        result = both.unique(return_inverse=True)[1]
    return result


def numbers_along(planes: Iterable[Tensor], dims: Sequence[int]) -> Tensor:
    """Numbers at positions along these dimensions: the same where all values along the other dimensions are the same.

    Returns:
        int64, of the size of the tensor along these dimensions, in their order, and 1 where no plane varies.
    """
    result = torch.zeros([1] * len(dims), dtype=torch.int64)
    for plane in planes:
        rows = plane.movedim(tuple(dims), tuple(range(len(dims))))
        sizes = rows.shape[: len(dims)]
        if max(sizes) > 1:
            number = rows.reshape(sizes.numel(), -1).unique(dim=0, return_inverse=True)[1]
            result = product([result, number.reshape(sizes)])
    return result


@dataclass
class Slot:
    """One dimension of one parameter or buffer: atoms `first` to `first + size - 1`.

    Slots of units have an empty string as tensor, and `module` names the module that combines the units. `parameter` is
    not set for a buffer other than BatchNorm's statistics.
    """

    tensor: str
    dim: int
    first: int
    size: int
    module: str = ""
    parameter: bool = True


@dataclass
class Separation:
    """Atoms with different keys must not be merged with each other; atoms with the same key may be.

    Attributes:
        atoms: int64 [m].
        keys: int64 [m].
        reason: shown to the user.
        level: `CHANNELS`, `UNITS` or `BOTH`.
    """

    atoms: Tensor
    keys: Tensor
    reason: str
    level: int

    @property
    def parts(self) -> bool:
        """Whether it keeps some of its atoms apart from each other, and not only from all other atoms."""
        return bool((self.keys != self.keys[:1]).any())


@dataclass
class Atoms:
    """All atoms of a recorded pass with their roles, the equations between them, and separations with their reasons."""

    slots: list[Slot] = field(default_factory=list)
    separations: list[Separation] = field(default_factory=list)
    _firsts: list[int] = field(default_factory=list)  # first atom of each slot, ascending
    _by_name: dict[tuple[str, int], Slot] = field(default_factory=dict)
    _edges: list[tuple[Tensor, int]] = field(default_factory=list)
    _roles: list[tuple[Tensor, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many atoms there are."""
        return self.slots[-1].first + self.slots[-1].size if self.slots else 0

    def of(self, tensor: str, dim: int, size: int, *, parameter: bool = True) -> Tensor:
        """The atoms of a tensor's dimension, int64 [size]; the slot is created on first use."""
        key = (tensor, dim)
        if key not in self._by_name:
            self._by_name[key] = self._add(Slot(tensor, dim, self.count, size, parameter=parameter))
        slot = self._by_name[key]
        return torch.arange(slot.first, slot.first + slot.size)

    def units(self, size: int, module: str) -> Tensor:
        """New atoms for units that a module combines, int64 [size]."""
        slot = self._add(Slot("", 0, self.count, size, module))
        return torch.arange(slot.first, slot.first + size)

    def _add(self, slot: Slot) -> Slot:
        self.slots.append(slot)
        self._firsts.append(slot.first)
        return slot

    def slot_numbers(self) -> Tensor:
        """The number of the slot that each atom is in, int64 [count]."""
        sizes = torch.tensor([slot.size for slot in self.slots], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.slots)), sizes)

    def slot_at(self, atom: int) -> Slot:
        """The slot that an atom is in."""
        return self.slots[bisect_right(self._firsts, atom) - 1]

    def unite(self, left: Tensor, right: Tensor, level: int = BOTH) -> None:
        """Note elementwise that atoms share one assignment. The planes are broadcast; `NONE` in either is skipped."""
        left, right = torch.broadcast_tensors(left, right)
        different = (left != right) & (left >= 0) & (right >= 0)
        if bool(different.any()):
            self._edges.append((torch.stack([left[different], right[different]]), level))

    def role(self, atoms: Tensor, role: int) -> None:
        """Note that these atoms are used as `MEAN` or as `SUM`; atoms used as both cannot be merged."""
        atoms = atoms.flatten()
        self._roles.append((atoms[atoms >= 0], role))

    def separate(self, plane: Tensor, dims: Sequence[int], reason: str, level: int = BOTH) -> None:
        """Note that atoms at different positions along these dimensions must not be merged."""
        self.separations.append(self.separation(plane, dims, reason, level))

    @staticmethod
    def separation(plane: Tensor, dims: Sequence[int], reason: str, level: int = BOTH) -> Separation:
        """The separation that `separate` notes."""
        key = torch.zeros((), dtype=torch.int64)
        for dim in dims:
            shape = [1] * plane.ndim
            shape[dim] = plane.shape[dim]
            key = key * plane.shape[dim] + torch.arange(plane.shape[dim]).reshape(shape)
        known = plane >= 0
        return Separation(plane[known], key.expand(plane.shape)[known], reason, level)

    @staticmethod
    def separation_by(plane: Tensor, numbers: Tensor, reason: str, level: int = BOTH) -> Separation:
        """A separation of atoms that are at positions with different numbers, int64 that broadcast to the plane.

        An atom may be at several positions: the first of one is compared with the first of the other, and so on.
        """
        known = plane >= 0
        atoms, order = plane[known].sort(stable=True)
        of_each, row, counts = atoms.unique_consecutive(return_inverse=True, return_counts=True)
        place = torch.arange(len(atoms)) - (counts.cumsum(0) - counts)[row]
        token = scramble(numbers.expand(plane.shape)[known][order] + scramble(place))
        keys = torch.zeros(len(of_each), dtype=torch.int64).index_add_(0, row, token)
        return Separation(of_each, keys, reason, level)

    def freeze(self, atoms: Tensor, reason: str, level: int = BOTH) -> None:
        """Note that these atoms must not be merged with anything; `NONE` is ignored."""
        atoms = atoms.flatten()
        atoms = atoms[atoms >= 0]
        self.separations.append(Separation(atoms, atoms, reason, level))

    def roles(self) -> Tensor:
        """Role bits of every atom, int64 [count]."""
        roles = torch.zeros(self.count, dtype=torch.int64)
        for role in (MEAN, SUM):
            used = [atoms for atoms, own in self._roles if own == role]
            if used:
                roles[torch.cat(used)] |= role
        return roles

    def codes(self, level: int) -> Tensor:
        """A hash of each atom's separations and keys, int64 [count]: only atoms with equal hashes may be merged."""
        codes = torch.zeros(self.count, dtype=torch.int64)
        own = [separation for separation in self.separations if separation.level & level]
        if not own:
            return codes
        sizes = torch.tensor([len(separation.keys) for separation in own])
        number = torch.repeat_interleave(scramble(torch.arange(1, len(own) + 1)), sizes)
        mixed = scramble(torch.cat([separation.keys for separation in own]) + number)
        return codes.index_add_(0, torch.cat([separation.atoms for separation in own]), mixed)

    def classes(self, level: int) -> Tensor:
        """The class of each atom, int64 [count]: the lowest atom that it is united with, directly or indirectly."""
        parent = torch.arange(self.count)
        edges = [edge for edge, at in self._edges if at & level]
        if not edges:
            return parent
        left, right = torch.cat(edges, dim=1)
        while True:
            a, b = parent[left], parent[right]
            open_edges = a != b
            if not bool(open_edges.any()):
                return parent
            left, right = left[open_edges], right[open_edges]
            a, b = a[open_edges], b[open_edges]
            # Attach each higher root to the lowest root that an edge connects it to, then compress all paths.
            parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
            while True:
                shorter = parent[parent]
                if torch.equal(shorter, parent):
                    break
                parent = shorter


def scramble(values: Tensor) -> Tensor:
    """A hash of each int64: the finaliser of splitmix64, computed modulo 2^64."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return values ^ ((values >> 31) & ((1 << 33) - 1))
