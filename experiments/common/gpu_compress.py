"""Whole compressions on a GPU: the CPU's result, what the host hears of, and how long the default takes."""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nac_gpu as nac
from common.device import peak, reset_peak
from common.gpu_times import profiled
from common.models import NETWORKS
from common.runner import Check
from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import call, evaluating

_TOLERANCE = 1e-6  # relative, of outputs in float64


class Recurrent(nn.Module):
    """An LSTM that reads sequences, and a linear layer behind its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(20, 48, num_layers=2, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, sequences: Tensor) -> Tensor:
        """[batch, steps, 20] to [batch, 10]."""
        return self.head(self.lstm(sequences)[0][:, -1])


def _images(count: int, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))


def _tokens(count: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(200, (count, 12), generator=torch.Generator().manual_seed(1))}


#: A network of each kind with random weights, of some width where it has any, and so many inputs.
MODELS: dict[str, tuple[Callable[[float], nn.Module], Callable[[int], Any]]] = {
    "VGG-16": (lambda width: NETWORKS["vgg16"](10, width), _images),
    "ResNet-18": (lambda width: NETWORKS["resnet18"](10, width), _images),
    "LSTM": (lambda _: Recurrent(), lambda n: torch.randn(n, 9, 20, generator=torch.Generator().manual_seed(1))),
    "Llama": (lambda _: _llama(), _tokens),
}


def compress_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """For each network: as on the CPU, by activations and by weights; the copies to the host of one compression."""
    for name in MODELS:
        for wanted in ({"width": 0.5}, {"params": 0.5, "multiple_of": 1}):
            words = ", ".join(f"{key}={value}" for key, value in wanted.items())
            yield f"{name}: {words}, as on the CPU", partial(_as_on_cpu, name, wanted, device, small)
        yield f"{name}: the same twice", partial(_twice, name, device, small)
        if device.type == "cuda":
            yield f"{name}: copies to the host", partial(_copies, name, device)


def default_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """How long the default takes, from the call to the smaller network: refinement and all."""
    if small:
        yield "ResNet-20, default", partial(_default, lambda: NETWORKS["resnet20"](10, 0.25), _images(2, 8), device)
        return
    yield "VGG-16, default", partial(_default, lambda: NETWORKS["vgg16"](10, 1.0), _images(2), device)
    yield "ResNet-50, default", partial(_default, _resnet50, _images(2, 224), device)


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


def _made(name: str, device: torch.device, small: bool) -> tuple[nn.Module, Any, list[Any]]:
    """A model in float64 on the device, example inputs and calibration batches."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make(0.05 if small else 0.25).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: not all channels alike
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert isinstance(value, Tensor), "BatchNorm has all four"
                value.uniform_(0.5, 1.5)

    def there(value: Any) -> Any:
        value = value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        return value.to(device) if isinstance(value, Tensor) else value

    example, batch = (pytree.tree_map(there, inputs(count)) for count in (2, 8 if small else 64))
    return model.to(device), example, [batch]


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluating(model):
        return [value.cpu() for value in tensors_in(call(model, inputs)) if value.is_floating_point()]


def _as_on_cpu(name: str, wanted: dict[str, Any], device: torch.device, small: bool) -> str:
    found = []
    for place in (device, torch.device("cpu")):
        model, example, batches = _made(name, place, small)
        before = copy.deepcopy(model.state_dict())
        result = nac.compress(model, example, **wanted, calibration=batches, refine=0)
        elsewhere = [key for key, value in result.state_dict().items() if value.device.type != place.type]
        assert not elsewhere, f"not on {place}: {elsewhere}"
        changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
        assert not changed, f"the model was changed: {changed}"
        shapes = {key: tuple(value.shape) for key, value in result.state_dict().items()}
        found.append((shapes, _outputs(result, batches[0])))
    (shapes, ours), (expected_shapes, theirs) = found
    differing = {key: (shape, expected_shapes[key]) for key, shape in shapes.items() if shape != expected_shapes[key]}
    assert not differing, f"other widths than on the CPU: {differing}"
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert error <= _TOLERANCE, f"outputs differ by {error:.1e} from those of the CPU's result"
    return f"outputs differ by {error:.1e}"


def _twice(name: str, device: torch.device, small: bool) -> str:
    """Without calibration, where every sum is ours: the same bits."""
    model, example, _ = _made(name, device, small)
    states = [nac.compress(model, example, width=0.5, calibration="none").state_dict() for _ in range(2)]
    differing = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
    assert not differing, f"other bits in {differing}"
    return f"{len(states[0])} tensors"


def _copies(name: str, device: torch.device) -> dict[str, Any]:
    model, example, batches = _made(name, device, small=False)
    return profiled(lambda: nac.compress(model, example, width=0.5, calibration=batches, refine=0))


def _default(make: Callable[[], nn.Module], example: Tensor, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make().to(device)
    example = example.to(device)
    reset_peak(device)
    start = time.perf_counter()
    result = nac.compress(model, example, params=0.5)
    found = float(sum(value.sum() for value in _outputs(result, example)))
    seconds = time.perf_counter() - start
    assert found == found, "its outputs are not numbers"
    return {"seconds": seconds, "peak, bytes": peak(device)}
