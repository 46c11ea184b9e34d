"""A group's neurons as points: the incoming weights and bias of each, Eq. (2) of the paper."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nac_gpu.network.moving import sent
from nac_gpu.network.precision import working_dtype
from nac_gpu.tracing.graph import Group, Norm, Producer


def rows(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The values of each neuron in a tensor, flattened: [n, values], for positions `index` int64 [n, m] along `dim`."""
    values = tensor.movedim(dim, 0)[sent(index, tensor.device)]
    return values.reshape(len(index), -1).to(working_dtype(tensor))


def norm_scale(state: Mapping[str, Tensor], norm: Norm, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A BatchNorm in eval mode as `a * z + c`: slope a, offset c and the running mean, each [n].

    Args:
        state: tensors by name.
        norm: the normalisation.
        size: number n of channels.
        like: defines device and dtype.
    """

    def get(name: str | None, default: float) -> Tensor:
        if name is None:
            return torch.full((size,), default, device=like.device, dtype=like.dtype)
        return state[name].to(like.dtype)

    slope = get(norm.weight, 1.0)
    if norm.variance is not None:
        slope = slope / torch.sqrt(state[norm.variance].to(like.dtype) + norm.eps)
    mean = get(norm.mean, 0.0)
    return slope, get(norm.bias, 0.0) - slope * mean, mean


def neuron_vectors(state: Mapping[str, Tensor], group: Group, *, fold: bool = True) -> Tensor:
    """The neurons of a group as points, for clustering.

    With `fold`, neurons are compared by what they compute in eval mode: a BatchNorm directly after a layer is folded
    into its weights (`a W`) and bias (`a b + c`). Without it, they are compared by bare weights and bias, which is
    Eq. (2) as published. The vectors of layers that share neurons (a residual stream) are concatenated.

    Args:
        state: the model's parameters and buffers by name; the positions in `group` must fit them.
        group: the group.
        fold: fold BatchNorm into the weights.

    Returns:
        float32 or float64 [n, d], on the device of the weights.
    """
    return torch.cat([_producer_vectors(state, producer, fold) for producer in group.producers], dim=1)


def _producer_vectors(state: Mapping[str, Tensor], producer: Producer, fold: bool) -> Tensor:
    weights = rows(state[producer.member.tensor], producer.member.dim, producer.member.index)
    index = sent(producer.member.index, weights.device)
    n, positions = index.shape
    size = state[producer.member.tensor].shape[producer.member.dim]
    bias = None
    if producer.bias is not None:
        bias = state[producer.bias].to(weights.dtype)
    if fold and producer.norm is not None:
        slope, offset, _ = norm_scale(state, producer.norm, size, weights)
        weights = (weights.reshape(n, positions, -1) * slope[index].unsqueeze(2)).reshape(n, -1)
        bias = offset if bias is None else slope * bias + offset
    return weights if bias is None else torch.cat([weights, bias[index]], dim=1)
