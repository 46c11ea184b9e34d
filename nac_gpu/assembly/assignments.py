"""The ways to make each group smaller, as labels of its neurons."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nac_gpu.assembly.settings import MergeSettings, compensates
from nac_gpu.assembly.untaught import labels_of
from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.curves import error_at
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.calibration.neurons import neuron_vectors
from nac_gpu.clustering.methods import METHODS, ward
from nac_gpu.distributed.ranks import Ranks
from nac_gpu.merging.centroids import Merger
from nac_gpu.merging.compensation import Compensator
from nac_gpu.tracing.graph import Choice

if TYPE_CHECKING:
    from nac_gpu.planning.prepare import Prepared

#: All groups in one way, each in the way that is likely to be the best, or each in the best of those tried.
Kind = Literal["ward", "removal", "likely", "auto"]
_BY_ACTIVATIONS = ("auto", "likely", "removal", "mixed")  # methods that need more than points


class Assignments:
    """The ways to make each group smaller, as labels of its neurons: int64 [n], clusters, or -1 for removed ones.

    Args:
        prepared: the plan.
        evidence: about its neurons.
        settings: how they are merged.
    """

    def __init__(self, prepared: "Prepared", evidence: Evidence | None, settings: MergeSettings) -> None:
        self._prepared, self._settings = prepared, settings
        self._observed = {} if evidence is None else evidence.activities
        comparable = compensates(evidence, settings) and evidence is not None and evidence.comparable
        self._known: dict[str, Tensor] = {}
        self._errors: dict[str, dict[str, float]] = {}  # of the ways, by group
        acting: list[Choice] = []
        self._found: Iterator[Tensor] = iter(())
        if evidence is not None and (settings.neurons == "activations" or (settings.neurons is None and comparable)):
            acting = [c for c in prepared.choices if c.merges and c.group.name in self._observed]
            self._found = _by_activations(acting, evidence, settings, prepared.subject.ranks)
        self._acting = {choice.group.name for choice in acting}

    def on(
        self, merger: Merger | Compensator, kind: Kind, best: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Choice, dict[str, Tensor]]]:
        """The ways for each group, by name, in the order of the plan; merge each before taking the next.

        Clusters by weights depend on the groups merged before, so every rank computes all of them. A function of the
        user is called once for each group.

        Args:
            merger: merges them.
            kind: how groups are made smaller, if the method leaves that open: all in one way, or each in the best.
            best: for some groups, by name, which of `WAYS` is the best.
        """
        settings = self._settings
        for choice in self._prepared.choices:
            group = choice.group
            if not choice.merges:
                yield choice, {"none": torch.arange(choice.width)}
                continue
            if best and group.name in best:
                way = best[group.name]
                yield choice, {way: labels_of(merger.state, choice, way, settings)}
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
