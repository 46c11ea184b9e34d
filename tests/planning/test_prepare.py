"""What was found out when a plan was made is found out once, and only used for the same model."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import network
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.calibration import gathering, inputs
from nac_gpu.network.state import fingerprint
from nac_gpu.planning import bench, prepare

pytestmark = pytest.mark.usefixtures("short_dreams")


class Counted:
    """How often the steps of a plan are taken, and how many forward passes a model makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, int] = {}
        for place, name in (
            (prepare, "recorded"),
            (bench.Bench, "attempt"),
            (inputs, "dream"),
            (gathering, "observe"),
        ):
            self._count(monkeypatch, place, name)

    def _count(self, monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
        real = getattr(place, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(place, name, counting)

    def taken(self) -> dict[str, int]:
        """The counts since the last call."""
        found, self.counts = self.counts, {}
        return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def passes(model: nn.Module) -> list[int]:
    """Counts the forward passes of the model and of its copies."""
    count = [0]

    def forward(*_: Any) -> None:
        count[0] += 1

    forward.__deepcopy__ = lambda _: forward  # type: ignore[attr-defined]  # copies of the model count, too
    model.register_forward_pre_hook(forward)
    return count


@pytest.mark.parametrize("how", [{"params": 0.5}, {"width": 0.5}], ids=["budget", "width"])
def test_a_plan_that_was_just_made_is_carried_out_without_finding_out_again(
    how: dict[str, Any], counted: Counted
) -> None:
    model, x = network("cnn")
    plan = nac.plan(model, x, **how)
    small = nac.compress(model, x, plan)
    found = counted.taken()
    assert found.pop("attempt") >= 1
    assert found == {"recorded": 1, "dream": 1, "observe": 1}
    fresh = nac.compress(model, x, nac.Plan.from_json(plan.to_json()))
    assert counted.taken() == {"recorded": 1, "attempt": 1, "dream": 1, "observe": 1}
    assert same(small, fresh)


def test_plan_and_compress_make_no_more_passes_than_compress_alone() -> None:
    model, x = network("cnn")
    count = passes(model)
    nac.compress(model, x, params=0.5, refine=0)
    alone, count[0] = count[0], 0
    plan = nac.plan(model, x, params=0.5)
    nac.compress(model, x, plan, refine=0)
    assert count[0] == alone


def changed_weight(model: nn.Module, x: Tensor) -> Tensor:
    next(model.parameters()).data.view(-1)[3] += 1e-3  # which no version counter notices
    return x


def changed_buffer(model: nn.Module, x: Tensor) -> Tensor:
    next(iter(model.buffers())).data[0] += 1e-3
    return x


def changed_attribute(model: nn.Module, x: Tensor) -> Tensor:
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eps = 1e-3
    return x


def changed_hook(model: nn.Module, x: Tensor) -> Tensor:
    model.register_forward_hook(lambda *_: None)
    return x


def changed_inputs(model: nn.Module, x: Tensor) -> Tensor:
    return x[:1]


def nothing(model: nn.Module, x: Tensor) -> Tensor:
    model.train()
    return x.clone()


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (nothing, 0),
        (changed_weight, 1),
        (changed_buffer, 1),
        (changed_attribute, 1),
        (changed_hook, 1),
        (changed_inputs, 1),
    ],
)
def test_whatever_changed_is_found_out_again(change: Any, again: int, counted: Counted) -> None:
    model, x = network("vgg16")
    plan = nac.plan(model, x, params=0.5, calibration="none")
    counted.taken()
    x = change(model, x)
    small = nac.compress(model, x, plan, calibration="none")
    assert counted.taken().get("recorded", 0) == again
    assert small.training == model.training


@pytest.mark.parametrize("kept", [True, False], ids=["the same data", "other data"])
def test_evidence_is_used_for_the_same_calibration_only(kept: bool, counted: Counted) -> None:
    model, x = network("cnn")
    data = [torch.randn(8, *x.shape[1:])]
    plan = nac.plan(model, x, params=0.5, calibration=data)
    counted.taken()
    nac.compress(model, x, plan, calibration=data if kept else [data[0].clone()], seed=1)
    assert counted.taken() == ({} if kept else {"observe": 1})


def test_other_dreams_are_dreamed_for_another_seed(counted: Counted) -> None:
    model, x = network("cnn")
    plan = nac.plan(model, x, params=0.5)
    counted.taken()
    nac.compress(model, x, plan, seed=1)
    assert counted.taken() == {"dream": 1, "observe": 1}


def test_the_memory_goes_when_the_plan_is_carried_out_and_with_no_copy() -> None:
    model, x = network("cnn")
    plan = nac.plan(model, x, params=0.5)
    kept = set(vars(plan)) - set(plan.__dataclass_fields__)
    assert kept
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), replace(plan)):
        assert not kept & set(vars(other))
        assert other == plan
    small = nac.compress(model, x, plan, refine=0)
    assert not kept & set(vars(plan))
    assert not kept & set(vars(small._nac_gpu_origin.plan))  # type: ignore[union-attr]


def test_only_the_latest_plan_remembers() -> None:
    model, x = network("cnn")
    first = nac.plan(model, x, width=0.5)
    assert vars(first).keys() > set(first.__dataclass_fields__)
    second = nac.plan(model, x, width=0.25)
    assert vars(first).keys() == set(first.__dataclass_fields__)
    assert vars(second).keys() > set(second.__dataclass_fields__)


class Odd(nn.Module):
    """Has tensors of kinds that are rarely seen."""

    def __init__(self, odd: Tensor) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
        self.register_buffer("odd", odd)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(0),
        torch.ones(3, dtype=torch.bool),
        torch.randn(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.bfloat16).reshape(1, 2),
    ],
    ids=["empty", "bool", "complex", "bfloat16"],
)
def test_tensors_of_any_kind(odd: Tensor, counted: Counted) -> None:
    model, x = Odd(odd), torch.randn(2, 8)
    plan = nac.plan(model, x, width=0.5)
    counted.taken()
    small = nac.compress(model, x, plan, calibration="none")
    assert "record" not in counted.taken()
    assert small.first.out_features == 16


def test_without_a_checksum_there_is_no_fingerprint() -> None:
    x = torch.randn(2, 8)
    assert fingerprint(Odd(torch.ones(3).to_sparse()), x) is None
    model = Odd(torch.ones(3))
    assert fingerprint(model, x) == fingerprint(copy.deepcopy(model), x.clone()) is not None
