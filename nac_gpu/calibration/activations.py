"""The activations of a group's neurons, observed at the inputs of its consumers and summed up as second moments.

Only linear layers and convolutions without groups are observed, because compensation can refit the columns of their
weights. Other consumers (recurrent layers, parameters used directly in products) are skipped.
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nac_gpu.calibration.activity import Activity, condensed
from nac_gpu.calibration.batches import Batches
from nac_gpu.calibration.moments import Moments, Part, folds_of
from nac_gpu.calibration.readings import Reading, outgoing, readings, row_weights, samples
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.memory import trim
from nac_gpu.network.moving import sent
from nac_gpu.network.padding import counted, padding_of
from nac_gpu.network.precision import floating
from nac_gpu.network.running import evaluating
from nac_gpu.network.watching import count_calls, look
from nac_gpu.tracing.graph import Group

_MOST_VALUES = 2048  # of a consumer with several values of each neuron, whose moments are kept


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
    moments: dict[_Key, _Halves] = {}

    def observed(number: int) -> dict[_Key, _Halves]:
        own: dict[_Key, _Halves] = {}
        mask = padding_of(batches[number])

        def take(layer: str, inputs: Tensor) -> None:
            inputs = counted(modules[layer], inputs, mask)
            for name, found in read.items():
                for at, reading in enumerate(found):
                    if reading.layer == layer:
                        for several, values in _seen(modules[layer], inputs, reading):
                            halves = own.setdefault(_Key(name, at, several), (Moments(), Moments()))
                            weights = row_weights(values)
                            for fold, rows in folds_of(number, len(batches), len(values)):
                                halves[fold % 2].add(values[rows], values[rows], weights[rows])

        look(model, batches[number], calls, take)
        return own

    with evaluating(model):
        (calls,) = ranks.share([None], lambda _: count_calls(model, batches[0], layers))
        for own in ranks.share(range(len(batches)), observed):
            for key in list(own):  # their memory is free for the next batch
                for half, part in zip(moments.setdefault(key, (Moments(), Moments())), own.pop(key), strict=True):
                    half.take(part)
            trim()
    constant = _constants(state, groups)
    result = {}
    for name, found in read.items():
        activity = _activity(name, found, moments, state, constant)
        if activity is not None:
            result[name] = activity
        trim()
    return result


class _Key(NamedTuple):
    """What moments are of: the neurons that a consumer of a group reads, or the several values of each neuron."""

    group: str
    consumer: int
    several: bool


_Halves = tuple[Moments, Moments]  # of each half of the inputs


def _seen(module: nn.Module, inputs: Tensor, reading: Reading) -> Iterator[tuple[bool, Tensor]]:
    """The samples of neurons, [samples, n]; and of their values if they have several, but not too many."""
    index = reading.member.index
    yield False, floating(samples(module, inputs, index))
    linear = not isinstance(module, nn.modules.conv._ConvNd)
    if linear and index.shape[1] > 1 and index.numel() <= _MOST_VALUES:
        yield True, floating(inputs.flatten(0, -2)[:, sent(index.flatten(), inputs.device)])


def _activity(
    name: str,
    found: Sequence[Reading],
    moments: MutableMapping[_Key, _Halves],
    state: Mapping[str, Tensor],
    constant: Callable[[str], bool],
) -> Activity | None:
    """What was observed of one group, whose moments are used up; None if none of its consumers was called."""
    covariances, weights, halves, constants = [], [], [], []
    values: dict[str, tuple[Part, ...]] = {}
    for at, reading in enumerate(found):
        own = moments.pop(_Key(name, at, False), None)
        total = Moments.total(own) if own is not None else Moments()
        if not total.count or own is None:
            continue
        mean, weight = constant(reading.layer), state[reading.member.tensor]
        covariances.append(total.about(mean))
        if not bool(torch.isfinite(covariances[-1]).all()):
            raise NotFiniteError(f"{reading.layer} reads activations that are not finite")
        weights.append(condensed(outgoing(weight, reading.member).flatten(1).double()))
        constants.append(mean)
        halves.append(_parts(own))
        if reading.member.index.shape[1] * math.prod(weight.shape[2:]) == 1:
            values[reading.layer] = halves[-1]
        several = moments.pop(_Key(name, at, True), None)
        if several is not None:
            values[reading.layer] = _parts(several)
    if not covariances:
        return None
    divided = all(len(parts) == 2 for parts in halves)
    return Activity(
        tuple(covariances),
        tuple(weights),
        tuple(halves) if divided else (),
        tuple(constants),
        values if divided else {},
    )


def _parts(halves: _Halves) -> tuple[Part, ...]:
    return tuple(half.part() for half in halves if half.count)


def _constants(state: Mapping[str, Tensor], groups: Sequence[Group]) -> Callable[[str], bool]:
    """Whether a layer's outputs can get a constant: in its bias, or in the running mean of the BatchNorm after it."""
    normed = {
        producer.member.tensor
        for group in groups
        for producer in group.producers
        if producer.norm is not None and producer.norm.mean is not None
    }
    return lambda layer: f"{layer}.bias" in state or f"{layer}.weight" in normed
