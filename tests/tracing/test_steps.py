"""Recurrent layers are recorded on few of their steps; the record is that of all steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nac_gpu.network.counting import cost
from nac_gpu.network.running import ExampleInputs
from nac_gpu.tracing import steps
from nac_gpu.tracing.graph import Graph
from nac_gpu.tracing.trace import record


class Speech(nn.Module):
    """A recurrent network; `stops` reads a value of the recurrent layer's outputs on the host."""

    def __init__(self, kind: str, *, stops: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding, self.begin, self.stops = nn.Linear(5, 12), nn.Linear(5, 8), stops
        self.rnn = getattr(nn, kind)(12, 8, **options)
        self.hidden = nn.Linear(8 * (1 + self.rnn.bidirectional), 6)
        self.last = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        time = 1 if self.rnn.batch_first else 0
        first = self.begin(x.select(time, 0)).expand(self.rnn.num_layers * (1 + self.rnn.bidirectional), -1, -1)
        first = first.contiguous()
        states, last = self.rnn(self.embedding(x).relu(), (first, first) if self.rnn.mode == "LSTM" else first)
        last = last[0] if isinstance(last, tuple) else last
        if self.stops and float(states.detach().square().mean()) > 0:
            states = states.tanh()
        return self.head(self.hidden(states).sum(time) + self.last(last[-1]))


class AcrossChannels(nn.Module):
    """A recurrent layer whose steps are the channels of another."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.rnn, self.head = nn.Linear(5, 12), nn.LSTM(9, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.wide(x).mT)[0])


class Packed(nn.Module):
    """Sequences of several lengths."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([11, 9, 6, 5]), enforce_sorted=True)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])[0])


def in_all_steps(monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: ExampleInputs) -> Graph:
    with monkeypatch.context() as patch:
        patch.setattr(steps, "STEPS", 10**6)
        return record(model, inputs)


def assert_same_record(found: Graph, expected: Graph) -> None:
    def told(graph: Graph) -> Any:
        groups = [
            (g.name, g.size, [(m.tensor, m.dim, m.role, m.index.tolist()) for m in g.members]) for g in graph.groups
        ]
        return groups, graph.left_alone, graph.flops, graph.operations

    assert told(found) == told(expected)


@pytest.mark.parametrize("stops", [False, True], ids=["shapes", "values"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_few_steps_tell_as_much_as_all(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any], stops: bool
) -> None:
    torch.manual_seed(0)
    model, x = Speech(kind, stops=stops, **options).eval(), torch.randn(11, 9, 5)
    graph = record(model, x)
    assert_same_record(graph, in_all_steps(monkeypatch, model, x))
    assert graph.flops == cost(model, x).flops
    assert {group.size for group in graph.groups} >= ({6, 12} if stops else {6, 8, 12})


@pytest.mark.parametrize(
    "model", [AcrossChannels(), Packed(nn.GRU(5, 8)), Packed(nn.LSTM(5, 8))], ids=["across", "gru", "lstm"]
)
def test_steps_that_differ_are_all_recorded(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    x = torch.randn(11, 4, 5) if isinstance(model, Packed) else torch.randn(3, 9, 5)
    assert_same_record(record(model.eval(), x), in_all_steps(monkeypatch, model, x))


def test_a_long_sequence_takes_no_more_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    apply = record.__globals__["apply"]
    monkeypatch.setitem(record.__globals__, "apply", lambda notes, call: (calls.append(1), apply(notes, call))[1])
    model = nn.Sequential(nn.LSTM(5, 8, num_layers=2))
    counts = []
    for length in (10, 1_000):
        calls.clear()
        record(model, torch.randn(length, 2, 5))
        counts.append(len(calls))
    assert counts[0] == counts[1]
