"""Models and examples as they come from training: odd attributes, several dtypes, examples of one step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Leaves(nn.Module):
    """Leaves tensors with a graph behind in training: in an attribute, in containers, and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.history: dict[str, list[Tensor]] = {"hidden": []}
        self.register_buffer("state", torch.zeros(16), persistent=False)
        self.state: Tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        if self.training:
            self.penalty = hidden.abs().mean()
            self.history["hidden"].append(hidden)
            self.state = 0.9 * self.state + 0.1 * hidden.mean(0)
        return self.last(hidden)


def test_what_training_left_behind_keeps_no_model_from_being_copied() -> None:
    model = Leaves()
    for _ in range(2):
        model(X).sum().backward()
    small = nac.compress(model.eval(), X, width=0.5, calibration="none")
    assert small(X).shape == (4, 3)
    assert model.penalty.grad_fn is not None
    assert model.history["hidden"][0].grad_fn is not None


class Steps(nn.Module):
    """A recurrent layer by hand, with the steps along some dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reads, self.again, self.last, self.dim = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3), dim

    def forward(self, x: Tensor) -> Tensor:
        steps = x.unbind(self.dim)
        hidden = torch.zeros(len(steps[0]), self.again.in_features)
        for step in steps:
            hidden = (self.reads(step) + self.again(hidden)).tanh()
        return self.last(hidden)


class Compares(nn.Module):
    """Every input of the batch is compared with the one before, through a layer of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x[:1]).relu()]
        for number in range(1, len(x)):
            found.append((self.pair(found[-1]) + self.first(x[number : number + 1])).relu())
        return self.last(torch.cat(found))


class Recurrent(nn.Module):
    """A recurrent layer of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0])


@pytest.mark.parametrize(
    ("model", "one", "several"),
    [
        (Steps(1), X[:, None], torch.randn(4, 3, 6)),
        (Steps(0), X[None], torch.randn(3, 4, 6)),
        (Steps(1), X[:1, None], torch.randn(2, 3, 6)),
        (Compares(), X[:1], X),
        (Recurrent(), X[None], torch.randn(3, 4, 6)),
    ],
    ids=["steps", "steps first", "one input of one step", "batch", "lstm"],
)
def test_an_example_of_one_step_tells_what_several_do(model: nn.Module, one: Tensor, several: Tensor) -> None:
    small = nac.compress(model, one, width=0.5, calibration="none")
    assert small(several).shape == model(several).shape
    assert {name: tuple(value.shape) for name, value in small.named_parameters()} == {
        name: tuple(value.shape)
        for name, value in nac.compress(model, several, width=0.5, calibration="none").named_parameters()
    }


def test_a_second_example_is_named_where_it_mattered() -> None:
    plan = nac.plan(Steps(1), X[:, None], width=0.5)
    assert any("tried with larger inputs, too" in line and "(4, 2, 6)" in line for line in plan.changes)
    assert plan.widths == {"reads": 8}
    assert plan.before.flops == nac.cost(Steps(1), X[:, None]).flops  # of the example that was given
    assert not nac.plan(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), X[:1], width=0.5).changes


class Casts(nn.Module):
    """A layer of 16 bits, with casts in the code."""

    def __init__(self, dtype: torch.dtype, *, checks: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16).to(dtype), nn.Linear(16, 3)
        self.dtype, self.checks = dtype, checks

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.dtype))
        if self.checks and x.dtype != self.dtype:
            raise TypeError(f"expected {self.dtype}")
        return self.last(x.relu().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checks", [False, True], ids=["casts", "insists on its dtype"])
def test_models_of_several_dtypes_are_tried(dtype: torch.dtype, checks: bool) -> None:
    model = Casts(dtype, checks=checks)
    plan = nac.plan(model, X, width=0.5)
    assert plan.widths == {"first": 8}
    small: Any = nac.compress(model, X, plan, calibration="none")
    assert (small.first.weight.dtype, small.last.weight.dtype) == (dtype, torch.float32)
    assert small(X).shape == (4, 3)


def test_float64_in_the_code_is_no_difference() -> None:
    class Double(nn.Module):
        """Computes a part in float64, as code for geometry does."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).double().softmax(0).to(torch.float32)
            return self.last(x) + torch.zeros(3)

    assert nac.plan(Double(), X, width=0.5).widths == {"first": 8}


class Normalised(nn.Module):
    """BatchNorm cannot be trained on one value for each channel, but the model runs in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.unused = nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def test_a_pass_that_fails_in_training_mode_refuses_nothing() -> None:
    assert nac.plan(Normalised(), X[:1], width=0.5).widths == {"first": 8}


class RemembersBias(nn.Module):
    """Attention whose bias is looked up once in eval mode, as LeViT's; setting the mode forgets it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(4, 9))
        self.num_heads = 4
        self.known: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "RemembersBias":
        super().train(mode)
        self.known = {}
        return self

    def bias(self, steps: int) -> Tensor:
        place = (torch.arange(steps)[:, None] - torch.arange(steps)).abs()
        if self.training:
            return self.table[:, place]
        if "cpu" not in self.known:
            self.known["cpu"] = self.table[:, place]
        return self.known["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 2 + self.bias(t)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, -1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("calibration", ["none", "random"])
def test_what_a_model_remembers_of_its_weights_is_not_handed_on(calibration: str) -> None:
    x = torch.randn(2, 9, 6)
    model = nn.Sequential(nn.Linear(6, 16), RemembersBias(), nn.Linear(16, 3)).eval()
    model(x)
    assert model[1].known
    batches: Any = "none" if calibration == "none" else [torch.randn(8, 9, 6)]
    small = nac.compress(model, x, width={"1.qkv": 2}, calibration=batches, refine=3)
    assert small[1].num_heads == 2  # type: ignore[index, union-attr]
    found = small(x)
    assert torch.equal(found, small.eval()(x))
    assert model[1].known


def test_modes_of_parts_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3)).train()
    model[1].eval()
    small = nac.compress(model, X, width=0.5, calibration="none")
    assert [part.training for part in small.modules()] == [part.training for part in model.modules()]
