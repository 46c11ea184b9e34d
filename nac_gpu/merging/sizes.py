"""The new size of every dimension after merging, and which of them an attribute of a module stands for.

An attribute stands for dimensions of its own size in the module's tensors. Its name may say for which: those that the
module reads (`in_channels`), those that it makes for others (`out_dim`), or those inside of it (`ffn_dim`). It is
updated only where all of them get the same new size.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from torch import nn

from nac_gpu.network.kept_numbers import numbers_of, own_sizes
from nac_gpu.tracing.graph import Choice, Group, Member

_WHAT = r"(?:ch|chs|chan|chans|channels?|planes|dims?|features?|feats?|sizes?|width|filters|units)"
_IN = re.compile(rf"^(?:(?:num|n|c|d|ch)_?)?(?:in|inp|inputs?|src|source|prev)(?:_?{_WHAT})?$|_(?:in|inp|input)$")
_OUT = re.compile(rf"^(?:(?:num|n|c|d|ch)_?)?(?:out|oup|outputs?|dst|dest|target)(?:_?{_WHAT})?$|_(?:out|oup|output)$")
_GROUPS = re.compile(r"^(?:num_|n_|conv_)?groups?$|^cardinality$")
_LAST = re.compile(r"^(?:num_features|head_hidden_size|feat(?:ure)?s?_(?:dims?|size))$")
_INNER = frozenset(
    "inner mid middle intermediate ffn ff expand expanded exp bottleneck squeeze mlp attn qkv rd".split()
)
_SIZE = frozenset(
    "dim dims size sizes width widths channel channels ch chs chan chans feature features feats hidden hid nhid planes "
    "plane inplanes embed embedding embd emb unit units filter filters nf ngf ndf ninp nhid ndim model".split()
)
#: Words of sizes that are not numbers of channels.
_OTHER = frozenset(
    "kernel image img patch patches window pool vocab batch stride dilation padding pad class classes token tokens len "
    "length seq sequence step steps layer layers depth block blocks position positions pos max min crop grid base "
    "ratio multiple mult seed epoch epochs bins time timesteps stage stages branch branches version iters iterations "
    "height per experts".split()
)


def meaning(path: str) -> str | None:
    """What a name says of a size: "in", "out", "inner", "groups", "last" or "any"; None if it does not say a width.

    "last" is what the last layer of a module reads, which is what models of timm call `num_features`.
    """
    name = next(key for key in reversed(path.split(".")) if not key.isdecimal())
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    words = [word.rstrip("0123456789") for word in name.split("_")]
    if says_otherwise(path):
        return None
    for pattern, kind in ((_GROUPS, "groups"), (_LAST, "last"), (_IN, "in"), (_OUT, "out")):
        if pattern.search(name):
            return kind
    if not _INNER.isdisjoint(words) or "all_head" in name:
        return "inner"
    return None if _SIZE.isdisjoint(words) else "any"


def says_otherwise(path: str) -> bool:
    """Whether a name says that the number is not one of channels: `kernel_size`, `num_classes`, ..."""
    words = re.split(r"[_.]", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path).lower())
    return not _OTHER.isdisjoint(word.rstrip("0123456789") for word in words)


def inside(module: str, name: str) -> bool:
    """Whether a layer or module is inside of another one, or is that one."""
    return not module or name == module or name.startswith(f"{module}.")


def holder(tensor: str) -> str:
    """The name of the module that a tensor belongs to."""
    return tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Dimension:
    """One dimension of a tensor, or the part of it that belongs to one group.

    Attributes:
        tensor: its name.
        place: number of the dimension.
        before: its size.
        after: its size after merging.
        groups: that have neurons in it.
        reads: whether its layer reads channels there.
        makes: whether its layer makes channels there.
        whole: it is not a part of a dimension.
    """

    tensor: str
    place: int
    before: int
    after: int
    groups: tuple[Group, ...] = ()
    reads: bool = False
    makes: bool = False
    whole: bool = False


class Resized:
    """The sizes of a network's dimensions before and after merging.

    Args:
        model: the original network.
        choices: the groups and their widths.
    """

    def __init__(self, model: nn.Module, choices: Sequence[Choice]) -> None:
        self._ends = {id(choice.group): ends(choice.group) for choice in choices}
        self._by_size: dict[int, list[Dimension]] = {}
        self._counts: dict[str, tuple[int, int]] = {}  # numbers of groups of layers, before and after
        dimensions = list(_dimensions(model, choices))
        wholes: dict[str, list[Dimension]] = {}
        for dimension in (dimension for dimension in dimensions if dimension.whole):
            wholes.setdefault(dimension.tensor, []).append(dimension)
        units = {name: choice for choice in choices for name in choice.group.units}
        for name, layer in model.named_modules():
            before = _count_of(layer)
            if before:
                own = wholes[f"{name}.weight".lstrip(".")]
                after = _count_after(layer, before, own, units.get(name))
                self._counts[name] = before, after
                if isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed:
                    groups = tuple(group for d in own for group in d.groups)
                    groups += (units[name].group,) if name in units else ()
                    read = Dimension(own[1].tensor, 1, layer.in_channels, after * own[1].after, groups, reads=True)
                    dimensions.append(read)
        for dimension in dimensions:
            self._by_size.setdefault(dimension.before, []).append(dimension)

    def of(self, module: str, path: str, value: int) -> set[int]:
        """The new sizes that an attribute may stand for: one if it is clear, none if it stands for no dimension."""
        kind, own = meaning(path), self._inside(module, value)
        if kind in ("in", "out", "groups") and not any(d.reads or d.makes for d in own):
            kind = "any"  # a module of normalisations
        if kind == "groups":
            return {after for name, (before, after) in self._counts.items() if inside(module, name) and before == value}
        if kind == "in":
            own = [d for d in own if d.reads and any(self._crosses(module, group, 0) for group in d.groups)]
        elif kind == "out":
            own = [d for d in own if d.makes and any(self._crosses(module, group, 1) for group in d.groups)]
        elif kind == "inner":
            both = [d for d in own if any(self._passes_inside(module, group) for group in d.groups)]
            own = [d for d in both if not any(self._leaves(module, group) for group in d.groups)] or both
            own = own or [d for d in self._inside(module, value) if d.makes] or self._inside(module, value)
        elif kind == "last" and len({d.after for d in own}) > 1:
            own = [d for d in own if d.whole and (d.reads or (d.place == 1 and not d.groups))][-1:]
        return {dimension.after for dimension in own}

    def of_groups(self, value: int, groups: Sequence[Group]) -> set[int]:
        """The new sizes of dimensions in which any of these groups has neurons."""
        wanted = {id(group) for group in groups}
        return {d.after for d in self._by_size.get(value, ()) if any(id(group) in wanted for group in d.groups)}

    def stays_inside(self, module: str, value: int) -> bool:
        """Whether no dimension of this size changes that the module shares with others, other than of heads."""
        own = [d for d in self._inside(module, value) if d.after != value]
        return not any(self._leaves(module, group) and not group.units for d in own for group in d.groups)

    def _inside(self, module: str, value: int) -> list[Dimension]:
        return [d for d in self._by_size.get(value, ()) if inside(module, holder(d.tensor))]

    def _crosses(self, module: str, group: Group, end: int) -> bool:
        """Whether a group has a layer that makes it (end 0) or reads it (end 1) outside of a module."""
        return not all(inside(module, layer) for layer in self._ends[id(group)][end])

    def _passes_inside(self, module: str, group: Group) -> bool:
        """Whether a module both makes and reads a group."""
        return all(any(inside(module, layer) for layer in end) for end in self._ends[id(group)])

    def _leaves(self, module: str, group: Group) -> bool:
        return self._crosses(module, group, 0) or self._crosses(module, group, 1)


def _count_of(layer: nn.Module) -> int:
    """The number of groups of a layer with weights; 0 if it has no groups."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups if layer.groups > 1 else 0
    return layer.num_groups if isinstance(layer, nn.GroupNorm) and layer.affine else 0


