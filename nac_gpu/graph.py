"""One recorded forward pass of a model: which channels belong together, and which must be left alone.

The pass runs on example inputs, in eval mode and without gradients, under a `TorchDispatchMode`: every ATen operation
is seen, however the model is written. `nac_gpu.rules` says what each operation does to channels; this module runs the
model, and turns the equations into groups.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nac_gpu.labels import MEAN, SUM, Atoms, Labels, Slot
from nac_gpu.notes import Call, Normalisation, Notes, Production
from nac_gpu.rules import apply

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group runs through.

    Attributes:
        tensor: name of the parameter or buffer.
        dim: the dimension.
        role: `"mean"` (merged neurons keep the mean) or `"sum"` (Eq. (9): they add up).
        index: int64 [n, m], the positions along the dimension that belong to each of the n neurons (m is 1, but for
            example a block of columns where a channel was flattened).
    """

    tensor: str
    dim: int
    role: str
    index: Tensor


@dataclass(frozen=True)
class Producer:
    """A weight that makes the neurons of a group, with what is needed to compare and merge them.

    Attributes:
        member: its rows.
        layer: name of its module.
        bias: name of the bias added in the same operation, or None.
        norm: the BatchNorm that takes its bare result and nothing else does, or None.
    """

    member: Member
    layer: str
    bias: str | None
    norm: "Norm | None"


@dataclass(frozen=True)
class Norm:
    """A BatchNorm over the channels of a group: names of its tensors (None where it has none) and its epsilon."""

    weight: str | None
    bias: str | None
    mean: str | None
    variance: str | None
    eps: float


@dataclass(frozen=True)
class Group:
    """Neurons that one assignment must serve together.

    Attributes:
        name: name of the layer that first makes them.
        size: number n of neurons.
        members: every dimension of every tensor that they run through.
        producers: the members that make them, in the order of the forward pass.
        norms: BatchNorms over them that stand behind no single producer.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    producers: tuple[Producer, ...]
    norms: tuple[Norm, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that make the neurons."""
        return tuple(dict.fromkeys(producer.layer for producer in self.producers))


@dataclass(frozen=True)
class LeftAlone:
    """Neurons that are not compressed: the layer that makes them, how many, and why."""

    layer: str
    size: int
    reason: str


@dataclass(frozen=True)
class Graph:
    """What a recorded pass tells: the groups in the order of the pass, and what is left alone."""

    groups: tuple[Group, ...]
    left_alone: tuple[LeftAlone, ...]


class _Record(TorchDispatchMode):
    """Carries labels along with every tensor of the pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules: list[str] = [type(model).__name__]  # that are running, the innermost last
        named = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): name for name, tensor in named}
        self._parameters = {id(tensor) for _, tensor in model.named_parameters()}
        self._labels: dict[int, tuple[Tensor, Labels]] = {}  # the tensor is held, so that its id stays its own
        self.notes = Notes(
            Atoms(),
            name_of=lambda tensor: self._names.get(id(tensor)),
            labels_of=self.labels_of,
            module=lambda: self.modules[-1],
        )

    def labels_of(self, tensor: Tensor) -> Labels:
        """The labels of a tensor; a parameter's are made when it is first read."""
        key = id(tensor)
        if key not in self._labels and key in self._parameters:
            planes = []
            for dim, size in enumerate(tensor.shape):
                shape = [1] * tensor.ndim
                shape[dim] = size
                planes.append(self.notes.atoms.of(self._names[key], dim, size).reshape(shape))
            self._labels[key] = (tensor, Labels(tuple(planes), parameter=True))
        return self._labels[key][1] if key in self._labels else Labels()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        with _disable_current_modes():
            outputs = [value for value in pytree.tree_leaves(out) if isinstance(value, Tensor)]
            labels = apply(self.notes, Call(func, args, kwargs, outputs))
            for tensor, found in zip(outputs, labels, strict=True):
                if found.planes or id(tensor) in self._labels:
                    self._labels[id(tensor)] = (tensor, found)
        return out


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """One forward pass: a tensor is the only argument, a sequence the arguments, a mapping the keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode and the random state are put back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # it hides attention in one operation
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes:
            module.training = mode


def record(model: nn.Module, example_inputs: ExampleInputs) -> Graph:
    """Run the model once on example inputs and find its groups.

    Args:
        model: left exactly as it was.
        example_inputs: as for a call: a tensor, a sequence of arguments, or a mapping of keyword arguments.

    Raises:
        RuntimeError: the forward pass failed; names the module, with the original error as its cause.
    """
    names = {module: name for name, module in model.named_modules() if module is not model}
    mode = _Record(model)

    def enter(module: nn.Module, _: Any) -> None:
        if module in names:
            mode.modules.append(names[module])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if module in names:
            mode.modules.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        with evaluating(model), mode:
            output = call(model, example_inputs)
    except Exception as error:
        raise RuntimeError(
            f"the example inputs do not fit the forward pass: {mode.modules[-1]} raised {type(error).__name__}: "
            f"{error}; expected inputs with which model(...) runs, got {_describe(example_inputs)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for tensor in pytree.tree_leaves(output):
        if isinstance(tensor, Tensor):
            for plane in mode.labels_of(tensor).planes:
                mode.notes.atoms.freeze(plane, "model output")
    return _groups(mode.notes)


def _describe(inputs: ExampleInputs) -> str:
    return ", ".join(
        f"{tuple(value.shape)} {value.dtype}".replace("torch.", "") if isinstance(value, Tensor) else repr(value)
        for value in pytree.tree_leaves(inputs)
    )


def _groups(notes: Notes) -> Graph:
    """Classes of atoms with the same signature are the neurons of one group."""
    atoms = notes.atoms
    classes, roles = atoms.classes(), atoms.roles()
    reasons: dict[int, str] = {}
    for frozen, reason in atoms.frozen():
        for root in classes[frozen].unique().tolist():
            reasons.setdefault(root, reason)
    for root in classes[roles == MEAN | SUM].unique().tolist():
        reasons.setdefault(root, "its weight both makes and reads these channels")
    slot_of = torch.repeat_interleave(
        torch.arange(len(atoms.slots)), torch.tensor([slot.size for slot in atoms.slots], dtype=torch.int64)
    )
    used = (roles > 0).nonzero().flatten()
    consumed = set(classes[used[roles[used] == SUM]].tolist())
    members: dict[int, list[int]] = {}
    for atom, root in zip(used.tolist(), classes[used].tolist(), strict=True):
        members.setdefault(root, []).append(atom)
    made: dict[int, Production] = {}
    for production in notes.productions:
        for root in classes[production.atoms[production.atoms >= 0]].tolist():
            made.setdefault(root, production)
    neurons: dict[tuple[int, ...], list[int]] = {}
    alone: dict[tuple[str, str], int] = {}
    for root, production in made.items():
        if root not in reasons and root not in consumed:
            reasons[root] = "nothing reads these channels"
        if root in reasons:
            key = (_layer(atoms.slot_at(int(production.atoms[0]))), reasons[root])
            alone[key] = alone.get(key, 0) + 1
        else:
            signature = tuple(slot_of[torch.tensor(members[root])].tolist())
            neurons.setdefault(signature, []).append(root)
    groups = tuple(
        _group(signature, torch.tensor([members[root] for root in roots]), roles, notes, made[roots[0]])
        for signature, roots in neurons.items()
    )
    return Graph(_unique_names(groups), tuple(LeftAlone(layer, size, why) for (layer, why), size in alone.items()))


def _unique_names(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Two groups made by one layer (a split, say) get `#2`, `#3`, ... behind the layer's name."""
    count: dict[str, int] = {}
    named = []
    for group in groups:
        count[group.name] = count.get(group.name, 0) + 1
        suffix = f"#{count[group.name]}" if count[group.name] > 1 else ""
        named.append(Group(group.name + suffix, group.size, group.members, group.producers, group.norms))
    return tuple(named)


