"""Records a recurrent layer on a few of its time steps, because all steps do the same with their channels.

One step of an LSTM is more than ten operations; a sentence or a second of sound would be many thousands.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from nac_gpu.tracing.atoms import Labels, varying

STEPS = 3  # the first, the last, and one with a step before and after it: layers may run in both directions
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class FewSteps(TorchFunctionMode):
    """A context in which recurrent layers run on `STEPS` steps, while their outputs have all steps.

    Packed sequences, and inputs that have other channels at each step, run as they are.

    Attributes:
        flops: those of the steps that were left out. FLOPs are in proportion to the number of steps.

    Args:
        labels_of: returns the labels of a tensor.
        put: stores the labels of a tensor.
        values: compute the values of all steps, without a record.
        total: returns the FLOPs that were counted so far.
        operations: FLOPs by the name of the parameter that they multiply with; those of all steps are added.
    """

    def __init__(
        self,
        labels_of: Callable[[Tensor], Labels],
        put: Callable[[Tensor, Labels], None],
        *,
        values: bool,
        total: Callable[[], int],
        operations: dict[str, int],
    ) -> None:
        super().__init__()
        self.flops = 0
        self._labels_of, self._put, self._values = labels_of, put, values
        self._total, self._operations = total, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RECURRENT or kwargs or not isinstance(args[3], bool):  # the fourth of packed ones are weights
            return func(*args, **(kwargs or {}))
        inputs, time = args[0], 1 if args[-1] else 0
        steps = inputs.shape[time]
        if steps <= STEPS or self._varies(inputs, time):
            return func(*args)
        flops, operations = self._total(), dict(self._operations)
        found = func(inputs.narrow(time, 0, STEPS), *args[1:])
        self.flops += (self._total() - flops) * (steps - STEPS) // STEPS
        for name, now in self._operations.items():
            self._operations[name] += (now - operations.get(name, 0)) * (steps - STEPS) // STEPS
        with _disable_current_modes():
            of = torch.ones(steps, dtype=torch.int64, device=inputs.device)
            of[0], of[-1] = 0, STEPS - 1
        found = (found[0].index_select(time, of), *found[1:])
        labels = [replace(self._labels_of(tensor), repeats=None) for tensor in found]
        if self._values:
            with _disable_current_modes():
                found = func(*args)
        for tensor, own in zip(found, labels, strict=True):
            self._put(tensor, own)
        return found

    def _varies(self, inputs: Tensor, time: int) -> bool:
        """Whether a sequence has other channels at each step."""
        labels = self._labels_of(inputs)
        return any(time in varying(plane) for plane in (*labels.planes, *labels.latent))
