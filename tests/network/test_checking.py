"""What cannot be compressed is named, with what to do instead."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.network.checking import check_model

INPUTS = torch.randn(4, 6)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def quantised(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


def traced(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, INPUTS)


def frozen(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(scripted(module))


def sparse(module: nn.Sequential) -> nn.Module:
    module[0].weight = nn.Parameter(module[0].weight.detach().to_sparse())
    return module


def forward(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scripted(perceptron()), r"model is a ScriptModule \(Sequential\).*compress the Python module"),
        (lambda: traced(perceptron()), r"model is a ScriptModule \(Sequential\)"),
        (lambda: frozen(perceptron()), r"model is a ScriptModule"),
        (lambda: torch.export.export(perceptron(), (INPUTS,)), r"ExportedProgram, expected .*program\.module\(\)"),
        (lambda: forward, r"model is the function forward, expected a torch\.nn\.Module; put its layers"),
        (lambda: nn.Linear, r"model is the class Linear, expected a torch\.nn\.Module; make one: Linear\(\.\.\.\)"),
        (lambda: perceptron().state_dict(), r"OrderedDict, expected a torch\.nn\.Module; build the module and load"),
        (lambda: "model.pt", r"model is of the type str, expected .*; load it first"),
        (lambda: Path("model.pt"), r"expected .*; load it first"),
        (lambda: None, r"model is None, expected a torch\.nn\.Module"),
        (lambda: nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 3)), r"0\.weight has no shape yet.*LazyLinear"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.LazyBatchNorm1d()), r"1\.weight has no shape yet.*call the model"),
        (lambda: sparse(perceptron()), r"0\.weight has the layout sparse_coo, expected a dense tensor"),
    ],
)  # fmt: skip
def test_what_is_no_model(make: Any, message: str) -> None:
    model = make()
    for run in (nac.plan, nac.compress):
        with pytest.raises(TypeError, match=message):
            run(model, INPUTS, width=0.5, calibration="none")
    with pytest.raises(TypeError, match=message):
        nac.merge_experts(model, INPUTS, 0.5)


def test_parameters_without_values() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device and has no values.*load them"):
        nac.plan(perceptron().to("meta"), INPUTS, width=0.5)


class FullyShardedDataParallel(nn.Module):
    """Stands for the class of that name, which asks for a process group."""


def test_flat_parameters() -> None:
    with pytest.raises(TypeError, match=r"1 is in FullyShardedDataParallel.*fully_shard"):
        check_model(nn.Sequential(nn.Linear(6, 6), FullyShardedDataParallel()))


def test_quantised_layers_are_named_and_the_others_compressed() -> None:
    with pytest.raises(ValueError, match=r"nothing to compress: 0 \(16\): it is quantised: compress the model before"):
        nac.plan(quantised(perceptron()), INPUTS, width=0.5)
    model = perceptron()
    model[4] = quantised(nn.Sequential(model[4]))
    plan = nac.plan(model, INPUTS, width=0.5)
    assert plan.widths == {"0": 8}
    assert ("4.0", 3) in {(alone.layer, alone.size) for alone in plan.left_alone if "quantised" in alone.reason}


def test_scripted_parts_are_named_and_the_others_compressed() -> None:
    model = perceptron()
    model[1] = scripted(nn.GELU())
    assert nac.plan(model, INPUTS, width=0.5).widths == {"0": 8, "2": 6}
    model = perceptron()
    model[4] = scripted(model[4])
    plan = nac.plan(model, INPUTS, width=0.5)
    assert plan.widths == {"0": 8}
    assert "left alone: 4 (3): it is inside a ScriptModule, whose code is compiled" in str(plan)


@pytest.mark.parametrize("make", [torch.fx.symbolic_trace, lambda m: torch.export.export(m, (INPUTS,)).module()])
def test_graph_modules_are_compressed(make: Any) -> None:
    assert nac.plan(make(perceptron()), INPUTS, width=0.5).widths == {"0": 8, "2": 6}


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_statistics_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    getattr(model[1], name)[2] = value
    with pytest.raises(ValueError, match=rf"1\.{name} has 1 values .*, expected finite statistics"):
        nac.plan(model, torch.randn(1, 3, 8, 8), width=0.5)
