"""Networks that the tests share, written in many ways, with example inputs."""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from common.models import dbn, mnist_cnn, vgg16, vgg19


class Conv1dNet(nn.Module):
    """Conv1d, BatchNorm1d, mean over time; layers used in another order than they are declared."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(9, 4)
        self.second = nn.Conv1d(12, 9, 3)
        self.norm = nn.BatchNorm1d(9)
        self.first = nn.Conv1d(5, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        x = self.norm(self.second(x)).tanh()
        return self.head(x.mean(2))


class Conv3dNet(nn.Module):
    """Conv3d, BatchNorm3d, pooling, a view with computed sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm3d(8)
        self.second = nn.Conv3d(8, 6, 1, bias=False)
        self.head = nn.Linear(6 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.silu(self.norm(self.first(x))), 2)
        x = F.avg_pool3d(F.elu(self.second(x)), 1)
        return self.head(x.view(x.shape[0], -1))


class NormedMLP(nn.Module):
    """Linear layers with BatchNorm1d before and after the activation, on sequences of vectors too."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(7, 20)
        self.norm = nn.BatchNorm1d(20)
        self.hidden = nn.Linear(20, 16, bias=False)
        self.after = nn.BatchNorm1d(16)
        self.outputs = nn.Linear(16, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.inputs(x))))
        return self.outputs(self.after(F.leaky_relu(self.hidden(x)) * 0.5 + 1))


class Residual(nn.Module):
    """A residual stream: two producers and two BatchNorms share their neurons; concatenation before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(10)
        self.block = nn.Conv2d(10, 10, 3, padding=1)
        self.block_norm = nn.BatchNorm2d(10)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.act = nn.PReLU(10)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = x + self.block_norm(self.block(x))
        y = self.act(self.depthwise(x))
        return self.head(torch.cat([x, y], 1).mean((2, 3)))


class Sequence(nn.Module):
    """Linear layers on [batch, time, features], einsum on a raw parameter, in-place activations, reuse of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 14)
        self.mix = nn.Parameter(torch.randn(14, 14) / 4)
        self.last = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.first(x), inplace=True)
        x = torch.einsum("btc,cd->btd", x, self.mix).sigmoid_()
        return self.last(x).sum(1)


class Split(nn.Module):
    """One layer whose channels go to two readers: two groups with one layer's name."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.a, self.b = nn.Linear(4, 10), nn.Linear(6, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.make(x).relu()
        return self.a(hidden[:, : self.a.in_features]) + self.b(hidden[:, -self.b.in_features :])


def images(*shape: int) -> Tensor:
    """Random float images."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dbn": (dbn, (2, 1, 28, 28)),
    "cnn": (mnist_cnn, (2, 1, 28, 28)),
    "vgg16": (lambda: vgg16(10, 0.125), (2, 3, 32, 32)),
    "vgg19": (lambda: vgg19(10, 0.125), (2, 3, 32, 32)),
    "conv1d": (Conv1dNet, (3, 5, 11)),
    "conv3d": (Conv3dNet, (2, 2, 4, 4, 4)),
    "normed_mlp": (NormedMLP, (5, 7)),
    "residual": (Residual, (2, 3, 8, 8)),
    "sequence": (Sequence, (2, 4, 6)),
    "split": (Split, (5, 4)),
}

#: Large ones, for the test that matters most only.
LARGE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "alexnet": (lambda: torchvision.models.alexnet(num_classes=10), (1, 3, 64, 64)),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(num_classes=10, init_weights=False), (1, 3, 32, 32)),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and BatchNorm statistic random and large enough to matter, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(len(module.running_mean), generator=generator))
            module.running_var.copy_(torch.rand(len(module.running_var), generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.randn(len(module.weight), generator=generator))
                module.bias.copy_(torch.randn(len(module.bias), generator=generator))
        elif isinstance(module, nn.PReLU):
            with torch.no_grad():
                module.weight.copy_(torch.rand(len(module.weight), generator=generator))
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is not None:
            with torch.no_grad():
                module.bias.copy_(torch.randn(len(module.bias), generator=generator) / 4)
    return model


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A randomised network in eval mode, and its example inputs."""
    build, shape = (NETWORKS | LARGE)[name]
    torch.manual_seed(0)
    return randomised(build()).eval(), images(*shape)
