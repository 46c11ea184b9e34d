"""The training objective: the loss on targets, distillation from a teacher, or a weighted sum of both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nac_gpu.network.running import call


@dataclass(frozen=True)
class Objective:
    """The training objective.

    Attributes:
        loss: function of outputs and targets, or None for the default.
        teacher: or None.
        share: the teacher's share of the loss.
        temperature: divides the logits of both networks for distillation.
    """

    loss: Callable[[Any, Any], Tensor] | None
    teacher: nn.Module | None
    share: float
    temperature: float

    def __call__(self, outputs: Any, inputs: Any, targets: Any) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            outputs: of the model.
            inputs: of the model and of the teacher.
            targets: or None without targets.

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


def _own_loss(outputs: Any) -> Tensor | None:
    found = getattr(outputs, "loss", None)
    return found if isinstance(found, Tensor) else None


def _logits(outputs: Any) -> Tensor:
    """The logits, with classes in the last dimension: the output, its `logits`, or the first of several outputs."""
    for found in (outputs, getattr(outputs, "logits", None)):
        if isinstance(found, Tensor):
            return found
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]
    if isinstance(outputs, list | tuple) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise TypeError(
        f"the model returns {type(outputs).__name__}, expected a tensor or an output with logits; give loss="
    )


def _divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    if logits.shape != wanted.shape:
        raise ValueError(
            f"the teacher's outputs have the shape {tuple(wanted.shape)}, expected that of the model's, "
            f"{tuple(logits.shape)}"
        )
    dim = 1 if logits.ndim > 3 else -1  # [batch, classes, height, width] has classes in dim 1, all else in the last
    found, target = (F.log_softmax(x.float() / temperature, dim) for x in (logits, wanted))
    return temperature**2 * F.kl_div(found, target, reduction="none", log_target=True).sum(dim).mean()
