"""The trial's precision: float32 where it tells, float64 where it does not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.planning import bench
from nac_gpu.planning.trial import Trial
from nac_gpu.tracing.graph import Choice
from nac_gpu.tracing.trace import record


class Amplifies(nn.Module):
    """What float32 rounds away is seen in the outputs, the more the larger the factor."""

    def __init__(self, factor: float, *, in_double: bool = True, flaw: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 4)
        self.factor, self.in_double, self.flaw = factor, in_double, flaw

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64 and not self.in_double:
            raise RuntimeError("not implemented for 'Double'")
        x = self.first(x).relu()
        return (self.last(x * (1 + self.flaw * x.shape[1])) * self.factor).sin()


def tried(model: Amplifies) -> tuple[str | None, list[torch.dtype]]:
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=next(model.parameters()).dtype)
    (group,) = record(model, inputs).groups
    types: list[torch.dtype] = []
    model.register_forward_pre_hook(lambda _, args: types.append(args[0].dtype))  # copies keep it
    refused = Trial(model, inputs).run([Choice(group, 32)]).refused
    return refused[0].reason if refused else None, types


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_float32_is_enough_where_outputs_agree() -> None:
    why, types = tried(Amplifies(1.0, in_double=False))
    assert why is None
    assert set(types) == {torch.float32}


def test_float64_tells_rounding_from_a_difference() -> None:
    why, types = tried(Amplifies(1e4))
    assert why is None
    assert types[-1] == torch.float64


def test_a_difference_is_told_in_float64() -> None:
    why, types = tried(Amplifies(1.0, flaw=1e-5))
    assert why is not None
    assert "changed the outputs" in why
    assert types[-1] == torch.float64


def test_a_small_difference_is_told_from_rounding() -> None:
    why, types = tried(Amplifies(1.0, flaw=1.5e-7))  # 5e-6 of the outputs, which float32 could make in a deep network
    assert why is not None
    assert types[-1] == torch.float64


def test_without_float64_rounding_is_allowed_for() -> None:
    why, types = tried(Amplifies(600.0, in_double=False))
    assert why is None
    assert [types[0], types[-1]] == [torch.float32] * 2
    assert torch.float64 in types
    why, _ = tried(Amplifies(1e4, in_double=False))
    assert why is not None


def test_models_in_float64_are_tried_in_float64() -> None:
    why, types = tried(Amplifies(1.0, flaw=1e-9).double())
    assert why is not None
    assert set(types) == {torch.float64}


class TurnsIntoNaN(nn.Module):
    """Divides zero by zero as soon as it has fewer channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        flaw = x.new_tensor(float(x.shape[1] // 64))
        return self.last(x) * (flaw / flaw)


def test_outputs_that_become_nan_are_a_difference() -> None:
    why, _ = tried(TurnsIntoNaN())  # type: ignore[arg-type]
    assert why is not None
    assert "changed the outputs (relative error inf)" in why


class Blocks(nn.Module):
    """Several blocks, some of which depend on their number of channels, or do not run with another."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        self.kinds = kinds
        self.ups = nn.ModuleList(nn.Linear(8, 32) for _ in kinds)
        self.downs = nn.ModuleList(nn.Linear(32, 8) for _ in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for kind, up, down in zip(self.kinds, self.ups, self.downs, strict=True):
            hidden = up(x).relu()
            if kind == "d":
                hidden = hidden * (hidden.shape[-1] / 32)
            elif kind == "f":
                hidden = hidden.view(-1, 4, 8).flatten(1)
            x = x + down(hidden)
        return x


@pytest.mark.parametrize("kinds", ["....", "f...", "ffff", "..d.", "d.f.", ".fff..dd", "dddddd"])
def test_each_failing_group_costs_few_passes(kinds: str) -> None:
    model, inputs = Blocks(kinds), torch.randn(4, 8)
    groups = record(model, inputs).groups
    assert len(groups) == len(kinds)
    trial = Trial(model, inputs)
    outcome = trial.run([Choice(group, group.size // 2) for group in groups])
    bad = {f"ups.{number}" for number, kind in enumerate(kinds) if kind != "."}
    assert {alone.layer for alone in outcome.refused} == bad
    assert len(outcome.choices) == len(kinds) - len(bad)
    # One pass finds the cause of each failure. Where only outputs differ, it takes a stricter dtype and a closer look.
    assert trial.attempts <= 1 + 2 * ("d" in kinds) + len(bad)


def test_a_failure_that_is_seen_late_is_found_too() -> None:
    class Late(nn.Module):
        """The number of channels of the first layer is used outside of any layer, at the end."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8 if not n else 16, 16) for n in range(5))
            self.last = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            width = None
            for layer in self.layers:
                x = layer(x).tanh()
                width = width or x.shape[-1]
            return self.last(x) * width

    model, inputs = Late(), torch.randn(4, 8)
    outcome = Trial(model, inputs).run([Choice(group, 8) for group in record(model, inputs).groups])
    assert [alone.layer for alone in outcome.refused] == ["layers.0"]
    assert len(outcome.choices) == 4


@pytest.mark.parametrize("rule", ["centroid", "restored", "compensated"])
def test_the_trial_merges_by_the_rule_that_will_merge(monkeypatch: pytest.MonkeyPatch, rule: Any) -> None:
    rules: list[str] = []
    merged = bench.merged

    def seen(state: Any, choices: Any, labels: Any, deviation: Any) -> dict[str, Tensor]:
        rules.append(deviation)
        return merged(state, choices, labels, deviation)

    monkeypatch.setattr(bench, "merged", seen)
    nac.compress(Blocks("..").eval(), torch.randn(4, 8), width=0.5, rule=rule, calibration="none")
    assert set(rules) == {"centroid" if rule == "centroid" else "restored"}


class Partial(nn.Module):
    """A layer for some of the channels; no tensor of it belongs to the others, whose number it keeps (FasterNet)."""

    def __init__(self, part: int, rest: int) -> None:
        super().__init__()
        self.part, self.untouched = part, rest
        self.layer = nn.Linear(part, part)

    def forward(self, x: Tensor) -> Tensor:
        part, rest = x.split([self.part, self.untouched], -1)
        return torch.cat([self.layer(part), rest], -1)


def test_a_module_that_fails_may_keep_a_size_of_layers_elsewhere() -> None:
    model = nn.Sequential(
        nn.Linear(8, 40), nn.Sequential(Partial(10, 30), nn.Tanh(), Partial(10, 30)), nn.Linear(40, 3)
    )
    small = nac.compress(model.eval(), torch.randn(4, 8), width=0.5, calibration="none")
    assert small[0].out_features == 20  # type: ignore[union-attr]
    assert [(part.part, part.untouched) for part in small.modules() if isinstance(part, Partial)] == [(5, 15)] * 2
    nac.testing.check_copies(model, torch.randn(4, 8))
