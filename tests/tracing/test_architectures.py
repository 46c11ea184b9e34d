"""Hand-written networks of many kinds: plans never promise too much, whatever the network is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_shares import SHARES
from plans import prepared
from torch import nn

import nac_gpu as nac
from common.architectures import ARCHITECTURES
from common.checks import compressible_share, training_step
from nac_gpu.network.comparing import relative_error
from nac_gpu.network.unwrapping import computed
from nac_gpu.testing import floating_outputs, merge_copies, randomise
from nac_gpu.tracing.trace import record

pytestmark = pytest.mark.usefixtures("short_dreams")


def built(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    entry = ARCHITECTURES[name]
    return randomise(entry.build()).eval(), entry.inputs()


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plans_hold(name: str, tmp_path: Path) -> None:
    """Copies merge with no change; a network of half the width runs and trains; a file brings it back; its original is
    as it was.
    """
    model, inputs = built(name)
    before = floating_outputs(model, inputs)
    if SHARES[name] == 0:
        with pytest.raises(ValueError, match="nothing to compress: "):
            prepared(model, inputs)
        return
    plan = prepared(model, inputs)
    assert compressible_share(plan.model, plan.groups) >= SHARES[name]
    for seed in (1, 2):
        found = merge_copies(plan.model, inputs, plan.choices, seed)
        assert found.error < 1e-8
        assert not found.vacuous
    small = nac.compress(model, inputs, width=0.5, method="random")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert nac.cost(small, inputs) == plan.plan.after
    nac.save(small, tmp_path / "small.safetensors")
    loaded = nac.load(tmp_path / "small.safetensors", ARCHITECTURES[name].build)
    assert repr(loaded) == repr(small)
    assert relative_error(floating_outputs(loaded, inputs), floating_outputs(small, inputs)) == 0
    training_step(small, inputs)
    assert relative_error(floating_outputs(model, inputs), before) == 0


#: Added to channels that other weights make, or normalisation's: of those nothing is told.
BESIDE = {"cls", "positions", "norm.weight", "norm.bias"}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_weight_is_left_alone_in_silence(name: str) -> None:
    model, inputs = built(name)
    model, _ = computed(model)
    graph = record(model, inputs)
    told = {alone.layer for alone in graph.left_alone}
    told |= {member.tensor.removesuffix(".weight") for group in graph.groups for member in group.members}
    weights = {name for name, parameter in model.named_parameters() if parameter.ndim > 1} - BESIDE
    assert {name.removesuffix(".weight") for name in weights} <= told


def test_weights_that_are_flattened_are_told_of_with_what_to_do() -> None:
    model, inputs = built("attention_einsum")
    alone = {alone.layer: alone for alone in record(model, inputs).left_alone}
    assert list(alone) == ["head", "q", "k", "v", "o"]
    assert alone["q"].reason == "several dimensions of channels are flattened into one in EinsumAttention"
    assert alone["q"].remedy is not None
    assert alone["q"].remedy.startswith("multiply with a matrix, and give its result more dimensions")
    with pytest.raises(ValueError, match=r"nothing to compress: head .*; q \(9\): several dimensions"):
        nac.plan(model, inputs, width=0.5)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
def test_budgets_count_what_comes_out_where_sizes_had_to_be_guessed(share: float) -> None:
    model, inputs = built("attention_width_kept")
    plan = nac.plan(model, inputs, params=share, calibration="none")
    assert share - 0.1 < plan.after.parameters / plan.before.parameters <= share  # a head is 9 % of all parameters
    assert nac.cost(nac.compress(model, inputs, plan, calibration="none"), inputs) == plan.after


def test_the_smallest_possible_budget_is_met_and_told() -> None:
    model, inputs = built("attention_width_kept")
    with pytest.raises(ValueError, match="the smallest possible is ") as told:
        nac.plan(model, inputs, params=10, calibration="none")
    least = int(str(told.value).partition("possible is ")[2].partition(":")[0].replace(",", ""))
    assert nac.plan(model, inputs, params=least, calibration="none").after.parameters == least
    with pytest.raises(ValueError, match=f"params={least - 1} cannot be met, the smallest possible is {least:,}"):
        nac.plan(model, inputs, params=least - 1, calibration="none")


@pytest.mark.parametrize("name", ["shufflenet", "siamese", "style_gram", "gru"])
def test_a_plan_can_be_carried_out(name: str) -> None:
    """As it is, and after it was written and read."""
    model, inputs = built(name)
    plan = nac.plan(model, inputs, width=0.5)
    small = nac.compress(model, inputs, nac.Plan.from_json(plan.to_json()), method="random")
    assert nac.cost(small, inputs) == plan.after
