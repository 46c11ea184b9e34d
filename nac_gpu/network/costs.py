"""What the size of a model is, and what counts the operations of a forward pass."""

from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode


class _NoTracker:
    """Replaces the module tracker of `FlopCounterMode`, which fails on views of parameters without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flop_counter() -> FlopCounterMode:
    """A context that counts floating point operations in total, without a count for each module."""
    counter = FlopCounterMode(display=False)
    vars(counter)["mod_tracker"] = _NoTracker()
    return counter


@dataclass(frozen=True)
class Cost:
    """The size of a model, as `cost` returns it.

    Attributes:
        parameters: number of learnt values; tied ones count once.
        flops: floating point operations of one forward pass on the example inputs: those of matrix products and
            convolutions, 2 per multiply-add, as `torch.utils.flop_counter` counts them.
    """

    parameters: int
    flops: int
