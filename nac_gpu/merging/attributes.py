"""Size attributes of modules and configurations, updated to agree with the merged tensors.

The attributes of PyTorch's own layers are known. Counts of units (heads, groups of a convolution) follow from the
groups. Size attributes of user-defined modules are guessed by name and value, and each guess is tested by running the
smaller network (see `nac_gpu.planning.trial`).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from nac_gpu.tracing.graph import Choice, Group

_COUNT = re.compile(r"heads?$|groups$")
_HEADS = re.compile(r"heads$|n_head$")
_HIDDEN = re.compile(r"intermediate_size$|ffn_dim$|d_ff$|n_inner$")
_WIDTH = re.compile(r"dim|size|width|channels|features|hidden|planes|inner|embed|chunk|split|pad")


def attributes(model: nn.Module, choices: Sequence[Choice]) -> dict[tuple[str, str], object]:
    """The new values of the attributes that depend on the groups, by (module, attribute)."""
    modules = dict(model.named_modules())
    values: dict[tuple[str, str], object] = {}
    for group, width in ((choice.group, choice.width) for choice in choices):
        for name, attribute in group.attributes:
            old = values.get((name, attribute), getattr(modules[name], attribute))
            values[name, attribute] = _scaled(old, group.size, width)
            if attribute == "groups":  # in_channels is `groups` times the columns of the weight
                layer = modules[name]
                assert isinstance(layer, nn.modules.conv._ConvNd), "only convolutions have groups"
                values[name, "in_channels"] = _scaled(layer.in_channels, group.size, width)
    return values


def _scaled(value: object, before: int, after: int) -> object:
    assert isinstance(value, int), "only whole numbers are scaled"
    return value * after // before


def set_configs(model: nn.Module, choices: Sequence[Choice]) -> None:
    """Update the configurations of a compressed Hugging Face model to the new widths, in place.

    A configuration holds one width for all layers, so it is changed only if all groups of that width got the same new
    width.

    Args:
        model: compressed; it does not share its configurations with the original.
        choices: the merged groups and their widths.
    """
    modules = dict(model.named_modules())
    found: dict[int, tuple[object, list[tuple[Group, int]]]] = {}
    for group, width in ((choice.group, choice.width) for choice in choices):
        for length in range(len(group.layers[0].split(".")), -1, -1):
            holder = modules.get(".".join(group.layers[0].split(".")[:length]))
            config = getattr(holder, "config", None)
            if hasattr(config, "to_dict"):
                found.setdefault(id(config), (config, []))[1].append((group, width))
                break
    for config, members in found.values():
        for name, value in list(vars(config).items()):
            heads = _HEADS.search(name) is not None
            if not isinstance(value, int) or not (heads or _HIDDEN.search(name)):
                continue
            changes = {
                (group.size, width)
                for group, width in members
                if bool(group.units) == heads and (value % group.size == 0 if heads else value == group.size)
            }
            if len(changes) != 1:
                continue
            before, after = changes.pop()
            hidden = getattr(config, "hidden_size", None)
            if heads and "key_value" not in name and hidden and getattr(config, "head_dim", None) is None:
                vars(config)["head_dim"] = hidden // value  # no longer hidden_size / heads, which is the default
            setattr(config, name, value * after // before)


def guesses(modules: Mapping[str, nn.Module], group: Group) -> Iterator[tuple[tuple[str, str], ...]]:
    """Candidate sets of attributes, as (module, attribute), that have to follow a group's size; likeliest first."""
    units = tuple(name if name in modules else "" for name in group.units)  # other names mean the model itself
    own = tuple((name, kind) for name in units for kind in _own_count(modules[name]))
    if group.units:
        heads = [name for name in units if not _own_count(modules[name])]
        counts = own + tuple(_matching(modules, heads, _COUNT, lambda value: value % group.size == 0))
        yield counts
        rows = {member.index.numel() for member in group.members} | {group.size}
        wide = tuple(_matching(modules, heads, _WIDTH, lambda value: value in rows))
        if wide:
            yield counts + wide
        return
    yield ()
    owners = (member.tensor for member in group.members if member.role == "mean")
    parents = dict.fromkeys(name.rpartition(".")[0] for name in (*group.layers, *owners))
    known = [name for name in parents if name in modules and not type(modules[name]).__module__.startswith("torch.nn")]
    sizes = {group.size} | {member.index.numel() for member in group.members}
    wide = tuple(_matching(modules, known, _WIDTH, lambda value: value in sizes))
    if wide:
        yield wide
    exact = tuple(_matching(modules, known, _WIDTH, lambda value: value == group.size))
    if exact and exact != wide:
        yield exact


def _own_count(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return ("groups",)
    return ("num_groups",) if isinstance(module, nn.GroupNorm) else ()


def _matching(
    modules: Mapping[str, nn.Module], names: Sequence[str], pattern: re.Pattern[str], fits: Callable[[int], bool]
) -> Iterator[tuple[str, str]]:
    """Integer attributes of these modules with a matching name and value, as (module, attribute)."""
    for name in names:
        for attribute, value in vars(modules[name]).items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 1
            if whole and pattern.search(attribute) and fits(value):
                yield name, attribute
