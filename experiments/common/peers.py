"""Methods of others that do not merge neurons: network slimming, Torch-Pruning's default, global sparse momentum."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

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


def _weights(model: nn.Module) -> list[Tensor]:
    """What single connections are pruned from: the weights of linear layers and convolutions."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _kept_weights(model: nn.Module, share: float) -> int:
    """How many weights may stay, so that with all other parameters a share of the model's stays; at least one."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    return max(1, int(share * whole) - (whole - sum(weight.numel() for weight in _weights(model))))


def _least_of_largest(scores: list[Tensor], count: int) -> Tensor:
    """The least of so many largest values, of all tensors together."""
    every = torch.cat([score.flatten() for score in scores])
    return every.kthvalue(len(every) - count + 1).values


@torch.no_grad()
def magnitude_pruned(model: nn.Module, share: float) -> nn.Module:
    """A copy in which the smallest weights of all layers together are zeros: a share of the parameters is left."""
    model = copy.deepcopy(model)
    weights = _weights(model)
    least = _least_of_largest([weight.abs() for weight in weights], _kept_weights(model, share))
    for weight in weights:
        weight *= weight.abs() >= least
    return model


def nonzero(model: nn.Module) -> int:
    """Parameters that are not zeros."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def _told_by(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "after a backward pass"
    return (weight * weight.grad).abs()


@contextlib.contextmanager
def global_sparse_momentum(model: nn.Module, share: float) -> Iterator[None]:
    """A context in which SGD trains a model as GSM does (Ding et al. 2019): all but a share of it decays to zero.

    Of all weights, only those with the largest products of weight and gradient are told their gradients, in every step
    as many as are to stay; the others follow their momentum and weight decay. The momentum is to be large (0.98 there).

    Args:
        model: the model.
        share: of all parameters, to be kept.
    """
    weights = _weights(model)
    own, kept = {id(weight) for weight in weights}, _kept_weights(model, share)

    def told(optimizer: Optimizer, *_: object) -> None:
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            return
        with torch.no_grad():
            least = _least_of_largest([_told_by(weight) for weight in weights], kept)
            for weight in weights:
                gradient = weight.grad
                assert gradient is not None, "after a backward pass"
                gradient *= _told_by(weight) >= least

    handle = register_optimizer_step_pre_hook(told)
    try:
        yield
    finally:
        handle.remove()
