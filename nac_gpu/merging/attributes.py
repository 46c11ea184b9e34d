"""Size attributes of modules and configurations, updated to agree with the merged tensors.

The attributes of PyTorch's own layers are known. Counts of units (heads, groups of a convolution) follow from the
groups. Size attributes of user-defined modules are guessed by value, place and name (see `nac_gpu.merging.sizes`), and
each guess is tested by running the smaller network (see `nac_gpu.planning.trial`).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from torch import nn

from nac_gpu.merging.sizes import (
    Resized,
    above,
    around,
    holder,
    is_of_torch,
    kept_by,
    meaning,
    says_otherwise,
    sizes_in,
)
from nac_gpu.network.kept_numbers import number_at
from nac_gpu.tracing.graph import Choice, Group

_COUNT = re.compile(r"(?<!dim_)(?<!\bd_)(?<!size_)(?<!per_)heads?$|(?<!key_value_)(?<!kv_)(?<!per_)groups$")
_HEADS = re.compile(r"heads$|n_head$")
_OF_UNITS = re.compile(r"heads?$|groups$")
_HEAD = re.compile(r"(?<!all_)head(?!s)")
_HIDDEN = re.compile(r"intermediate_size$|ffn_dim$|d_ff$|n_inner$")
_WIDTH = re.compile(r"dim|size|width|channels|features|hidden|planes|inner|embed|chunk|split|pad")
_MOST = 6  # attributes that are tried one by one
_LINES = 3  # that name attributes; more are counted


class Following(NamedTuple):
    """An attribute that may have to follow the size of a group.

    Attributes:
        module: name of the module.
        attribute: path of the number in it (see `nac_gpu.network.kept_numbers`).
        surely: scaled with the group whatever its name says; else only where the sizes in its module leave no doubt.
    """

    module: str
    attribute: str
    surely: bool = False


def attributes(model: nn.Module, choices: Sequence[Choice]) -> dict[tuple[str, str], object]:
    """The new values of what depends on the groups, by (module, path): attributes, and entries of configurations."""
    return _in_configurations(dict(model.named_modules()), choices) | _decided(model, choices)[0]


def stale(model: nn.Module, choices: Sequence[Choice]) -> list[str]:
    """Lines that name attributes which may be sizes of the merged groups and were not changed; a few at most."""
    updated, doubtful = _decided(model, choices)
    modules = dict(model.named_modules())
    resized = Resized(model, choices)
    for choice in choices:
        if choice.merges:
            doubtful |= _unnamed(modules, choice.group, resized)
    lines: dict[tuple[type, str], list[str]] = {}
    for (module, path), group in doubtful.items():
        if (module, path) in updated:
            continue
        own, what = f"{module}.{path}".strip("."), "heads or groups" if group.units else "channels"
        line = f"{own} ({number_at(modules[module], path)}) may be the number of {group.name}'s {what} and was left"
        lines.setdefault((type(modules[module]), re.sub(r"\.\d+", "", path)), []).append(line)
    said = [alike[0] + (f", like {len(alike) - 1} more of them" if alike[1:] else "") for alike in lines.values()]
    for choice in choices:
        if not choice.group.configured:
            usual = replace(choice, group=replace(choice.group, configured=True))
            for module, path in _in_configurations(modules, [usual]):
                if number_at(modules[module], path) is None:  # it would only be added
                    continue
                line = f"{module}.{path} ".strip(".") + "was left: the code computes something else from it, too"
                said += [line] if line not in said else []
    more = len(said) - _LINES
    return said[:_LINES] + ([f"and {more} more such attributes were left"] if more > 0 else [])


def _unnamed(modules: Mapping[str, nn.Module], group: Group, resized: Resized) -> dict[tuple[str, str], Group]:
    """Numbers right beside the group's layers that are its size without saying so, where nothing else has that size."""
    sizes, near = sizes_in(modules, group), {holder(layer) for layer in _layers(group)}
    return {
        (name, path): group
        for name in near
        if name in modules and not is_of_torch(modules[name])
        for path, value in kept_by(modules[name]).items()
        if value in sizes and meaning(path) is None and all(key.isdecimal() for key in path.split(".")[1:])
        if not (says_otherwise(path) or _OF_UNITS.search(path))
        if resized.of(name, path, value) - {value} and len(resized.of(name, path, value)) == 1
    }


