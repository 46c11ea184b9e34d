"""Images made by a linear layer: a channel is a block of its rows, one for each pixel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional import Functional, left_alone, widths
from torch import Tensor, nn

from nac_gpu.tracing.trace import record


def decoder(norm: nn.Module, read: nn.Module, *sizes: int) -> nn.Module:
    """A linear layer, an image of eight channels, a layer for it, and one that reads it."""

    def forward(model: Any, z: Tensor) -> Tensor:
        return model.read(model.norm(model.make(z).view(len(z), -1, *sizes)))

    made = 8 * torch.Size(sizes).numel()
    return Functional(forward, make=nn.Linear(6, made), norm=norm, read=read)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "norm",
    [
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
        nn.PReLU(8),
        nn.InstanceNorm2d(8, affine=True),
        nn.Upsample(scale_factor=2),
        nn.ZeroPad2d(1),
        nn.ReflectionPad2d(1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
    ],
    ids=["norm", "slopes", "instance", "upsample", "pad", "reflect", "depthwise"],
)
def test_a_channel_of_an_image_is_a_block_of_rows(norm: nn.Module, batch: int) -> None:
    model = decoder(norm, nn.ConvTranspose2d(8, 5, 2, 2), 3, 3)
    assert widths(model, torch.randn(batch, 6)) == {"make": 4}
    (group,) = record(model, torch.randn(batch, 6)).groups
    members = {(m.tensor, m.dim): m.index.shape for m in group.members}
    assert members["make.weight", 0] == (8, 9)
    assert members["read.weight", 0] == (8, 1)


def test_groups_of_normalised_channels_are_units_of_them() -> None:
    assert widths(decoder(nn.GroupNorm(4, 8), nn.Conv2d(8, 5, 1), 3, 3), torch.randn(2, 6)) == {"make": 2}


def test_channels_added_to_those_of_an_image_have_no_rows() -> None:
    model = decoder(nn.ConstantPad3d((1, 1, 1, 1, 0, 1), 1.0), nn.Conv2d(9, 5, 1), 3, 3)
    assert widths(model, torch.randn(2, 6)) == {"make": 4}
    read = next(m for m in record(model, torch.randn(2, 6)).groups[0].members if m.tensor == "read.weight")
    assert torch.equal(read.index, torch.arange(8)[:, None])


def test_lines_and_volumes() -> None:
    assert widths(decoder(nn.ReLU(), nn.Conv1d(8, 5, 3), 4), torch.randn(2, 6)) == {"make": 4}
    assert widths(decoder(nn.BatchNorm3d(8), nn.Conv3d(8, 5, 1), 2, 2, 2), torch.randn(2, 6)) == {"make": 4}


@pytest.mark.parametrize("sizes", [(8, 3, 3), (-1, 3, 3), torch.Size([8, 3, 3])])
def test_the_sizes_of_an_unflatten_follow(sizes: tuple[int, ...]) -> None:
    layers = [nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 72), nn.Unflatten(1, sizes), nn.BatchNorm2d(8)]
    model = nn.Sequential(*layers, nn.ConvTranspose2d(8, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 3, 1))
    assert widths(model, torch.randn(2, 6)) == {"0": 10, "2": 4, "5": 2}


class Generator(nn.Module):
    """The number of channels is kept by the module, and normalised before and after the view."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 8
        self.make, self.norm = nn.Linear(6, self.channels * 9, bias=False), nn.BatchNorm1d(self.channels * 9)
        self.image = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 3, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.image(self.norm(self.make(z)).view(-1, self.channels, 3, 3))


def test_a_number_of_channels_that_the_module_keeps() -> None:
    assert widths(Generator(), torch.randn(2, 6)) == {"make": 4, "image.2": 3}


def test_a_number_of_channels_written_into_the_code_is_told() -> None:
    def forward(model: Any, z: Tensor) -> Tensor:
        return model.read(model.make(z).view(-1, 8, 3, 3))

    model = Functional(forward, make=nn.Linear(6, 72), read=nn.Conv2d(8, 5, 1))
    assert "make (8): the smaller network does not run:" in left_alone(model, torch.randn(2, 6))


def channels_first(x: Tensor) -> Tensor:
    return x.view(len(x), 2, 2, -1, 3, 3).permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, 6, 6)


def channels_last(x: Tensor) -> Tensor:
    return x.view(len(x), 2, 2, 3, 3, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, 6, 6)


@pytest.mark.parametrize("unpatched", [channels_first, channels_last])
def test_patches_that_become_an_image(unpatched: Callable[[Tensor], Tensor]) -> None:
    """The decoder of a vision transformer."""

    def forward(model: Any, x: Tensor) -> Tensor:
        return model.read(unpatched(model.make(model.embed(x))))

    layers = {"embed": nn.Linear(6, 7), "make": nn.Linear(7, 72), "read": nn.Conv2d(8, 5, 3, padding=1)}
    assert widths(Functional(forward, **layers), torch.randn(2, 4, 6)) == {"embed": 4, "make": 4}


def test_rows_that_are_read_as_an_image_and_as_a_vector() -> None:
    def forward(model: Any, z: Tensor) -> Tensor:
        z = model.make(z)
        return model.image(z.view(len(z), -1, 3, 3)).flatten(1) + model.vector(z)

    layers = {"make": nn.Linear(6, 72), "image": nn.Conv2d(8, 5, 1), "vector": nn.Linear(72, 45)}
    assert widths(Functional(forward, **layers), torch.randn(2, 6)) == {"make": 4}
