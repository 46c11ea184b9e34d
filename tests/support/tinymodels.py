"""Networks that tests name on the command line: `tinymodels:small`."""

import torch
from torch import nn


def small() -> nn.Sequential:
    """For images 3 x 16 x 16, 2 classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 2))


def number() -> int:
    """Not a network."""
    return 3
