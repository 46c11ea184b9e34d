"""Compensation: the consumers of a merged group are refitted to reproduce their original outputs.

The original and the merged network run on the same inputs. Two ridge regressions on their activations then correct the
weights of each consumer:

- if the consumer reads several values of each neuron (positions of a kernel, channels of a head), every original neuron
  is regressed on all merged ones, shrunk towards the sum of Eq. (9). The coefficients are folded into the columns of
  the weight;
- the remaining error of its outputs is regressed on the values that it reads, shrunk towards the first result.

Penalties are chosen on inputs that were left out of the fit, and so is whether to refit at all (see
`nac_gpu.merging.regression`). The intercepts go to the consumer's bias, or to the running mean of the BatchNorm after
it. Groups are compensated in the order of the forward pass, on the activations of the merged network, so that later
consumers also correct the errors that earlier ones left.

Where there are several ways to make a group smaller, each is tried, and the one that loses least of the consumers'
outputs, on inputs that were left out, is kept.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.batches import Batches, first_of
from nac_gpu.calibration.readings import Reading, columns_of, readings
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.merging.centroids import Merger, keeps_all
from nac_gpu.merging.consumers import Assigned, Consumer, Sample
from nac_gpu.merging.regression import Fit, Terms, empty_folds
from nac_gpu.network.copying import copied, rebuild
from nac_gpu.network.memory import trim
from nac_gpu.network.moving import sent
from nac_gpu.network.running import evaluating
from nac_gpu.network.state import tensors
from nac_gpu.network.walking import Chains, Place, Walk, find_chains
from nac_gpu.network.watching import captured, count_calls, look
from nac_gpu.tracing.graph import Graph, Group

#: From what consumers are refitted to their outputs in the original.
#:
#: - "through": from what they read in the network as it is by then. So they also correct what earlier groups have lost.
#:   Where that is much, they become small: their inputs are noise.
#: - "alone": from what they would read if their group alone was merged.
Refit = Literal["through", "alone"]

_KEPT_BYTES = 1 << 28  # of what the consumers of one group read in the original network
_FEW = 256  # inputs or tokens on which chains are found


@dataclass
class _Way:
    """One way to make a group smaller, carried out.

    Attributes:
        merger: with the group merged.
        failures: lines that say which consumers could not be refitted.
        lost: the share of the consumers' outputs that is lost, summed over them; None if it is not known.
    """

    merger: Merger
    failures: list[str]
    lost: float | None = None


class Compensator:
    """Merges groups one after another, and refits their consumers.

    Attributes:
        merger: merges the tensors.
        failures: lines that say which consumers could not be refitted, and why.

    Args:
        model: the original; not changed, and not run.
        graph: its record.
        batches: inputs of the model.
        activities: activations and outgoing weights on these inputs, by the name of the group.
        ranks: the processes that divide the batches among them.
        refit: see `Refit`.
        dtypes: in which the tensors will be used in the end, by name, if not in the model's own; they must fit.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        batches: Batches,
        activities: Mapping[str, Activity],
        ranks: Ranks = ALONE,
        *,
        refit: Refit = "through",
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._dtypes, self._refit = dtypes or {}, refit
        self.failures: list[str] = []
        self._original, self._graph, self._batches, self._ranks = model, graph, batches, ranks
        self._model = copied(model)  # to be run
        self._activities = activities
        self._state = tensors(model)
        self._modules = dict(model.named_modules())
        self._calls: dict[str, int] | None = None
        self._kept: tuple[str, dict[int, dict[str, list[Tensor]]]] = ("", {})
        self._chains = self._found_chains()
        self._before = Walk(self._chains, batches)
        self.start()

    def _found_chains(self) -> Chains:
        def find(_: Ranks) -> Chains:
            with evaluating(self._model):
                return find_chains(self._model, first_of(self._batches[0], _FEW))

        try:
            return attempt(find, self._ranks)
        except StepError:  # its modules cannot be run alone
            return Chains()

    def start(self) -> None:
        """Start again from the original."""
        self.merger = Merger(self._state)
        self._merged = False
        self._after = Walk(self._chains, self._batches)

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors by name as they are now, see `Merger`."""
        return self.merger.state

    def finish(self) -> dict[str, Tensor]:
        """All parameters and buffers, merged and at their new sizes."""
        return self.merger.finish()

    def network(self) -> nn.Module:
        """A network merged so far, to be run, with zeros at the positions of dropped neurons."""
        return rebuild(self._original, self.merger.state, clone=True)

    def merge(self, group: Group, *ways: Tensor) -> int:
        """Make one group smaller and refit its consumers.

        The consumers of a group that keeps all its neurons are refitted, too, if an earlier group was merged.

        Args:
            group: the group.
            ways: labels as `Merger.merge` takes them, one or several; the best is taken.

        Returns:
            Which of them was taken.

        Raises:
            RankError: another rank failed or was lost.
        """
        labels = [way.cpu() for way in ways]
        if keeps_all(labels[0]) and not (self._merged and self._refit == "through"):
            return 0
        self._merged = True
        start = self.merger
        done = [self._carried_out(group, own, start.copy()) for own in labels]
        known = [(way.lost, number) for number, way in enumerate(done) if way.lost is not None]
        best = min(known)[1] if known else 0
        self.merger = done[best].merger
        self.failures += done[best].failures
        places = [self._chains.place(name) for name in _modules_of(group)]
        first = min((place for place in places if place is not None), key=lambda place: place.at, default=None)
        self._after.forget(None if None in places else first)
        trim()
        return best

    def _carried_out(self, group: Group, labels: Tensor, merger: Merger) -> _Way:
        """One way to make a group smaller.

        Args:
            group: the group.
            labels: of its neurons.
            merger: is changed.
        """
        self.merger = merger
        way = _Way(merger, [])
        assigned = Assigned(group, labels)
        activity = self._activities.get(group.name)
        merger.merge_made(group, labels, None if activity is None else activity.masses())
        whole = dict(merger.state)  # consumers not merged yet
        merger.merge_read(group, labels)
        if self._refit == "alone":
            self.merger = Merger(self._state)
            self.merger.merge_made(group, labels, None if activity is None else activity.masses())
            whole = dict(self.merger.state)
            self.merger.merge_read(group, labels)
        found = {reading.layer: reading for reading in readings(self._model, group)}
        try:
            consumers = self._known(assigned, found, whole) or attempt(
                lambda ranks: self._summed(assigned, found, whole, ranks), self._ranks
            )
        except StepError as error:  # the merged network may not run on some inputs
            way.failures.append(_told(found, error))
            return way
        self.merger = merger
        for layer, one in consumers.items():
            if one.comparable:
                try:
                    fit = attempt(lambda _, layer=layer, one=one: self._changed(layer, one))
                except StepError as error:
                    way.failures.append(_told([layer], error))
                else:
                    way.lost = (way.lost or 0.0) + (0.0 if fit is None else fit.lost)
        return way

    def _known(
        self, assigned: Assigned, found: Mapping[str, Reading], whole: Mapping[str, Tensor]
    ) -> dict[str, Consumer]:
        """The same as `_summed`, from what was observed of the original; none if that does not tell.

        Where neurons are only removed, the others are what they were.
        """
        activity = self._activities.get(assigned.group.name)
        if self._refit != "alone" or activity is None or not assigned.only_removes or not activity.values:
            return {}
        if any(layer not in activity.values for layer in found):
            return {}
        made = {}
        for layer, reading in found.items():
            one = made[layer] = Consumer(reading, self._modules[layer], assigned, whole, self.merger.state)
            one.know(activity.values[layer])
        return made

    def _summed(
        self, assigned: Assigned, found: Mapping[str, Reading], whole: Mapping[str, Tensor], ranks: Ranks
    ) -> dict[str, Consumer]:
        """The regressions of the consumers of a group that was merged, by layer.

        Args:
            assigned: the group.
            found: what its consumers read, by layer.
            whole: tensors of the network with consumers not merged yet.
            ranks: the processes that divide the batches among them.
        """
        # What stays of a group where neurons are only removed is what the original computes: nothing has to be run.
        same = self._refit == "alone" and assigned.only_removes
        work = self._model if same else self.network()
        with evaluating(self._model), evaluating(work):
            calls = self._calls_of(found, ranks)
            consumers = {
                layer: Consumer(reading, self._modules[layer], assigned, whole, self.merger.state)
                for layer, reading in found.items()
                if layer in calls
            }
            places = self._chains.together([*_modules_of(assigned.group), *calls])

            def observed(number: int) -> dict[str, list[Terms]]:
                before = self._originally(assigned.group, number, calls, places)
                parts = {layer: len(self._batches) * max(1, len(values)) for layer, values in before.items()}
                terms = {layer: empty_folds() for layer in consumers}
                sample = Sample.of(self._batches, number)

                def take(layer: str, merged: Tensor) -> None:
                    original = before[layer].pop(0) if before[layer] else None  # pop frees its memory
                    consumers[layer].add(terms[layer], original, merged, parts[layer], sample)

                walk = self._before if self._refit == "alone" else self._after
                if same:
                    for layer, values in before.items():
                        for value in list(values):
                            take(layer, value)
                elif places is None or not walk.look(work, number, places, calls, take):
                    look(work, self._batches[number], calls, take)
                for layer, left in before.items():
                    terms[layer][0].comparable &= not left
                return terms

            for terms in ranks.share(range(len(self._batches)) if consumers else (), observed):
                for layer, one in consumers.items():
                    for fold, own in zip(one.total, terms[layer], strict=True):
                        fold.take(own)
        return consumers

    def _calls_of(self, layers: Iterable[str], ranks: Ranks) -> dict[str, int]:
        """How often each of these layers is called in a pass of the original; those that are not called are left out.

        All layers are counted in one pass.
        """
        if self._calls is None:
            plain = [name for name, module in self._modules.items() if columns_of(module) is not None]
            (self._calls,) = ranks.share([None], lambda _: count_calls(self._model, self._batches[0], plain))
        return {layer: self._calls[layer] for layer in layers if layer in self._calls}

    def _originally(
        self, group: Group, number: int, calls: Mapping[str, int], places: tuple[Place, Place] | None
    ) -> dict[str, list[Tensor]]:
        """What the consumers of a group are called with in the original network, on one of the batches."""
        if self._kept[0] != group.name:
            self._kept = group.name, {}
        kept = self._kept[1]
        if number in kept:
            return {layer: list(values) for layer, values in kept[number].items()}
        found: dict[str, list[Tensor]] = {name: [] for name in calls}

        def take(layer: str, value: Tensor) -> None:
            found[layer].append(value.clone())

        if places is None or not self._before.look(self._model, number, places, calls, take, onward=True):
            found = captured(self._model, self._batches[number], calls)
        size = sum(value.numel() * value.element_size() for values in found.values() for value in values)
        if size * len(self._batches) <= _KEPT_BYTES:
            kept[number] = {layer: list(values) for layer, values in found.items()}
        return found

    def _changed(self, layer: str, consumer: Consumer) -> Fit | None:
        """Refit a consumer; None without samples.

        Raises:
            ValueError: the result is not finite.
        """
        state = self.merger.state
        weight = f"{layer}.weight"
        bias, norm = f"{layer}.bias", self._graph.norms.get(weight)
        target, sign = (bias, 1) if bias in state else (norm.mean if norm is not None else None, -1)
        fit = consumer.solved(intercept=target is not None)
        if fit is None:
            return None
        columns, constant, member = consumer.columns(fit.weight), fit.constant, consumer.reading.member
        changed = {weight: state[weight].clone()}
        view = changed[weight].movedim(member.dim, 0)
        places = sent(member.index[consumer.assigned.first], view.device)
        view[places] = (view[places].to(columns.dtype) + columns).to(view.dtype)
        if target is not None:
            changed[target] = (state[target].to(constant.dtype) + sign * constant).to(state[target].dtype)
        for name, tensor in changed.items():
            if not bool(torch.isfinite(tensor.to(self._dtypes.get(name, tensor.dtype))).all()):
                raise ValueError(f"{name} would not be finite")
        state.update(changed)
        return fit


def _modules_of(group: Group) -> list[str]:
    """Names of the modules that hold a group's tensors."""
    return list(dict.fromkeys(member.tensor.rpartition(".")[0] for member in group.members))


def _told(layers: Iterable[str], error: StepError) -> str:
    return f"{', '.join(layers)}: not compensated, because that failed ({error})"
