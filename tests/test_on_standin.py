"""The library on a stand-in for CUDA: everything stays on the device, gives the CPU's result, and seldom waits."""

import copy
from typing import Any

import pytest
import torch
from cuda_standin import AVAILABLE, OnDevice, model_on_device, on_device, standin, to_host
from torch import nn

import nac_gpu as nac
from common.architectures import recurrent
from nac_gpu.calibration import dream
from nac_gpu.merging import refinement

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no devices that Python stands in for")


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class Reader(nn.Module):
    """Recurrent layers, and a linear layer behind the last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers, self.head = kind(6, 10, num_layers=2, batch_first=True), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.layers(x)[0][:, -1])


def plain() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 12)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 5))


def residual() -> nn.Module:
    stem = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*stem, Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def sequences(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[Any, Any]] = {
    "plain": (plain, images),
    "residual": (residual, images),
    "lstm": (lambda: Reader(nn.LSTM), sequences),
    "gru": (lambda: Reader(nn.GRU), sequences),
    "rnn": (lambda: Reader(nn.RNN), sequences),
    "lstm_cell": (recurrent.LSTMCellLoop, lambda: sequences(2)),
    "gru_cell": (recurrent.GRUCellLoop, lambda: sequences(2)),
}


@pytest.fixture(autouse=True)
def alike(short_dreams: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU may multiply bfloat16, the stand-in does not."""
    for module in (dream, refinement):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda _: False)


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert isinstance(value, torch.Tensor)
                value.uniform_(0.5, 1.5)
    return model, MODELS[name][1]()


@pytest.mark.parametrize("algorithm", ["auto", "resident", "matrix-free"])
def test_linkages_have_the_same_bits(algorithm: Any) -> None:
    points = torch.randn(70, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = nac.ward_linkage(points, algorithm=algorithm)
    with standin():
        found = nac.ward_linkage(on_device(points), algorithm=algorithm)
        assert isinstance(found.merges, OnDevice)
        assert torch.equal(to_host(found.merges), expected.merges)
        last_bit = 1e-14 if algorithm == "matrix-free" else 0  # a BLAS rounds by the shapes that it is given
        torch.testing.assert_close(to_host(found.heights), expected.heights, rtol=last_bit, atol=0)


# Budgets take multiples of 8 on CUDA by default, so here both sides are told the same.
@pytest.mark.parametrize("wanted", [{"width": 0.5, "calibration": "none"}, {"params": 0.5, "multiple_of": 1}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_compressions_are_the_cpus(name: str, wanted: dict[str, Any]) -> None:
    model, inputs = made(name)
    expected = nac.compress(copy.deepcopy(model), inputs, **wanted).state_dict()
    with standin():
        found = nac.compress(model_on_device(model), on_device(inputs), **wanted).state_dict()
        assert all(isinstance(value, OnDevice) for value in found.values())
        # CUDA adds this cell's biases in an operation of its own: it is clustered without them, for other widths, too
        if name != "gru_cell" or "width" in wanted:
            assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in expected.items()}
        else:
            most = 0.5 * sum(value.numel() for value in model.state_dict().values())
            assert sum(value.numel() for value in found.values()) <= most
        if name != "gru_cell":
            for key, value in found.items():
                torch.testing.assert_close(to_host(value), expected[key], rtol=1e-5, atol=1e-5)


def test_refinement_and_curves_do_not_wait_in_every_step() -> None:
    model, inputs = made("residual")
    with standin() as counts:
        small = nac.compress(model_on_device(model), on_device(inputs), params=0.5)
        assert isinstance(next(small.parameters()), OnDevice)
        steps = [event for event in counts.events if "_descend" in event.calls]
        assert steps, "inputs are mixed on the device"
        assert [event for event in steps if event.waits] == []
        # Three for each of 5 groups: errors of merging and of removal, and the order in which neurons are removed. Cuts
        # of a tree tell how many names there are.
        curves = [event for event in counts.events if "error_curve" in event.calls and event.waits]
        assert len([event for event in curves if "number_by_first_appearance" not in event.calls]) <= 15
        # Labels and masses of 8 neurons; errors of a group at all widths.
        assert max(event.size for event in counts.events if event.kind == "to host") <= 256
