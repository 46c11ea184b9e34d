"""Methods of others that do not merge neurons: network slimming, and Torch-Pruning's default."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nac_gpu as nac
from common.zoo_measure import pruned

_HALVINGS = 12


def largest(build: Callable[[float], tuple[int, Any]], most: float) -> Any:
    """What is built for the largest share, in [0, 1], at which it has no more than so many parameters.

    Args:
        build: gives the number of parameters and what has them, for a share to keep; for 0 it must fit.
        most: parameters.
    """
    low, high = 0.0, 1.0
    best = build(low)[1]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        parameters, found = build(middle)
        if parameters <= most:
            low, best = middle, found
        else:
            high = middle
    return best


def torch_pruned(model: nn.Module, example: Tensor, share: float) -> nn.Module:
    """Torch-Pruning's default: in every layer the channels of the largest norm stay, the same share of each.

    Args:
        model: not changed.
        example: what it is called with.
        share: of the parameters, to be kept.
    """

    def build(width: float) -> tuple[int, nn.Module]:
        small = copy.deepcopy(model)
        pruned(small, example, width=width)
        return nac.cost(small, example).parameters, small

    return largest(build, share * nac.cost(model, example).parameters)


def slimmed(model: nn.Module, example: Tensor, share: float, **options: Any) -> nn.Module:
    """Network slimming (Liu et al. 2017): of all channels of all layers those with the largest BatchNorm scales stay.

    Args:
        model: trained with a penalty on these scales; every convolution is followed by its BatchNorm. Not changed.
        example: what it is called with.
        share: of the parameters, to be kept.
        options: more for `nac_gpu.compress`.
    """
    scales = channel_scales(model)
    every = torch.cat(list(scales.values())).sort().values

    def build(kept: float) -> tuple[int, nac.Plan]:
        threshold = every[min(round((1 - kept) * len(every)), len(every) - 1)]
        widths = {name: max(1, int((scale >= threshold).sum())) for name, scale in scales.items()}
        plan = nac.plan(model, example, width=widths, only=list(widths))
        return plan.after.parameters, plan

    plan: nac.Plan = largest(build, share * nac.cost(model, example).parameters)
    asked: Iterator[Tensor] = iter([scales[group.name] for group in plan.groups if group.after < group.before])

    def by_scale(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        labels = torch.full((len(points),), -1)
        labels[next(asked).topk(k).indices.sort().values] = torch.arange(k)  # layers come in the plan's order
        return labels

    return nac.compress(model, example, plan, method=by_scale, neurons="weights", **options)


def channel_scales(model: nn.Module) -> dict[str, Tensor]:
    """The absolute scales of the BatchNorm behind each convolution, [channels], by the convolution's name.

    Raises:
        ValueError: a convolution is not followed by its BatchNorm.
    """
    kinds = nn.Conv2d | nn.BatchNorm2d
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    found: dict[str, Tensor] = {}
    for (name, conv), (_, norm) in zip(layers[::2], layers[1::2], strict=True):
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            raise ValueError(f"{name} is {type(conv).__name__}, expected convolutions each with a BatchNorm behind it")
        found[name] = norm.weight.detach().abs().cpu()
    return found
