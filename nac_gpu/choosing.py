"""Widths that keep a budget, tried on the network itself: what it really costs then is what counts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from nac_gpu.budget import Curve, Limits, Sizes, allocate
from nac_gpu.cost import Cost
from nac_gpu.distributed import Ranks
from nac_gpu.evidence import Evidence, gather
from nac_gpu.forward import ExampleInputs
from nac_gpu.groups import Graph, Group
from nac_gpu.latency import Stopwatch, nearest
from nac_gpu.opening import is_open
from nac_gpu.selection import nothing_to_compress
from nac_gpu.sensitivity import losses
from nac_gpu.trial import Chosen, Trial
from nac_gpu.widths import Wanted, limits_of

_ATTEMPTS = 4  # at a budget, until what it really costs is right
_TOLERANCE = 0.01


def choose(
    model: nn.Module,
    example_inputs: ExampleInputs,
    graph: Graph,
    wanted: Wanted,
    trial: Trial,
    before: Cost,
    ranks: Ranks,
) -> tuple[Chosen, Evidence, tuple[str, ...]]:
    """Groups and widths that keep a budget, what they were judged by, and lines for people about both.

    Raises:
        ValueError: nothing can be compressed, or the budget cannot be met.
    """
    if wanted.latency is not None and is_open(model):
        raise ValueError("latency= cannot be measured on a model of nac_gpu.open_model: its weights are in files")
    chooser = _Chooser(model, example_inputs, graph, wanted, trial, before, ranks)
    asked = wanted.most(before.parameters, before.flops)
    if wanted.latency is None:
        return chooser.within(asked), chooser.evidence, (chooser.evidence.source,)
    watch = Stopwatch(model, example_inputs, ranks)
    measured: dict[tuple[int, ...], tuple[float, str]] = {}  # another budget may be what limits the widths
    known: dict[float, tuple[Chosen, str]] = {}

    def timed(share: float) -> float:
        """The share of its time that the network with a share of the model's operations takes."""
        chosen = chooser.within((asked[0], min(asked[1], share * before.flops)))
        widths = tuple(width for _, width in chosen)
        if widths not in measured:
            measured[widths] = watch.measure(chosen)
        latency, line = measured[widths]
        known[share] = chosen, line
        return latency

    found = nearest(wanted.latency, 1.001 * chooser.least / before.flops, timed)  # above what rounding may take
    chosen, line = known[found]
    return trial.passed(chosen), chooser.evidence, (chooser.evidence.source, line)


class _Chooser:
    """Finds widths for budgets.

    Attributes:
        evidence: what neurons are judged by.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        graph: Graph,
        wanted: Wanted,
        trial: Trial,
        before: Cost,
        ranks: Ranks,
    ) -> None:
        self._graph, self._wanted, self._trial, self._before = graph, wanted, trial, before
        pairs = zip(graph.groups, limits_of(graph, wanted, _step(model, wanted)), strict=True)
        self._limits = {group.name: limits for group, limits in pairs}
        halves = [
            (group, max(limits.least, min(limits.most, max(1, group.size // 2))))
            for group, limits in zip(graph.groups, self._limits.values(), strict=True)
        ]
        self._good = self._left([group for group, _ in trial.passed(halves)])
        self.evidence = gather(model, example_inputs, self._good, wanted.calibration, wanted.seed, ranks)
        self._lost: Mapping[str, Curve] = losses(model, graph, self._good, self.evidence, ranks)
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    @property
    def least(self) -> float:
        """Operations of a pass of the narrowest network."""
        narrowest = torch.tensor([limits.least for limits in self._own()], dtype=torch.float64)
        return float(self._sizes().cost(narrowest)[1])

    def within(self, asked: tuple[float, float]) -> Chosen:
        """Groups and widths that cost no more than so many parameters and operations.

        Raises:
            ValueError: there are none.
        """
        most = asked
        best: tuple[float, Chosen] | None = None
        for _ in range(_ATTEMPTS):
            own = self._own()
            widths = allocate([self._lost[group.name] for group in self._good], own, self._sizes(), most)
            found = self._trial.passed(list(zip(self._good, widths, strict=True)))
            after = self._trial.after
            assert after is not None, "they were tried together"
            used = max(c / a for c, a in zip((after.parameters, after.flops), asked, strict=True))
            if len(found) < len(self._good):  # some fail at these widths only
                self._good = self._left([group for group, _ in found])
                continue
            if used <= 1 and (best is None or used > best[0]):
                best = used, found
            if 1 - _TOLERANCE <= used <= 1:
                break
            if used > 1 and widths == [limits.least for limits in own]:
                raise ValueError(_impossible(self._wanted, self._before, after))
            most = (most[0] / used, most[1] / used)
        if best is None:
            raise ValueError(f"no widths were found that meet the budget in {_ATTEMPTS} attempts; give width= instead")
        return self._trial.passed(best[1])

    def _own(self) -> list[Limits]:
        return [self._limits.get(group.name, Limits(1, group.size)) for group in self._good]

    def _sizes(self) -> Sizes:
        return Sizes(self._good, self._shapes, self._graph.operations, self._before.flops)

    def _left(self, good: Sequence[Group]) -> list[Group]:
        if not good:
            raise nothing_to_compress(replace(self._graph, left_alone=tuple(self._trial.alone)))
        return list(good)


def _step(model: nn.Module, wanted: Wanted) -> int:
    if wanted.multiple_of is not None:
        return wanted.multiple_of
    cuda = any(parameter.is_cuda for parameter in model.parameters())
    return 8 if cuda or wanted.latency is not None else 1


def _impossible(wanted: Wanted, before: Cost, least: Cost) -> str:
    parts = []
    for name, asked, whole, possible in (
        ("params", wanted.params, before.parameters, least.parameters),
        ("flops", wanted.flops, before.flops, least.flops),
    ):
        if asked is not None:
            share = f"{possible / whole:.4f}" if isinstance(asked, float) else f"{possible:,}"
            parts.append(f"{name}={asked!r} cannot be met, the smallest possible is {share}")
    return "; ".join(parts) + ": one neuron is left in each group, or what limits= and width= allow"
