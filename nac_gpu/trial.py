"""Does merging a group leave a correct network? Tried on the example inputs, before anything is promised.

Some neurons of every group are made copies of others. Merging copies must not change the function at all; if it does,
or if the smaller network does not run (a size is written into the model's code), the group is left alone.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.cost import Cost
from nac_gpu.deferred import after, loaded
from nac_gpu.forward import (
    ExampleInputs,
    call,
    evaluating,
    flop_counter,
    in_small_operations,
    sent,
    tensors_in,
    without_tf32,
)
from nac_gpu.groups import Group, LeftAlone
from nac_gpu.rebuild import rebuild, selected, tensors
from nac_gpu.sizes import attributes, guesses
from nac_gpu.sums import add_rows

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # relative
_SURE = 1e-5  # in float32: no more than its rounding, float64 need not be asked


def copy_neurons(state: Mapping[str, Tensor], group: Group, labels: Tensor) -> dict[str, Tensor]:
    """Tensors in which all neurons of a cluster compute what its first neuron computes.

    Args:
        state: tensors by name; not changed.
        group: the group.
        labels: int64 [n].
    """
    first = torch.full((int(labels.max()) + 1,), group.size, dtype=torch.int64)
    first.scatter_reduce_(0, labels, torch.arange(group.size), "amin")
    home = first[labels]
    copies = dict(state)
    for member in group.members:
        if member.role == "mean":
            read = torch.arange(state[member.tensor].shape[member.dim])
            read[member.index.flatten()] = member.index[home].flatten()
            copies[member.tensor] = copies[member.tensor].index_select(
                member.dim, sent(read, copies[member.tensor].device)
            )
    return copies


def random_labels(size: int, clusters: int, generator: torch.Generator) -> Tensor:
    """A random assignment of `size` neurons to exactly `clusters` clusters, int64 [size]."""
    labels = torch.cat([torch.arange(clusters), torch.randint(clusters, (size - clusters,), generator=generator)])
    return labels[torch.randperm(size, generator=generator)]


def outputs(model: nn.Module, example_inputs: ExampleInputs, *, auxiliary: bool = False) -> list[Tensor]:
    """All tensors that the model returns in eval mode, with what auxiliary heads return if asked for.

    They are to be compared, so CUDA does not round products to TF32.
    """
    with evaluating(model, auxiliary=auxiliary), in_small_operations(model), without_tf32():
        return list(tensors_in(call(model, example_inputs)))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error over several tensors, each against its own largest value."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel() and b.is_floating_point():
            scale = float(b.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another type, anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def converted(model: nn.Module, example_inputs: ExampleInputs, dtype: torch.dtype) -> tuple[nn.Module, ExampleInputs]:
    """A copy of the model, and its inputs, in another floating type."""
    return copy.deepcopy(model).to(dtype), pytree.tree_map(lambda value: in_dtype(value, dtype), example_inputs)


def lively(tensor: Any, generator: torch.Generator) -> Any:
    """The tensor, or random numbers of its shape where it holds one constant.

    Zero-initialised heads, layer scales of 1e-6 and inputs of zeros hide what merging does; none may make the trial
    vacuous.
    """
    if not isinstance(tensor, Tensor) or tensor.numel() < 2 or not tensor.is_floating_point():
        return tensor
    if not _constant(loaded(tensor)):
        return tensor
    fan_in = math.prod(tensor.shape[1:])
    seed = int(torch.randint(2**62, (), generator=generator))

    def drawn(like: Tensor) -> Tensor:
        own = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=own, dtype=torch.float64).to(like) / fan_in**0.5

    return after(tensor, drawn)


def _constant(tensor: Tensor) -> bool:
    flat = tensor.flatten()
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


def merged_copies(state: Mapping[str, Tensor], groups: Sequence[Group], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors in which every cluster of identical neurons is one, whose outgoing connections are summed.

    Args:
        state: tensors by name; not changed.
        groups: the groups.
        labels: for each group, int64 [n].
    """
    small = dict(state)
    all_moves: dict[tuple[str, int], list[tuple[Tensor, Tensor, bool]]] = {}
    for group, chosen in zip(groups, labels, strict=True):
        first = torch.full((int(chosen.max()) + 1,), group.size, dtype=torch.int64)
        first.scatter_reduce_(0, chosen, torch.arange(group.size), "amin")
        home = first[chosen]
        away = home != torch.arange(group.size)
        for member in group.members:
            moved = member.index[away].flatten(), member.index[home][away].flatten()
            all_moves.setdefault((member.tensor, member.dim), []).append((*moved, member.role == "sum"))
    for (name, dim), moves in sorted(
        all_moves.items(), key=lambda item: any(added for _, _, added in item[1])
    ):  # small ones first
        small[name] = after(small[name], partial(_moved, dim=dim, moves=moves))
    return small


