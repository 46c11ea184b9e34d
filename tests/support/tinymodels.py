"""Networks that tests name on the command line: `tinymodels:small`."""

import torch
from torch import nn


def small() -> nn.Sequential:
    """For images 3 x 16 x 16, 2 classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 2))


def broken() -> nn.Module:
    """A function of a user that fails, with a message of two lines."""
    raise KeyError("one\ntwo")


class Failing(nn.Module):
    """A network whose code fails when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * {}["missing"]


class Huge(nn.Module):
    """A network that asks for more memory than any machine has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1 << 50))


def number() -> int:
    """Not a network."""
    return 3
