"""Methods of others for transformers that remove neurons, heads or layers: FLAP, Wanda, magnitude, random, ShortGPT.

All are our reading of the papers, not their code. Of grouped queries, heads that share their keys and values stay or go
together.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.language_blocks import (
    Group,
    Kept,
    groups_of,
    largest_whole,
    layers_of,
    linear,
    parameters,
    per_unit,
    remove_units,
    set_layers,
    unit_parameters,
)
from common.language_data import Batch
from common.language_statistics import Moments, Observed, Walk, covariance

Score = Literal["fluctuation", "activation", "magnitude", "random"]
Repair = Literal["none", "means", "ridge"]
#: The ridge's weight, as a share of the mean variance of the channels that are regressed on.
RIDGE = 1e-2


@dataclass(frozen=True)
class Pruning:
    """A method that removes neurons and heads.

    Attributes:
        score: what is removed first: the units of the smallest
            "fluctuation": variance of the channel that the reader sees, times the squared norm of its column (FLAP, An
            et al. 2024);
            "activation": norm of the channel over all tokens, times the sum of the column's absolute weights (Wanda,
            Sun et al. 2024, summed over the outputs, since a whole column is removed);
            "magnitude": L2 norm of all weights of the unit;
            "random": random number.
            The scores of a unit's channels are summed up.
        adaptive: all units compete after their scores were standardised in each group, until the budget is met (FLAP).
            Otherwise all layers lose the same share of their neurons, and of their heads what is nearest to it.
        heads: heads are removed, too.
        repair: what becomes of the layers that read the units:
            "none": they keep their other columns;
            "means": what the removed units computed on average goes to the bias (FLAP);
            "ridge": what the removed units computed is regressed on the units that stay, with a constant, layer by
            layer on what the layers before it compute by now (GRAIL, Tang et al. 2026). The ridge acts on what is
            added for the removed units, not on the units that stay: without any to be removed nothing changes.
    """

    score: Score
    adaptive: bool = False
    heads: bool = True
    repair: Repair = "none"

    @property
    def observes(self) -> bool:
        """Whether it looks at the activations of the original."""
        return self.score in ("fluctuation", "activation") or self.repair == "means"


def scores(
    model: nn.Module, groups: Sequence[Group], observed: Observed | None, kind: Score, seed: int
) -> dict[Group, Tensor]:
    """The scores of all units, in float64."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        column = linear(model, group.reader).weight.detach().double()
        if kind == "random":
            found[group] = torch.rand(group.units, generator=generator, dtype=torch.float64)
        elif kind == "magnitude":
            squares = per_unit(column.square().sum(0), group.columns)
            for name, rows in group.makers:
                squares = squares + per_unit(linear(model, name).weight.detach().double().square().sum(1), rows)
            found[group] = squares.sqrt()
        elif kind == "activation":
            found[group] = per_unit(moments_of(observed, group).squares.sqrt() * column.abs().sum(0), group.columns)
        else:
            found[group] = per_unit(moments_of(observed, group).variance * column.square().sum(0), group.columns)
    return found


def moments_of(observed: Observed | None, group: Group) -> Moments:
    """Of what the reader of a group reads."""
    assert observed is not None, "this method looks at activations"
    return observed.moments[group.reader]


class Sizes:
    """How many parameters a model has after units were removed from it."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], repair: Repair) -> None:
        """Count what there is, what goes with a unit, and what a repair adds to a reader without a bias."""
        self.whole = parameters(model)
        self.units = {group: unit_parameters(model, group) for group in groups}
        readers = {group: linear(model, group.reader) for group in groups}
        self.added = {
            group: reader.out_features if repair != "none" and reader.bias is None else 0
            for group, reader in readers.items()
        }

    def saved(self, group: Group, removed: int) -> int:
        """By so many units of a group."""
        return removed * self.units[group] - (self.added[group] if removed else 0)

    def after(self, counts: Mapping[Group, int]) -> int:
        """With so many units of these groups; all of the others."""
        return self.whole - sum(self.saved(group, group.units - count) for group, count in counts.items())

    def share(self, most: float) -> float:
        """Of what can be removed, the share that may stay."""
        units = sum(group.units * each for group, each in self.units.items())
        return 1 - (self.whole - most) / units


def uniform(scored: Mapping[Group, Tensor], sizes: Sizes, most: float, heads: bool) -> dict[Group, Tensor]:
    """The units with the largest scores: the same share of the neurons of every layer, and of the heads the nearest.

    Raises:
        ValueError: one neuron in each layer is too many.
    """
    share = min(1.0, max(0.0, sizes.share(most)))
    counts: dict[Group, int] = {}
    for group in scored:
        if group.kind == "heads" and heads:
            counts[group] = max(1, round(share * group.units))
    neurons = [group for group in scored if group.kind == "neurons"]
    widest = max(group.units for group in neurons)

    def with_neurons(number: int) -> dict[Group, int]:
        return counts | {group: max(1, round(number * group.units / widest)) for group in neurons}

    chosen = with_neurons(largest_whole(lambda number: sizes.after(with_neurons(number)), most, widest))
    return {group: scored[group].topk(count).indices.sort().values for group, count in chosen.items()}


def adaptive(scored: Mapping[Group, Tensor], sizes: Sizes, most: float, heads: bool) -> dict[Group, Tensor]:
    """What is left when the units with the smallest standardised scores of all are removed until the budget is met.

    The last unit of a group stays.

    Raises:
        ValueError: the budget cannot be met.
    """
    standard = {
        group: (found - found.mean()) / found.std().clamp_min(1e-30)
        for group, found in scored.items()
        if group.units > 1 and (heads or group.kind == "neurons")
    }
    order = sorted(
        (float(value), place, unit)
        for place, group in enumerate(standard)
        for unit, value in enumerate(standard[group])
    )
    groups, left = list(standard), sizes.whole
    gone: dict[Group, set[int]] = {group: set() for group in groups}
    for _, place, unit in order:
        if left <= most:
            break
        group = groups[place]
        if len(gone[group]) < group.units - 1:
            left -= sizes.saved(group, len(gone[group]) + 1) - sizes.saved(group, len(gone[group]))
            gone[group].add(unit)
    if left > most:
        raise ValueError(f"with one unit a layer there are {left} parameters, expected at most {int(most)}")
    return {group: torch.tensor([u for u in range(group.units) if u not in found]) for group, found in gone.items()}


def split(group: Group, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of the units that stay, and of the others."""
    stays = torch.zeros(group.units, dtype=torch.bool)
    stays[kept] = True
    stays = stays.repeat_interleave(group.columns)
    return stays.nonzero().flatten(), (~stays).nonzero().flatten()


