"""Measuring both models: bytes on disk and accuracy."""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.network.moving import to_device
from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import call, device_of, evaluating


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of both models on a data set.

    Attributes:
        labels: number of labels.
        before: accuracy of the original, 0 to 1.
        after: accuracy of the compressed model, 0 to 1.
        agreement: share of labels for which both models predict the same class, right or wrong.
    """

    labels: int
    before: float
    after: float
    agreement: float

    @property
    def deviations(self) -> tuple[float, float]:
        """Standard errors of both accuracies for this number of labels."""
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
    """The size of the file that `torch.save(model.state_dict(), ...)` would write; nothing is written."""
    counter = _Counter()
    torch.save(model.state_dict(), counter)  # pyright: ignore[reportArgumentType]
    return counter.bytes


def accuracy(model: nn.Module, small: nn.Module, data: Iterable[Any]) -> Accuracy:
    """Top-1 accuracy of both models.

    Args:
        model: the original; its mode is restored.
        small: the compressed model; its mode is restored.
        data: batches (inputs, labels) with inputs as the models take them. Labels are class numbers, int [batch] for
            outputs [batch, classes], or [batch, ...] for outputs [batch, classes, ...].

    Raises:
        TypeError: a batch is not such a pair.
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
            inputs, labels = to_device(batch, device)
            before, after = (_classes(call(network, inputs), labels) for network in (model, small))
            count += labels.numel()
            right_before += int((before == labels).sum())
            right_after += int((after == labels).sum())
            same += int((before == after).sum())
    if not count:
        raise ValueError("the data has no labels, expected at least one batch; a generator can be used only once")
    return Accuracy(count, right_before / count, right_after / count, same / count)


def _classes(output: Any, labels: Tensor) -> Tensor:
    """The predicted classes: argmax of the first output that has a score of each class for every label."""
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
