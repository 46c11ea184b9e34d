"""Networks that make images, or restore their size."""
# ruff: noqa: D102 -- every method without a docstring is a forward pass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures.registry import architecture, floats


@architecture("super_resolution", floats(2, 3, 6, 6))
class SuperResolution(nn.Module):
    """Residual blocks with circular padding, PixelShuffle by two and by three, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.body = nn.Sequential(
            nn.Conv2d(8, 10, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(10), nn.PReLU(), nn.Conv2d(10, 8, 1)
        )
        self.up = nn.Sequential(nn.Conv2d(8, 24, 1), nn.PixelShuffle(2), nn.PReLU(), nn.Conv2d(6, 36, 1))
        self.last = nn.Sequential(nn.PixelShuffle(3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.up(x + self.body(x)))


@architecture("linear_generator", floats(2, 6))
def linear_generator() -> nn.Module:
    """A Linear makes a small image, transposed convolutions make it larger."""
    return nn.Sequential(
        nn.Linear(6, 14),
        nn.ReLU(),
        nn.Linear(14, 12 * 9),
        nn.Unflatten(1, (12, 3, 3)),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 2, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 2, 2),
    )


@architecture("convolutional_autoencoder", floats(2, 3, 8, 8))
class ConvolutionalAutoencoder(nn.Module):
    """An image becomes a vector and an image again; the number of channels is kept by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 10
        self.encode = nn.Sequential(nn.Conv2d(3, 9, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 7))
        self.expand = nn.Linear(7, self.channels * 4)
        self.decode = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(10, 6, 3, padding=1), nn.ReLU())
        self.out = nn.ConvTranspose2d(6, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(self.encode(x)).view(-1, self.channels, 2, 2).relu()
        return self.out(self.decode(x))


@architecture("patch_decoder", floats(2, 4, 9))
class PatchDecoder(nn.Module):
    """Tokens become patches of an image, which a convolution smooths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.patches = nn.Linear(9, 11), nn.Linear(11, 8 * 9)
        self.smooth, self.out = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(F.gelu(self.embed(x)))
        b, n, _ = x.shape
        side = round(n**0.5)
        x = x.view(b, side, side, -1, 3, 3).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, 3 * side, 3 * side)
        return self.out(self.smooth(x).relu())


@architecture("unpooled_segmentation", floats(2, 3, 8, 8))
class UnpooledSegmentation(nn.Module):
    """SegNet: maxima are put back to where they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, places = F.max_pool2d(self.down(x).relu(), 2, return_indices=True)
        x = F.max_unpool2d(self.norm(self.middle(x)).relu(), places, [2, 2])
        return self.out(x)


@architecture("involution", floats(2, 3, 6, 6))
class Involution(nn.Module):
    """Kernels computed for each pixel, applied to unfolded neighbours; space to depth before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(24, 10, 1)
        self.kernels, self.out = nn.Conv2d(10, 9, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(F.pixel_unshuffle(self.stem(x), 2)).relu()
        b, c, h, w = x.shape
        near = F.unfold(x, 3, padding=1).view(b, c, 9, h * w)
        return self.out((near * self.kernels(x).flatten(2).unsqueeze(1).softmax(2)).sum(2).view(b, c, h, w))


@architecture("temporal_shift", floats(4, 3, 6, 6))
class TemporalShift(nn.Module):
    """A film: a quarter of the channels of each frame comes from the next one, written into a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        fold, shifted = x.shape[1] // 4, torch.zeros_like(x)
        shifted[:-1, :fold] = x[1:, :fold]
        shifted[:, fold:] = x[:, fold:]
        return self.head(self.second(shifted).mean((2, 3)))
