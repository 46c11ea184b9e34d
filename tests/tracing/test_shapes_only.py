"""A record in outline says what a record with all values says, and is given up where values are needed."""

import pytest
import torch
from networks import NETWORKS, network
from torch import Tensor, nn

from nac_gpu.network.running import call, evaluating
from nac_gpu.tracing import trace
from nac_gpu.tracing.graph import Graph, Group
from nac_gpu.tracing.shapes_only import Outline, ValuesNeededError
from nac_gpu.tracing.trace import record


class NoOutline(Outline):
    def __call__(self, func, args, kwargs):
        self.failed = True
        raise ValuesNeededError


class Watched(Outline):
    """Remembers all that were made."""

    made: list["Watched"] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.made.append(self)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    monkeypatch.setattr(Watched, "made", [])
    monkeypatch.setattr(trace, "Outline", Watched)
    return Watched.made


def told(graph: Graph) -> object:
    def of(group: Group) -> object:
        members = [(m.tensor, m.dim, m.role, m.index.tolist()) for m in group.members]
        return group.name, group.size, members, group.units, group.norms, [of(other) for other in group.otherwise]

    return [of(group) for group in graph.groups], graph.left_alone, graph.flops, graph.operations, graph.auxiliary


class Recurrent(nn.Module):
    """Sequences are transposed in place inside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x)[0][:, -1])


def same_with_values(model: nn.Module, inputs: object, monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(record(model, inputs))  # type: ignore[arg-type]
    monkeypatch.setattr(trace, "Outline", NoOutline)
    assert found == told(record(model, inputs))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
def test_an_outline_tells_what_values_tell(name: str, watched: list[Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network(name)
    same_with_values(model, inputs, monkeypatch)
    assert not watched[0].failed


def test_shapes_that_change_in_place(watched: list[Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    same_with_values(Recurrent(), torch.randn(2, 5, 4), monkeypatch)
    assert not watched[0].failed


class Decides(nn.Module):
    """The second layer runs in one case only: by a number, a mask or an index; the error may be caught."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "number":
            run = float(x.square().sum()) > 0
        elif self.how == "caught":
            try:
                run = bool((x == x).all())
            except RuntimeError:
                run = False
        elif self.how == "mask":
            run = len(x[x.square().sum(1) > 0]) > 0
        else:
            run = int(torch.zeros(9, dtype=torch.int64).index_select(0, x.argmax(1))[0]) == 0
        return self.last(self.second(x).relu() if run else x)


@pytest.mark.parametrize("how", ["number", "caught", "mask", "index"])
def test_values_that_decide_are_computed(how: str, watched: list[Watched]) -> None:
    graph = record(Decides(how), torch.randn(2, 3))
    assert watched[0].failed
    assert "second" in [group.name for group in graph.groups]


class Keeps(nn.Module):
    """Keeps what it computes: in an attribute, and in a buffer that it writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("written", torch.zeros(2, 8))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(self.table(torch.eye(4)))
        self.written.copy_(self.first(x))  # type: ignore[operator]
        return self.last(self.first(x) + self.kept[0].sum(0))


def test_what_the_model_keeps_has_values(watched: list[Watched]) -> None:
    model, inputs = Keeps(), torch.randn(2, 4)
    record(model, inputs)
    assert not watched[0].failed
    assert not model.kept
    with evaluating(model):
        expected = call(model, inputs)
        assert torch.equal(expected, model.last(model.first(inputs) + model.table(torch.eye(4)).sum(0)))


def test_errors_of_the_forward_pass_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"do not fit the forward pass: 1 raised RuntimeError: .*mat1 and mat2"):
        record(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), torch.randn(1, 3))
