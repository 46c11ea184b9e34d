"""Names of layers in `only=`, `skip=`, `width=` and `limits=`: which groups they mean, and the resulting widths."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from nac_gpu.planning.request import Limits, Names, Request, Width, number
from nac_gpu.tracing.graph import Graph, Group, LeftAlone


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a layer: it equals or matches the name of the layer or of a module that contains it.

    >>> [matches("layer4.0.conv1", pattern) for pattern in ("layer4", "*.conv1", "conv1")]
    [True, True, False]
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


def stands_for(pattern: str, group: Group) -> bool:
    """Whether a pattern means one of a group's producers."""
    return any(matches(name, pattern) for name in (group.name, *group.layers))


def with_groups(graph: Graph, wanted: Sequence[tuple[str, int]]) -> Graph:
    """The graph with these groups, by name and size; a unit group may be replaced by its groups of channels.

    Raises:
        ValueError: the graph lacks one.
    """
    known = {(g.name, g.size): g for group in graph.groups for g in (*group.otherwise, group)}
    missing = [(name, size) for name, size in wanted if (name, size) not in known]
    if missing:
        name, size = missing[0]
        raise ValueError(
            f"the plan was made for another model: it has a group {name} of {size}, which this model lacks; make it "
            "again"
        )
    return replace(graph, groups=tuple(known[key] for key in wanted))


def filtered(graph: Graph, only: Names, skip: Names) -> Graph:
    """The graph with the groups that `only` and `skip` select; the others are left alone.

    Raises:
        TypeError: a single string instead of a sequence of names.
        ValueError: a name that matches no layer.
    """
    for option, patterns in (("only", only or ()), ("skip", skip or ())):
        if isinstance(patterns, str):
            raise TypeError(f"{option}={patterns!r}: expected a sequence of names, such as [{patterns!r}]")
        if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"{option}={patterns!r}: expected a sequence of names (str)")
        for pattern in patterns:
            if not any(stands_for(pattern, group) for group in graph.groups) and not any(
                matches(alone.layer, pattern) for alone in graph.left_alone
            ):
                known = ", ".join(group.name for group in graph.groups)
                raise ValueError(f"unknown layer {pattern!r} in {option}=, expected some of: {known}")
    kept, alone = [], list(graph.left_alone)
    for group in graph.groups:
        if only is not None and not any(stands_for(pattern, group) for pattern in only):
            alone.append(LeftAlone(group.name, group.size, "it is not named in only="))
        elif any(stands_for(pattern, group) for pattern in skip or ()):
            alone.append(LeftAlone(group.name, group.size, "it is named in skip="))
        else:
            kept.append(group)
    return replace(graph, groups=tuple(kept), left_alone=tuple(alone))


def nothing_to_compress(graph: Graph) -> ValueError:
    """The error for a graph without groups: why there are none, and the remedies."""
    if not graph.left_alone:
        why = "expected at least two linear layers or convolutions, where one reads the channels of the other"
        return ValueError(f"nothing to compress: {why}")
    remedies = dict.fromkeys(alone.remedy for alone in graph.left_alone if alone.remedy)
    reasons = [f"{alone.layer} ({alone.size}): {alone.reason}" for alone in graph.left_alone]
    return ValueError(
        "nothing to compress: " + "; ".join([*reasons, *(f"to compress more: {remedy}" for remedy in remedies)])
    )


def widths_of(graph: Graph, width: Width) -> list[int]:
    """The number of neurons to keep in each group.

    Raises:
        ValueError: an unknown layer, two widths for one group, or a width out of range.
    """
    if not isinstance(width, Mapping):
        return [kept_of(group.name, group.size, float(width)) for group in graph.groups]
    chosen: dict[str, tuple[str, int]] = {}
    for pattern, value in width.items():
        for group in _groups_of(graph, pattern):
            kept = kept_of(pattern, group.size, value)
            before = chosen.setdefault(group.name, (pattern, kept))
            if before[1] != kept:
                raise ValueError(
                    f"{before[0]} and {pattern} share their neurons (group {group.name}), expected one width, "
                    f"got {before[1]} and {kept}"
                )
    return [chosen[group.name][1] if group.name in chosen else group.size for group in graph.groups]