def _group(signature: tuple[int, ...], neurons: Tensor, roles: Tensor, notes: Notes, made: Production) -> Group:
    """A group from its neurons' atoms, int64 [n, atoms of each], columns ordered by slot as in the signature."""
    columns = torch.tensor(signature)
    members = {}
    for number in dict.fromkeys(signature):
        slot = notes.atoms.slots[number]
        positions = neurons[:, columns == number] - slot.first
        role = "sum" if int(roles[slot.first + int(positions[0, 0])]) == SUM else "mean"
        members[number] = Member(slot.tensor, slot.dim, role, positions)
    by_tensor = {member.tensor: member for member in members.values() if member.role == "mean"}
    norms = {
        number: Norm(*norm.tensors, norm.eps)
        for number, norm in enumerate(notes.normalisations)
        if any(name in by_tensor for name in norm.tensors)
    }
    producers: dict[str, Producer] = {}
    folded: set[int] = set()
    for number, production in enumerate(notes.productions):
        slot = notes.atoms.slot_at(int(production.atoms[0]))
        member = by_tensor.get(slot.tensor)
        if member is None or member.dim != slot.dim or slot.tensor in producers:
            continue
        behind = _only_norm(number, slot, notes)
        if behind is not None:
            folded.add(behind)
        bias = None if production.bias is None else notes.atoms.slot_at(int(production.bias[0])).tensor
        norm = norms.get(behind) if behind is not None else None
        producers[slot.tensor] = Producer(member, _layer(slot), bias, norm)
    free = tuple(norm for number, norm in norms.items() if number not in folded)
    first = notes.atoms.slot_at(int(made.atoms[0]))
    return Group(_layer(first), len(neurons), tuple(members.values()), tuple(producers.values()), free)


def _layer(slot: Slot) -> str:
    """The layer that a weight belongs to; a parameter of another name stands for itself."""
    return slot.tensor.removesuffix(".weight")


def _only_norm(number: int, slot: Slot, notes: Notes) -> int | None:
    """The one BatchNorm behind a production, if its weight is used once and nothing else reads the bare result."""
    same = [p for p in notes.productions if notes.atoms.slot_at(int(p.atoms[0])) == slot]
    behind: list[tuple[int, Normalisation]] = [(i, n) for i, n in enumerate(notes.normalisations) if n.source == number]
    if len(same) > 1 or len(behind) != 1 or notes.uses.get(number, 0) != 1:
        return None
    index, norm = behind[0]
    used = [n for n in notes.normalisations if n.tensors == norm.tensors]
    return index if len(used) == 1 and torch.equal(norm.channels, notes.productions[number].atoms) else None