def _count_after(layer: nn.Module, before: int, own: Sequence[Dimension], unit: Choice | None) -> int:
    """The number of groups of a layer after merging: of units, or of channels with a group each."""
    if unit is not None:
        return before * unit.width // unit.group.size
    alone = before == (layer.in_channels if isinstance(layer, nn.modules.conv._ConvNd) else own[0].before)
    return before * own[0].after // own[0].before if alone else before


def ends(group: Group) -> tuple[list[str], list[str]]:
    """The modules that make a group, and those that read it."""
    made = [holder(producer.member.tensor) for producer in group.producers]
    return made, [holder(member.tensor) for member in group.members if member.role == "sum"]


def _dimensions(model: nn.Module, choices: Sequence[Choice]) -> Iterator[Dimension]:
    members: dict[tuple[str, int], list[tuple[Choice, Member]]] = {}
    for choice in choices:
        for member in choice.group.members:
            members.setdefault((member.tensor, member.dim), []).append((choice, member))
    makers = {producer.member.tensor for choice in choices for producer in choice.group.producers}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for place, size in enumerate(tensor.shape):
            own = members.get((name, place), [])
            parts = [(member.index.numel(), choice.group.size, choice.width) for choice, member in own]
            makes = any(member.role == "mean" for _, member in own) and name in makers
            reads = any(member.role == "sum" for _, member in own)
            groups = tuple(choice.group for choice, _ in own)
            small = size - sum(part - part * after // before for part, before, after in parts)
            yield Dimension(name, place, size, small, groups, reads, makes, whole=True)
            sizes = {(part, part * after // before) for part, before, after in parts if part < size}
            sizes |= {(before, after) for part, before, after in parts if before < part}
            for before, after in sorted(sizes):  # a part of the dimension, and channels of several positions each
                yield Dimension(name, place, before, after, groups, reads, makes)


def kept_by(module: nn.Module, *, options: bool = False) -> dict[str, int]:
    """The whole numbers that a module keeps, by their paths, without those that PyTorch's layers define.

    Args:
        module: the module.
        options: include those in dictionaries and objects, which modules may share, and which tell how a model was
            built.
    """
    left = own_sizes(module) | {name for name, value in vars(module).items() if not (options or _is_size(value))}
    return {path: value for path, value in numbers_of(module).items() if path.partition(".")[0] not in left}


def _is_size(value: object) -> bool:
    return isinstance(value, Integral | list | tuple)


def sizes_in(modules: Mapping[str, nn.Module], group: Group) -> set[int]:
    """Numbers that may stand for a group's size: of neurons, of their positions, of dimensions they are a part of."""
    found = {group.size}
    for member in group.members:
        found.add(member.index.numel())
        tensor = getattr(modules.get(holder(member.tensor)), member.tensor.rpartition(".")[2], None)
        if isinstance(tensor, nn.Parameter):
            found.add(tensor.shape[member.dim])
    return found - {1}


def above(module: str) -> Iterator[str]:
    """The names of a module and of those that contain it, up to the model."""
    yield module
    while module:
        module = holder(module)
        yield module


def around(layers: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules that contain any of these layers, or are one of them, nearest first; PyTorch's own are omitted."""
    found: dict[str, int] = {}
    for layer in dict.fromkeys(layers):
        for up, name in enumerate(above(layer)):
            found[name] = min(found.get(name, up), up)
    near = sorted(found, key=lambda name: found[name])
    return [name for name in near if name in modules and not is_of_torch(modules[name])]


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module's class is PyTorch's own."""
    return type(module).__module__.startswith("torch.nn")
