"""The networks of the paper as plain `nn.Sequential`s, with layer shapes that give its parameter counts; ResNets."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Network = Literal["vgg16", "vgg19", "resnet18", "resnet20", "resnet56"]

#: Output channels of the 3x3 convolutions; 0 is a 2x2 max pooling (Simonyan & Zisserman 2015; Liu et al. 2017).
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512)
VGG8 = (32, 32, 0, 64, 64, 0, 128, 128, 0)  # the same in small


def scaled(width: int, multiplier: float) -> int:
    """A layer's width under a width multiplier: rounded, at least 1."""
    return max(1, round(width * multiplier))


def _vgg_features(widths: tuple[int, ...], multiplier: float, bias: bool) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        out = scaled(width, multiplier)
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=bias), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        channels = out
    return layers, channels


def _initialised(model: nn.Sequential) -> nn.Sequential:
    """He initialisation (fan out) of convolutions, variance `1 / in` in linear layers, zero biases.

    With PyTorch's own, the MNIST CNN stayed at 88 % error for one of two seeds.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, (1.0 / module.in_features) ** 0.5)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _assembled(features: nn.Module, classifier: nn.Module) -> nn.Sequential:
    return _initialised(nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier)))


def vgg16(classes: int, multiplier: float = 1.0) -> nn.Module:
    """The paper's VGG-16 for 32x32 images: 13 convolutions with BatchNorm, then 512-4096-4096-classes.

    33,646,666 parameters for 10 classes and 34,015,396 for 100; 6.65e8 FLOPs at 2 per multiply-add.
    """
    features, channels = _vgg_features(VGG16, multiplier, bias=True)
    hidden = scaled(4096, multiplier)
    classifier = nn.Sequential(
        nn.Linear(channels, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, classes),
    )
    return _assembled(nn.Sequential(*features), classifier)


def vgg19(classes: int, multiplier: float = 1.0) -> nn.Module:
    """Network slimming's VGG-19 for 32x32 images: 16 convolutions with BatchNorm, average pooling, one linear layer.

    20.04 M parameters for 10 classes.
    """
    features, channels = _vgg_features(VGG19, multiplier, bias=False)
    return _assembled(nn.Sequential(*features, nn.AvgPool2d(2)), nn.Linear(channels, classes))


def vgg8(classes: int, multiplier: float = 1.0) -> nn.Module:
    """A VGG for 8x8 images: 6 convolutions with BatchNorm, a hidden layer of 128; 305,258 parameters for 10 classes."""
    features, channels = _vgg_features(VGG8, multiplier, bias=False)
    hidden = scaled(128, multiplier)
    classifier = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes))
    return _assembled(nn.Sequential(*features), classifier)


class Residual(nn.Module):
    """Two 3x3 convolutions and what goes past them (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways, rectified."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


def _resnet(classes: int, widths: tuple[int, ...], blocks: int, multiplier: float) -> nn.Module:
    channels = scaled(widths[0], multiplier)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            outputs = scaled(width, multiplier)
            layers.append(Residual(channels, outputs, 2 if stage and not block else 1))
            channels = outputs
    return _assembled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), nn.Linear(channels, classes))


def resnet18(classes: int, multiplier: float = 1.0) -> nn.Module:
    """ResNet-18 for 32x32 images: four stages of two blocks, 64 to 512 channels, 11.17 M parameters for 10 classes."""
    return _resnet(classes, (64, 128, 256, 512), 2, multiplier)


def resnet20(classes: int, multiplier: float = 1.0) -> nn.Module:
    """ResNet-20 for CIFAR (He et al. 2016) with projections: 16 to 64 channels, 0.27 M parameters for 10 classes."""
    return _resnet(classes, (16, 32, 64), 3, multiplier)


def resnet56(classes: int, multiplier: float = 1.0) -> nn.Module:
    """ResNet-56 for CIFAR (He et al. 2016) with projections: 16 to 64 channels, 0.86 M parameters for 10 classes."""
    return _resnet(classes, (16, 32, 64), 9, multiplier)


#: What builds a network for so many classes, its width multiplied.
NETWORKS: Mapping[Network, Callable[[int, float], nn.Module]] = {
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet56": resnet56,
}


def dbn(widths: tuple[int, int, int] = (500, 500, 2000)) -> nn.Sequential:
    """The paper's deep belief network for MNIST, 784-500-500-2000-10 with sigmoid units: 1,665,010 parameters."""
    sizes = (784, *widths)
    hidden = [
        layer for inputs, outputs in itertools.pairwise(sizes) for layer in (nn.Linear(inputs, outputs), nn.Sigmoid())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], 10))


def mnist_cnn() -> nn.Sequential:
    """The paper's CNN for MNIST: 3x3 convolutions of 6, 6, 16, 16 and 120 channels, 120-10; 151,920 parameters."""
    channels = ((1, 6), (6, 6), None, (6, 16), (16, 16), None, (16, 120), None)
    layers: list[nn.Module] = []
    for shape in channels:
        layers += [nn.MaxPool2d(2)] if shape is None else [nn.Conv2d(*shape, 3, padding=1), nn.ReLU()]
    return _initialised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(120 * 9, 120), nn.ReLU(), nn.Linear(120, 10)))
