"""From a plan to the smaller network: neurons assigned, groups made smaller, consumers refitted, the whole refined.

There are several ways to do each of these, and which is best depends on the network. Merging is right where neurons are
alike, removal where they are not; consumers are refitted to what they read in the smaller network, or in the original;
or they are left as they are, where what is fitted does not hold on other inputs. A part of the inputs is kept aside:
nothing is fitted to it, and the way whose answers there are nearest to the original's is taken.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.batches import Batches, Divided, first_batches, size_of
from nac_gpu.calibration.curves import error_at
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.calibration.neurons import neuron_vectors
from nac_gpu.clustering.methods import METHODS, AssignmentMethod, l1, ward
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.files.origin import remember
from nac_gpu.merging.attributes import attributes
from nac_gpu.merging.centroids import Deviation, Merger
from nac_gpu.merging.compensation import Compensator, Refit
from nac_gpu.merging.refinement import learn
from nac_gpu.network.copying import copied, in_float32, rebuild
from nac_gpu.network.judging import Answers, all_answers, judged
from nac_gpu.network.running import set_mode_again
from nac_gpu.network.state import tensors
from nac_gpu.planning.prepare import Prepared
from nac_gpu.planning.request import checked_passes
from nac_gpu.tracing.graph import Choice

#: How merged neurons and the weights of their consumers are computed: see `nac_gpu.compress`.
Rule = Literal["compensated", "restored", "centroid"]
#: How neurons are compared: see `nac_gpu.compress`.
Neurons = Literal["activations", "folded", "weights"]
#: How a group is made smaller: see `nac_gpu.compress`.
Method = Literal["auto", "ward", "removal", "mixed", "kmeans", "random", "l1"]
#: All groups in one way, each in the way that is likely to be the best, or each in the best of those tried.
Kind = Literal["ward", "removal", "likely", "auto"]
# Operations of all passes; some minutes on two cores.
_PASSES = 1e13 / 4  # each group needs about four passes of its own part of the network
_REFINEMENT = 1e14 / 4  # two forward passes, and a backward one that is twice as dear
_HOW: dict[Refit, str] = {
    "through": "refitted in the smaller network",
    "alone": "refitted in the original",
}
_BY_ACTIVATIONS = ("auto", "likely", "removal", "mixed")  # methods that need more than points


@dataclass(frozen=True)
class MergeSettings:
    """How neurons are merged: the arguments of `compress` that a plan does not contain.

    Attributes:
        method: name of the method; None for a function of the user.
        assign: assigns neurons to clusters.
        rule: how merged neurons and their consumers are computed.
        neurons: how neurons are compared; None to decide by the evidence.
        refine: passes of refinement over the calibration inputs.
        seed: of random methods and of refinement.
    """

    method: str | None
    assign: AssignmentMethod
    rule: Rule
    neurons: Neurons | None
    refine: int
    seed: int

    @staticmethod
    def of(
        method: str | AssignmentMethod, rule: Rule, neurons: Neurons | None, refine: int, seed: int
    ) -> "MergeSettings":
        """From the arguments of `compress`.

        Raises:
            ValueError: an unknown name, or a negative number of passes.
        """
        if isinstance(method, str) and method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise ValueError(f"unknown method {method!r}, expected one of {known}, or a function")
        for name, value, known in (("rule", rule, get_args(Rule)), ("neurons", neurons, (None, *get_args(Neurons)))):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(k for k in known if k)}")
        assign = METHODS.get(method, ward) if isinstance(method, str) else method
        if assign is l1 and neurons is None:
            neurons = "weights"
        own = method if isinstance(method, str) else None
        return MergeSettings(own, assign, rule, neurons, checked_passes(refine), seed)

    @property
    def looks_at_activations(self) -> bool:
        """Whether activations have to be observed."""
        return self.rule == "compensated" or self.neurons == "activations"

    @property
    def deviation(self) -> Deviation:
        """How the standard deviation of a merged channel with BatchNorm is chosen."""
        return "centroid" if self.rule == "centroid" else "restored"

    def arguments(self) -> dict[str, object]:
        """The arguments that must be equal on all ranks."""
        method = getattr(self.assign, "__qualname__", type(self.assign).__qualname__)
        values = {name: value for name, value in vars(self).items() if name != "assign"}
        return {**values, "method": self.method or method}


def made(prepared: Prepared, evidence: Evidence | None, settings: MergeSettings) -> nn.Module:
    """The smaller model of a plan, which remembers the plan with a line about each step that failed.

    If activations were observed in a copy of the model in float32, the smaller network is made of that copy first.
    """
    model = prepared.model
    wide = evidence is not None and evidence.float32 and _compensates(evidence, settings)
    network = in_float32(model) if wide else model
    assembly = _Assembly(prepared, network, evidence, settings)
    small = assembly.merged()
    lines = [line for line in assembly.failures if line not in prepared.plan.changes]
    if lines:
        warnings.warn("; ".join(lines), stacklevel=3)
    lines += assembly.refined(small)
    if network is not model:
        dtypes = {name: tensor.dtype for name, tensor in tensors(model).items()}
        state = {name: tensor.to(dtypes[name]) for name, tensor in tensors(small).items()}
        small = _rebuilt(model, state, prepared)
    plan = replace(prepared.plan, changes=(*prepared.plan.changes, *assembly.told, *lines))
    set_mode_again(small)
    remember(small, model, plan, settings.seed)
    return small


def _rebuilt(network: nn.Module, state: Mapping[str, Tensor], prepared: Prepared) -> nn.Module:
    return rebuild(network, state, attributes(prepared.model, prepared.choices))


def _compensates(evidence: Evidence | None, settings: MergeSettings) -> bool:
    return settings.rule == "compensated" and evidence is not None and bool(evidence.batches)


@dataclass(frozen=True)
class _Made:
    """One way to make the network smaller, carried out.

    Attributes:
        how: in words.
        state: all tensors, at their new sizes.
        failures: lines about what failed.
        ways: how many groups were made smaller in which way.
    """

    how: str
    state: Mapping[str, Tensor]
    failures: tuple[str, ...]
    ways: Mapping[str, int]


class _Assembly:
    """Makes the smaller network of a plan.

    Attributes:
        failures: lines about what failed.
        told: lines about what was chosen.

    Args:
        prepared: the plan.
        network: the model, or its copy in float32.
        evidence: about its neurons.
        settings: how they are merged.
    """

    def __init__(
        self, prepared: Prepared, network: nn.Module, evidence: Evidence | None, settings: MergeSettings
    ) -> None:
        self._prepared, self._network, self._evidence, self._settings = prepared, network, evidence, settings
        self._ranks = prepared.subject.ranks
        self.failures: tuple[str, ...] = () if evidence is None else evidence.failures
        self.told: tuple[str, ...] = ()
        self._expected: list[Answers] | None = None
        self._assignments = _Assignments(prepared, evidence, settings)

    def merged(self) -> nn.Module:
        """The smaller network, with compensated consumers if the rule asks for them; the best of several ways."""
        if not _compensates(self._evidence, self._settings):
            return self._network_of(self._by_weights())
        assert self._evidence is not None, "_compensates() checks this"
        kinds: tuple[Kind, ...] = ("ward",)
        if self._answers() is not None and self._settings.method == "auto":
            kinds = ("likely",) if len(self._for_passes()) < len(self._evidence.batches) else ("ward", "removal")
        ways: list[Callable[[], _Made]] = [partial(self._compensated, kind, refit="through") for kind in kinds]
        if self._answers() is not None:
            ways += [partial(self._compensated, "auto", refit="alone"), self._by_weights]
        best: tuple[float, _Made, nn.Module] | None = None
        for way in ways:
            found = way()
            network = self._network_of(found)
            lost = self._lost(network) if len(ways) > 1 else 0.0
            if best is None or lost < best[0]:
                best = lost, found, network
        assert best is not None, "there are ways"
        lost, found, network = best
        self.failures += found.failures
        if len(ways) > 1:
            counts = ", ".join(f"{count} groups by {way}" for way, count in found.ways.items())
            self.told = (f"{found.how}: {lost:.3g} is lost on inputs left out" + f" ({counts})" * bool(counts),)
        return network

    def _network_of(self, made: _Made) -> nn.Module:
        return _rebuilt(self._network, made.state, self._prepared)

    def _answers(self) -> list[Answers] | None:
        """The original's answers to the inputs that are kept aside; None if there are none to compare."""
        evidence = self._evidence
        if self._expected is None and evidence is not None and evidence.judged:
            run = copied(self._network)
            try:
                self._expected = attempt(lambda _: all_answers(run, evidence.judged), self._ranks)
            except StepError:
                self._expected = []
        return self._expected or None

    def _lost(self, network: nn.Module) -> float:
        """How far a network's answers are from the original's on inputs that are kept aside; infinity if unknown."""
        assert self._evidence is not None, "_answers() checks this"
        assert self._expected, "_answers() found them"
        batches, expected, run = self._evidence.judged, self._expected, copied(network)
        try:
            # one rank's figure for all: they have to take the same way
            (found,) = attempt(lambda r: [*r.share([None], lambda _: judged(run, batches, expected))], self._ranks)
        except StepError:
            return float("inf")
        return float("inf") if found is None else found

    def _compensated(self, kind: Kind, *, refit: Refit) -> _Made:
        """Groups made smaller, with their consumers refitted.

        Args:
            kind: how groups are made smaller, if the method leaves that open.
            refit: to what consumers are refitted.
        """
        evidence, subject = self._evidence, self._prepared.subject
        assert evidence is not None, "_compensates() checks this"
        # The sums of a batch are large matrices: a GPU computes them faster than ranks can exchange them.
        ranks = ALONE if subject.on_cuda else subject.ranks
        dtypes = {name: tensor.dtype for name, tensor in tensors(self._prepared.model).items()}
        compensator = Compensator(
            self._network,
            subject.graph,
            evidence.batches if refit == "alone" else self._for_passes(),
            evidence.activities,
            ranks,
            refit=refit,
            dtypes=dtypes,
        )
        counts: dict[str, int] = {}
        for choice, ways in self._assignments.on(compensator, kind):
            taken = compensator.merge(choice.group, *ways.values())
            if choice.merges:
                name = list(ways)[taken]
                counts[name] = counts.get(name, 0) + 1
        return _Made(_HOW[refit], compensator.finish(), tuple(compensator.failures), counts)

    def _for_passes(self) -> Batches:
        """The inputs that smaller networks are run on, group by group: not all of them where that takes long."""
        assert self._evidence is not None, "_compensates() checks this"
        return first_batches(self._evidence.batches, self._inputs_within(_PASSES))

    def _inputs_within(self, operations: float) -> int:
        """How many inputs, or tokens, pass through the network with so many operations; at least one."""
        subject = self._prepared.subject
        return max(1, int(operations / max(1.0, subject.graph.flops / size_of(subject.inputs))))

    def _by_weights(self) -> _Made:
        """Groups merged without compensation."""
        merger = Merger(tensors(self._network), self._settings.deviation)
        own = self._assignments
        if self._settings.method == "auto" and _compensates(self._evidence, self._settings):
            own = _Assignments(self._prepared, None, self._settings)  # by weights, as without any inputs
        for choice, ways in own.on(merger, "ward"):
            merger.merge(choice.group, next(iter(ways.values())))
        return _Made("not refitted, which loses less", merger.finish(), (), {})

    def refined(self, small: nn.Module) -> list[str]:
        """Refine the smaller network in place, if it was compensated; lines about that for the plan."""
        evidence, prepared, settings = self._evidence, self._prepared, self._settings
        if not _compensates(evidence, settings) or evidence is None:
            return []
        touched = {m.tensor for choice in prepared.choices if choice.merges for m in choice.group.members}
        line = learn(
            small,
            self._network,
            touched,
            Divided(evidence.batches, evidence.judged),
            settings.refine,
            most=self._inputs_within(_REFINEMENT),
            synthetic=evidence.synthetic,
            seed=settings.seed,
            ranks=prepared.subject.ranks,
        )
        return [line] if line else []


