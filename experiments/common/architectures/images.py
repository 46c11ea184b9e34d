"""Networks on images."""
# ruff: noqa: D102 -- every method without a docstring is a forward pass

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures.registry import architecture, floats, several


def conv_norm(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """A convolution that keeps the size, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


@architecture("unet", floats(2, 3, 12, 12))
class UNet(nn.Module):
    """Skip connections by concatenation, transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv_norm(3, 8), conv_norm(8, 12), conv_norm(12, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 12, 3, 2, 1, output_padding=0), nn.ConvTranspose2d(12, 8, 2, 2)
        self.join2, self.join1 = conv_norm(24, 12), conv_norm(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.middle(F.max_pool2d(two, 2))
        x = self.join2(torch.cat([F.interpolate(self.up2(x), size=two.shape[-2:]), two], 1))
        x = self.join1(torch.cat([self.up1(x), one], 1))
        return self.head(x)


@architecture("resnext", floats(2, 3, 8, 8))
class ResNeXt(nn.Module):
    """Grouped convolutions inside of residual bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 12)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                conv_norm(12, 16, 1), conv_norm(16, 16, groups=4), nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """The channels of all groups in turn."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@architecture("shufflenet", floats(2, 3, 8, 8))
class ShuffleNet(nn.Module):
    """Half of the channels goes by, the other through a depthwise branch; then they are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16)
        self.branches = nn.ModuleList(
            nn.Sequential(
                conv_norm(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), conv_norm(8, 8, 1)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            by, through = x.chunk(2, 1)
            x = shuffle(torch.cat([by, branch(through)], 1), 2)
        return self.head(x.mean((2, 3)))


@architecture("squeeze_excitation", floats(2, 3, 8, 8))
class SqueezeExcitation(nn.Module):
    """Gates for channels computed from their means, by 1x1 convolutions and by Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_norm(3, 10), conv_norm(10, 12)
        self.squeeze, self.excite = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)
        self.fc = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 12), nn.Sigmoid())
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = self.body(x)
        b, c, _, _ = x.size()
        x = x * self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        return self.head(x.mean((2, 3)))


