"""From a plan to the smaller network: neurons assigned, groups made smaller, consumers refitted, the whole refined.

There are several ways to do each of these, and which is best depends on the network. Merging is right where neurons are
alike, removal where they are not; consumers are refitted to what they read in the smaller network, or in the original;
or they are left as they are, where what is fitted does not hold on other inputs. A part of the inputs is kept aside:
nothing is fitted to it, and the way whose answers there are nearest to the original's is taken.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from nac_gpu.assembly.assignments import Assignments, Kind
from nac_gpu.assembly.settings import MergeSettings, compensates
from nac_gpu.assembly.untaught import is_left_untried, tried
from nac_gpu.calibration.batches import Batches, Divided, first_batches, size_of
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import ALONE
from nac_gpu.files.origin import remember
from nac_gpu.merging.attributes import attributes
from nac_gpu.merging.centroids import Merger
from nac_gpu.merging.compensation import Compensator, Refit
from nac_gpu.merging.refinement import Amount, learn
from nac_gpu.network.copying import copied, in_float32, rebuild
from nac_gpu.network.judging import Answers, all_answers, judged
from nac_gpu.network.memory import trim
from nac_gpu.network.running import set_mode_again
from nac_gpu.network.state import tensors
from nac_gpu.planning.prepare import Prepared

# Operations of all passes; some minutes on two cores.
_PASSES = 1e13 / 4  # each group needs about four passes of its own part of the network
_REFINEMENT = 1e14 / 4  # two forward passes, and a backward one that is twice as dear
_HOW: dict[Refit, str] = {
    "through": "refitted in the smaller network",
    "alone": "refitted in the original",
}


def made(
    prepared: Prepared, evidence: Evidence | None, settings: MergeSettings, merged: Callable[[], None]
) -> nn.Module:
    """The smaller model of a plan, which remembers the plan with a line about each step that failed.

    If activations were observed in a copy of the model in float32, the smaller network is made of that copy first.

    Args:
        prepared: the plan.
        evidence: about its neurons, which is released.
        settings: how they are merged.
        merged: is called before the evidence is released.
    """
    model = prepared.model
    wide = evidence is not None and evidence.float32 and compensates(evidence, settings)
    network = in_float32(model) if wide else model
    assembly = _Assembly(prepared, network, evidence, settings)
    small = assembly.merged()
    lines = [line for line in assembly.failures if line not in prepared.plan.changes]
    if lines:
        warnings.warn("; ".join(lines), stacklevel=3)
    merged()
    if evidence is not None:
        evidence.release()
        trim()
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
        self._assignments = Assignments(prepared, evidence, settings)

    def merged(self) -> nn.Module:
        """The smaller network, with compensated consumers if the rule asks for them; the best of several ways."""
        if not compensates(self._evidence, self._settings):
            return self._network_of(self._by_weights())
        assert self._evidence is not None, "compensates() checks this"
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
        assert evidence is not None, "compensates() checks this"
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
        assert self._evidence is not None, "compensates() checks this"
        return first_batches(self._evidence.batches, self._inputs_within(_PASSES))

    def _inputs_within(self, operations: float) -> int:
        """How many inputs, or tokens, pass through the network with so many operations; at least one."""
        subject = self._prepared.subject
        return max(1, int(operations / max(1.0, subject.graph.flops / size_of(subject.inputs))))

    def _by_weights(self) -> _Made:
        """Groups made smaller without compensation."""
        merger = Merger(tensors(self._network), self._settings.deviation)
        own, evidence, best = self._assignments, self._evidence, dict[str, str]()
        if self._settings.method == "auto" and compensates(evidence, self._settings):
            own = Assignments(self._prepared, None, self._settings)  # by weights, as without any inputs
        elif self._settings.method == "auto" and (evidence is None or not evidence.batches):
            best = self._tried()
        for choice, ways in own.on(merger, "ward", best):
            merger.merge(choice.group, next(iter(ways.values())))
        return _Made("not refitted, which loses less", merger.finish(), (), {})

    def _tried(self) -> Mapping[str, str]:
        """The ways to make groups smaller that were tried, by group."""
        best, failed = tried(self._prepared, self._network, self._settings, self._ranks)
        if failed:
            self.failures += (f"groups are merged by their weights, because other ways could not be tried: {failed}",)
        if is_left_untried(self._network, self._prepared.subject.inputs):
            self.told = ("groups are merged by their weights; loaded into memory, other ways would be tried, too",)
        if best:
            counts = ", ".join(f"{count} groups by {way}" for way, count in Counter(best.values()).items())
            self.told = (f"tried on random tokens: {counts}",)
        return best

    def refined(self, small: nn.Module) -> list[str]:
        """Refine the smaller network in place, if it was compensated; lines about that for the plan."""
        evidence, prepared, settings = self._evidence, self._prepared, self._settings
        if not compensates(evidence, settings) or evidence is None:
            return []
        touched = {m.tensor for choice in prepared.choices if choice.merges for m in choice.group.members}
        line = learn(
            small,
            self._network,
            touched,
            Divided(evidence.batches, evidence.judged),
            Amount(settings.refine, self._inputs_within(_REFINEMENT)),
            synthetic=evidence.synthetic,
            seed=settings.seed,
            ranks=prepared.subject.ranks,
        )
        return [line] if line else []
