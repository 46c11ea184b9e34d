"""What the original and the compressed model really take and give: bytes, seconds, right answers.

Both are measured in turn in one run, so that whatever else the machine does falls on both alike.
"""

import io
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.forward import ExampleInputs, call, device_of, evaluating, tensors_in

_FEWEST, _MOST = 5, 500  # rounds at one batch size, whatever the time budget


@dataclass(frozen=True)
class Spread:
    """The median of a measurement, and where 20 % and 80 % of its values lie."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """One forward pass of both models at one batch size.

    Attributes:
        batch: number of inputs.
        before: seconds of the original.
        after: seconds of the compressed model.
        speedup: the ratio of the two, by rounds; above 1 the compressed model is the faster one.
        rounds: how many times each ran.
    """

    batch: int
    before: Spread
    after: Spread
    speedup: Spread
    rounds: int

    @property
    def throughput(self) -> tuple[float, float]:
        """Inputs per second of the original and of the compressed model, at their median latencies."""
        return self.batch / self.before.median, self.batch / self.after.median


@dataclass(frozen=True)
class Accuracy:
    """Right answers on a data set.

    Attributes:
        labels: how many there were.
        before: share of them that the original gets right.
        after: share of them that the compressed model gets right.
        agreement: share for which both give the same answer, right or wrong.
    """

    labels: int
    before: float
    after: float
    agreement: float

    @property
    def deviations(self) -> tuple[float, float]:
        """Standard deviations of both shares that so many labels leave open."""
        before, after = (math.sqrt(share * (1 - share) / self.labels) for share in (self.before, self.after))
        return before, after


class _Counter(io.RawIOBase):
    """A file that only counts what is written to it."""

    def __init__(self) -> None:
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        self.bytes += size
        return size


def bytes_on_disk(model: nn.Module) -> int:
    """How large a file `torch.save(model.state_dict(), ...)` writes; nothing is written."""
    counter = _Counter()
    torch.save(model.state_dict(), counter)  # pyright: ignore[reportArgumentType]
    return counter.bytes


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batch_of(example_inputs: ExampleInputs, size: int) -> ExampleInputs:
    """The example inputs repeated, or cut, to another batch size.

    Args:
        example_inputs: the first tensor with dimensions says how large their batch is; every tensor whose first
            dimension is as large follows.
        size: of the batch wanted.

    Raises:
        ValueError: no tensor among them has a dimension, or the batch is empty.
    """
    found = next(
        (value for value in pytree.tree_leaves(example_inputs) if isinstance(value, Tensor) and value.ndim), None
    )
    if found is None or not len(found):
        raise ValueError("the example inputs hold no tensor [batch, ...] with a batch to repeat")
    old = len(found)

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or len(value) != old:
            return value
        return value.repeat(math.ceil(size / old), *[1] * (value.ndim - 1))[:size]

    return pytree.tree_map(resized, example_inputs)


def timings(
    model: nn.Module, small: nn.Module, example_inputs: ExampleInputs, batch_sizes: Sequence[int], seconds: float
) -> tuple[list[Timing], list[str]]:
    """Time forward passes of both models in turn, in eval mode, after warming up.

    Args:
        model: the original; its mode is put back.
        small: the compressed model; its mode is put back.
        example_inputs: repeated along the batch.
        batch_sizes: numbers of inputs in a pass.
        seconds: how long to measure, in all; every batch size gets an equal share, but five rounds at least.

    Returns:
        What was measured, and a line for each batch size at which the models do not run.
    """
    measured, failed = [], []
    with evaluating(model, fused=True), evaluating(small, fused=True):
        for size in batch_sizes:
            try:
                measured.append(_timing(model, small, batch_of(example_inputs, size), size, seconds / len(batch_sizes)))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:  # out of memory, or a fixed batch size
                reason = (str(error).splitlines() or [""])[0]
                failed.append(f"not timed at batch {size:,}: {type(error).__name__}: {reason}")
    return measured, failed


def _timing(model: nn.Module, small: nn.Module, inputs: ExampleInputs, size: int, seconds: float) -> Timing:
    device = device_of(model)

    def timed(network: nn.Module) -> float:
        synchronise(device)
        start = time.perf_counter()
        call(network, inputs)
        synchronise(device)
        return time.perf_counter() - start

    # Not in inference mode: tables that a model makes for itself in its first pass must stay usable in training.
    warm = timed(model) + timed(small)
    taken: list[tuple[float, float]] = []
    with torch.inference_mode():
        if warm < seconds:
            warm = timed(model) + timed(small)
        stop = time.perf_counter() + max(seconds - warm, 0.0)
        while len(taken) < _FEWEST or (time.perf_counter() < stop and len(taken) < _MOST):
            if len(taken) % 2:  # neither always comes second
                after, before = timed(small), timed(model)
            else:
                before, after = timed(model), timed(small)
            taken.append((before, after))
    before, after = np.array(taken).T
    return Timing(size, spread(before), spread(after), spread(before / after), len(taken))


def spread(values: np.ndarray) -> Spread:
    """The median of values [n], and where 20 % and 80 % of them lie."""
    low, median, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return Spread(median, low, high)


def accuracy(model: nn.Module, small: nn.Module, data: Iterable[Any]) -> Accuracy:
    """How often both models' largest output is that of the right class.

    Args:
        model: the original; its mode is put back.
        small: the compressed model; its mode is put back.
        data: batches (inputs, labels): class numbers, int [batch] for outputs [batch, classes], or with positions
            behind: [batch, ...] for [batch, classes, ...]. Inputs are what the models are called with.

    Raises:
        TypeError: a batch is no such pair.
        ValueError: there is no batch, or no output fits the labels.
    """
    count, right_before, right_after, same = 0, 0, 0, 0
    device = device_of(model)
    with evaluating(model, fused=True), evaluating(small, fused=True):
        for number, batch in enumerate(data):
            pair = isinstance(batch, tuple | list) and len(batch) == 2
            if not pair or not isinstance(batch[1], Tensor) or batch[1].is_floating_point():
                raise TypeError(
                    f"batch {number} of the data is {_kind(batch)}, expected a pair (inputs, labels) with integer "
                    "labels"
                )
            inputs, labels = pytree.tree_map(
                lambda value: value.to(device) if isinstance(value, Tensor) else value, batch
            )
            before, after = (_classes(call(network, inputs), labels) for network in (model, small))
            count += labels.numel()
            right_before += int((before == labels).sum())
            right_after += int((after == labels).sum())
            same += int((before == after).sum())
    if not count:
        raise ValueError("the data has no labels, expected at least one batch; a generator can be used only once")
    return Accuracy(count, right_before / count, right_after / count, same / count)


def _classes(output: Any, labels: Tensor) -> Tensor:
    """The classes that an output names: the first tensor in it that has one score a class for every label."""
    shapes = []
    for scores in tensors_in(output):
        if scores.ndim > 1 and scores.shape[:1] + scores.shape[2:] == labels.shape:
            return scores.argmax(1)
        shapes.append(tuple(scores.shape))
    raise ValueError(
        f"the outputs are {', '.join(map(str, shapes)) or 'no tensors'} and the labels {tuple(labels.shape)}, expected "
        "scores [batch, classes, ...] for labels [batch, ...]"
    )


def _kind(batch: object) -> str:
    name = type(batch).__name__
    if not isinstance(batch, tuple | list):
        return name
    parts = [str(v.dtype).removeprefix("torch.") if isinstance(v, Tensor) else type(v).__name__ for v in batch]
    return f"{name} of {', '.join(parts)}"