def limits_of(graph: Graph, request: Request, step: int) -> list[Limits]:
    """The fewest and most neurons of each group, for a budget.

    Layers named in `width` have a fixed width; a single number is the maximum of every group. Without limits, a group
    keeps at least `step` neurons, or all if it has no more.

    Raises:
        ValueError: an unknown layer, or limits out of range.
    """
    exact: dict[str, int] = {}  # fixed widths by group
    if isinstance(request.width, Mapping):
        named = {group.name for pattern in request.width for group in _groups_of(graph, pattern)}
        pairs = zip(graph.groups, widths_of(graph, request.width), strict=True)
        exact = {group.name: width for group, width in pairs if group.name in named}
    chosen: dict[str, tuple[int, int]] = {}
    for pattern, pair in (request.limits or {}).items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{pattern}: limits are {pair!r}, expected a pair: fewest and most neurons")
        for group in _groups_of(graph, pattern):
            least, most = (kept_of(pattern, group.size, value) for value in pair)
            if least > most:
                raise ValueError(f"{pattern}: limits are {least} to {most} neurons, expected the fewest first")
            chosen[group.name] = (least, most)
    result = []
    for group in graph.groups:
        usual = usual_limits(group, request, step)
        least, most = chosen.get(group.name, (usual.least, usual.most))
        if group.name in exact:
            least = most = exact[group.name]
        elif group.name in chosen:
            most = max(least, min(most, _widest(group, request)))
        result.append(Limits(least, most, usual.step))
    return result


def usual_limits(group: Group, request: Request, step: int) -> Limits:
    """The fewest and most neurons of a group that is not named in `limits` or `width`; units have no step."""
    own = 1 if group.units else step
    widest = _widest(group, request)
    if group.size <= own:
        return Limits(min(own, widest), widest, own)
    return Limits(own, max(own, widest), own)


def _widest(group: Group, request: Request) -> int:
    """The number of neurons that a single width for all groups leaves of this one."""
    if request.width is None or isinstance(request.width, Mapping):
        return group.size
    return kept_of(group.name, group.size, float(request.width))


def kept_of(name: str, size: int, value: int | float, what: str = "neurons") -> int:
    """The number of neurons that a width keeps.

    Args:
        name: of the layer, for error messages.
        size: number of its neurons.
        value: a number (int) or a share (float).
        what: the things counted, for error messages.

    Raises:
        ValueError: out of range.
    """
    value = number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: width is {value!r}, expected a number of {what} (int) or a share (float)")
    if isinstance(value, int):
        if not 1 <= value <= size:
            raise ValueError(f"{name}: cannot keep {value} of {size} {what}, expected 1 to {size}")
        return value
    if not 0 < value <= 1:
        raise ValueError(f"{name}: cannot keep the share {value}, expected more than 0 and at most 1")
    return max(1, round(value * size))


def _groups_of(graph: Graph, pattern: str) -> list[Group]:
    """The groups that a key of a mapping means; the exact name of a group, such as `qkv#2`, means only that one.

    Raises:
        ValueError: there are none.
    """
    exact = [group for group in graph.groups if group.name == pattern]
    found = exact or [group for group in graph.groups if stands_for(pattern, group)]
    if found:
        return found
    for alone in graph.left_alone:
        if alone.layer == pattern:
            raise ValueError(f"{pattern} cannot be compressed: {alone.reason}; take it out of the widths")
    known = ", ".join(group.name for group in graph.groups)
    raise ValueError(f"unknown layer {pattern!r} in the widths, expected one of: {known}")
