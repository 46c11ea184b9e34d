"""Networks given as layers and a function of them."""

from collections.abc import Callable
from typing import Any

from plans import prepared
from torch import Tensor, nn

from nac_gpu.testing import merge_copies, randomise


class Functional(nn.Module):
    """Layers by name, and a forward pass that gets this module and the inputs."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any) -> Tensor:
        """As the function says."""
        return self._forward(self, *inputs)


def around(between: Callable[..., Tensor], made: int = 8, read: int | None = None) -> nn.Module:
    """Two linear layers, and a function of what the first makes, [..., made]; more inputs are handed on to it."""

    def forward(model: Any, x: Tensor, *more: Tensor) -> Tensor:
        return model.read(between(model.make(x), *more))

    return Functional(forward, make=nn.Linear(6, made), read=nn.Linear(read or made, 3))


def widths(model: nn.Module, inputs: Any) -> dict[str, int]:
    """The widths of a plan for half of all neurons, whose copies merge without changing the outputs."""
    plan = prepared(randomise(model).eval(), inputs)
    found = merge_copies(plan.model, inputs, plan.choices)
    assert found.error < 1e-8
    assert not found.vacuous
    return dict(plan.plan.widths)


def left_alone(model: nn.Module, inputs: Any) -> str:
    """Why nothing of a model can be compressed."""
    try:
        found = prepared(randomise(model).eval(), inputs).plan.widths
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{found} was compressed, expected nothing")