def _decided(
    model: nn.Module, choices: Sequence[Choice]
) -> tuple[dict[tuple[str, str], object], dict[tuple[str, str], Group]]:
    """New values by (module, path), and a group for each attribute that could not be decided."""
    modules = dict(model.named_modules())
    claims: dict[tuple[str, str], tuple[list[Choice], list[Choice]]] = {}  # those that are sure come last
    for choice in choices:
        for module, path, surely in choice.group.attributes:
            claims.setdefault((module, path), ([], []))[surely].append(choice)
    values: dict[tuple[str, str], object] = {}
    doubtful: dict[tuple[str, str], Group] = {}
    resized = Resized(model, choices if claims else ())
    for (module, path), (named, sure) in claims.items():
        old = number_at(modules[module], path)
        assert old is not None, "guesses name whole numbers"
        found = {_scaled(path, old, sure, resized)} if sure else resized.of(module, path, old)
        if len(found) == 1 and found != {None}:
            values[module, path] = found.pop()
        elif found and not (old in found and resized.stays_inside(module, old)):
            doubtful[module, path] = (sure or named)[0].group
    for choice in choices:
        for name in choice.group.units:
            layer = modules.get(name)
            if isinstance(layer, nn.modules.conv._ConvNd) and (name, "groups") in values:
                # in_channels is `groups` times the columns of the weight
                values[name, "in_channels"] = layer.in_channels * choice.width // choice.group.size
    return {key: new for key, new in values.items() if new != number_at(modules[key[0]], key[1])}, doubtful


