"""Which channel is where: atoms of a union-find, and the planes of atoms that tensors carry through a forward pass.

An *atom* is one index of one dimension of a parameter or buffer, `(tensor name, dim, index)`, numbered by an int64. A
*slot* is one `(tensor name, dim)`, a contiguous range of atoms. A *plane* is an int64 tensor of atoms that broadcasts
to the tensor it describes (size 1 along every dimension where it does not vary); `NONE` marks places without a label.

Where channels are regrouped, C to (h, d), they can be merged along either axis. At the level of `CHANNELS`, d merges,
in step over h; at the level of `UNITS`, whole rows h merge: heads of attention, groups of a convolution. Equations hold
at one of the levels or at both. A unit has an atom of its own, in a slot without a tensor.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NONE = -1
MEAN = 1  # role of a slot: merged neurons keep the mean (rows of a producer, per-channel parameters)
SUM = 2  # role of a slot: merged neurons add up (columns of a consumer), Eq. (9) of the paper
CHANNELS = 1
UNITS = 2
BOTH = CHANNELS | UNITS


@dataclass(frozen=True)
class Labels:
    """What is known about one tensor of the forward pass.

    Attributes:
        planes: each an int64 tensor broadcastable to the tensor's shape, no two varying along the same dimension.
        parameter: the tensor is a parameter, or only a rearrangement of one.
        source: number of the producing operation whose bare result this is (before anything nonlinear), else None.
        pending: holds as soon as something reads the tensor: an average that nobody looks at keeps nothing apart.
        uniform: the tensor was made in the pass and holds one constant at whatever size: initial states, say.
    """

    planes: tuple[Tensor, ...] = ()
    parameter: bool = False
    source: int | None = None
    uniform: bool = False
    pending: tuple["Separation", ...] = ()


def compact(plane: Tensor) -> Tensor | None:
    """The plane with size 1 along every dimension where it does not vary; None if it holds no label at all."""
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
    """Dimensions along which a compact plane varies (a plane of one single atom varies nowhere)."""
    return tuple(dim for dim, size in enumerate(plane.shape) if size > 1)


@dataclass
class Slot:
    """One dimension of one parameter or buffer: atoms `first` to `first + size - 1`.

    Units have slots whose tensor is the empty string; `module` is then where they were met.
    """

    tensor: str
    dim: int
    first: int
    size: int
    module: str = ""


@dataclass
class Separation:
    """Atoms with different keys must not be merged; at the same key they may.

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
        """Some atoms of it are kept apart from each other, not only from all others."""
        return bool((self.keys != self.keys[:1]).any())


@dataclass
class Atoms:
    """All atoms of a recorded pass, the equations between them, their roles, and what keeps them apart and why."""

    slots: list[Slot] = field(default_factory=list)
    separations: list[Separation] = field(default_factory=list)
    _firsts: list[int] = field(default_factory=list)  # of the slots
    _by_name: dict[tuple[str, int], Slot] = field(default_factory=dict)
    _edges: list[tuple[Tensor, int]] = field(default_factory=list)
    _roles: list[tuple[Tensor, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many atoms there are."""
        return self.slots[-1].first + self.slots[-1].size if self.slots else 0

    def of(self, tensor: str, dim: int, size: int) -> Tensor:
        """The atoms of a tensor's dimension, int64 [size]; its slot is made on first use."""
        key = (tensor, dim)
        if key not in self._by_name:
            self._by_name[key] = self._add(Slot(tensor, dim, self.count, size))
        slot = self._by_name[key]
        return torch.arange(slot.first, slot.first + slot.size)

    def units(self, size: int, module: str) -> Tensor:
        """New atoms for units met in a module, int64 [size]."""
        slot = self._add(Slot("", 0, self.count, size, module))
        return torch.arange(slot.first, slot.first + size)

    def _add(self, slot: Slot) -> Slot:
        self.slots.append(slot)
        self._firsts.append(slot.first)
        return slot

    def slot_numbers(self) -> Tensor:
        """The number of the slot of every atom, int64 [count]."""
        sizes = torch.tensor([slot.size for slot in self.slots], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.slots)), sizes)

    def slot_at(self, atom: int) -> Slot:
        """The slot that an atom lies in."""
        return self.slots[bisect_right(self._firsts, atom) - 1]

    def unite(self, left: Tensor, right: Tensor, level: int = BOTH) -> None:
        """Atoms that must share one assignment, elementwise: two planes that broadcast; `NONE` in either is skipped."""
        left, right = torch.broadcast_tensors(left, right)
        different = (left != right) & (left >= 0) & (right >= 0)
        if bool(different.any()):
            self._edges.append((torch.stack([left[different], right[different]]), level))

    def role(self, atoms: Tensor, role: int) -> None:
        """Note that these atoms are used as `MEAN` or `SUM`; an atom used as both cannot be merged."""
        atoms = atoms.flatten()
        self._roles.append((atoms[atoms >= 0], role))

    def separate(self, plane: Tensor, dims: Sequence[int], reason: str, level: int = BOTH) -> None:
        """Keep the atoms of a plane apart along these dimensions."""
        self.separations.append(self.separation(plane, dims, reason, level))

    @staticmethod
    def separation(plane: Tensor, dims: Sequence[int], reason: str, level: int = BOTH) -> Separation:
        """What `separate` notes down."""
        key = torch.zeros((), dtype=torch.int64)
        for dim in dims:
            shape = [1] * plane.ndim
            shape[dim] = plane.shape[dim]
            key = key * plane.shape[dim] + torch.arange(plane.shape[dim]).reshape(shape)
        known = plane >= 0
        return Separation(plane[known], key.expand(plane.shape)[known], reason, level)

    def freeze(self, atoms: Tensor, reason: str, level: int = BOTH) -> None:
        """These atoms must stay as they are (`NONE` among them is ignored)."""
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
        """A number for every atom, int64 [count]: atoms may only be merged if theirs are equal."""
        codes = torch.zeros(self.count, dtype=torch.int64)
        own = [separation for separation in self.separations if separation.level & level]
        if not own:
            return codes
        sizes = torch.tensor([len(separation.keys) for separation in own])
        number = torch.repeat_interleave(scramble(torch.arange(1, len(own) + 1)), sizes)
        mixed = scramble(torch.cat([separation.keys for separation in own]) + number)
        return codes.index_add_(0, torch.cat([separation.atoms for separation in own]), mixed)

    def classes(self, level: int) -> Tensor:
        """The class of every atom, int64 [count]: the lowest atom that it is united with, directly or not."""
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
            # Hook the higher root under the lowest that meets it, then shorten all paths.
            parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
            while True:
                shorter = parent[parent]
                if torch.equal(shorter, parent):
                    break
                parent = shorter


def scramble(values: Tensor) -> Tensor:
    """Every int64 to another one, well mixed (the finaliser of splitmix64, in arithmetic that wraps around)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return values ^ ((values >> 31) & ((1 << 33) - 1))
