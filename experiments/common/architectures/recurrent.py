"""Networks on sequences without attention."""
# ruff: noqa: D102 -- every method without a docstring is a forward pass

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures.registry import architecture, floats, tokens


class Recurrent(nn.Module):
    """A projection, a stack of recurrent layers, a head."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.layers = kind(10, 8, num_layers=2, batch_first=True, **options)
        self.hidden = nn.Linear(16 if options.get("bidirectional") else 8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.layers(self.embed(x).relu())
        return self.head(self.hidden(x[:, -1]).relu())


architecture("lstm", floats(2, 5, 6))(lambda: Recurrent(nn.LSTM))
architecture("lstm_bidirectional", floats(2, 5, 6))(lambda: Recurrent(nn.LSTM, bidirectional=True))
architecture("lstm_projected", floats(2, 5, 6))(lambda: Projected())
architecture("gru", floats(2, 5, 6))(lambda: Recurrent(nn.GRU))
architecture("gru_bidirectional", floats(2, 5, 6))(lambda: Recurrent(nn.GRU, bidirectional=True))
architecture("rnn", floats(2, 5, 6))(lambda: Recurrent(nn.RNN))
architecture("rnn_relu", floats(2, 5, 6))(lambda: Recurrent(nn.RNN, nonlinearity="relu"))


class Projected(nn.Module):
    """An LSTM with a projection of its state, time first, its last state read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(6, 10, proj_size=5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.layers(x.transpose(0, 1))
        return self.head(hidden[-1])


@architecture("lstm_cell", floats(2, 5, 6))
class LSTMCellLoop(nn.Module):
    """A loop over time, the state's size taken from the cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)


@architecture("gru_cell", floats(2, 5, 6))
class GRUCellLoop(nn.Module):
    """A loop over time without an initial state; all states stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(6, 7), nn.GRUCell(7, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, states = None, []
        for step in x.unbind(1):
            h = self.cell(self.embed(step).tanh(), h)
            states.append(h)
        return self.head(torch.stack(states, 1))


@architecture("lstm_by_hand", floats(2, 5, 6))
class LSTMByHand(nn.Module):
    """Gates from one Linear over input and state, split into four."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state = nn.Linear(6, 32), nn.Linear(8, 32, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.state.in_features)
        for step in x.unbind(1):
            i, f, g, o = (self.inputs(step) + self.state(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


@architecture("elman_by_hand", floats(2, 5, 6))
class ElmanByHand(nn.Module):
    """A state that is its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inputs(x[:, 0]).tanh()
        for step in x[:, 1:].unbind(1):
            h = torch.tanh(self.inputs(step) + self.state(h))
        return self.head(h)


@architecture("text_cnn", tokens(2, 9))
class TextCNN(nn.Module):
    """Embedding, convolutions of several widths, maxima over time, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.convolutions = nn.ModuleList(nn.Conv1d(8, 6, width) for width in (2, 3, 4))
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(x)).max(2).values for conv in self.convolutions], 1))


@architecture("wavenet", floats(2, 1, 20))
class WaveNet(nn.Module):
    """Gated dilated causal convolutions, residual and skip sums."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.filters = nn.ModuleList(nn.Conv1d(8, 10, 2, dilation=2**i) for i in range(3))
        self.gates = nn.ModuleList(nn.Conv1d(8, 10, 2, dilation=2**i) for i in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(10, 8, 1) for _ in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(10, 9, 1) for _ in range(3))
        self.first, self.last = nn.Conv1d(9, 9, 1), nn.Conv1d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), 0.0
        for i, (filters, gate) in enumerate(zip(self.filters, self.gates, strict=True)):
            padded = F.pad(x, (2**i, 0))
            y = torch.tanh(filters(padded)) * torch.sigmoid(gate(padded))
            total = total + self.skips[i](y)
            x = x + self.residuals[i](y)
        assert isinstance(total, Tensor)
        return self.last(F.relu(self.first(F.relu(total))))


@architecture("gated_conv", floats(2, 4, 12))
class GatedConv(nn.Module):
    """GLU over channels, dropout, strided and transposed convolutions over time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 16, 3, 2, 1), nn.ConvTranspose1d(8, 6, 2, 2)
        self.norm, self.last = nn.BatchNorm1d(6), nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.glu(self.first(x), 1), 0.1, self.training)
        return self.last(F.elu(self.norm(self.second(x))))


@architecture("depthwise_1d", floats(2, 12, 6))
class Conformer(nn.Module):
    """A conformer's convolution: pointwise, GLU, depthwise over time, BatchNorm, Swish, pointwise, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.up, self.depthwise = nn.Conv1d(8, 20, 1), nn.Conv1d(10, 10, 3, padding=1, groups=10)
        self.norm, self.down, self.head = nn.BatchNorm1d(10), nn.Conv1d(10, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = F.glu(self.up(x.transpose(1, 2)), 1)
        y = self.down(F.silu(self.norm(self.depthwise(y))))
        return self.head(x + y.transpose(1, 2))
