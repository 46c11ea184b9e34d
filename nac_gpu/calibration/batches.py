"""Calibration data as batches of inputs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nac_gpu.network.ambient import drawn, ordinary
from nac_gpu.network.moving import to_device
from nac_gpu.network.running import ExampleInputs

Batches = Sequence[ExampleInputs]


def as_batches(calibration: Iterable[Any], example_inputs: ExampleInputs, device: torch.device) -> Iterator[Any]:
    """The calibration batches in the form in which the model takes them, on the device.

    If the example input is a single tensor, a batch may be a pair such as `(images, labels)`: the first element is
    used.

    Raises:
        TypeError: the calibration data is not iterable, or a batch has another type than the example inputs.
        ValueError: the calibration data is empty.
    """
    if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        kind = "a tensor" if isinstance(calibration, Tensor) else type(calibration).__name__
        raise TypeError(f"calibration is {kind}, expected batches: a list of inputs of the model, or a DataLoader")
    none = True
    for number, given in enumerate(drawn(calibration)):
        batch = given
        if isinstance(example_inputs, Tensor) and isinstance(batch, list | tuple) and batch:
            batch = batch[0]
        if isinstance(example_inputs, Tensor) and not isinstance(batch, Tensor):
            raise TypeError(
                f"batch {number} of the calibration data is {type(batch).__name__}, expected a tensor as in the "
                "example inputs, or a pair that starts with one"
            )
        none = False
        yield to_device(ordinary(batch), device)
    if none:
        raise ValueError("the calibration data has no batch, expected at least one; a generator can be used only once")


_EVERY = 8  # one batch of so many, or one input of so many, is kept aside
_FEWEST = 16  # inputs that are divided


class Divided(NamedTuple):
    """Inputs to fit to, and inputs that are kept aside to judge by, which may be none."""

    fit: Batches
    judged: Batches = ()


def divided(batches: Batches) -> Divided:
    """Keep about an eighth of the inputs aside; none if there are too few.

    Args:
        batches: of several, whole ones are kept aside; of few, the last inputs of each, if all of its tensors have the
            same length.
    """
    if len(batches) >= _EVERY:
        aside = set(range(_EVERY - 1, len(batches), _EVERY))
        return Divided([b for n, b in enumerate(batches) if n not in aside], [batches[n] for n in sorted(aside)])
    counts = [length_of(batch) for batch in batches]
    if any(count < 2 for count in counts) or sum(counts) < _FEWEST:
        return Divided(batches)
    pairs = list(zip(batches, counts, strict=True))
    fit = [_part(batch, slice(0, count - _aside(count))) for batch, count in pairs]
    judge = [_part(batch, slice(count - _aside(count), count)) for batch, count in pairs]
    return Divided(fit, judge)


def size_of(batch: ExampleInputs) -> int:
    """How many inputs a batch has, or tokens, where its first tensor is whole numbers [batch, length]; at least 1."""
    first = next((leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None:
        return 1
    tokens = first.ndim == 2 and not first.is_floating_point() and not first.is_complex()
    return max(1, first.numel() if tokens else len(first))


def of_tokens(batches: Batches) -> bool:
    """Whether all batches are tokens, [batch, length], of sequences that can be told apart."""
    return all(size_of(batch) > length_of(batch) > 0 for batch in batches)


def first_of(batch: ExampleInputs, most: int) -> ExampleInputs:
    """The first inputs of a batch, at least one, with no more inputs or tokens than that; all if they are not told."""
    length = length_of(batch)
    return _part(batch, slice(0, max(1, most * length // size_of(batch)))) if length else batch


def first_batches(batches: Batches, most: int) -> Batches:
    """The first batches, until they have so many inputs or tokens; the last one cut."""
    chosen: list[Any] = []
    for batch in batches:
        size = size_of(batch)
        if size > most and chosen:
            break
        chosen.append(first_of(batch, most) if size > most else batch)
        most -= size
        if most <= 0:
            break
    return chosen


def parts_of(batch: ExampleInputs, most: int) -> list[ExampleInputs]:
    """A batch as smaller ones, with no more inputs or tokens than that; whole if that cannot be told."""
    length, size = length_of(batch), size_of(batch)
    if size <= most or not length:
        return [batch]
    rows = max(1, most * length // size)
    return [_part(batch, slice(at, at + rows)) for at in range(0, length, rows)]


def _aside(count: int) -> int:
    return max(1, count // _EVERY)


def length_of(batch: ExampleInputs) -> int:
    """How many inputs a batch has; 0 if that cannot be told."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    lengths = {len(leaf) if leaf.ndim else 0 for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else 0


def _part(batch: ExampleInputs, inputs: slice) -> ExampleInputs:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[inputs], batch)


Calibration = Iterable[Any] | Literal["dream", "none"]
