"""Times forward passes of two networks.

The two are timed alternately, so that other load on the machine affects both equally.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.network.running import ExampleInputs, call_on, device_of, evaluating, own_inputs

_FEWEST, _MOST = 5, 500  # limits of the number of rounds at one batch size, independent of the time budget


@dataclass(frozen=True)
class Spread:
    """The median of a measurement, and its 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """The time of one forward pass of both models at one batch size.

    Attributes:
        batch: number of inputs.
        before: seconds of the original.
        after: seconds of the compressed model.
        speedup: `before / after`, computed for each round; above 1 the compressed model is faster.
        rounds: how many times each model ran.
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


def synchronise(device: torch.device) -> None:
    """Wait until a CUDA device has finished all queued work; does nothing for other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batch_of(example_inputs: ExampleInputs, size: int) -> ExampleInputs:
    """The example inputs repeated or truncated to another batch size.

    Args:
        example_inputs: their batch size is the first dimension of the first tensor that has dimensions. Every tensor
            with the same first dimension is resized.
        size: the new batch size.

    Raises:
        ValueError: no tensor has a dimension, or the batch is empty.
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
    model: nn.Module, small: nn.Module, example_inputs: ExampleInputs, timed: Mapping[int, float]
) -> tuple[list[Timing], list[str]]:
    """Time forward passes of both models alternately, in eval mode, after a warm-up.

    Args:
        model: the original; its mode is restored.
        small: the compressed model; its mode is restored.
        example_inputs: repeated or truncated to each batch size.
        timed: seconds to measure for, by batch size; at least five rounds are measured.

    Returns:
        The measurements, and a line of text for each batch size at which the models do not run.
    """
    measured, failed = [], []
    for size, seconds in timed.items():
        try:
            taken = seconds_in_turn(model, small, batch_of(example_inputs, size), seconds)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # out of memory, or a fixed batch size
            reason = (str(error).splitlines() or [""])[0]
            failed.append(f"not timed at batch {size:,}: {type(error).__name__}: {reason}")
            continue
        before, after = taken
        measured.append(Timing(size, spread(before), spread(after), spread(before / after), len(before)))
    return measured, failed


def seconds_in_turn(
    model: nn.Module, small: nn.Module, example_inputs: ExampleInputs, seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of every forward pass of both models, run alternately in eval mode: float64 [rounds] each.

    Args:
        model: one model; its mode is restored.
        small: the other; its mode is restored.
        example_inputs: the inputs of both.
        seconds: how long to measure, including the warm-up; at least five rounds are measured.
    """
    device, inputs = device_of(model), own_inputs(example_inputs)

    def timed(network: nn.Module) -> float:
        synchronise(device)
        start = time.perf_counter()
        call_on(network, inputs)
        synchronise(device)
        return time.perf_counter() - start

    taken: list[tuple[float, float]] = []
    with evaluating(model, fused=True), evaluating(small, fused=True):
        # Not in inference mode: tensors that a model caches in its first pass must stay usable in training.
        warm = timed(model) + timed(small)
        with torch.inference_mode():
            if warm < seconds:
                warm = timed(model) + timed(small)
            stop = time.perf_counter() + max(seconds - warm, 0.0)
            while len(taken) < _FEWEST or (time.perf_counter() < stop and len(taken) < _MOST):
                if len(taken) % 2:  # swap the order each round, so that neither model always runs second
                    after, before = timed(small), timed(model)
                else:
                    before, after = timed(model), timed(small)
                taken.append((before, after))
    before, after = np.array(taken).T
    return before, after


def spread(values: np.ndarray) -> Spread:
    """The median of values [n], and their 20 % and 80 % quantiles."""
    low, median, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return Spread(median, low, high)
