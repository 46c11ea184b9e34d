"""Networks on vectors, sets and graphs, and unusual ways of writing modules."""
# ruff: noqa: D102 -- every method without a docstring is a forward pass

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from common.architectures.registry import architecture, floats, several


def keywords() -> Mapping[str, Tensor]:
    """Inputs by name, one of them an integer tensor."""
    return {
        "numbers": floats(4, 5)(),
        "category": torch.tensor([0, 2, 1, 2]),
        "mask": torch.tensor([[True], [False], [False], [False]]),
    }


@architecture("pointnet", floats(2, 3, 10))
class PointNet(nn.Module):
    """1x1 convolutions, the maximum over points repeated beside each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv1d(3, 10, 1), nn.BatchNorm1d(10), nn.ReLU(), nn.Conv1d(10, 12, 1))
        self.joined = nn.Sequential(nn.Conv1d(24, 9, 1), nn.ReLU(), nn.Conv1d(9, 2, 1))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.local(x)
        whole = x.max(2, keepdim=True)[0]
        return self.head(whole.squeeze(2)), self.joined(torch.cat([x, whole.repeat(1, 1, x.shape[2])], 1))


@architecture("gcn", several(floats(7, 5), lambda: (floats(7, 7)() > 0).float() + torch.eye(7)))
class GraphConvolution(nn.Module):
    """A dense adjacency matrix, normalised by degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 10, bias=False)
        self.offset, self.head = nn.Parameter(torch.zeros(10)), nn.Linear(10, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency / adjacency.sum(1, keepdim=True)
        x = F.relu(adjacency @ self.first(x))
        x = F.relu(torch.mm(adjacency, self.second(x)) + self.offset)
        return self.head(x)


@architecture("gcn_edges", several(floats(7, 5), lambda: torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 2, 0, 5, 6, 4, 3]])))
class EdgeMessages(nn.Module):
    """Messages along a list of edges, summed by index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message, self.head = nn.Linear(5, 8), nn.Linear(16, 10), nn.Linear(18, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.embed(x).relu()
        source, target = edges
        messages = self.message(torch.cat([x[source], x[target]], 1)).relu()
        received = messages.new_zeros(len(x), messages.shape[1]).index_add_(0, target, messages)
        return self.head(torch.cat([x, received], 1))


@architecture("deep_sets", floats(2, 6, 5))
class DeepSets(nn.Module):
    """Sums, means and standard deviations over a set."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 10), nn.Linear(10, 8)
        self.head = nn.Sequential(nn.Linear(24, 9), nn.Mish(), nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.softplus(self.first(x)))
        return self.head(torch.cat([x.sum(1), x.mean(1), x.std(1)], -1))


@architecture("tied_autoencoder", floats(4, 9))
class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 12), nn.Linear(12, 5)
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(9))])

    def forward(self, x: Tensor) -> Tensor:
        code = self.second(self.first(x).relu())
        x = F.linear(code, self.second.weight.t(), self.biases[0]).relu()
        return F.linear(x, self.first.weight.t(), self.biases[1])


@architecture("variational_autoencoder", floats(4, 9))
class VariationalAutoencoder(nn.Module):
    """Noise is added to the code, in training and in eval mode a fixed one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.spread = nn.Linear(9, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 9))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.encoder(x).relu()
        mean, spread = self.mean(x), self.spread(x)
        noise = torch.randn_like(mean) if self.training else torch.ones_like(mean)
        return self.decoder(mean + noise * (0.5 * spread).exp()), mean, spread


@architecture("weight_norm", floats(2, 3, 8))
def weight_norm() -> nn.Module:
    """Weights as a norm and a direction."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(3, 10, 3)),
        nn.LeakyReLU(0.2),
        parametrizations.weight_norm(nn.Conv1d(10, 8, 3)),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


@architecture("spectral_norm", floats(4, 6))
def spectral_norm() -> nn.Module:
    """Weights divided by their largest singular value."""
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 10)),
        nn.LeakyReLU(0.2),
        parametrizations.spectral_norm(nn.Linear(10, 8)),
        nn.LeakyReLU(0.2),
        nn.Linear(8, 2),
    )


class Positive(nn.Module):
    """A parametrisation: what is stored is the logarithm."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp() / 4


@architecture("parametrized", floats(4, 6))
def parametrized() -> nn.Module:
    """Weights that a module of the user's makes."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2))
    parametrize.register_parametrization(model[2], "weight", Positive())
    parametrize.register_parametrization(model[4], "weight", Positive())
    return model


@architecture("pruned", floats(4, 6))
def pruned() -> nn.Module:
    """Masks of `torch.nn.utils.prune`: constants that differ between channels."""
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
    prune.l1_unstructured(model[2], "weight", amount=0.3)
    prune.ln_structured(model[0], "weight", amount=0.2, n=2, dim=0)
    return model


@architecture("weight_standardised", floats(2, 3, 8, 8))
class WeightStandardised(nn.Module):
    """Kernels are normalised before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            w = layer.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
            x = F.conv2d(x, w, layer.bias).relu()
        return self.head(x.mean((2, 3)))


@architecture("siren", floats(10, 2))
class Siren(nn.Module):
    """Sines of coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 12), nn.Linear(12, 10)])
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(3.0 * layer(x))
        return self.head(x)


