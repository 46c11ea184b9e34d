"""Networks on images with normalisations over several channels."""
# ruff: noqa: D102 -- every method without a docstring is a forward pass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures.registry import architecture, floats


@architecture("group_norm", floats(2, 3, 8, 8))
def group_norm() -> nn.Module:
    """Several groups, one group, and a group for each channel."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.GroupNorm(4, 12),
        nn.SiLU(),
        nn.Conv2d(12, 8, 3),
        nn.GroupNorm(1, 8),
        nn.SiLU(),
        nn.Conv2d(8, 6, 3),
        nn.GroupNorm(6, 6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


@architecture("instance_norm", floats(2, 3, 8, 8))
def instance_norm() -> nn.Module:
    """With scales, without, and with running statistics."""
    return nn.Sequential(
        nn.ReflectionPad2d(1),
        nn.Conv2d(3, 12, 3),
        nn.InstanceNorm2d(12, affine=True),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3),
        nn.InstanceNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.ReLU(),
        nn.Conv2d(6, 3, 1),
    )


class ConvNeXtBlock(nn.Module):
    """LayerNorm with the channels last, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.scale = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an image, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-6) * self.weight[:, None, None] + self.bias[:, None, None]


@architecture("convnext", floats(2, 3, 8, 8))
def convnext() -> nn.Module:
    """Two such blocks behind a stem that divides the image."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 2, 2),
        ChannelNorm(8),
        ConvNeXtBlock(8),
        ConvNeXtBlock(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 4),
    )


@architecture("layer_norm_over_images", floats(2, 3, 6, 6))
class LayerNormOverImages(nn.Module):
    """LayerNorm over channels and pixels, and one without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.norm, self.head = nn.LayerNorm([8, 4, 4]), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.norm(self.first(x))))
        return self.head(F.layer_norm(x, x.shape[1:]).mean((2, 3)))


@architecture("local_response", floats(2, 3, 8, 8))
def local_response() -> nn.Module:
    """Channels that are divided by what their neighbours do, and a softmax over channels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), nn.Conv2d(8, 6, 3), nn.Softmax2d(), nn.Conv2d(6, 2, 1)
    )
