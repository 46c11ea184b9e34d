"""Does merging a group leave a correct network? Tried on the example inputs, before anything is promised.

Some neurons of every group are made copies of others. Merging copies must not change the function at all; if it does,
or if the smaller network does not run (a size is written into the model's code), the group is left alone.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.graph import ExampleInputs, call, evaluating, tensors_in
from nac_gpu.groups import Group, LeftAlone
from nac_gpu.merge import Merger
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.sizes import attributes, guesses

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # relative


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
                member.dim, read.to(copies[member.tensor].device)
            )
    return copies


def random_labels(size: int, clusters: int, generator: torch.Generator) -> Tensor:
    """A random assignment of `size` neurons to exactly `clusters` clusters, int64 [size]."""
    labels = torch.cat([torch.arange(clusters), torch.randint(clusters, (size - clusters,), generator=generator)])
    return labels[torch.randperm(size, generator=generator)]


def outputs(model: nn.Module, example_inputs: ExampleInputs, *, auxiliary: bool = False) -> list[Tensor]:
    """All tensors that the model returns in eval mode, with what auxiliary heads return if asked for."""
    with evaluating(model, auxiliary=auxiliary):
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


def in_dtype(model: nn.Module, example_inputs: ExampleInputs, dtype: torch.dtype) -> tuple[nn.Module, ExampleInputs]:
    """A copy of the model and its inputs in another type."""

    def cast(value: object) -> object:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return copy.deepcopy(model).to(dtype), pytree.tree_map(cast, example_inputs)


def in_float64(model: nn.Module, example_inputs: ExampleInputs) -> tuple[nn.Module, ExampleInputs]:
    """A copy of the model and its inputs in float64."""
    return in_dtype(model, example_inputs, torch.float64)


def lively(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor, or random numbers of its shape where it holds one constant.

    Zero-initialised heads, layer scales of 1e-6 and inputs of zeros hide what merging does; none may make the trial
    vacuous.
    """
    if tensor.numel() < 2 or not tensor.is_floating_point() or not bool((tensor == tensor.flatten()[0]).all()):
        return tensor
    fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    return drawn / fan_in**0.5


def failure(
    model: nn.Module,
    example_inputs: ExampleInputs,
    groups: Sequence[Group],
    widths: Sequence[int],
    *,
    seed: int = 0,
    auxiliary: bool = False,
    tolerance: float = TOLERANCE[torch.float64],
) -> str | None:
    """Why these groups cannot be merged to these widths, or None if they can.

    Args:
        model: in float64, or the widest type that it runs in; not changed.
        example_inputs: in the same type; inputs and parameters that hold one constant are replaced by random ones.
        groups: to merge, all at once.
        widths: clusters of each.
        seed: of the choice of copies.
        auxiliary: compare what auxiliary heads return, too.
        tolerance: largest relative error.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {name for name, _ in model.named_parameters()}
    copies = {name: lively(t, generator) if name in parameters else t for name, t in tensors(model).items()}
    example_inputs = pytree.tree_map(lambda v: lively(v, generator) if isinstance(v, Tensor) else v, example_inputs)
    labels = [random_labels(group.size, width, generator) for group, width in zip(groups, widths, strict=True)]
    for group, chosen in zip(groups, labels, strict=True):
        copies = copy_neurons(copies, group, chosen)
    merger = Merger(copies)
    for group, chosen in zip(groups, labels, strict=True):
        merger.merge(group, chosen)
    modes = (False, True) if auxiliary else (False,)
    copied = rebuild(model, copies)
    expected = [tensor for mode in modes for tensor in outputs(copied, example_inputs, auxiliary=mode)]
    del copied
    try:
        small = rebuild(model, merger.finish(), attributes(model, groups, widths))
        found = [tensor for mode in modes for tensor in outputs(small, example_inputs, auxiliary=mode)]
    except Exception as error:  # whatever the user's code raises when a width is not what it was written for
        return f"the smaller network does not run: {type(error).__name__}: {error}"
    error = relative_error(found, expected)
    if not error <= tolerance:
        return f"merging identical neurons changed the outputs (relative error {error:.1e})"
    return None


def shrunk(state: Mapping[str, Tensor], groups: Sequence[Group], widths: Sequence[int]) -> dict[str, Tensor]:
    """Tensors of the sizes that a compression will give, whatever their values."""
    merger = Merger(dict(state))
    for group, width in zip(groups, widths, strict=True):
        merger.merge(group, torch.arange(group.size).clamp_max(width - 1))
    return merger.finish()


Chosen = list[tuple[Group, int]]


class Trial:
    """Tries groups on the example inputs; `alone` lists those that failed.

    Args:
        model: not changed.
        example_inputs: as for `record`.
        auxiliary: compare what auxiliary heads return, too.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, *, auxiliary: bool = False) -> None:
        self.alone: list[LeftAlone] = []
        self._auxiliary = auxiliary
        for dtype, tolerance in TOLERANCE.items():
            self._model, self._inputs = in_dtype(model, example_inputs, dtype)
            self._tolerance = tolerance
            with contextlib.suppress(Exception):  # an operation that float64 has not: float32 then
                outputs(self._model, self._inputs, auxiliary=auxiliary)
                return

    def passed(self, chosen: Chosen) -> Chosen:
        """The groups, with their widths, that can be merged; attributes that have to follow them are found out.

        All at once first, in halves where that fails. Units that cannot be merged make room for the channels that they
        were preferred to.
        """
        likely = [(replace(group, attributes=next(guesses(self._model, group))), width) for group, width in chosen]
        good = self._good(likely)
        together = self._failure(good) if len(good) < len(likely) else None
        if together is None:
            return good
        self.alone += [LeftAlone(g.name, g.size, f"together with the other groups: {together}") for g, _ in good]
        return []

    def _failure(self, tried: Chosen) -> str | None:
        groups, widths = [group for group, _ in tried], [width for _, width in tried]
        return failure(self._model, self._inputs, groups, widths, auxiliary=self._auxiliary, tolerance=self._tolerance)

    def _good(self, tried: Chosen) -> Chosen:
        if not tried:
            return []
        why = self._failure(tried)
        if why is None:
            return tried
        if len(tried) > 1:
            half = len(tried) // 2
            return self._good(tried[:half]) + self._good(tried[half:])
        group, width = tried[0]
        for more in list(guesses(self._model, group))[1:]:
            again = replace(group, attributes=more)
            if self._failure([(again, width)]) is None:
                return [(again, width)]
        share = width / group.size
        found = self._good([(other, max(1, round(share * other.size))) for other in group.otherwise])
        if not found:
            self.alone.append(LeftAlone(group.name, group.size, why))
        return found
