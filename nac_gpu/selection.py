"""Which groups of a graph are meant: by the names that `only=` and `skip=` give, or those of an earlier plan."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from nac_gpu.groups import Graph, Group, LeftAlone

Names = Sequence[str] | None


def with_groups(graph: Graph, wanted: Sequence[tuple[str, int]]) -> Graph:
    """The graph with these groups, by name and size, among them units' channels that are groups otherwise.

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
    """The graph with the groups that `only` and `skip` leave; the others are left alone.

    Raises:
        TypeError: one name in place of several.
        ValueError: a name that fits no layer.
    """
    for option, patterns in (("only", only or ()), ("skip", skip or ())):
        if isinstance(patterns, str):
            raise TypeError(f"{option}={patterns!r}: expected a sequence of names, such as [{patterns!r}]")
        for pattern in patterns:
            if not any(_holds(group, pattern) for group in graph.groups) and not any(
                _named(alone.layer, pattern) for alone in graph.left_alone
            ):
                known = ", ".join(group.name for group in graph.groups)
                raise ValueError(f"unknown layer {pattern!r} in {option}=, expected some of: {known}")
    kept, alone = [], list(graph.left_alone)
    for group in graph.groups:
        if only is not None and not any(_holds(group, pattern) for pattern in only):
            alone.append(LeftAlone(group.name, group.size, "it is not named in only="))
        elif any(_holds(group, pattern) for pattern in skip or ()):
            alone.append(LeftAlone(group.name, group.size, "it is named in skip="))
        else:
            kept.append(group)
    return replace(graph, groups=tuple(kept), left_alone=tuple(alone))


def nothing_to_compress(graph: Graph) -> ValueError:
    """The error for a graph without groups: why there are none, and what would help."""
    if not graph.left_alone:
        why = "no Linear or convolution makes channels that another one reads; expected at least two such layers"
        return ValueError(f"nothing to compress: {why}")
    remedies = dict.fromkeys(alone.remedy for alone in graph.left_alone if alone.remedy)
    reasons = [f"{alone.layer} ({alone.size}): {alone.reason}" for alone in graph.left_alone]
    return ValueError(
        "nothing to compress: " + "; ".join([*reasons, *(f"to compress more: {remedy}" for remedy in remedies)])
    )


def _holds(group: Group, pattern: str) -> bool:
    return any(_named(name, pattern) for name in (group.name, *group.layers))


def _named(name: str, pattern: str) -> bool:
    """The name, a module that holds it, or a pattern for either."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))
