"""The activations of a group's neurons, observed at the inputs of its consumers and summed up as second moments.

Only linear layers and convolutions without groups are observed, because compensation can refit the columns of their
weights. Other consumers (recurrent layers, parameters used directly in products) are skipped.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.batches import Batches
from nac_gpu.calibration.moments import Moments
from nac_gpu.calibration.readings import outgoing, readings, samples
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.precision import floating
from nac_gpu.network.running import ExampleInputs, evaluating
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
    moments = {key: Moments() for key in keys}

    def observed(batch: ExampleInputs) -> dict[tuple[str, str], Moments]:
        own = {key: Moments() for key in keys}

        def take(layer: str, inputs: Tensor) -> None:
            for name, found in read.items():
                for reading in found:
                    if reading.layer == layer:
                        values = floating(samples(modules[layer], inputs, reading.member.index))
                        own[name, layer].add(values, values)

        look(model, batch, calls, take)
        return own

    with evaluating(model):
        (calls,) = ranks.share([None], lambda _: count_calls(model, batches[0], layers))
        for own in ranks.share(batches, observed):
            for key, one in own.items():
                moments[key].take(one)
    result = {}
    for name, found in read.items():
        called = [reading for reading in found if moments[name, reading.layer].count]
        covariances = tuple(moments[name, reading.layer].covariance for reading in called)
        for reading, covariance in zip(called, covariances, strict=True):
            if not bool(torch.isfinite(covariance).all()):
                raise NotFiniteError(f"{reading.layer} reads activations that are not finite")
        flat = [outgoing(state[reading.member.tensor], reading.member).flatten(1).double() for reading in called]
        if called:
            result[name] = Activity(covariances, tuple(columns @ columns.T for columns in flat))
    return result
