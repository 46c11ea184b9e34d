"""Observes the inputs of layers during a forward pass."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.network.ambient import cut_short
from nac_gpu.network.running import ExampleInputs, call


class EnoughError(BaseException):
    """All requested calls were observed, so the rest of the pass is skipped; the model's code must not catch it."""


@dataclass
class Watched:
    """How many of the requested calls are still missing."""

    missing: int


@contextlib.contextmanager
def watching(
    modules: Mapping[str, nn.Module], calls: Mapping[str, int], take: Callable[[str, Tensor], None]
) -> Iterator[Watched]:
    """Pass the inputs of layers to a function, until all requested calls were seen; what runs in here is then ended.

    Args:
        modules: of the network, by name.
        calls: how many times each layer is called, by its name.
        take: see `look`.
    """
    watched = Watched(sum(calls.values()))

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            # what a model computes in inference mode could not be added up outside of it
            with torch.inference_mode(False), torch.no_grad():
                take(name, inputs[0] if inputs else next(iter(keywords.values())))
            watched.missing -= 1
            if not watched.missing:
                raise EnoughError

        return modules[name].register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [watch(name) for name in calls]
    try:
        with cut_short():
            yield watched
    except EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def look(model: nn.Module, batch: ExampleInputs, calls: Mapping[str, int], take: Callable[[str, Tensor], None]) -> None:
    """Pass the inputs of layers to a function during a forward pass, which stops after the last requested call.

    Args:
        model: in eval mode, without gradients (see `evaluating`).
        batch: its inputs.
        calls: how many times each layer is called, by its name.
        take: is called with a layer's name and its input, which it must copy to keep: later operations may change it.
    """
    with watching(dict(model.named_modules()), calls, take):
        call(model, batch)


def captured(model: nn.Module, batch: ExampleInputs, calls: Mapping[str, int]) -> dict[str, list[Tensor]]:
    """Copies of the inputs of layers, by layer name, one for each call: see `look`."""
    seen: dict[str, list[Tensor]] = {name: [] for name in calls}
    look(model, batch, calls, lambda name, value: seen[name].append(value.clone()))
    return seen


def count_calls(model: nn.Module, batch: ExampleInputs, layers: Iterable[str]) -> dict[str, int]:
    """How many times each of these layers is called in a forward pass; layers that are not called are omitted."""
    counts = dict.fromkeys(layers, 0)

    def take(name: str, _: Tensor) -> None:
        counts[name] += 1

    look(model, batch, dict.fromkeys(counts, 1 << 30), take)
    return {name: count for name, count in counts.items() if count}
