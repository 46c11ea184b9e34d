"""Several values of each channel, one for each path, that are weighted, normalised and summed over the paths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional import Functional, left_alone, widths
from torch import Tensor, nn

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class SelectiveKernels(nn.Module):
    """Two convolutions, weighted channel by channel by what both give (SKNet, ResNeSt)."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weigh = weigh
        self.small, self.large = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.reduce, self.select = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1)
        self.read = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        paths = torch.stack([self.small(x), self.large(x)], 1)
        told = self.select(self.reduce(paths.sum(1).mean((2, 3), keepdim=True)).relu())
        return self.read((paths * self.weigh(told.unflatten(1, (2, -1)))).sum(1))


@pytest.mark.parametrize("weigh", [lambda w: w.softmax(1), torch.sigmoid], ids=["softmax", "sigmoid"])
def test_paths_that_are_weighted_and_summed(weigh: Callable[[Tensor], Tensor]) -> None:
    assert widths(SelectiveKernels(weigh).eval(), IMAGES) == {"small": 4, "reduce": 2}


def paths(combine: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Channels in two paths, [batch, path, channel, ...], of which a function makes [batch, channel, ...]."""

    def forward(model: Any, x: Tensor) -> Tensor:
        return model.read(combine(model, model.make(x).unflatten(1, (2, -1))))

    return Functional(forward, make=nn.Conv2d(3, 16, 1), read=nn.Conv2d(8, 5, 1)).eval()


@pytest.mark.parametrize(
    "combine",
    [
        lambda _, y: y.sum(1),
        lambda _, y: y.amax(1),
        lambda _, y: y.softmax(1)[:, 0],
        lambda _, y: (y / y.norm(dim=1, keepdim=True)).mean(1),
        lambda _, y: torch.fft.rfft(y, dim=1).abs().sum(1),
        lambda _, y: (y.cumsum(1) * y.amin(1, keepdim=True)).std(1),
    ],
    ids=["sum", "max", "softmax", "norm", "fourier", "cumulated"],
)
def test_channels_merge_alike_in_all_paths(combine: Callable[[Any, Tensor], Tensor]) -> None:
    assert widths(paths(combine), IMAGES) == {"make": 4}


def test_channels_of_two_paths_times_channels_of_one() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.read((model.make(x).unflatten(1, (2, -1)) * model.scale(x)[:, None]).sum(1))

    model = Functional(forward, make=nn.Conv2d(3, 16, 1), scale=nn.Conv2d(3, 8, 1), read=nn.Conv2d(8, 5, 1)).eval()
    assert widths(model, IMAGES) == {"make": 4}


def test_sums_over_channels_keep_them_apart() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.read(model.make(x).unflatten(1, (2, -1)).sum(2))

    model = Functional(forward, make=nn.Conv2d(3, 16, 1), read=nn.Conv2d(2, 5, 1)).eval()
    assert "make (2): the smaller network does not run" in left_alone(model, IMAGES)  # the paths, as two units
