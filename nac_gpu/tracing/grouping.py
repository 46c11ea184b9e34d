"""Derives groups of neurons from the equations of a recorded pass, and reasons for neurons that are left alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nac_gpu.tracing.atoms import CHANNELS, MEAN, SUM, UNITS, Slot, scramble
from nac_gpu.tracing.graph import Graph, Group, LeftAlone, Member, Norm, Producer
from nac_gpu.tracing.makers import Makers
from nac_gpu.tracing.recorder import Normalisation, Notes


@dataclass(frozen=True)
class _Level:
    """The groups at one level (channels or units), and the status of every atom.

    Attributes:
        found: groups, each with the number of the production that first makes it and its first atom.
        grouped: bool [atoms], whether the atom is in a group.
        reasons: int64 [atoms], number of the reason why the atom's class is in no group.
        made: bool [atoms], whether a production makes an atom of the same class.
    """

    found: list[tuple[tuple[int, int], Group]]
    grouped: Tensor
    reasons: Tensor
    made: Tensor


_ONE = "there is only one of them"
_UNREAD = "nothing reads these channels"
_TIED = "its weight both makes and reads these channels"
_OF_UNITS = "each belongs to another head or group"
_FREE = (_ONE, _UNREAD, _TIED, _OF_UNITS)  # reasons other than separations and freezes


def find_groups(notes: Notes) -> Graph:
    """Find the groups: the neurons of a group are the classes of atoms with the same signature.

    Groups of channels are found first. A group of units (heads, groups of a convolution) replaces the groups of
    channels that it overlaps if those do not cover all the weights that make the units.
    """
    atoms = notes.atoms
    if not atoms.count or not notes.productions:
        return Graph((), ())
    reasons = [_ONE, _UNREAD, _TIED, _OF_UNITS, *dict.fromkeys(s.reason for s in atoms.separations)]
    numbers = {reason: number for number, reason in enumerate(reasons)}
    makers = Makers(notes)
    channels = _level(notes, CHANNELS, makers, numbers)
    found, grouped = list(channels.found), channels.grouped.clone()
    if any(not slot.tensor for slot in atoms.slots):
        units = _level(notes, UNITS, makers, numbers)
        owner = torch.full((atoms.count,), -1, dtype=torch.int64)  # number of the group that an atom produces
        for number, (_, group) in enumerate(channels.found):
            owner[_atoms_of(notes, group)] = number
        rivalled: set[int] = set()
        for first, group in units.found:
            own = _atoms_of(notes, group)
            if bool(channels.grouped[own].all()):
                continue
            rivals = sorted(set(owner[own].tolist()) - rivalled - {-1})
            rivalled |= set(rivals)
            found.append((first, replace(group, otherwise=tuple(channels.found[number][1] for number in rivals))))
            grouped[own] = True
        found = [item for number, item in enumerate(found) if number not in rivalled]
    found.sort(key=lambda item: item[0])
    alone: dict[tuple[str, str], int] = {}
    seen = torch.zeros(atoms.count, dtype=torch.bool)
    for production in notes.productions:
        left = production.atoms.unique()
        left = left[~grouped[left] & ~seen[left]]
        seen[left] = True
        for number, count in zip(*(t.tolist() for t in channels.reasons[left].unique(return_counts=True)), strict=True):
            key = (_layer(atoms.slot_at(int(left[0]))), reasons[number])
            alone[key] = alone.get(key, 0) + count
    alone |= _in_no_production(notes, channels, reasons)
    left_alone = tuple(LeftAlone(layer, size, why) for (layer, why), size in alone.items())
    return Graph(_unique_names([group for _, group in found]), left_alone, norms=_norms_behind(makers))


def _in_no_production(notes: Notes, channels: _Level, reasons: Sequence[str]) -> dict[tuple[str, str], int]:
    """Weights that were frozen before any product used them: size along dimension 0 by layer and reason."""
    slots: dict[str, list[Slot]] = {}
    for slot in notes.atoms.slots:
        slots.setdefault(slot.tensor, []).append(slot)
    found: dict[tuple[str, str], int] = {}
    for tensor, own in slots.items():
        every = torch.cat([torch.arange(slot.first, slot.first + slot.size) for slot in own])
        if not tensor or not own[0].parameter or len(own) < 2 or bool((channels.made | channels.grouped)[every].any()):
            continue
        frozen = [why for why in map(reasons.__getitem__, channels.reasons[every].tolist()) if why not in _FREE]
        if frozen:
            found[_layer(own[0]), frozen[0]] = own[0].size
    return found


def _norms_behind(makers: Makers) -> dict[str, Norm]:
    """By the name of a weight, the BatchNorm directly after it, if nothing else reads the weight's output."""
    pairs = zip(makers.slots, makers.behind, strict=True)
    return {slot.tensor: _norm(makers.norms[number]) for slot, number in pairs if number is not None}


