"""What calibration inputs show of a transformer: moments of what its layers read, and how much its layers do."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.language_blocks import layers_of
from common.language_data import Batch

_CALLED = {"use_cache": False}  # nothing is generated


class _EnoughError(Exception):
    """What was to be seen has been seen: the rest of the pass is not needed."""


@dataclass
class Moments:
    """Of the channels that a linear layer reads: over all tokens that are not padding, in float64.

    Attributes:
        count: tokens.
        total: sums, [channels].
        squares: sums of squares, [channels].
    """

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, read: Tensor) -> None:
        """Add tokens, [tokens, channels]."""
        read = read.double()
        self.count += len(read)
        self.total = self.total + read.sum(0)
        self.squares = self.squares + read.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """Means."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Variances."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0)


@dataclass
class Observed:
    """What one pass of the calibration inputs through a model shows.

    Attributes:
        moments: of what linear layers read, by their names.
        change: by layer, the mean over tokens of 1 - cosine of what goes into it and what comes out.
    """

    moments: dict[str, Moments]
    change: list[float]


def padding(batch: Batch) -> Tensor:
    """Which tokens of a batch are not padding, [rows, length]."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def body(model: nn.Module) -> nn.Module:
    """The model without its head, which predicts tokens and is not looked at."""
    inner = getattr(model, "base_model", model)
    return inner if isinstance(inner, nn.Module) else model


def hidden_of(output: Any) -> Tensor:
    """The hidden states in the output of a layer."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def observe(model: nn.Module, batches: Sequence[Batch], readers: Sequence[str]) -> Observed:
    """Run the calibration inputs through a model.

    Args:
        model: not changed.
        batches: the calibration inputs.
        readers: names of the linear layers whose inputs are looked at.
    """
    found = {name: Moments() for name in readers}
    layers, now = layers_of(model), [torch.ones(0)]
    change = torch.zeros(len(layers), dtype=torch.float64)

    def look(moments: Moments) -> Callable[..., None]:
        return lambda _, inputs: moments.add(inputs[0][now[0]])

    def compare(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = (args[0] if args else kwargs["hidden_states"])[now[0]]
            change[number] += (1 - functional.cosine_similarity(before, hidden_of(output)[now[0]], dim=-1)).sum()

        return hook

    with contextlib.ExitStack() as stack:
        for name, moments in found.items():
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(look(moments)))
        for number, layer in enumerate(layers):
            stack.enter_context(layer.register_forward_hook(compare(number), with_kwargs=True))
        tokens = 0
        for batch in batches:
            now[0] = padding(batch)
            tokens += int(now[0].sum())
            body(model)(**batch, **_CALLED)
    return Observed(found, [float(value) / tokens for value in change])


class Walk:
    """The calibration inputs on their way through a model, one layer after another.

    So a layer can be changed before what comes out of it goes into the next one.

    Attributes:
        masks: by batch, which tokens are not padding.
        hidden: by batch, what goes into the layer that comes next.
        kwargs: by batch, what else all layers are called with.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Run the model up to its first layer."""
        self.masks = [padding(batch) for batch in batches]
        self.hidden: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []
        self._rest: list[tuple[Any, ...]] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            self.hidden.append(args[0] if args else kwargs.pop("hidden_states"))
            self._rest.append(args[1:])
            self.kwargs.append(kwargs)
            raise _EnoughError

        with layers_of(model)[0].register_forward_pre_hook(catch, with_kwargs=True):
            for batch in batches:
                with contextlib.suppress(_EnoughError):
                    body(model)(**batch, **_CALLED)

    def _run(self, layer: nn.Module, number: int) -> Tensor:
        return hidden_of(layer(self.hidden[number], *self._rest[number], **self.kwargs[number]))

    @torch.no_grad()
    def read(self, layer: nn.Module, reader: nn.Module) -> Iterator[Tensor]:
        """What a linear layer within the next layer reads, [tokens, channels], batch by batch."""
        seen: list[Tensor] = []

        def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0])
            raise _EnoughError

        for number, mask in enumerate(self.masks):
            with reader.register_forward_pre_hook(look), contextlib.suppress(_EnoughError):
                self._run(layer, number)
            yield seen.pop()[mask]

    @torch.no_grad()
    def step(self, layer: nn.Module) -> None:
        """Go through the next layer."""
        self.hidden = [self._run(layer, number) for number in range(len(self.hidden))]


@torch.no_grad()
def covariance(reads: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean, [channels], and the covariance, [channels, channels], of tokens: products in float32, then float64."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for read in reads:
        count += len(read)
        total = total + read.double().sum(0)
        products = products + (read.T @ read).double()
    mean = total / count
    return mean, products / count - torch.outer(mean, mean)
