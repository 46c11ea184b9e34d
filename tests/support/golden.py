"""Do two versions of the library make the same? Hashes of plans and compressed tensors of ten networks, by all rules.

    python tests/support/golden.py OUT.json        # with the version that is imported

A refactoring must not change one of them: run it before and after, on the same machine, and compare the files. It uses
public names only, so that it runs with either version. Five minutes on one core.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
import transformers
from torch import Tensor, nn

import nac_gpu as nac

Made = tuple[nn.Module, Any]


def _vgg() -> Made:
    layers = torchvision.models.vgg.make_layers([16, "M", 32, "M", 48, 48, "M"], batch_norm=True)
    head = nn.Sequential(nn.Flatten(), nn.Linear(48 * 4, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return nn.Sequential(layers, head), torch.randn(2, 3, 16, 16)


def _resnet() -> Made:
    made = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    made.layer4 = nn.Sequential()
    made.fc = nn.Linear(256, 10)
    return made, torch.randn(2, 3, 16, 16)


def _densenet() -> Made:
    made = torchvision.models.DenseNet(growth_rate=8, block_config=(2, 3, 2), num_init_features=16, num_classes=10)
    return made, torch.randn(2, 3, 16, 16)


def _shufflenet() -> Made:
    made = torchvision.models.ShuffleNetV2([1, 2, 1], [16, 24, 48, 64, 96], num_classes=10)
    return made, torch.randn(2, 3, 16, 16)


def _vit() -> Made:
    made = torchvision.models.VisionTransformer(16, 4, 2, 4, 64, 128, num_classes=10)
    nn.init.normal_(made.heads[0].weight)
    return made, torch.randn(2, 3, 16, 16)


_TEXT = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _llama() -> Made:
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT))
    return made, {"input_ids": torch.randint(64, (2, 12)), "use_cache": False}


def _mixtral() -> Made:
    made = transformers.MixtralForCausalLM(transformers.MixtralConfig(**_TEXT, num_local_experts=4))
    return made, {"input_ids": torch.randint(64, (2, 12)), "use_cache": False}


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(20, 48, 2, batch_first=True), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _lstm() -> Made:
    return _Lstm(), torch.randn(3, 7, 20)


def _block(read: int, made: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(read, made, 3, padding=1), nn.BatchNorm2d(made), nn.ReLU())


class _Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = _block(3, 16), _block(16, 32)
        self.up, self.last = nn.ConvTranspose2d(32, 16, 2, 2), _block(32, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        side = self.down(x)
        deep = self.up(self.deep(nn.functional.max_pool2d(side, 2)))
        return self.head(self.last(torch.cat([side, deep], 1)))


def _unet() -> Made:
    return _Unet(), torch.randn(2, 3, 16, 16)


def _mnist() -> Made:
    layers: list[nn.Module] = []
    for read, made, pool in ((1, 6, 0), (6, 6, 2), (6, 16, 0), (16, 16, 2), (16, 120, 2)):
        layers += [nn.Conv2d(read, made, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(pool)] if pool else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1080, 60), nn.ReLU(), nn.Linear(60, 10)), torch.randn(
        2, 1, 28, 28
    )


NETWORKS: dict[str, Callable[[], Made]] = {
    "vgg": _vgg,
    "resnet": _resnet,
    "densenet": _densenet,
    "shufflenet": _shufflenet,
    "vit": _vit,
    "llama": _llama,
    "mixtral": _mixtral,
    "lstm": _lstm,
    "unet": _unet,
    "mnist": _mnist,
}


def _varied(model: nn.Module) -> None:
    """Statistics that an untrained BatchNorm does not have."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.running_mean, -0.3), (module.running_var, 0.5), (module.weight, 0.5)):
                assert isinstance(tensor, Tensor), "it has statistics"
                tensor.data.uniform_(low, low + 1)


def _hash(*tensors: Tensor | str) -> str:
    found = hashlib.sha256()
    for value in tensors:
        found.update(value.encode() if isinstance(value, str) else value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _of_model(model: nn.Module) -> str:
    return _hash(*(part for name, tensor in model.state_dict().items() for part in (name, tensor)))


def main() -> None:
    """Write the hashes."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    for name, make in NETWORKS.items():
        torch.manual_seed(7)
        model, inputs = make()
        _varied(model)
        model.eval()
        start, own = time.perf_counter(), {}
        share = 0.97 if name == "mixtral" else 0.5
        plan = nac.plan(model, inputs, params=share)
        own["plan by budget"] = _hash(plan.to_json())
        own["planned"] = _of_model(nac.compress(model, inputs, plan, refine=2))
        own["by budget"] = _of_model(nac.compress(model, inputs, params=share, refine=2))
        own["plan by width"] = _hash(nac.plan(model, inputs, width=0.5).to_json())
        for rule in ("compensated", "restored", "centroid"):
            own[rule] = _of_model(nac.compress(model, inputs, width=0.5, rule=rule, refine=2))
        own["activations"] = _of_model(nac.compress(model, inputs, width=0.6, neurons="activations", refine=0))
        for neurons in ("folded", "weights"):
            own[neurons] = _of_model(nac.compress(model, inputs, width=0.6, neurons=neurons, calibration="none"))
        for method in ("kmeans", "random"):
            own[method] = _of_model(nac.compress(model, inputs, width=0.5, method=method, calibration="none"))
        own["none"] = _of_model(nac.compress(model, inputs, params=share, calibration="none"))
        found[name] = own
        print(f"{name:12} {time.perf_counter() - start:6.1f} s", flush=True)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