def _moved(old: Tensor, dim: int, moves: Sequence[tuple[Tensor, Tensor, bool]]) -> Tensor:
    """A tensor without positions along one dimension, some of which are added to others: (from, to, added) int64."""
    kept = torch.ones(old.shape[dim], dtype=torch.bool)
    for source, _, _ in moves:
        kept[source] = False
    place = kept.cumsum(0) - 1
    new = selected(old, dim, kept)
    for source, target, added in moves:
        if added:
            add_rows(new, dim, sent(place[target], old.device), old.index_select(dim, sent(source, old.device)))
    return new


Chosen = list[tuple[Group, int]]


def _asked(tried: Chosen) -> list[Any]:
    """What is tried, comparable."""
    return [(group.name, group.size, group.attributes, width) for group, width in tried]


class Trial:
    """Tries groups on the example inputs.

    Attributes:
        alone: groups that failed, and why.
        after: cost of the smaller network, once all that passed have been tried together.
        shapes: of its tensors, by name.

    Args:
        model: not changed.
        example_inputs: as for `record`; inputs and parameters that hold one constant are replaced by random ones.
        auxiliary: compare what auxiliary heads return, too.
        seed: of the choice of copies.
    """

    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs, *, auxiliary: bool = False, seed: int = 0
    ) -> None:
        self.alone: list[LeftAlone] = []
        self.after: Cost | None = None
        self.shapes: dict[str, torch.Size] = {}
        self._latest: list[Any] = []  # what passed last, all at once
        self._known: dict[tuple[tuple[str, int, int], ...], tuple[Chosen, Cost | None, dict[str, torch.Size]]] = {}
        self._model, self._inputs, self._seed = model, example_inputs, seed
        self._auxiliary = auxiliary
        self._modules = dict(model.named_modules())
        double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
        # float64 where float32 does not tell, and float32 for good where an operation has no float64.
        self._next = [] if double else [torch.float64, torch.float32]
        self._set_dtype(torch.float64 if double else torch.float32)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(self._seed)
        self._dtype = dtype
        parameters = {name for name, _ in self._model.named_parameters()}
        self._state = {
            name: lively(value, generator) if name in parameters else value
            for name, value in pytree.tree_map(lambda value: in_dtype(value, dtype), tensors(self._model)).items()
        }
        self._lively_inputs = pytree.tree_map(lambda value: lively(in_dtype(value, dtype), generator), self._inputs)

    def passed(self, chosen: Chosen) -> Chosen:
        """The groups, with their widths, that can be merged; attributes that have to follow them are found out.

        All at once first, in halves where that fails. Units that cannot be merged make room for the channels that they
        were preferred to. What passed in parts is tried together in the end: that is the network whose cost counts.
        Budgets come back to widths that have passed, and those are not tried again; nor are attributes that were found.
        """
        asked = tuple((group.name, group.size, width) for group, width in chosen)
        if asked in self._known:
            good, self.after, self.shapes = self._known[asked]
            return good
        likely = [
            (group if group.attributes else replace(group, attributes=next(guesses(self._modules, group))), width)
            for group, width in chosen
        ]
        place = {group.name: at for at, (parent, _) in enumerate(chosen) for group in (*parent.otherwise, parent)}
        good = sorted(self._good(likely), key=lambda item: place[item[0].name])
        together = self.failure(good) if good and self._latest != _asked(good) else None
        if together is None:
            if good:
                self._known[asked] = good, self.after, self.shapes
            return good
        self.alone += [LeftAlone(g.name, g.size, f"together with the other groups: {together}") for g, _ in good]
        return []

    def failure(self, tried: Chosen) -> str | None:
        """Why these groups cannot be merged to these widths, all at once, or None if they can.

        In float32 first: it takes half the time, and what it rounds away it rounds away in the user's network too. Only
        a difference that could be more than rounding is looked at in float64, and from then on all is.
        """
        groups, widths = [group for group, _ in tried], [width for _, width in tried]
        generator = torch.Generator().manual_seed(self._seed)
        labels = [random_labels(group.size, width, generator) for group, width in tried]
        copies = self._state
        for group, chosen in zip(groups, labels, strict=True):
            copies = copy_neurons(copies, group, chosen)
        copied = rebuild(self._model, copies, share=True)
        del copies
        try:
            expected = outputs(copied, self._lively_inputs)
            if self._auxiliary:
                expected += outputs(copied, self._lively_inputs, auxiliary=True)
        except Exception:  # an operation that this type has not
            if not self._next:
                raise
            return self._again(tried)
        del copied
        counter = flop_counter()
        try:
            # The first of a cluster's neurons is itself in the network of copies too: no need to merge those.
            merged = merged_copies(self._state, groups, labels)
            small = rebuild(self._model, merged, attributes(self._model, groups, widths), share=True)
            with counter:
                found = outputs(small, self._lively_inputs)
            if self._auxiliary:
                found += outputs(small, self._lively_inputs, auxiliary=True)
        except Exception as error:  # whatever the user's code raises when a width is not what it was written for
            return f"the smaller network does not run: {type(error).__name__}: {error}"
        error = relative_error(found, expected)
        if self._dtype == torch.float32 and self._next and not error <= _SURE:
            return self._again(tried)
        if not error <= TOLERANCE[self._dtype]:
            return f"merging identical neurons changed the outputs (relative error {error:.1e})"
        self.shapes = {name: tensor.shape for name, tensor in merged.items()}
        self.after = Cost(sum(parameter.numel() for parameter in small.parameters()), counter.get_total_flops())
        self._latest = _asked(tried)
        return None

    def _again(self, tried: Chosen) -> str | None:
        """The same in the next type, in which all other trials will be made."""
        self._set_dtype(self._next.pop(0))
        return self.failure(tried)

    def _good(self, tried: Chosen) -> Chosen:
        if not tried:
            return []
        why = self.failure(tried)
        if why is None:
            return tried
        kinds: dict[str, Chosen] = {}
        for group, width in tried:
            kinds.setdefault(self._kind(group), []).append((group, width))
        if len(kinds) > 1:
            return [item for alike in kinds.values() for item in self._good(alike)]
        if tried[0][0].units or len(tried) == 1:
            return self._good_alike(tried, why)
        half = len(tried) // 2
        return self._good(tried[:half]) + self._good(tried[half:])

    def _kind(self, group: Group) -> str:
        """What groups have in common whose fates are alike: units in modules of one class, or channels."""
        return " ".join(sorted({type(self._modules.get(name, self._model)).__qualname__ for name in group.units}))

    def _good_alike(self, tried: Chosen, why: str) -> Chosen:
        """Units of one kind: what is found out about the first of them is taken to hold for all."""
        group, width = tried[0]
        if len(tried) > 1:
            why = self.failure(tried[:1]) or ""
        ways = [] if not why else list(guesses(self._modules, group))[1:]
        for number, attributes_too in enumerate(ways, 1):
            if self.failure([(replace(group, attributes=attributes_too), width)]) is None:
                same = [(replace(g, attributes=self._guess(g, number)), w) for g, w in tried]
                return same if len(same) == 1 or self.failure(same) is None else self._one_by_one(same)
        if not why:
            return self._one_by_one(tried)
        rest = [
            (other, max(1, round(width / group.size * other.size)))
            for group, width in tried
            for other in group.otherwise
        ]
        found = self._good(rest)
        kept = {other.name for other, _ in found}
        for group, _ in tried:
            if not any(other.name in kept for other in group.otherwise):
                self.alone.append(LeftAlone(group.name, group.size, why))
        return found

    def _guess(self, group: Group, number: int) -> tuple[tuple[str, str], ...]:
        found = list(guesses(self._modules, group))
        return found[min(number, len(found) - 1)]

    def _one_by_one(self, tried: Chosen) -> Chosen:
        return [found for item in tried for found in self._good([item])]