def _norm(found: Normalisation) -> Norm:
    return Norm(*found.tensors, found.eps)


def _atoms_of(notes: Notes, group: Group) -> Tensor:
    """The atoms that make a group's neurons, int64."""
    firsts = {(slot.tensor, slot.dim): slot.first for slot in notes.atoms.slots}
    made = [p.member for p in group.producers]
    return torch.cat([firsts[member.tensor, member.dim] + member.index.flatten() for member in made])


def _level(notes: Notes, level: int, makers: Makers, numbers: dict[str, int]) -> _Level:
    """The groups at one level: classes of atoms with the same signature."""
    atoms = notes.atoms
    classes, roles, slots = atoms.classes(level), atoms.roles(), atoms.slot_numbers()
    codes = atoms.codes(level)
    virtual = torch.tensor([not slot.tensor for slot in atoms.slots])[slots]
    made, why, usable = _usable(notes, level, classes, virtual, numbers)

    used = (usable & ((roles > 0) | virtual)).nonzero().flatten()
    used = used[classes[used].argsort(stable=True)]  # sorted by class, then by atom
    _, row, sizes = classes[used].unique_consecutive(return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(used)) - starts[row]
    token = scramble(codes[used] + scramble(slots[used] * (int(sizes.max()) if len(sizes) else 1) + place))
    signatures = torch.zeros(len(sizes), dtype=torch.int64).index_add_(0, row, token)
    _, which, of_each = signatures.unique(return_inverse=True, return_counts=True)
    of_no_tensor = virtual.nonzero().flatten()
    grouped = torch.zeros(atoms.count, dtype=torch.bool)  # indexed by class here, by atom in the result
    found = []
    order = which.argsort(stable=True)
    for rows in order.split(of_each.tolist()):
        if len(rows) < 2:
            continue
        neurons = used[starts[rows, None] + torch.arange(int(sizes[rows[0]]))]
        neurons = neurons[:, ~virtual[neurons[0]]]
        root = classes[neurons[0, 0]]
        units: tuple[str, ...] = ()
        if level == UNITS:
            inside = of_no_tensor[classes[of_no_tensor] == root]
            units = tuple(dict.fromkeys(atoms.slots[number].module for number in slots[inside].tolist()))
        grouped[classes[neurons[:, 0]]] = True
        first = int(made[root])
        found.append(
            (
                (first, int(neurons[0, 0])),
                _group(slots[neurons[0]], neurons, roles, notes, makers, first, units),
            )
        )
    found.sort(key=lambda item: item[0])
    return _Level(found, grouped[classes], why, made < len(notes.productions))


