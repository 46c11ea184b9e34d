"""Calibration data as batches of inputs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

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


Calibration = Iterable[Any] | Literal["dream", "none"]
