"""The activations of a group's neurons, observed at the inputs of its consumers and summed up as second moments.

Only linear layers and convolutions without groups are observed, because compensation can refit the columns of their
weights. Other consumers (recurrent layers, parameters used directly in products) are skipped.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nac_gpu.calibration.activity import Activity, condensed
from nac_gpu.calibration.batches import Batches
from nac_gpu.calibration.moments import Moments, folds_of
from nac_gpu.calibration.readings import Reading, outgoing, readings, row_weights, samples
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.padding import counted, padding_of
from nac_gpu.network.precision import floating
from nac_gpu.network.running import evaluating
from nac_gpu.network.watching import count_calls, look
from nac_gpu.tracing.graph import Group


class NotFiniteError(Exception):
    """Activations are not finite."""


def observe(
    model: nn.Module,
    state: Mapping[str, Tensor],
    groups: Sequence[Group],
    batches: Batches,
    ranks: Ranks = ALONE,
) -> dict[str, Activity]:
    """Run the model on batches and observe the activations of each group that has observable consumers, by its name.

    Args:
        model: the original.
        state: its tensors by name.
        groups: the groups to observe.
        batches: inputs.
        ranks: the processes that divide the batches among them.

    Raises:
        NotFiniteError: activations are not finite.
        RankError: another rank failed or was lost.
    """
    read = {group.name: readings(model, group) for group in groups}
    layers = list(dict.fromkeys(reading.layer for found in read.values() for reading in found))
    if not layers:
        return {}
    modules = dict(model.named_modules())
    keys = [(name, reading.layer) for name, found in read.items() for reading in found]
    moments = {key: (Moments(), Moments()) for key in keys}  # of each half

    def observed(number: int) -> dict[tuple[str, str], tuple[Moments, Moments]]:
        own = {key: (Moments(), Moments()) for key in keys}
        mask = padding_of(batches[number])

        def take(layer: str, inputs: Tensor) -> None:
            inputs = counted(modules[layer], inputs, mask)
            for name, found in read.items():
                for reading in found:
                    if reading.layer == layer:
                        values = floating(samples(modules[layer], inputs, reading.member.index))
                        weights = row_weights(values)
                        for fold, rows in folds_of(number, len(batches), len(values)):
                            own[name, layer][fold % 2].add(values[rows], values[rows], weights[rows])

        look(model, batches[number], calls, take)
        return own

    with evaluating(model):
        (calls,) = ranks.share([None], lambda _: count_calls(model, batches[0], layers))
        for own in ranks.share(range(len(batches)), observed):
            for key, parts in own.items():
                for half, part in zip(moments[key], parts, strict=True):
                    half.take(part)
    constant = _constants(state, groups)
    result = {name: _activity(name, found, moments, state, constant) for name, found in read.items()}
    return {name: activity for name, activity in result.items() if activity is not None}


def _activity(
    name: str,
    found: Sequence[Reading],
    moments: Mapping[tuple[str, str], tuple[Moments, Moments]],
    state: Mapping[str, Tensor],
    constant: Callable[[str], bool],
) -> Activity | None:
    """What was observed of one group; None if none of its consumers was called."""
    known = [(reading, *_covariances(moments[name, reading.layer], reading, constant)) for reading in found]
    for reading, whole, _ in known:
        if not bool(torch.isfinite(whole).all()):
            raise NotFiniteError(f"{reading.layer} reads activations that are not finite")
    called = [(reading, whole, halves) for reading, whole, halves in known if len(whole)]
    if not called:
        return None
    weights = (outgoing(state[reading.member.tensor], reading.member) for reading, _, _ in called)
    return Activity(
        tuple(whole for _, whole, _ in called),
        tuple(condensed(own.flatten(1).double()) for own in weights),
        tuple(halves for _, _, halves in called) if all(halves for _, _, halves in called) else (),
    )


def _constants(state: Mapping[str, Tensor], groups: Sequence[Group]) -> Callable[[str], bool]:
    """Whether a layer's outputs can get a constant: in its bias, or in the running mean of the BatchNorm after it."""
    normed = {
        producer.member.tensor
        for group in groups
        for producer in group.producers
        if producer.norm is not None and producer.norm.mean is not None
    }
    return lambda layer: f"{layer}.bias" in state or f"{layer}.weight" in normed


def _covariances(
    halves: tuple[Moments, Moments], reading: Reading, constant: Callable[[str], bool]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a consumer reads, over all inputs, [n, n]; and over each half, none if one is empty. Empty if not called."""
    total = Moments.total(halves)
    if not total.count:
        return torch.empty(0, 0, dtype=torch.float64), ()
    mean = constant(reading.layer)
    parts = tuple(half.about(mean).float() for half in halves) if all(half.count for half in halves) else ()
    return total.about(mean), parts