def _usable(
    notes: Notes, level: int, classes: Tensor, virtual: Tensor, numbers: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Which atoms may be in groups at a level, and why the others may not.

    Args:
        notes: the notes of the recorded pass.
        level: `CHANNELS` or `UNITS`.
        classes: int64 [atoms], their classes at this level.
        virtual: bool [atoms], whether the atom stands for a unit and is in no tensor.
        numbers: the number of each reason.

    Returns:
        For every atom: the number of the production that first makes its class (the number of productions if there is
        none); the number of the reason why it cannot be merged; and whether it may be in a group.
    """
    count, roles = notes.atoms.count, notes.atoms.roles()

    def classes_with(mask: Tensor) -> Tensor:
        """Bool [atoms]: whether the class of the atom has any atom of the mask."""
        return torch.zeros(count, dtype=torch.bool).index_fill_(0, classes[mask], True)[classes]

    def first_with(found: Sequence[Tensor]) -> Tensor:
        """Int64 [atoms]: the first of the sets that has an atom of the same class; `len(found)` if none has."""
        number = torch.full((count,), len(found), dtype=torch.int64)
        if found:
            of_each = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(set_) for set_ in found]))
            number.scatter_reduce_(0, classes[torch.cat(list(found))], of_each, "amin")
        return number[classes]

    made = first_with([production.atoms for production in notes.productions])
    parting = [s for s in notes.atoms.separations if s.level & level and s.parts]
    why = torch.tensor([*(numbers[s.reason] for s in parting), numbers[_ONE]])[first_with([s.atoms for s in parting])]
    of_units = classes_with(virtual)
    tied = classes_with(roles == MEAN | SUM)
    read = classes_with((roles & SUM) > 0)
    usable = (made < len(notes.productions)) & ~tied & read & (of_units if level == UNITS else ~of_units)
    free = why == numbers[_ONE]
    why = torch.where(free & ~read, numbers[_UNREAD], why)
    why = torch.where(free & tied, numbers[_TIED], why)
    if level == CHANNELS:
        why = torch.where(of_units, numbers[_OF_UNITS], why)
    return made, why, usable


def _unique_names(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Append `#2`, `#3`, ... to the names of further groups of the same layer (for example if its output is split)."""
    count: dict[str, int] = {}
    named = []
    for group in groups:
        count[group.name] = count.get(group.name, 0) + 1
        suffix = f"#{count[group.name]}" if count[group.name] > 1 else ""
        named.append(replace(group, name=group.name + suffix))
    return tuple(named)


def _group(
    columns: Tensor, neurons: Tensor, roles: Tensor, notes: Notes, makers: Makers, made: int, units: tuple[str, ...]
) -> Group:
    """Build a group from the atoms of its neurons.

    Args:
        columns: int64 [m], the number of the slot of each of a neuron's m atoms.
        neurons: int64 [n, m], the atoms of each neuron.
        roles: int64 [atoms], role bits.
        notes: the notes of the recorded pass.
        makers: the productions.
        made: number of the production that first makes the neurons.
        units: modules that combine the neurons as units.
    """
    members = {}
    for number in dict.fromkeys(columns.tolist()):
        slot = notes.atoms.slots[number]
        positions = neurons[:, columns == number] - slot.first
        role = "sum" if int(roles[slot.first + int(positions[0, 0])]) == SUM else "mean"
        members[number] = Member(slot.tensor, slot.dim, role, positions)
    by_tensor = {member.tensor: member for member in members.values() if member.role == "mean"}
    norms = {number: _norm(makers.norms[number]) for number in makers.norms_with(by_tensor)}
    producers: list[Producer] = []
    folded: set[int | None] = set()
    for number in makers.first_uses((member.tensor, member.dim) for member in by_tensor.values()):
        slot, behind = makers.slots[number], makers.behind[number]
        folded.add(behind)
        norm = norms.get(behind) if behind is not None else None
        producers.append(Producer(by_tensor[slot.tensor], _layer(slot), makers.biases[number], norm))
    free = tuple(norm for number, norm in norms.items() if number not in folded)
    return Group(_layer(makers.slots[made]), len(neurons), tuple(members.values()), tuple(producers), free, units)


def _layer(slot: Slot) -> str:
    """The layer that a weight belongs to; for a parameter that is not called `weight`, its own name."""
    return slot.tensor.removesuffix(".weight")
