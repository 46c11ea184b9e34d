"""The plan of a compression: the width of every group, and what is left alone and why."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nac_gpu.network.costs import Cost
from nac_gpu.planning.alike import by_kind, counted, numbered, spread, unnumbered
from nac_gpu.tracing.graph import LeftAlone


@dataclass(frozen=True)
class GroupPlan:
    """One group in a plan.

    Attributes:
        name: of its first producer.
        layers: names of all its producers.
        before: number of neurons.
        after: number of neurons kept.
        units: the neurons are attention heads or groups of channels, not channels.
        parameters_before: number of parameters in the rows, scales and columns of its neurons, over all layers; a
            weight between two groups counts for both.
        parameters_after: the same for the compressed model.

    >>> nac_gpu.GroupPlan("conv1", ("conv1",), before=64, after=16).after
    16
    """

    name: str
    layers: tuple[str, ...]
    before: int
    after: int
    units: bool = False
    parameters_before: int = 0
    parameters_after: int = 0


@dataclass(frozen=True)
class Plan:
    """What a compression will do; `print(plan)` shows it as a table, `print(plan.detailed())` with every single group.

    Attributes:
        groups: every group that can be compressed, in the order of the forward pass.
        left_alone: neurons that cannot, with the reason.
        before: cost of the model.
        after: cost of the compressed model.
        changes: notes: wrappers and parametrisations that are removed, and how neurons are compared.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> plan = nac_gpu.plan(model, torch.zeros(1, 8), width=0.25)
    >>> plan.after.parameters
    108
    """

    groups: tuple[GroupPlan, ...]
    left_alone: tuple[LeftAlone, ...]
    before: Cost
    after: Cost
    changes: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, object]:
        """The fields, without the cached evidence about the model: copies and pickles stay small."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def widths(self) -> dict[str, int]:
        """Neurons kept, by group. To change some: `nac_gpu.plan(model, inputs, width={**plan.widths, "conv1": 12})`.

        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> nac_gpu.plan(model, torch.zeros(1, 8), width=0.25).widths
        {'0': 8}
        """
        return {group.name: group.after for group in self.groups}

    def to_json(self) -> str:
        """The plan as JSON, which `from_json` reads.

        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> text = nac_gpu.plan(model, torch.zeros(1, 8), width=0.25).to_json()
        """
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """A plan from the JSON that `to_json` wrote.

        Raises:
            ValueError: the text is not the JSON of a plan.

        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> plan = nac_gpu.plan(model, torch.zeros(1, 8), width=0.25)
        >>> nac_gpu.Plan.from_json(plan.to_json()) == plan
        True
        """
        try:
            value: dict[str, Any] = json.loads(text)
            groups = tuple(GroupPlan(**{**group, "layers": tuple(group["layers"])}) for group in value["groups"])
            alone = tuple(LeftAlone(**item) for item in value["left_alone"])
            return Plan(groups, alone, Cost(**value["before"]), Cost(**value["after"]), tuple(value["changes"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"not the JSON of a plan, expected what Plan.to_json() wrote: {error}") from error

    def __str__(self) -> str:
        """A table of the groups, what is left alone, and the cost before and after.

        Groups of the same kind are one line, with the sums of their parameters, if there are more than four whose names
        differ only in the numbers of their blocks; so are layers left alone for the same reason.
        """
        return self._text(
            by_kind(self.groups, lambda group: _kind(group.name, *group.layers, group.before, group.units)),
            by_kind(self.left_alone, _kind_of(self.left_alone)),
        )

    def detailed(self) -> str:
        """The same with one line for each group and for each layer that is left alone.

        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> plan = nac_gpu.plan(model, torch.zeros(1, 8), width=0.25)
        >>> plan.detailed() == str(plan)  # it has few layers
        True
        """
        return self._text([[group] for group in self.groups], [[alone] for alone in self.left_alone])

    def _text(self, groups: Sequence[Sequence[GroupPlan]], alone: Sequence[Sequence[LeftAlone]]) -> str:
        """The plan with these groups and layers left alone together in one line."""
        rows = [_row(alike) for alike in groups]
        titles = ("group", "neurons", "kept", "parameters", "after", "layers")
        name, neurons, kept, count, after, _ = (max(map(len, column)) for column in zip(titles, *rows, strict=True))
        kept, count = max(kept, 6), max(count, after)
        lines = [
            f"{row[0]:{name}}  {row[1]:>{neurons}}  {row[2]:>{kept}}  {row[3]:>{count}}  {row[4]:>{count}}  {row[5]}"
            for row in (titles, *rows)
        ]
        lines = lines if rows else []
        lines += self.changes
        lines += [f"left alone: {_alone(alike)}" for alike in alone]
        remedies = dict.fromkeys(alone.remedy for alone in self.left_alone if alone.remedy)
        lines += [f"to compress more: {remedy}" for remedy in remedies]
        for title, old, new in (
            ("parameters", self.before.parameters, self.after.parameters),
            ("FLOPs", self.before.flops, self.after.flops),
        ):
            lines.append(f"{title}: {old:,} -> {new:,} ({100 * new / max(old, 1):.1f} %)")
        return "\n".join(lines)


def _kind(name: str, *said: object) -> tuple[object, ...]:
    """What layers have in common whose names, and what is said of them, differ only in the numbers of their blocks."""
    return (unnumbered(name, name), *(unnumbered(part, name) if isinstance(part, str) else part for part in said))


def _kind_of(left_alone: Sequence[LeftAlone]) -> Callable[[LeftAlone], tuple[object, ...]]:
    """What layers that are left alone have in common: the same reason, which may name the block of each of them."""
    same = Counter((*_kind(alone.layer, alone.size), alone.reason) for alone in left_alone)

    def kind(alone: LeftAlone) -> tuple[object, ...]:
        literal = (*_kind(alone.layer, alone.size), alone.reason)
        return literal if same[literal] > 1 else _kind(alone.layer, alone.size, alone.reason)

    return kind


def _row(groups: Sequence[GroupPlan]) -> tuple[str, ...]:
    """The cells of groups of a kind in the table."""
    first, names = groups[0], [group.name for group in groups]

    def numbers(text: str) -> str:
        return text if len(groups) == 1 else numbered(unnumbered(text, first.name), names)

    layers = ", ".join(numbers(layer) for layer in first.layers)
    return (
        numbers(first.name) + counted(names),
        f"{first.before:,}",
        spread([group.after for group in groups]),
        f"{sum(group.parameters_before for group in groups):,}",
        f"{sum(group.parameters_after for group in groups):,}",
        ("heads or groups of " if first.units else "") + layers,
    )


def _alone(layers: Sequence[LeftAlone]) -> str:
    """Layers of a kind that are left alone, and why."""
    first, names = layers[0], [alone.layer for alone in layers]
    if len(layers) == 1:
        return f"{first.layer} ({first.size:,}): {first.reason}"
    name, reason = (numbered(unnumbered(text, first.layer), names) for text in (first.layer, first.reason))
    reason = first.reason if first.reason == layers[1].reason else reason
    return f"{name}{counted(names)} ({first.size:,}): {reason}"