class _Assignments:
    """The ways to make each group smaller, as labels of its neurons: int64 [n], clusters, or -1 for removed ones.

    Args:
        prepared: the plan.
        evidence: about its neurons.
        settings: how they are merged.
    """

    def __init__(self, prepared: Prepared, evidence: Evidence | None, settings: MergeSettings) -> None:
        self._prepared, self._settings = prepared, settings
        self._observed = {} if evidence is None else evidence.activities
        comparable = _compensates(evidence, settings) and evidence is not None and evidence.comparable
        self._known: dict[str, Tensor] = {}
        self._errors: dict[str, dict[str, float]] = {}  # of the ways, by group
        acting: list[Choice] = []
        self._found: Iterator[Tensor] = iter(())
        if evidence is not None and (settings.neurons == "activations" or (settings.neurons is None and comparable)):
            acting = [c for c in prepared.choices if c.merges and c.group.name in self._observed]
            self._found = _by_activations(acting, evidence, settings, prepared.subject.ranks)
        self._acting = {choice.group.name for choice in acting}

    def on(self, merger: Merger | Compensator, kind: Kind) -> Iterator[tuple[Choice, dict[str, Tensor]]]:
        """The ways for each group, by name, in the order of the plan; merge each before taking the next.

        Clusters by weights depend on the groups merged before, so every rank computes all of them. A function of the
        user is called once for each group.

        Args:
            merger: merges them.
            kind: how groups are made smaller, if the method leaves that open: all in one way, or each in the best.
        """
        settings = self._settings
        for choice in self._prepared.choices:
            group = choice.group
            if not choice.merges:
                yield choice, {"none": torch.arange(choice.width)}
                continue
            labels = self._known.get(group.name)
            if labels is None and group.name in self._acting:
                labels = self._known[group.name] = next(self._found)
            if labels is None:
                points = neuron_vectors(merger.state, group, fold=settings.neurons != "weights")
                labels = settings.assign(points, choice.width, seed=settings.seed)
                if settings.method is None:
                    self._known[group.name] = labels
            found = {settings.method if settings.method in METHODS else "ward": labels}
            activity = self._observed.get(group.name)
            method = kind if settings.method == "auto" else settings.method
            if method is not None and method in _BY_ACTIVATIONS and activity is not None:
                found |= {"removal": activity.removal(choice.width), "mixed": activity.mixed(choice.width)}
                found = self._promising(choice, found, activity, method)
            yield choice, found

    def _promising(self, choice: Choice, ways: dict[str, Tensor], activity: Activity, method: str) -> dict[str, Tensor]:
        """The way that a method names; or removal, and the ways to merge that may lose less; or the likeliest of them.

        The errors of the ways to merge are estimates of the best case.
        """
        if method in ways:
            return {method: ways[method]}
        name = choice.group.name
        errors = self._errors.get(name)
        if errors is None:
            errors = {way: error_at(labels, choice.width, activity) for way, labels in ways.items()}
            if name in self._known:  # else the clusters are other ones each time
                self._errors[name] = errors
        if method == "likely":
            best = min(errors, key=errors.__getitem__)
            return {best: ways[best]}
        return {way: labels for way, labels in ways.items() if way == "removal" or errors[way] < errors["removal"]}


def _by_activations(
    choices: list[Choice], evidence: Evidence, settings: MergeSettings, ranks: Ranks
) -> Iterator[Tensor]:
    """Clusters of neurons by their activations."""

    def assigned(choice: Choice) -> Tensor:
        if settings.assign is ward:
            return evidence.tree(choice.group).cut(choice.width)
        points, masses = evidence.points(choice.group)
        return settings.assign(points, choice.width, weights=masses, seed=settings.seed)

    if settings.assign is ward:
        evidence.cluster(choice.group for choice in ranks.own(choices))
    return iter(ranks.share(choices, assigned))
