"""Choosing widths that meet a budget, checked against the measured cost of the smaller network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nac_gpu.calibration.curves import Curve
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.calibration.gathering import gather
from nac_gpu.network.costs import Cost
from nac_gpu.network.state import is_open
from nac_gpu.planning.allocation import Sizes, allocate
from nac_gpu.planning.latency import Stopwatch, nearest
from nac_gpu.planning.layers import limits_of, nothing_to_compress, usual_limits
from nac_gpu.planning.request import Limits, Request
from nac_gpu.planning.sensitivity import losses
from nac_gpu.planning.subject import Subject
from nac_gpu.planning.trial import Outcome, Trial
from nac_gpu.tracing.graph import Choice, Group, LeftAlone

_ATTEMPTS = 4  # corrections of the target until the measured cost meets the budget
_TOLERANCE = 0.01  # share of the budget that may stay unused


@dataclass(frozen=True)
class Chosen:
    """Widths for a budget.

    Attributes:
        outcome: result of their trial.
        evidence: used to choose the widths.
        refused: all groups that a trial refused, in order, and why.
        lines: about the evidence and the budget, for the printed plan.
    """

    outcome: Outcome
    evidence: Evidence
    refused: tuple[LeftAlone, ...]
    lines: tuple[str, ...]


def choose(subject: Subject, request: Request, trial: Trial) -> Chosen:
    """Groups and widths that meet a budget.

    Raises:
        ValueError: nothing can be compressed, or the budget cannot be met.
    """
    if request.latency is not None and is_open(subject.model):
        raise ValueError(
            "latency= cannot be measured on a model of nac_gpu.open_model, whose weights are in files; give params= or "
            "flops="
        )
    chooser = _Chooser(subject, request, trial)
    asked = request.most(subject.cost.parameters, subject.cost.flops)
    lines = (chooser.evidence.source, *chooser.unmeasured)
    if request.latency is None:
        outcome, own = chooser.within(asked)
        return Chosen(outcome, chooser.evidence, tuple(chooser.refused), (*lines, *own))
    watch = Stopwatch(subject.model, subject.inputs, subject.ranks)
    measured: dict[tuple[int, ...], tuple[float, str]] = {}  # by widths: another, tighter budget may repeat them
    known: dict[float, tuple[Outcome, tuple[str, ...]]] = {}

    def timed(share: float) -> float:
        """The relative latency of the network with this share of the model's operations."""
        outcome, lines = chooser.within((asked[0], min(asked[1], share * subject.cost.flops)))
        widths = tuple(choice.width for choice in outcome.choices)
        if widths not in measured:
            measured[widths] = watch.measure(outcome.choices)
        latency, line = measured[widths]
        known[share] = outcome, (line, *lines)
        return latency

    found = nearest(request.latency, 1.001 * chooser.least / subject.cost.flops, timed)  # a margin for rounding
    outcome, own = known[found]
    return Chosen(outcome, chooser.evidence, tuple(chooser.refused), (*lines, *own))


class _Chooser:
    """Finds widths for budgets.

    Attributes:
        evidence: used to choose the widths.
        refused: groups that a trial refused, and why.
        unmeasured: a line that says that losses could not be measured; none if they were.
    """

    def __init__(self, subject: Subject, request: Request, trial: Trial) -> None:
        self._subject, self._request, self._trial = subject, request, trial
        self.refused: list[LeftAlone] = []
        graph, self._step = subject.graph, _step(subject, request)
        halves = [
            Choice(group, max(limits.least, min(limits.most, max(1, group.size // 2))))
            for group, limits in zip(graph.groups, limits_of(graph, request, self._step), strict=True)
        ]
        self._good = self._left(self._run(halves))
        self.evidence = gather(
            subject.model, subject.inputs, self._good, request.calibration, request.seed, subject.ranks
        )
        self._lost: Mapping[str, Curve]
        self._lost, why = losses(subject.model, subject.inputs, graph, self._good, self.evidence, subject.ranks)
        self.unmeasured = (why,) if why else ()
        self._shapes = {name: parameter.shape for name, parameter in subject.model.named_parameters()}

    @property
    def least(self) -> float:
        """FLOPs of one pass of the narrowest possible network."""
        narrowest = torch.tensor([limits.least for limits in self._limits(self._step)], dtype=torch.float64)
        return float(self._sizes().cost(narrowest)[1])

    def within(self, asked: tuple[float, float], step: int | None = None) -> tuple[Outcome, tuple[str, ...]]:
        """Groups and widths within a budget of parameters and FLOPs, and lines for the printed plan.

        Args:
            asked: the most parameters and FLOPs.
            step: widths are multiples of this; by default what the request says. It is halved until the budget can be
                met.

        Raises:
            ValueError: there are none.
        """
        most, step = asked, step or self._step
        best: tuple[float, Outcome] | None = None
        for _ in range(_ATTEMPTS):
            own = self._limits(step)
            widths = allocate([self._lost[group.name] for group in self._good], own, self._sizes(), most)
            outcome = self._run([Choice(group, width) for group, width in zip(self._good, widths, strict=True)])
            if len(outcome.choices) < len(self._good):  # some groups fail only at these widths
                self._good = self._left(outcome)
                continue
            assert outcome.measured is not None, "all groups passed"
            after = outcome.measured.cost
            used = max(c / a for c, a in zip((after.parameters, after.flops), asked, strict=True))
            if used <= 1 and (best is None or used > best[0]):
                best = used, outcome
            if 1 - _TOLERANCE <= used <= 1:
                break
            if used > 1 and widths == [limits.least for limits in own]:
                if step > 1:
                    return self.within(asked, step // 2)
                raise ValueError(_impossible(self._request, self._subject.cost, after))
            most = (most[0] / used, most[1] / used)
        if best is None:
            raise ValueError(f"no widths were found that meet the budget in {_ATTEMPTS} attempts; give width= instead")
        left = f"the budget cannot be met with multiples of {self._step} neurons: widths are multiples of {step}"
        return best[1], (left,) if step < self._step else ()

    def _run(self, choices: Sequence[Choice]) -> Outcome:
        outcome = self._trial.run(choices)
        self.refused += [alone for alone in outcome.refused if alone not in self.refused]
        return outcome

    def _limits(self, step: int) -> list[Limits]:
        graph = self._subject.graph
        known = dict(zip((group.name for group in graph.groups), limits_of(graph, self._request, step), strict=True))
        return [  # groups of channels in place of units are not among them
            known.get(group.name) or usual_limits(group, self._request, step) for group in self._good
        ]

    def _sizes(self) -> Sizes:
        return Sizes(self._good, self._shapes, self._subject.graph.operations, self._subject.cost.flops)

    def _left(self, outcome: Outcome) -> list[Group]:
        if not outcome.choices:
            raise nothing_to_compress(replace(self._subject.graph, left_alone=tuple(self.refused)))
        return [choice.group for choice in outcome.choices]


def _step(subject: Subject, request: Request) -> int:
    if request.multiple_of is not None:
        return request.multiple_of
    return 8 if subject.on_cuda or request.latency is not None else 1


def _impossible(request: Request, before: Cost, least: Cost) -> str:
    parts = []
    for name, asked, whole, possible in (
        ("params", request.params, before.parameters, least.parameters),
        ("flops", request.flops, before.flops, least.flops),
    ):
        if asked is not None:
            share = f"{possible / whole:.4f}" if isinstance(asked, float) else f"{possible:,}"
            parts.append(f"{name}={asked!r} cannot be met, the smallest possible is {share}")
    return "; ".join(parts) + ": one neuron is left in each group, or what limits= and width= allow"
