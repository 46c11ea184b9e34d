"""Fewer experts: similar ones of a mixture become one. An approximation, and done on request only.

Which are similar is found by Ward's method, from what they compute if their activations were linear: the products of
what their neurons send out and take in, which do not depend on the neurons' order. The experts of a cluster become
one with all their neurons, which answers as their mean does; then those neurons are merged to as many as one expert
had, so experts that differ in the order of their neurons only stay what they are. (Merging of experts without data by
what they answer: Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", ICML 2025; by the
mean of weights, with neurons in a common order: Li et al., "Merge, Then Compress", ICLR 2024.)

The router's rows become their mean. A router that chose two of a cluster chooses one of them and another expert now:
that is why the function changes even where experts are equal. Refinement makes up for what it can.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from nac_gpu.cost import Cost, cost
from nac_gpu.evidence import gather
from nac_gpu.forward import ExampleInputs
from nac_gpu.graph import record
from nac_gpu.groups import Group, Member
from nac_gpu.linkage import ward_linkage
from nac_gpu.mixtures import Mixture, find_mixtures, within
from nac_gpu.neurons import rows, working_dtype
from nac_gpu.opening import is_open
from nac_gpu.origin import origin_of, remember, shorten
from nac_gpu.plan import Plan, check_weights
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.refinement import PASSES, learn
from nac_gpu.trial import outputs
from nac_gpu.unwrap import computed, unwrapped
from nac_gpu.widths import Calibration, neurons

Experts = int | float | Mapping[str, int | float]

_COUNT = re.compile(r"(?<!shared_)experts$")
_DIRECTIONS = 64  # random ones, in which the products of an expert are compared


def merge_experts(
    model: nn.Module,
    example_inputs: ExampleInputs,
    experts: Experts,
    *,
    calibration: Calibration = "dream",
    refine: int = PASSES,
    seed: int = 0,
) -> nn.Module:
    """A copy of a model with fewer experts in its mixtures: similar ones become one.

    Neurons inside experts are `nac_gpu.compress`'s to merge, before or after. The original is not changed.

    Args:
        model: any module with experts of equal form, in a list or as rows of common tensors, among which a router
            chooses.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments. Experts of a list that they do not reach are merged, too.
        experts: how many to keep: a number (int) or a share (float) of every mixture, or a mapping from the names of
            modules that hold experts (or patterns such as `"*.experts"`) to either; the others keep theirs. A router
            that picks several needs at least as many.
        calibration: on what the smaller network is refined: batches of unlabelled inputs, `"dream"` for inputs made up
            where that can be done, or `"none"`.
        refine: how often it looks at each of them to learn to answer as the original does (see `nac_gpu.refinement`).
        seed: of inputs made up and of refinement; the global random state is not touched.

    Returns:
        A new module of the same classes: the original's device, dtype, mode, `requires_grad` and hooks. Attributes and
        configurations that count experts agree with it; a configuration has one number for all layers, and is changed
        where that is what they have.

    Raises:
        ValueError: no mixture was found (with what looked like one, and why it is none), an unknown name, more experts
            than there are, fewer than the router picks, weights that are not finite, a model of `nac_gpu.open_model`.
        TypeError: integer or complex weights, calibration data of another kind than the example inputs.
        RuntimeError: the forward pass fails on the example inputs or the calibration data.
    """
    if refine < 0:
        raise ValueError(f"refine={refine}, expected a number of passes over the calibration inputs, 0 for none")
    network, wrappers = unwrapped(model)
    if is_open(network):
        raise ValueError("expected a model in memory, not one of nac_gpu.open_model, whose weights are in files")
    model, changes = computed(network)
    check_weights(model)
    groups = record(model, example_inputs).groups
    found, others = find_mixtures(model, example_inputs)
    kept = _kept(found, others, experts)
    state = tensors(model)
    merged = dict(state)
    attributes: dict[tuple[str, str], object] = {}
    said = []
    for mixture, count in zip(found, kept, strict=True):
        if count == mixture.count:
            continue
        hidden = _hidden(mixture, groups)
        own = [_working(mixture.expert(state, number)) for number in range(mixture.count)]
        clusters = _clusters(torch.stack([_sketch(expert, hidden) for expert in own]), count)
        new = [_one([own[number] for number in numbers], hidden) for numbers in clusters]
        merged |= {name: tensor.to(state[name].dtype) for name, tensor in mixture.written(new).items()}
        merged |= {name: _means(state[name], dim, clusters) for name, dim in mixture.router}
        attributes |= dict.fromkeys(_counting(model, mixture), count)
        said.append(f"{mixture.name or type(model).__name__}: {mixture.count} experts became {count}")
    smaller = [(mixture, count) for mixture, count in zip(found, kept, strict=True) if count < mixture.count]
    small = rebuild(model, merged, attributes)
    shorten(small, {mixture.name: count for mixture, count in smaller if mixture.listed})
    _set_counts(small, found, kept)
    _try(small, example_inputs, smaller)
    before, after = cost(model, example_inputs), cost(small, example_inputs)
    remember(small, model, _plan(model, (*wrappers, *changes, *said), before, after))
    touched = {name for mixture, _ in smaller for name in mixture.names()}
    if touched and refine and calibration != "none":
        evidence = gather(model, example_inputs, (), calibration, seed)
        learn(small, model, touched, evidence.batches, refine, made_up=isinstance(calibration, str), seed=seed)
    return small


def _kept(found: Sequence[Mixture], others: Mapping[str, str], experts: Experts) -> list[int]:
    """How many experts each mixture keeps."""
    if not found:
        looked = "; ".join(f"{name}: {why}" for name, why in others.items())
        raise ValueError(
            "no mixture of experts was found, expected modules of equal form, in a ModuleList or as rows of common "
            f"tensors, beside a router with an entry for each{': ' + looked if looked else ''}"
        )
    if not isinstance(experts, Mapping):
        return [neurons(mixture.name, mixture.count, experts, "experts") for mixture in found]
    kept = [mixture.count for mixture in found]
    for pattern, value in experts.items():
        matching = [number for number, mixture in enumerate(found) if fnmatchcase(mixture.name, pattern)]
        if not matching:
            why = others.get(pattern)
            known = ", ".join(mixture.name for mixture in found)
            raise ValueError(f"unknown experts {pattern!r}{': ' + why if why else ''}; expected some of: {known}")
        for number in matching:
            kept[number] = neurons(pattern, found[number].count, value, "experts")
    return kept


def _hidden(mixture: Mixture, groups: Sequence[Group]) -> tuple[Member, ...]:
    """Where the hidden neurons of an expert are, by its parts; nothing if they are not one group."""
    names = {mixture.tensor(part): part for part in mixture.parts}
    if mixture.listed:  # the first that the example inputs reached stands for all
        for number in range(mixture.count):
            names = {mixture.tensor(part, number): part for part in mixture.parts}
            if any(member.tensor in names for group in groups for member in group.members):
                break
    inside = [g for g in groups if all(m.tensor in names and (mixture.listed or m.dim) for m in g.members)]
    if len(inside) != 1:
        return ()
    less = 0 if mixture.listed else 1  # a row has one dimension less
    return tuple(replace(m, tensor=names[m.tensor], dim=m.dim - less) for m in inside[0].members)


def _working(expert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {part: tensor.to(working_dtype(tensor)) for part, tensor in expert.items()}


def _neurons(expert: Mapping[str, Tensor], hidden: Sequence[Member], role: str) -> list[Tensor]:
    """What an expert's neurons take in ("mean") or send out ("sum"), a tensor [n, values] of each part."""
    return [rows(expert[member.tensor], member.dim, member.index) for member in hidden if member.role == role]


