"""Networks with buffers, zeros in place of channels, fixed filters and complex weights."""
# ruff: noqa: D102 -- every method without a docstring is a forward pass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures.registry import architecture, floats


class FrozenNorm(nn.Module):
    """BatchNorm whose four tensors are buffers, written out."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 1.5, width))
        self.register_buffer("bias", torch.linspace(-1, 1, width))
        self.register_buffer("mean", torch.linspace(-0.5, 0.2, width))
        self.register_buffer("variance", torch.linspace(2, 0.5, width))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.variance + 1e-5).rsqrt()
        shift = self.bias - self.mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


@architecture("frozen_batch_norm", floats(2, 3, 8, 8))
class FrozenResidual(nn.Module):
    """A residual block with frozen BatchNorms, as in the backbone of a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (
            nn.Conv2d(3, 10, 3, bias=False),
            nn.Conv2d(10, 8, 3, padding=1, bias=False),
            nn.Conv2d(8, 10, 3, padding=1, bias=False),
        )
        self.norms = nn.ModuleList([FrozenNorm(10), FrozenNorm(8), FrozenNorm(10)])
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(x)))
        y = self.norms[2](self.second(F.relu(self.norms[1](self.first(x)))))
        return self.head(F.relu(x + y).mean((2, 3)))


@architecture("zero_padded_shortcut", floats(2, 3, 8, 8))
class ZeroPaddedShortcut(nn.Module):
    """The shortcut without parameters of the first residual networks: half as many channels, filled up with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.again = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 16, 3, 2, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.wide(x)
        pad = (y.shape[1] - x.shape[1]) // 2
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad)))
        return self.head(F.relu(x + self.again(x)).mean((2, 3)))


class Blur(nn.Module):
    """A fixed low-pass filter before a stride; its kernel is stored once, or once for each channel."""

    kernel: Tensor

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.channels = width
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", (line[:, None] * line).repeat(width or 1, 1, 1, 1), persistent=width is None)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.channels or x.shape[1]
        kernel = self.kernel if self.channels else self.kernel.repeat(channels, 1, 1, 1)
        return F.conv2d(F.pad(x, [1] * 4, mode="reflect"), kernel, stride=2, groups=channels)


@architecture("blurred_strides", floats(2, 3, 8, 8))
def blurred_strides() -> nn.Module:
    """An anti-aliased network."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1),
        nn.ReLU(),
        Blur(),
        nn.Conv2d(10, 8, 3, padding=1),
        nn.ReLU(),
        Blur(8),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


@architecture("fourier_operator", floats(2, 2, 16))
class FourierOperator(nn.Module):
    """A Fourier neural operator: complex weights multiply the spectrum of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Sequential(nn.Conv1d(2, 12, 1), nn.GELU(), nn.Conv1d(12, 6, 1))
        self.spectral = nn.Parameter(torch.randn(6, 6, 4, dtype=torch.cfloat) / 6)
        self.skip = nn.Conv1d(6, 6, 1)
        self.head = nn.Sequential(nn.Conv1d(6, 16, 1), nn.GELU(), nn.Conv1d(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        spectrum = torch.fft.rfft(x)
        made = torch.einsum("bix,iox->box", spectrum[..., :4], self.spectral)
        made = F.pad(made, (0, spectrum.shape[-1] - made.shape[-1]))
        return self.head(F.gelu(torch.fft.irfft(made, n=x.shape[-1]) + self.skip(x)))