@architecture("inverted_residual", floats(2, 3, 8, 8))
class InvertedResidual(nn.Module):
    """MobileNetV2: expand, depthwise, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 20, 1, bias=False),
                nn.BatchNorm2d(20),
                nn.ReLU6(inplace=True),
                nn.Conv2d(20, 20, 3, padding=1, groups=20, bias=False),
                nn.BatchNorm2d(20),
                nn.ReLU6(inplace=True),
                nn.Conv2d(20, 8, 1, bias=False),
                nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@architecture("densenet", floats(2, 3, 8, 8))
class DenseNet(nn.Module):
    """BatchNorm over concatenations that grow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 6 * i), nn.ReLU(), nn.Conv2d(8 + 6 * i, 6, 3, padding=1, bias=False))
            for i in range(3)
        )
        self.norm, self.head = nn.BatchNorm2d(26), nn.Linear(26, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(F.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


@architecture("dcgan", floats(2, 6, 1, 1))
def dcgan() -> nn.Module:
    """A generator: transposed convolutions with BatchNorm."""
    return nn.Sequential(
        nn.ConvTranspose2d(6, 16, 4, 1, 0, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(True),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
        nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


@architecture("pixel_shuffle", floats(2, 3, 6, 6))
def pixel_shuffle() -> nn.Module:
    """Four channels become the pixels of one; a slope for each channel."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1),
        nn.PReLU(),
        nn.Conv2d(10, 16, 3, padding=1),
        nn.PixelShuffle(2),
        nn.PReLU(4),
        nn.Conv2d(4, 12, 3, padding=1),
        nn.PixelShuffle(2),
        nn.PixelUnshuffle(2),
        nn.Conv2d(12, 3, 1),
    )


@architecture("auxiliary_head", floats(2, 3, 8, 8))
class AuxiliaryHead(nn.Module):
    """A second head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_norm(3, 8), conv_norm(8, 10)
        self.auxiliary, self.head = nn.Linear(8, 4), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.first(x)
        auxiliary = self.auxiliary(x.mean((2, 3))) if self.training else None
        x = self.head(self.second(x).mean((2, 3)))
        return x if auxiliary is None else (x, auxiliary)


@architecture("maxout", floats(2, 3, 8, 8))
class Maxout(nn.Module):
    """The larger of neighbours and of halves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 10, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x.view(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:]).amax(2)
        x = self.second(x)
        return self.head(torch.maximum(*x.chunk(2, 1)).mean((2, 3)))


@architecture("siamese", several(floats(2, 3, 8, 8), floats(2, 3, 8, 8, seed=2)))
class Siamese(nn.Module):
    """One encoder used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_norm(3, 8), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embed = nn.Linear(8, 10)
        self.head = nn.Linear(10, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.embed(self.encoder(a)), self.embed(self.encoder(b))
        return self.head((a - b).abs()).squeeze(-1)


@architecture("film", several(floats(2, 3, 8, 8), floats(2, 5)))
class FiLM(nn.Module):
    """Scales and shifts of channels computed from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 6, 3)
        self.condition = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 20))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition).chunk(2, dim=1)
        x = self.first(x) * (1 + scale[..., None, None]) + shift[..., None, None]
        return self.head(self.second(x.relu()).mean((2, 3)))


class Moved(nn.Module):
    """Channels in another order between two convolutions."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.second(x)
        if self.how == "flip":
            y = y.flip(1)
        elif self.how == "roll":
            y = y.roll(1, 1)
        elif self.how == "index_select":
            y = y.index_select(1, torch.arange(y.shape[1] - 1, -1, -1))
        elif self.how == "permuted":
            y = y[:, torch.randperm(y.shape[1], generator=torch.Generator().manual_seed(0))]
        elif self.how == "strided":
            y = torch.cat([y[:, ::2], y[:, 1::2]], 1)
        return self.head((x + y).relu().mean((2, 3)) + y.amax((2, 3)))


for _how in ("flip", "roll", "index_select", "permuted", "strided"):
    architecture(f"channels_{_how}", floats(2, 3, 8, 8))(lambda how=_how: Moved(how))


@architecture("depthwise_multiplier", floats(2, 3, 8, 8))
def depthwise_multiplier() -> nn.Module:
    """Two kernels for each channel; and one for each of the image's."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3),
        nn.ReLU(),
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


@architecture("multi_scale", floats(2, 3, 12, 12))
class MultiScale(nn.Module):
    """Parallel branches, atrous and pooled, flattened before the head; upsampling by factors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.branches = nn.ModuleList(nn.Conv2d(8, 5, 3, padding=rate, dilation=rate) for rate in (1, 2, 3))
        self.pooled, self.project = nn.Conv2d(8, 5, 1), conv_norm(20, 6, 1)
        self.head = nn.Linear(6 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = F.interpolate(self.pooled(F.adaptive_avg_pool2d(x, 1)), x.shape[-2:], mode="bilinear")
        x = self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))
        return self.head(F.adaptive_avg_pool2d(x, 3).flatten(1))


@architecture("channel_attention", floats(2, 3, 6, 6))
class ChannelAttention(nn.Module):
    """ECA (a convolution along the channels) and a spatial gate from means and maxima over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_norm(3, 8), conv_norm(8, 6)
        self.along, self.spatial = nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.along(x.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)[:, :, None, None]
        x = self.body(x)
        x = x * self.spatial(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        return self.head(x.mean((2, 3)))


@architecture("style_gram", floats(2, 3, 6, 6))
class StyleGram(nn.Module):
    """Inner products of channels with each other: the second convolution must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), nn.Linear(25, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).flatten(2)
        return self.head((x @ x.transpose(1, 2)).flatten(1))


@architecture("conv_pool_3d", floats(2, 2, 4, 6, 6))
def conv_pool_3d() -> nn.Module:
    """Factorised convolutions over space and time."""
    return nn.Sequential(
        nn.Conv3d(2, 8, (1, 3, 3)),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 6, (3, 1, 1)),
        nn.AdaptiveMaxPool3d((1, 2, 2)),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.Hardtanh(),
        nn.Linear(10, 4),
    )