def _sketch(expert: Mapping[str, Tensor], hidden: Sequence[Member]) -> Tensor:
    """An expert as a point: the products of what its neurons send out and take in, in some random directions.

    Distances in random directions are those of the whole products, nearly (Johnson and Lindenstrauss 1984).
    """
    others = [tensor.flatten() for part, tensor in expert.items() if part not in {m.tensor for m in hidden}]
    if not hidden:
        return torch.cat(others)
    taken, sent = (torch.cat(_neurons(expert, hidden, role), dim=1) for role in ("mean", "sum"))
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(taken.shape[1], _DIRECTIONS, generator=generator, dtype=torch.float64)
    product = sent.T @ (taken @ (directions / _DIRECTIONS**0.5).to(taken))
    return torch.cat([product.flatten(), *others])


def _clusters(points: Tensor, count: int) -> list[list[int]]:
    """Which experts become one, in the order of the first of each."""
    labels = ward_linkage(points).cut(count).tolist()
    return [[i for i, label in enumerate(labels) if label == one] for one in dict.fromkeys(labels)]


def _one(experts: Sequence[Mapping[str, Tensor]], hidden: Sequence[Member]) -> dict[str, Tensor]:
    """The expert that several become: it answers as their mean, with as many neurons as one of them.

    What belongs to no neuron, and everything where an expert's neurons are not one group, is their mean.
    """
    if len(experts) == 1:
        return dict(experts[0])
    merged = {part: torch.stack([expert[part] for expert in experts]).mean(0) for part in experts[0]}
    if not hidden:
        return merged
    taken = _together([_neurons(expert, hidden, "mean") for expert in experts])
    sent = [tensor / len(experts) for tensor in _together([_neurons(expert, hidden, "sum") for expert in experts])]
    masses = sum((tensor.square().sum(1) for tensor in sent), start=sent[0].new_zeros(()))
    masses = masses.clamp(min=torch.finfo(masses.dtype).eps * float(masses.max()) or 1.0)
    count = len(hidden[0].index)
    labels = ward_linkage(torch.cat(taken, dim=1), masses).cut(count).to(masses.device)
    total = masses.new_zeros(count).index_add_(0, labels, masses)
    shares = (masses / total[labels])[:, None]
    centroids = iter([t.new_zeros(count, t.shape[1]).index_add_(0, labels, t * shares) for t in taken])
    sums = iter([t.new_zeros(count, t.shape[1]).index_add_(0, labels, t) for t in sent])
    for member in hidden:
        values = next(centroids if member.role == "mean" else sums)
        front = merged[member.tensor].movedim(member.dim, 0)  # a view
        front[member.index.to(front.device)] = values.reshape(*member.index.shape, *front.shape[1:])
    return merged