def _scaled(path: str, value: int, claims: Sequence[Choice], resized: Resized) -> int | None:
    """A number that surely follows these groups; None if they do not agree."""
    sizes = math.prod(choice.group.size for choice in claims)
    if sizes == value and len({bool(choice.group.units) for choice in claims}) == 2:
        return math.prod(choice.width for choice in claims)  # heads times the width of a head, and both change
    numbers = [{choice.group.size, *(member.index.numel() for member in choice.group.members)} for choice in claims]
    if not _COUNT.search(path) and not all(value in own for own in numbers):
        parts = resized.of_groups(value, [choice.group for choice in claims])
        if len(parts) == 1:
            return next(iter(parts))
    scaled = {value * choice.width // choice.group.size for choice in claims if value % choice.group.size == 0}
    return scaled.pop() if len(scaled) == 1 else None


def _in_configurations(modules: Mapping[str, nn.Module], choices: Sequence[Choice]) -> dict[tuple[str, str], object]:
    """New values in the configurations of a Hugging Face model, by (a module that has it, path).

    A configuration holds one width for all layers, so it is changed only if all groups of that width got the same new
    width, and may be configured.
    """
    found: dict[int, tuple[str, list[Choice]]] = {}
    for choice in choices:
        layer = choice.group.layers[0].split(".")
        for length in range(len(layer), -1, -1):
            name = ".".join(layer[:length])
            config = getattr(modules.get(name), "config", None)
            if hasattr(config, "to_dict"):
                found.setdefault(id(config), (name, []))[1].append(choice)
                break
    values: dict[tuple[str, str], object] = {}
    for module, own in found.values():
        config = modules[module].config
        for name, value in vars(config).items():
            heads = _HEADS.search(name) is not None
            if not isinstance(value, int) or not (heads or _HIDDEN.search(name)):
                continue
            changes = {
                (choice.group.size, choice.width if choice.group.configured else choice.group.size)
                for choice in own
                if bool(choice.group.units) == heads
                and (value % choice.group.size == 0 if heads else value == choice.group.size)
            }
            if len(changes) != 1:
                continue
            before, after = changes.pop()
            if before == after:
                continue
            if heads and "key_value" not in name and (size := _size_of_head(config, value)):
                values.setdefault((module, "config.head_dim"), size)  # no longer hidden_size / heads, the default
            values[module, f"config.{name}"] = value * after // before
    return values


def _size_of_head(config: Any, heads: int) -> int | None:
    """The size of an attention head where a configuration gives it only by dividing; None if it gives it."""
    try:
        given, hidden = getattr(config, "head_dim", None), getattr(config, "hidden_size", None)
        return None if given is not None or not hidden else hidden // heads
    except Exception:  # each layer has its own, say
        return None


def not_configured(modules: Mapping[str, nn.Module], choice: Choice) -> Choice | None:
    """The choice, whose size is not to be written to a configuration; None if it would not be anyway."""
    if not choice.group.configured or not _in_configurations(modules, [choice]):
        return None
    return replace(choice, group=replace(choice.group, configured=False))


def guesses(
    modules: Mapping[str, nn.Module],
    group: Group,
    read: Callable[[], Set[tuple[str, str]]] | None = None,
    place: str | None = None,
) -> Iterator[tuple[Following, ...]]:
    """Candidate sets of attributes that have to follow a group's size; likeliest first.

    The first has what a name says to be a size of channels, even where `forward` does not read it: other methods may
    (re-parametrisation, a new classifier). Others have any number of the same value that `forward` reads, or leave some
    of these out, because the same number may mean something else.

    Args:
        modules: of the network, by name.
        group: the group.
        read: called only if the first guess fails; returns the (module, attribute) that the network reads as it runs
            (see `nac_gpu.network.kept_numbers.reads_of`). Without it, any attribute may be read.
        place: a module in which the first guess fails; it may hold none of the group's layers. None if none is known.
    """
    fixed, counts = _counts(modules, group)
    named = [*counts, *_named(modules, group)]
    yield (*fixed, *named)
    seen = None if read is None else read()

    def may_matter(item: Following) -> bool:
        return seen is None or (item.module, item.attribute.partition(".")[0]) in seen

    given = {item._replace(surely=True): item for item in named}
    scaled = list(filter(may_matter, dict.fromkeys([*given, *_of_any_name(modules, group)])))
    mixed = [given.get(item, item) for item in scaled]
    wide = [item for item in scaled if item in counts or meaning(item.attribute) or _WIDTH.search(item.attribute)]
    few = range(min(len(scaled), _MOST))
    sets = [mixed, scaled, wide, [item for item in scaled if item in counts], []]
    sets += [mixed[:one] + mixed[one + 1 :] for one in few] + [[scaled[one]] for one in few]
    if place is not None:
        sets.insert(2, list(dict.fromkeys([*mixed, *filter(may_matter, _where_it_fails(modules, group, place))])))
    unread = [item for item in named if not may_matter(item)]
    done = {frozenset([*fixed, *named])}
    for chosen in sets:
        found = (*fixed, *unread, *chosen)
        if frozenset(found) not in done:
            done.add(frozenset(found))
            yield found


def _layers(group: Group) -> list[str]:
    """Names of the modules that hold the group's tensors."""
    return list(dict.fromkeys(holder(member.tensor) for member in group.members))


def _counts(modules: Mapping[str, nn.Module], group: Group) -> tuple[list[Following], list[Following]]:
    """Numbers of units: those of PyTorch's layers, which are sure, and those that other modules keep."""
    units = [name if name in modules else "" for name in group.units]  # other names mean the model itself
    fixed = [Following(name, kind, True) for name in units for kind in _own_count(modules[name])]
    others = [name for name in units if not _own_count(modules[name])]
    found = [
        Following(name, path, True)
        for name in others
        for path, value in _values(modules[name])
        if _COUNT.search(path) and value % group.size == 0
    ]
    found += [
        Following(name, path, True)
        for name in around([holder(name) for name in others if name], modules)[:1]
        for path, value in kept_by(modules[name]).items()
        if _HEADS.search(path) and value == group.size
    ]
    for name in units:
        if isinstance(modules[name], nn.Unflatten):
            paths = (path for path, value in kept_by(modules[name]).items() if value == group.size)
            found += [Following(name, path, True) for path in islice(paths, 1)]  # channels come first
    return fixed, list(dict.fromkeys(found))


def _values(module: nn.Module) -> list[tuple[str, int]]:
    """The numbers of a module; for PyTorch's attention, its number of heads."""
    heads = isinstance(module, nn.MultiheadAttention)
    return [("num_heads", module.num_heads)] if heads else list(kept_by(module).items())


def _own_count(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return ("groups",)
    return ("num_groups",) if isinstance(module, nn.GroupNorm) else ()


def _named(modules: Mapping[str, nn.Module], group: Group) -> Iterator[Following]:
    """Attributes with a name and a value of the group's size, in modules that contain a layer of the group."""
    sizes = sizes_in(modules, group)
    for name in around(_layers(group), modules):
        for path, value in kept_by(modules[name]).items():
            # a number of heads is in `_counts`, and is easily the value of something else, too
            other = group.units and (value == group.size or _HEAD.search(path))
            if value in sizes and meaning(path) is not None and not other:
                yield Following(name, path)


def _where_it_fails(modules: Mapping[str, nn.Module], group: Group, place: str) -> Iterator[Following]:
    """Numbers of the size of a group of channels in modules of the class of one that fails."""
    kind = type(modules.get(place))
    alike = [name for name, module in modules.items() if type(module) is kind and not is_of_torch(module)]
    for name in alike if not group.units else ():
        for path, value in kept_by(modules[name], options=True).items():
            if value == group.size:
                yield Following(name, path, True)


def _of_any_name(modules: Mapping[str, nn.Module], group: Group) -> Iterator[Following]:
    """Numbers of the group's size in modules that contain its layers, and beside them in modules without tensors."""
    sizes, layers = sizes_in(modules, group), _layers(group)
    near = {holder(layer) for layer in layers} | {holder(holder(layer)) for layer in layers}
    beside = [
        name
        for name, module in modules.items()
        if not near.isdisjoint(above(name))
        if isinstance(module, nn.Unflatten) or not is_of_torch(module)
        if next(module.parameters(), None) is None
    ]
    for name in dict.fromkeys([*around(layers, modules), *beside]):
        for path, value in kept_by(modules[name], options=True).items():
            if value in sizes:
                yield Following(name, path, True)
