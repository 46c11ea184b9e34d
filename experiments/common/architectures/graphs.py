"""Networks on graphs, sets of points and sequences of several lengths."""
# ruff: noqa: D102 -- every method without a docstring is a forward pass

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from common.architectures.registry import architecture, floats, several


def edges() -> Tensor:
    """Sources and targets of the edges of a graph with five nodes."""
    return torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 4]])


@architecture("edge_maxima", several(floats(5, 6), edges))
class EdgeMaxima(nn.Module):
    """Messages along edges; each node takes the largest, then the mean, of those that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message = nn.Linear(6, 9), nn.Sequential(nn.Linear(18, 12), nn.ReLU(), nn.Linear(12, 8))
        self.second, self.head = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        x = self.embed(x).relu()
        y = self.message(torch.cat([x[target], x[source] - x[target]], 1))
        where = target[:, None].expand(-1, y.shape[1])
        y = y.new_zeros(len(x), y.shape[1]).scatter_reduce(0, where, y, "amax", include_self=False)
        y = self.second(y)[source]
        return self.head(y.new_zeros(len(x), y.shape[1]).scatter_reduce(0, where[:, :1].expand_as(y), y, "mean"))


@architecture("points_sampled", floats(2, 9, 3))
class PointsSampled(nn.Module):
    """The points nearest to each other are grouped; a channel keeps its largest value, and its median over all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 10), nn.Linear(10, 12), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        near = torch.cdist(x, x).topk(3, 2, largest=False).indices
        y = self.first(x).relu()
        where = near.flatten(1)[..., None].expand(-1, -1, y.shape[2])
        y = self.second(y.gather(1, where).unflatten(1, near.shape[1:]).amax(2))
        return self.head(torch.cat([y.topk(2, 1).values.mean(1), y.median(1).values], 1))


class PackedRecurrent(nn.Module):
    """Sequences of several lengths, packed for the recurrent layers."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(6, 10), kind(10, 8, batch_first=True, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(x).relu(), lengths, batch_first=True, enforce_sorted=False)
        states, _ = self.layers(packed)
        return self.head(pad_packed_sequence(states, batch_first=True)[0])


SEQUENCES = several(floats(2, 5, 6), lambda: torch.tensor([3, 5]))
architecture("lstm_packed", SEQUENCES)(lambda: PackedRecurrent(nn.LSTM, num_layers=2))
architecture("gru_packed_bidirectional", SEQUENCES)(lambda: PackedRecurrent(nn.GRU, bidirectional=True))


@architecture("states_written", floats(2, 5, 6))
class StatesWritten(nn.Module):
    """Each state of a cell is written into a tensor for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 9), nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        states = x.new_zeros(x.shape[0], x.shape[1], self.cell.hidden_size)
        h = None
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
            states[:, step] = h
        return self.head(states)


@architecture("padded_encoder", several(floats(2, 5, 16), lambda: torch.tensor([5, 3])))
class PaddedEncoder(nn.Module):
    """An encoder that knows which tokens are padding, and a mean over the others."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = self.layers(x, causal, padding).masked_fill(padding[..., None], 0)
        return self.head(F.relu(x.sum(1) / lengths[:, None]))
