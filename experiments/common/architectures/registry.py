"""Where the networks of this package are entered."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Builder = TypeVar("Builder", bound=Callable[[], nn.Module])


class Architecture(NamedTuple):
    """How to build a network and its example inputs."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]


ARCHITECTURES: dict[str, Architecture] = {}


def architecture(name: str, inputs: Callable[[], Any]) -> Callable[[Builder], Builder]:
    """Enter a module class, or a function that builds a module."""

    def enter(build: Builder) -> Builder:
        assert name not in ARCHITECTURES, name
        ARCHITECTURES[name] = Architecture(build, inputs)
        return build

    return enter


def floats(*shape: int, seed: int = 1) -> Callable[[], Tensor]:
    """Random numbers of a shape."""
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, vocabulary: int = 31) -> Callable[[], Tensor]:
    """Random token numbers."""
    return lambda: torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


def several(*builders: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Several positional arguments."""
    return lambda: tuple(build() for build in builders)