def _together(of_experts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The neurons of several experts as those of one."""
    return [torch.cat(parts) for parts in zip(*of_experts, strict=True)]


def _means(tensor: Tensor, dim: int, clusters: Sequence[Sequence[int]]) -> Tensor:
    """The router's entries: their mean."""
    exact = tensor.to(working_dtype(tensor))
    means = [exact.index_select(dim, torch.tensor(c, device=tensor.device)).mean(dim) for c in clusters]
    return torch.stack(means, dim).to(tensor.dtype)


def _counting(model: nn.Module, mixture: Mixture) -> list[tuple[str, str]]:
    """Attributes of a block's modules that say how many experts there are: (module, attribute)."""
    block = model.get_submodule(mixture.block)
    return [
        (within(mixture.block, name) if name else mixture.block, attribute)
        for name, module in block.named_modules()
        for attribute, value in vars(module).items()
        if _COUNT.search(attribute) and type(value) is int and value == mixture.count
    ]


def _set_counts(small: nn.Module, found: Sequence[Mixture], kept: Sequence[int]) -> None:
    """Configurations, and modules around the blocks, that have one number of experts for all."""
    changes = {(mixture.count, count) for mixture, count in zip(found, kept, strict=True)}
    if len(changes) != 1:
        return
    ((before, after),) = changes
    holders: list[object] = list(small.modules())
    configs = {id(config): config for config in (getattr(module, "config", None) for module in small.modules())}
    holders += [config for config in configs.values() if hasattr(config, "to_dict")]
    for holder in holders:
        for name, value in list(vars(holder).items()):
            if _COUNT.search(name) and type(value) is int and value == before:
                setattr(holder, name, after)


def _try(small: nn.Module, example_inputs: ExampleInputs, smaller: Sequence[tuple[Mixture, int]]) -> None:
    """Whether the smaller network runs."""
    try:
        outputs(small, example_inputs)
    except Exception as error:  # whatever the user's code raises
        counts = ", ".join(f"{mixture.name}: {count} of {mixture.count}" for mixture, count in smaller)
        raise ValueError(
            f"with fewer experts ({counts}) the network does not run: {type(error).__name__}: {error}; keep at least "
            "as many as the router picks for an input, or make the code take their number from a tensor's shape"
        ) from error


def _plan(model: nn.Module, changes: tuple[str, ...], before: Cost, after: Cost) -> Plan:
    """What was done, as a plan: that of an earlier compression goes on."""
    origin = origin_of(model)
    if origin is None:
        return Plan((), (), before, after, changes)
    return replace(origin.plan, after=after, changes=(*origin.plan.changes, *changes))
