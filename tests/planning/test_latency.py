"""Budgets of time. Times are made up here: what a test measures by the clock depends on who else uses the machine."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import network
from torch import nn

import nac_gpu as nac
from nac_gpu.network.timing import seconds_in_turn
from nac_gpu.planning import latency
from nac_gpu.planning.latency import nearest


@given(st.floats(0.05, 0.98), st.floats(0.001, 0.3), st.floats(0.0, 0.6), st.floats(0.5, 2.0))
def test_the_largest_network_in_time_is_found(wanted: float, least: float, fixed: float, power: float) -> None:
    tried: dict[float, float] = {}

    def timed(share: float) -> float:
        assert least <= share <= 1
        tried[share] = fixed + (1 - fixed) * share**power
        return tried[share]

    if fixed + (1 - fixed) * least**power > wanted:
        with pytest.raises(ValueError, match=r"latency=.* cannot be met: with .* % of its operations"):
            nearest(wanted, least, timed)
        assert least in tried
        return
    found = nearest(wanted, least, timed)
    assert tried[found] <= wanted
    best = ((wanted - fixed) / (1 - fixed)) ** (1 / power)
    assert tried[found] >= 0.9 * wanted or best - found < 0.05
    assert found == max(share for share, time in tried.items() if time <= wanted)


def test_noise_may_cost_a_little_but_no_promise() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        tried: dict[float, float] = {}

        def timed(share: float, tried: dict[float, float] = tried) -> float:
            tried[share] = (0.2 + 0.8 * share) * math.exp(0.03 * generator.standard_normal())
            return tried[share]

        found = nearest(0.5, 0.01, timed)
        assert tried[found] <= 0.5
        assert 0.3 < found < 0.45  # 0.375 without noise


class Clock:
    """Seconds by operations: a tenth of a pass does not depend on them. The networks run all the same."""

    def __init__(self, inputs: torch.Tensor, fixed: float = 0.1) -> None:
        self.inputs, self.fixed = inputs, fixed
        self.networks: list[nn.Module] = []

    def __call__(self, model: nn.Module, small: nn.Module, inputs: Any, seconds: float) -> tuple[np.ndarray, ...]:
        assert inputs is self.inputs
        assert seconds > 0
        taken = seconds_in_turn(model, small, inputs, 0)
        assert [len(rounds) for rounds in taken] == [5, 5]
        self.networks.append(small)
        whole, kept = nac.cost(model, inputs).flops, nac.cost(small, inputs).flops
        return np.full(5, 0.001), np.full(5, 0.001 * (self.fixed + (1 - self.fixed) * kept / whole))


@pytest.mark.parametrize("name", ["vgg16", "residual", "conv1d"])
def test_a_plan_takes_the_time_that_it_may(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network(name)
    clock = Clock(inputs)
    monkeypatch.setattr(latency, "seconds_in_turn", clock)
    plan = nac.plan(model, inputs, latency=0.55, multiple_of=1, calibration="none")
    assert plan.after.flops <= 0.5 * plan.before.flops
    assert len(clock.networks) < latency._GUESSES
    timed = [nac.cost(small, inputs) for small in clock.networks]
    assert max(cost.flops for cost in timed if cost.flops <= 0.5 * plan.before.flops) == plan.after.flops
    taken = 100 * (0.1 + 0.9 * plan.after.flops / plan.before.flops)
    line = f"latency on the example inputs: 1 ms -> {taken / 100:.3g} ms ({taken:.1f} %), measured on cpu"
    assert any(line in change for change in plan.changes), plan.changes
    small = nac.compress(model, inputs, plan, calibration="none")
    assert nac.cost(small, inputs) == plan.after
    again = nac.compress(model, inputs, latency=0.55, multiple_of=1, calibration="none")
    assert nac.cost(again, inputs) == plan.after


def test_all_budgets_hold_together_and_widths_are_multiples_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network("vgg19")
    clock = Clock(inputs)
    monkeypatch.setattr(latency, "seconds_in_turn", clock)
    plan = nac.plan(model, inputs, latency=0.7, params=0.2, calibration="none")
    timed = [nac.cost(small, inputs) for small in clock.networks]
    assert len(timed) == len(set(timed))
    assert plan.after.parameters <= 0.2 * plan.before.parameters
    assert 0.1 + 0.9 * plan.after.flops / plan.before.flops <= 0.7
    assert all(width % 8 == 0 for width in plan.widths.values())


def test_what_no_width_makes_quick_enough_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network("vgg16")
    monkeypatch.setattr(latency, "seconds_in_turn", Clock(inputs, fixed=0.9))
    with pytest.raises(ValueError, match=r"latency=0.5 cannot be met: with 0\.\d % of its .* takes 90 % of the time"):
        nac.plan(model, inputs, latency=0.5, calibration="none", multiple_of=1)


@pytest.mark.parametrize("share", [1.5, 1, 0.0, True, float("nan")])
def test_it_is_a_share_of_the_models_own_time(share: Any) -> None:
    with pytest.raises(ValueError, match=r"latency=.*, expected the share of the model's own time"):
        nac.plan(*network("vgg16"), latency=share)