@architecture("fourier_features", several(floats(4, 5), floats(4)))
class FourierFeatures(nn.Module):
    """A time step as sines and cosines of fixed rates, added to what layers make, and before them."""

    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.exp(-math.log(100.0) * torch.arange(5) / 5))
        self.inputs, self.time = nn.Linear(5, 12), nn.Sequential(nn.Linear(10, 14), nn.SiLU(), nn.Linear(14, 12))
        self.hidden, self.embed, self.head = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * self.rates
        context = torch.cat([angles.sin(), angles.cos()], -1)
        x = self.inputs(x) + self.time(context)
        return self.head(self.hidden(F.silu(x)) + context * self.embed(x))


@architecture("highway", floats(4, 6))
class Highway(nn.Module):
    """Gated sums of a layer and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.transforms, self.gates = (nn.ModuleList(nn.Linear(10, 10) for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for transform, gate in zip(self.transforms, self.gates, strict=True):
            open_ = torch.sigmoid(gate(x))
            x = open_ * F.relu(transform(x)) + (1 - open_) * x
        return self.head(x)


class Two(nn.Module):
    """A network with two results, in several containers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.hidden, self.head = nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.hidden(self.body(x).relu())
        return features, self.head(features.relu())


@architecture("dict_output", floats(4, 5))
class DictOutput(Two):
    """Tensors in a mapping, and what is no tensor."""

    def forward(self, x: Tensor) -> dict[str, object]:
        features, out = self.both(x)
        return {"out": out, "other": [{"features": features}, None, "text"]}


@architecture("tuple_output", floats(4, 5))
class TupleOutput(Two):
    """Two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.both(x)


@dataclass
class Result:
    """As some libraries return it."""

    features: Tensor
    out: Tensor


@architecture("dataclass_output", floats(4, 5))
class DataclassOutput(Two):
    """Two tensors in a dataclass."""

    def forward(self, x: Tensor) -> Result:
        return Result(*self.both(x))


@architecture("keyword_inputs", keywords)
class KeywordInputs(nn.Module):
    """Arguments by name only, one of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.category, self.head = nn.Linear(5, 12), nn.Embedding(3, 12), nn.Linear(12, 2)

    def forward(self, *, numbers: Tensor, category: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.relu(self.numbers(numbers) + self.category(category))
        return self.head(x if mask is None else x.masked_fill(mask, 0.0))


@architecture("embedding_bag", lambda: torch.tensor([[1, 2, 4], [4, 3, 0]]))
def embedding_bag() -> nn.Module:
    """Means of embeddings."""
    return nn.Sequential(nn.EmbeddingBag(6, 10, mode="mean"), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))


@architecture("bilinear", several(floats(4, 5), floats(4, 6)))
class Bilinear(nn.Module):
    """A form of two layers' results, and their inner products."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 8), nn.Linear(6, 8)
        self.form, self.head = nn.Bilinear(8, 8, 10), nn.Linear(11, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.left(a).relu(), self.right(b).relu()
        return self.head(torch.cat([self.form(a, b), (a * b).sum(1, keepdim=True)], 1))


@architecture("cosine_classifier", floats(4, 5))
class CosineClassifier(nn.Module):
    """Features and class weights of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.embed = nn.Linear(5, 12), nn.Linear(12, 8)
        self.classes = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.body(x).relu())
        return F.linear(F.normalize(x), F.normalize(self.classes))


@architecture("feature_statistics", floats(4, 5))
class FeatureStatistics(nn.Module):
    """Hidden values compared with their own mean, sorted, and counted: merging must see what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.head = (
            nn.Linear(5, 10),
            nn.Linear(10, 9),
            nn.Linear(9, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x - x.mean(-1, keepdim=True))
        x = self.third(x.sort(-1).values)
        return self.head(x) * x.topk(2, -1).values.sum(-1, keepdim=True)


@architecture("per_channel_constants", floats(4, 5))
class PerChannelConstants(nn.Module):
    """Buffers and computed constants that differ between channels, and such that do not."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 2, 10))
        self.first, self.second, self.third, self.head = (
            nn.Linear(5, 10),
            nn.Linear(10, 9),
            nn.Linear(9, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.second((self.first(x) * self.scale).relu())
        x = self.third(x.relu() * torch.full((x.shape[1],), 0.5, dtype=x.dtype))
        return self.head(x + torch.arange(x.shape[1]))


@architecture("in_place", floats(4, 5))
class InPlace(nn.Module):
    """Results written into slices and buffers made before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 10), nn.Linear(10, 8), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(F.relu(x.clone(), inplace=True))
        together = x.new_empty(len(x), x.shape[1] + y.shape[1])
        together[:, : x.shape[1]] = x
        together[:, x.shape[1] :] = y
        together[:, 0] += 1
        return self.head(together)


@architecture("where_and_gather", floats(4, 5))
class WhereAndGather(nn.Module):
    """Choices between channels by condition and by index."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 10), nn.Linear(5, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        x = self.c(torch.where(a > 0, a, b))
        return self.head(x.gather(1, x.argsort(1)) + x.clamp(min=0).sqrt())