def cut(model: nn.Module, group: Group, kept: Tensor, moments: Moments | None) -> None:
    """Remove all other units of a group.

    Args:
        model: changed.
        group: the group.
        kept: the units that stay.
        moments: of what the reader reads, if their means are to go to its bias.
    """
    reader = linear(model, group.reader)
    stays, goes = split(group, kept)
    bias = reader.bias
    if moments is not None and len(goes):
        constant = (reader.weight[:, goes].double() @ moments.mean[goes]).to(reader.weight.dtype)
        bias = constant if bias is None else bias + constant
    remove_units(model, group, kept, reader.weight[:, stays], bias)


def cut_by_ridge(model: nn.Module, group: Group, kept: Tensor, walk: Walk) -> None:
    """Remove all other units of a group of the layer that comes next, and regress what they compute on those that stay.

    Args:
        model: changed.
        group: the group.
        kept: the units that stay.
        walk: the calibration inputs, in front of the layer.
    """
    stays, goes = split(group, kept)
    if not len(goes):
        return
    reader = linear(model, group.reader)
    mean, products = covariance(walk.read(layers_of(model)[group.layer], reader))
    among = products[stays][:, stays]
    ridge = RIDGE * among.diagonal().mean() * torch.eye(len(stays), dtype=torch.float64)
    weight = reader.weight.double()
    told = torch.linalg.solve(among + ridge, products[stays][:, goes]).T  # [goes, stays]
    changed = weight[:, stays] + weight[:, goes] @ told
    constant = weight[:, goes] @ (mean[goes] - told @ mean[stays])
    bias = constant if reader.bias is None else reader.bias.double() + constant
    remove_units(model, group, kept, changed.to(reader.weight.dtype), bias.to(reader.weight.dtype))


@torch.no_grad()
def pruned(
    model: nn.Module, method: Pruning, most: float, batches: Sequence[Batch], observed: Observed | None, seed: int = 0
) -> nn.Module:
    """A copy of a model without some of its neurons and heads.

    Args:
        model: not changed.
        method: which, and what is done about it.
        most: parameters that the copy may have.
        batches: the calibration inputs.
        observed: what they show of the model, if the method looks at that.
        seed: of random scores.

    Raises:
        ValueError: the budget cannot be met.
    """
    small = copy.deepcopy(model)
    groups = groups_of(small)
    sizes = Sizes(small, groups, method.repair)
    scored = scores(small, groups, observed, method.score, seed)
    kept: Kept = (adaptive if method.adaptive else uniform)(scored, sizes, most, method.heads)
    walk = Walk(small, batches) if method.repair == "ridge" else None
    for number, layer in enumerate(layers_of(small)):
        for group in groups:
            if group.layer != number or group not in kept:
                continue
            if walk is None:
                cut(small, group, kept[group], moments_of(observed, group) if method.repair == "means" else None)
            else:
                cut_by_ridge(small, group, kept[group], walk)
        if walk is not None:
            walk.step(layer)
    return small


def layers_to_keep(model: nn.Module, most: float, rounded: Callable[[float], int]) -> int:
    """How many layers may stay.

    Args:
        model: the model, whose layers are as large as each other.
        most: parameters.
        rounded: makes a whole number of it: `math.floor` meets the budget.
    """
    layers = layers_of(model)
    each = parameters(layers[0])
    return min(len(layers), max(1, rounded((most - parameters(model)) / each + len(layers))))


def with_layers(model: nn.Module, numbers: Sequence[int]) -> nn.Module:
    """A copy of a model with only these of its layers."""
    small = copy.deepcopy(model)
    set_layers(small, numbers)
    return small


def least_changing_dropped(model: nn.Module, count: int, observed: Observed) -> nn.Module:
    """A copy with so many layers, those that change the hidden states most (ShortGPT, Men et al. 2024).

    A layer's influence is 1 - cosine of what goes in and what comes out, averaged over tokens.
    """
    order = sorted(range(len(observed.change)), key=lambda number: -observed.change[number])
    return with_layers(model, sorted(order[:count]))


def best_layers(model: nn.Module, count: int, quality: Callable[[nn.Module], float]) -> nn.Module:
    """A copy with so many layers, those of all possible choices with which it is best.

    Raises:
        ValueError: there are more than 1000 choices.
    """
    choices = list(itertools.islice(itertools.combinations(range(len(layers_of(model))), count), 1001))
    if len(choices) > 1000:
        raise ValueError(f"more than 1000 choices of {count} layers, expected fewer to try all of them")
    best: Any = max(choices, key=lambda numbers: quality(with_layers(model, numbers)))
    return with_layers(model, best)
