"""Which channel is where: atoms of a union-find, and the planes of atoms that tensors carry through a forward pass.

An *atom* is one index of one dimension of a parameter or buffer, `(tensor name, dim, index)`, numbered by an int64. A
*slot* is one `(tensor name, dim)`, a contiguous range of atoms. A *plane* is an int64 tensor of atoms that broadcasts
to the tensor it describes (size 1 along every dimension where it does not vary); `NONE` marks places without a label.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

NONE = -1

MEAN = 1  # role of a slot: merged neurons keep the mean (rows of a producer, per-channel parameters)
SUM = 2  # role of a slot: merged neurons add up (columns of a consumer), Eq. (9) of the paper


@dataclass(frozen=True)
class Labels:
    """What is known about one tensor of the forward pass.

    Attributes:
        planes: each an int64 tensor broadcastable to the tensor's shape, no two varying along the same dimension.
        parameter: the tensor is a parameter, or only a rearrangement of one.
        source: number of the producing operation whose bare result this is (before anything nonlinear), else None.
    """

    planes: tuple[Tensor, ...] = ()
    parameter: bool = False
    source: int | None = None


def compact(plane: Tensor) -> Tensor | None:
    """The plane with size 1 along every dimension where it does not vary; None if it holds no label at all."""
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
    """One dimension of one parameter or buffer: atoms `first` to `first + size - 1`."""

    tensor: str
    dim: int
    first: int
    size: int


@dataclass
class Atoms:
    """All atoms of a recorded pass, the equations between them, their roles, and what is frozen and why."""

    slots: list[Slot] = field(default_factory=list)
    _by_name: dict[tuple[str, int], Slot] = field(default_factory=dict)
    _edges: list[Tensor] = field(default_factory=list)
    _roles: list[tuple[Tensor, int]] = field(default_factory=list)
    _frozen: list[tuple[Tensor, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many atoms there are."""
        return self.slots[-1].first + self.slots[-1].size if self.slots else 0

    def slot(self, tensor: str, dim: int, size: int) -> Slot:
        """The slot of a tensor's dimension, made on first use."""
        key = (tensor, dim)
        if key not in self._by_name:
            self._by_name[key] = Slot(tensor, dim, self.count, size)
            self.slots.append(self._by_name[key])
        return self._by_name[key]

    def of(self, tensor: str, dim: int, size: int) -> Tensor:
        """The atoms of a tensor's dimension, int64 [size]."""
        slot = self.slot(tensor, dim, size)
        return torch.arange(slot.first, slot.first + size)

    def slot_at(self, atom: int) -> Slot:
        """The slot that an atom lies in."""
        return next(slot for slot in self.slots if slot.first <= atom < slot.first + slot.size)

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Atoms that must share one assignment, elementwise: both int64 [m], no `NONE` among them."""
        different = left != right
        if bool(different.any()):
            self._edges.append(torch.stack([left[different], right[different]]))

    def role(self, atoms: Tensor, role: int) -> None:
        """Note that these atoms are used as `MEAN` or `SUM`; an atom used as both cannot be merged."""
        self._roles.append((atoms.flatten(), role))

    def freeze(self, atoms: Tensor, reason: str) -> None:
        """These atoms must stay as they are (`NONE` among them is ignored)."""
        atoms = atoms.flatten()
        self._frozen.append((atoms[atoms >= 0], reason))

    def roles(self) -> Tensor:
        """Role bits of every atom, int64 [count]."""
        roles = torch.zeros(self.count, dtype=torch.int64)
        for atoms, role in self._roles:
            roles[atoms] |= role
        return roles

    def frozen(self) -> Iterable[tuple[Tensor, str]]:
        """Frozen atoms with the reason, in the order in which they were found."""
        return self._frozen

    def classes(self) -> Tensor:
        """The class of every atom, int64 [count]: the lowest atom that it is united with, directly or not."""
        parent = torch.arange(self.count)
        if not self._edges:
            return parent
        left, right = torch.cat(self._edges, dim=1)
        while True:
            a, b = parent[left], parent[right]
            open_edges = a != b
            if not bool(open_edges.any()):
                return parent
            low, high = torch.minimum(a, b)[open_edges], torch.maximum(a, b)[open_edges]
            parent.scatter_reduce_(0, high, low, "amin")  # hook the higher root under the lowest that meets it
            while True:  # shorten all paths
                shorter = parent[parent]
                if torch.equal(shorter, parent):
                    break
                parent = shorter
