"""What training minimises: the loss of the targets, the distance from a teacher, or a share of each."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nac_gpu.activations import floating
from nac_gpu.forward import call


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        loss: of outputs and targets, or None for the default.
        teacher: or None.
        share: of the loss that is the teacher's.
        temperature: of both networks' class probabilities.
    """

    loss: Callable[[Any, Any], Tensor] | None
    teacher: nn.Module | None
    share: float
    temperature: float

    def __call__(self, outputs: Any, inputs: Any, targets: Any) -> Tensor:
        """A scalar.

        Args:
            outputs: of the model.
            inputs: of the model and of the teacher.
            targets: or None where there are none.

        Raises:
            TypeError: neither targets nor a teacher, or outputs without logits.
            ValueError: the teacher's outputs have another shape.
        """
        if self.teacher is None:
            if targets is None and self.loss is None and _own_loss(outputs) is None:
                raise TypeError("a batch has no targets, expected (inputs, targets) pairs, or teacher=")
            return self._of_targets(outputs, targets)
        with torch.no_grad():
            wanted = _logits(call(self.teacher, inputs))
        parts = []
        if self.share < 1 and targets is not None:
            parts.append((1 - self.share) * self._of_targets(outputs, targets))
        share = self.share if parts else 1.0
        return sum(parts, share * _divergence(_logits(outputs), wanted, self.temperature))

    def _of_targets(self, outputs: Any, targets: Any) -> Tensor:
        if self.loss is not None:
            return self.loss(outputs, targets)
        own = _own_loss(outputs)
        return F.cross_entropy(_logits(outputs).float(), targets) if own is None else own


def change(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor | None:
    """How much outputs changed: the squared difference as a share of the variance, the mean over the outputs.

    The host does not wait for the device.

    Args:
        found: the outputs; those that are not floating, have another shape than expected, or should not vary, do not
            count.
        expected: what they were.

    Returns:
        A scalar: -1, without a gradient, where all outputs that could count should be zero; None if there are none.
    """
    if len(found) != len(expected):
        return None
    shares, counts = [], []
    for now, then in zip(found, expected, strict=True):
        if now.shape == then.shape and now.is_floating_point() and now.numel():
            now, then = floating(now), floating(then)
            whole = (then - then.mean(0)).square().mean()
            whole = torch.where(whole == 0, then.square().mean(), whole)
            some = whole > 0
            shares.append(torch.where(some, (now - then).square().mean() / torch.where(some, whole, 1), 0))
            counts.append(some)
    if not shares:
        return None
    count = torch.stack(counts).sum()
    return torch.where(count > 0, torch.stack(shares).sum() / count.clamp(min=1), -1)


def mean_change(changes: Iterable[Tensor | None]) -> float | None:
    """The mean of those that are known; None if there are none, or it is not finite."""
    shares = [float(share) for share in changes if share is not None]
    known = [share for share in shares if share != -1]
    mean = sum(known) / len(known) if known else None
    return mean if mean is not None and math.isfinite(mean) else None


def _own_loss(outputs: Any) -> Tensor | None:
    found = getattr(outputs, "loss", None)
    return found if isinstance(found, Tensor) else None


def _logits(outputs: Any) -> Tensor:
    """Scores of the classes, in the last dimension: the output, its `logits`, or the first of several outputs."""
    for found in (outputs, getattr(outputs, "logits", None)):
        if isinstance(found, Tensor):
            return found
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]
    if isinstance(outputs, list | tuple) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise TypeError(f"the model gives {type(outputs).__name__}, expected a tensor or something with logits; give loss=")


def _divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    if logits.shape != wanted.shape:
        raise ValueError(
            f"the teacher's outputs have the shape {tuple(wanted.shape)}, expected that of the model's, "
            f"{tuple(logits.shape)}"
        )
    dim = 1 if logits.ndim > 3 else -1  # of images of scores, and of sequences
    found, target = (F.log_softmax(x.float() / temperature, dim) for x in (logits, wanted))
    return temperature**2 * F.kl_div(found, target, reduction="none", log_target=True).sum(dim).mean()
