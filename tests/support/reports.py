"""A network whose report is looked at."""

from typing import Any

import torch
from networks import images, randomised
from torch import Tensor, nn

import nac_gpu as nac

QUICK: dict[str, Any] = {"timed": {1: 0.01, 3: 0.01}}


class Cnn(nn.Module):
    """A small network for images whose layers are called what nobody should call them."""

    def __init__(self) -> None:
        super().__init__()
        names = ["first", "norm", "act", "<b>\"$x_1$&'</b>", "more", "pool", "flat", "head"]
        layers = [
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 8, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ]
        self.layers = nn.Sequential()
        for name, layer in zip(names, layers, strict=True):
            self.layers.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def labelled(*counts: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator)) for n in counts]


def made_report() -> tuple[nn.Module, nn.Module, Tensor, nac.Plan, nac.Report]:
    """A model, what it became, example inputs, the plan and the report."""
    torch.manual_seed(0)
    model, x = randomised(Cnn()).eval(), images(2, 3, 8, 8)
    calibration = [images(64, 3, 8, 8)]
    plan = nac.plan(model, x, width=0.5)
    small = nac.compress(model, x, plan, calibration=calibration)
    found = nac.report(model, small, x, plan=plan, calibration=calibration, data=labelled(30, 20), **QUICK)
    return model, small, x, plan, found
