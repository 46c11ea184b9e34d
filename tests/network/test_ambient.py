"""Modes of PyTorch that a caller has set: they change no result, and are set again at the end."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac


@contextlib.contextmanager
def default(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "no gradients": lambda: torch.set_grad_enabled(False),
    "float64": lambda: default(torch.float64),
    "bfloat16": lambda: default(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "meta by default": lambda: default(device="meta"),
    "deterministic": deterministic,
}


def modes() -> tuple[object, ...]:
    """All modes that a test sets."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
    )


def perceptron() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(4, 6)


def convolutions() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 3)]
    return nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)


def made(build: Callable[[], tuple[nn.Module, Tensor]], mode: AbstractContextManager[object]) -> list[object]:
    """Plans and tensors of smaller models, as made within a mode."""
    model, inputs = build()
    batches = [inputs + 1, inputs * 2]
    with mode:
        before = modes()
        by_batches = nac.compress(model, inputs, width=0.5, calibration=batches, refine=1)
        plan = nac.plan(model, inputs, params=0.6)
        planned = nac.compress(model, inputs, plan, refine=1)
        copies = nac.testing.check_copies(model, inputs)
        found = [plan.to_json(), nac.cost(model, inputs), copies.error < 1e-8]
        assert modes() == before
    tensors = [value for small in (by_batches, planned) for value in small.state_dict().values()]
    assert not any(value.is_inference() for value in tensors)
    return [*found, *tensors]


@cache
def expected_of(build: Callable[[], tuple[nn.Module, Tensor]]) -> list[object]:
    return made(build, contextlib.nullcontext())


@pytest.mark.usefixtures("short_dreams")
@pytest.mark.parametrize(
    ("build", "mode"),
    [
        *((perceptron, mode) for mode in MODES),
        *((convolutions, mode) for mode in ("inference", "autocast", "bfloat16", "meta")),
    ],
)
def test_no_mode_changes_a_result(build: Callable[[], tuple[nn.Module, Tensor]], mode: str) -> None:
    expected, found = expected_of(build), made(build, MODES[mode]())
    assert expected[:3] == found[:3]
    for before, after in zip(expected[3:], found[3:], strict=True):
        assert torch.equal(before, after)  # type: ignore[arg-type]


noted: set[tuple[torch.dtype, str]] = set()


class Noting(nn.Module):
    """A module that notes the caller's defaults wherever it runs, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        noted.add((torch.get_default_dtype(), torch.get_default_device().type))
        if self.fails:
            raise RuntimeError("it fails")
        return self.last(self.first(x))


class Loader:
    """Batches that need the caller's default dtype."""

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(2):
            assert torch.get_default_dtype() == torch.float64
            yield torch.ones(4, 6, device="cpu").float()


def test_modules_and_loaders_run_under_the_callers_defaults() -> None:
    model = Noting().eval()
    noted.clear()
    before = modes()
    with default(torch.float64, "meta"):
        nac.compress(model, torch.ones(4, 6, dtype=torch.float32, device="cpu"), width=0.5, calibration=Loader())
        assert noted == {(torch.float64, "meta")}
        model.fails, inside = True, modes()
        with pytest.raises(RuntimeError, match="it fails"):
            nac.plan(model, torch.ones(4, 6, dtype=torch.float32, device="cpu"), width=0.5)
        assert modes() == inside
    assert modes() == before
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


def test_models_inputs_and_batches_made_in_inference_mode() -> None:
    """They are copied: PyTorch saves nothing of inference mode for the backward pass."""
    expected = expected_of(perceptron)
    with torch.inference_mode():
        model, inputs = perceptron()
        batches = [inputs + 1, inputs * 2]
        small = nac.compress(model, inputs, width=0.5, calibration=batches, refine=1)
    outside = nac.compress(model, inputs, width=0.5, calibration=batches, refine=1)
    for own, other, value in zip(
        small.state_dict().values(), outside.state_dict().values(), expected[3:], strict=False
    ):
        assert torch.equal(own, value)  # type: ignore[arg-type]
        assert torch.equal(other, value)  # type: ignore[arg-type]
    small(inputs.clone()).sum().backward()
    with pytest.raises(ValueError, match=r"made in inference mode and cannot be trained; use copy\.deepcopy"):
        nac.finetune(model, [(inputs, torch.zeros(4, dtype=torch.int64))])
    nac.finetune(copy.deepcopy(model), [(inputs, torch.zeros(4, dtype=torch.int64))])


@pytest.mark.parametrize("mode", MODES)
def test_training_within_a_mode(mode: str) -> None:
    trained = []
    for context in (contextlib.nullcontext(), MODES[mode]()):
        model, inputs = perceptron()
        with context:
            data = [(inputs.clone(), torch.zeros(4, dtype=torch.int64, device="cpu"))]
            if torch.is_autocast_enabled("cpu"):
                model(inputs)  # casts of the weights are kept until autocast ends
            nac.finetune(model, data, epochs=3, precision="float32", learning_rate=0.1)
            if torch.is_autocast_enabled("cpu"):
                assert torch.equal(model(inputs), copy.deepcopy(model)(inputs)), "of the weights as they are now"
        trained.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("mode", ["inference", "autocast", "float64"])
def test_reports_and_exports_within_a_mode(mode: str, tmp_path: Path) -> None:
    model, inputs = perceptron()
    small = nac.compress(model, inputs, width=0.5, calibration="none")
    with warnings.catch_warnings(), MODES[mode]():
        inputs = inputs.clone()
        assert nac.report(model, small, inputs, calibration="none", timed={}).plan.widths == {"0": 8}
        assert nac.export(small, tmp_path / "small.pt2", inputs) < 1e-4
