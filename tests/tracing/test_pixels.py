"""Channels that become pixels, and pixels that become channels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional import Functional, widths
from torch import Tensor, nn
from torch.nn import functional as F

from nac_gpu.tracing.trace import record


def image(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("sizes", [(1, 3, 4, 4), (2, 3, 4, 4), (3, 4, 4)], ids=["one", "two", "unbatched"])
def test_blocks_of_channels_that_become_pixels_are_one_neuron(factor: int, sizes: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4 * factor**2, 1), nn.PixelShuffle(factor), nn.Conv2d(4, 5, 1))
    assert widths(model, image(*sizes)) == {"0": 2}
    member = next(m for m in record(model, image(*sizes)).groups[0].members if m.tensor == "0.weight")
    assert torch.equal(member.index, torch.arange(4 * factor**2).reshape(4, -1))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)], {"0": 2}),
        ([nn.Conv2d(3, 64, 1), nn.PixelShuffle(2), nn.PixelShuffle(2), nn.Conv2d(4, 5, 1)], {"0": 2}),
        ([nn.Conv2d(3, 8, 1), nn.PixelUnshuffle(2), nn.Conv2d(32, 5, 1)], {"0": 4}),
        (
            [nn.Conv2d(3, 8, 1), nn.PixelUnshuffle(2), nn.Conv2d(32, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 3, 1)],
            {"0": 4, "2": 2},
        ),
        ([nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 5, 1)], {"0": 2}),
        ([nn.Conv1d(12, 32, 1), nn.Fold((4, 4), 2, stride=2), nn.Conv2d(8, 5, 1)], {"0": 4}),
        ([nn.Conv2d(3, 8, 1), nn.Unfold(3, padding=1), nn.Conv1d(72, 5, 1)], {"0": 4}),
        ([nn.Conv2d(3, 8, 1), nn.Unfold(3, padding=1), nn.Fold((4, 4), 3, padding=1), nn.Conv2d(8, 5, 1)], {"0": 4}),
    ],
    ids=["norm", "twice", "unshuffle", "back", "channels", "fold", "unfold", "unfold_fold"],
)
def test_layers_that_move_channels_to_pixels_and_back(layers: list[nn.Module], expected: dict[str, int]) -> None:
    inputs = image(2, 12, 4) if isinstance(layers[0], nn.Conv1d) else image(2, 3, 4, 4)
    assert widths(nn.Sequential(*layers), inputs) == expected


def channels_first(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def channels_last(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * h, 2 * w)


def neighbours(x: Tensor) -> Tensor:
    """The means of the pixels around each pixel."""
    b, c, h, w = x.shape
    return F.unfold(x, 3, padding=1).view(b, c, 9, -1).mean(2).view(b, c, h, w)


@pytest.mark.parametrize("between", [channels_first, channels_last, neighbours])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_the_same_written_out(between: Callable[[Tensor], Tensor], norm: Callable[[int], nn.Module]) -> None:
    channels = 8 if between is neighbours else 4

    def forward(model: Any, x: Tensor) -> Tensor:
        return model.read(model.norm(between(model.make(x))))

    layers = {"make": nn.Conv2d(3, 4 * channels if channels == 4 else 8, 1), "norm": norm(channels)}
    model = Functional(forward, **layers, read=nn.Conv2d(channels, 5, 1))
    assert widths(model, image(2, 3, 4, 4)) == {"make": channels // 2}


def segment(model: Any, x: Tensor) -> Tensor:
    """Values that other layers computed are put back to where the maxima were."""
    x, places = F.max_pool2d(model.make(x), 2, return_indices=True)
    return model.read(F.max_unpool2d(model.middle(x).relu(), places, [2, 2]))


def test_unpooling_puts_each_channel_back_to_its_own_places() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.read(model.back(*model.pool(x)))

    pool = nn.Sequential(nn.Conv1d(3, 8, 1), nn.MaxPool1d(2, return_indices=True))
    line = Functional(forward, pool=pool, back=nn.MaxUnpool1d(2), read=nn.Conv1d(8, 5, 1))
    assert widths(line, image(2, 3, 6)) == {"pool.0": 4}
    layers = {"make": nn.Conv2d(3, 8, 1), "middle": nn.Conv2d(8, 8, 3, padding=1), "read": nn.Conv2d(8, 5, 1)}
    assert widths(Functional(segment, **layers), image(2, 3, 4, 4)) == {"make": 4}


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_padding_along_pixels_keeps_channels(kind: Any, mode: str) -> None:
    layers = [kind(3, 8, 3, padding=1, padding_mode=mode), kind(8, 6, 3, padding=1, padding_mode=mode), kind(6, 2, 1)]
    sizes = (4,) * (int(kind.__name__[4]))
    assert widths(nn.Sequential(*layers), image(2, 3, *sizes)) == {"0": 4, "1": 3}


@pytest.mark.parametrize("pad", [nn.CircularPad2d(1), nn.ConstantPad2d(1, 2.0), nn.ZeroPad2d((1, 0, 2, 1))])
def test_layers_that_pad(pad: nn.Module) -> None:
    assert widths(nn.Sequential(nn.Conv2d(3, 8, 1), pad, nn.Conv2d(8, 5, 3)), image(1, 3, 4, 4)) == {"0": 4}


BLUR = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).view(1, 1, 3, 3) / 16


def blurred(x: Tensor) -> Tensor:
    """Each channel is an image of its own in the batch, as in kornia and StyleGAN."""
    return F.conv2d(x.reshape(-1, 1, *x.shape[2:]), BLUR.to(x), padding=1).view(x.shape)


def upsampled(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    x = F.pad(x.reshape(-1, h, 1, w, 1, 1), [0, 0, 0, 1, 0, 0, 0, 1]).reshape(-1, 1, 2 * h, 2 * w)
    return F.conv2d(x, BLUR.to(x).flip(2, 3), padding=1).reshape(b, c, 2 * h, 2 * w)


def edges(x: Tensor) -> Tensor:
    """Two fixed kernels: what they give for a channel stays beside each other."""
    kernels = torch.stack([BLUR[0], BLUR[0].mT - 0.2]).to(x)
    both = F.conv2d(x.flatten(0, 1)[:, None], kernels, padding=1)
    return both.square().sum(1).sqrt().view(x.shape)


@pytest.mark.parametrize(
    "between",
    [
        *(blurred, upsampled, edges),
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]),
        lambda x: torch.fft.fft2(x).abs(),
        lambda x: torch.fft.ifft(torch.fft.fft(x).conj()).real,
        lambda x: torch.view_as_complex(torch.view_as_real(torch.fft.fft2(x)) * 2).imag,
        lambda x: x.tril() - x.triu(1),
        lambda x: x.rot90(1, (2, 3)),
        lambda x: x * x.diagonal(dim1=2, dim2=3).unsqueeze(-1),
    ],
    ids=["blur", "up", "edges", "filter", "power", "conj", "complex", "triangles", "turned", "diagonal"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_operations_on_the_pixels_of_each_channel(between: Callable[[Tensor], Tensor], batch: int) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.read(between(model.make(x)))

    model = Functional(forward, make=nn.Conv2d(3, 8, 3, padding=1), read=nn.Conv2d(8, 5, 1)).eval()
    assert widths(model, image(batch, 3, 6, 6)) == {"make": 4}
