"""Ways to make groups smaller where nothing is known but the weights: those that read tokens are tried on random ones.

Neurons of convolutional networks and of plain layers that are near to each other by their weights may be averaged. In
transformers, few neurons have a near neighbour, and a product of two averages is nothing like the average of two
products: with 90 % of its gated neurons, SmolLM2 had a perplexity of 10,600 when they were merged by weights, 37 when
as many were removed at random, and 4,500 when those with the smallest weights were, because a few neurons do far more
than their weights say. So each group is made smaller in several ways, in the original network, and the way that changes
its answers least is taken. Random tokens tell this apart, as they are tokens; noise in place of pictures does not, so
the groups of all other networks are merged.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nac_gpu.assembly.settings import MergeSettings
from nac_gpu.calibration.neurons import neuron_vectors
from nac_gpu.calibration.tokens import Speaker
from nac_gpu.clustering.methods import l1, ward
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import Ranks
from nac_gpu.merging.centroids import Merger
from nac_gpu.network.copying import copied
from nac_gpu.network.judging import all_answers, judged
from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import ExampleInputs, own_inputs
from nac_gpu.network.state import is_open, tensors
from nac_gpu.tracing.graph import Choice

if TYPE_CHECKING:
    from nac_gpu.planning.prepare import Prepared

_TOKENS = 256  # at most, if one sequence is not longer
_DRAWS = 2  # of neurons that are removed at random: one of them may miss those that count


def tried(
    prepared: "Prepared", network: nn.Module, settings: MergeSettings, ranks: Ranks
) -> tuple[Mapping[str, str], str]:
    """For each group, by name, the way that changes the answers to random tokens least: a name of `WAYS`.

    Args:
        prepared: the plan.
        network: the model, or its copy in float32.
        settings: how neurons are merged.
        ranks: the processes that divide the groups among them.

    Returns:
        The ways: none if the network reads no tokens, its weights are in files, or it does not run; and then why.
    """
    if is_open(network):
        return {}, ""
    failed = ""
    for careful in (False, True):
        try:
            return attempt(partial(_tried, prepared, network, settings, careful), ranks), ""
        except StepError as error:
            failed = failed or str(error)
    return {}, failed


def is_left_untried(network: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether weights in files are why no way is tried: the network has an embedding, and gets integers."""
    integers = any(not (leaf.is_floating_point() or leaf.is_complex()) for leaf in tensors_in(own_inputs(inputs)))
    return is_open(network) and integers and any(isinstance(module, nn.Embedding) for module in network.modules())


def _tried(
    prepared: "Prepared", network: nn.Module, settings: MergeSettings, careful: bool, ranks: Ranks
) -> Mapping[str, str]:
    run = copied(network)
    speaker = Speaker(run, prepared.subject.inputs, careful=careful)
    if not speaker.places:
        return {}
    trial = _Trial(run, network, [speaker.drawn(_TOKENS, settings.seed)], settings)
    choices = [choice for choice in prepared.choices if choice.merges]
    return dict(zip((choice.group.name for choice in choices), ranks.share(choices, trial.best), strict=True))


class _Trial:
    """Makes single groups of a network smaller, and looks how much that changes."""

    def __init__(
        self, run: nn.Module, network: nn.Module, batches: Sequence[ExampleInputs], settings: MergeSettings
    ) -> None:
        self._run, self._batches, self._settings = run, batches, settings
        self._original = tensors(network)
        self._own = tensors(run)
        self._expected = all_answers(run, batches)

    def best(self, choice: Choice) -> str:
        """The name of the best way."""
        lost = {way: self._lost(choice, way) for way in WAYS}
        return min(lost, key=lost.__getitem__)

    @torch.no_grad()
    def _lost(self, choice: Choice, way: str) -> float:
        merger = Merger(self._original, self._settings.deviation)
        merger.merge(choice.group, labels_of(merger.state, choice, way, self._settings))
        changed = [name for name, tensor in merger.state.items() if tensor is not self._original[name]]
        try:
            for name in changed:  # all tensors of a merger have their old sizes
                self._own[name].copy_(merger.state[name])
            lost = judged(self._run, self._batches, self._expected)
        finally:
            for name in changed:
                self._own[name].copy_(self._original[name])
        return float("inf") if lost is None or lost != lost else lost


def labels_of(state: dict[str, Tensor], choice: Choice, way: str, settings: MergeSettings) -> Tensor:
    """Labels of a group's neurons, int64 [n], made in one of the ways.

    Args:
        state: tensors by name, of which those of the group have their old sizes.
        choice: the group, and how many neurons are kept.
        way: a name of `WAYS`.
        settings: how neurons are compared, and the seed.
    """
    points = neuron_vectors(state, choice.group, fold=settings.neurons != "weights")
    return WAYS[way](points, choice.width, settings.seed)


def _drawn(draw: int) -> Callable[[Tensor, int, int], Tensor]:
    def way(points: Tensor, k: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(_DRAWS, len(points), generator=generator)[draw].topk(k).indices.sort().values
        labels = torch.full((len(points),), -1, dtype=torch.int64)
        labels[kept] = torch.arange(k)
        return labels

    return way


#: The ways to make a group smaller that need its weights alone: labels from points [n, d], a width and a seed.
WAYS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "ward": lambda points, k, seed: ward(points, k),
    "removal of the smallest": lambda points, k, seed: l1(points, k),
    **{f"removal at random ({draw + 1})": _drawn(draw) for draw in range(_DRAWS)},
}
