"""The plan of a compression: the width of every group, and what is left alone and why."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from nac_gpu.network.costs import Cost
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
    """What a compression will do; `print(plan)` shows it as a table.

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
        """A table of the groups, what is left alone, and the cost before and after."""
        name = max([len("group"), *(len(group.name) for group in self.groups)])
        count = max(len(f"{group.parameters_before:,}") for group in self.groups) if self.groups else 0
        count = max(count, len("parameters"))
        title = f"{'group':{name}}  {'neurons':>7}  {'kept':>6}  {'parameters':>{count}}  {'after':>{count}}  layers"
        lines = [title] if self.groups else []
        for group in self.groups:
            layers = ("heads or groups of " if group.units else "") + ", ".join(group.layers)
            cells = f"{group.parameters_before:{count},}  {group.parameters_after:{count},}"
            lines.append(f"{group.name:{name}}  {group.before:7,}  {group.after:6,}  {cells}  {layers}")
        lines += self.changes
        lines += [f"left alone: {alone.layer} ({alone.size:,}): {alone.reason}" for alone in self.left_alone]
        remedies = dict.fromkeys(alone.remedy for alone in self.left_alone if alone.remedy)
        lines += [f"to compress more: {remedy}" for remedy in remedies]
        for title, old, new in (
            ("parameters", self.before.parameters, self.after.parameters),
            ("FLOPs", self.before.flops, self.after.flops),
        ):
            lines.append(f"{title}: {old:,} -> {new:,} ({100 * new / max(old, 1):.1f} %)")
        return "\n".join(lines)
