"""The MNIST experiments from end to end, on a few made-up digits."""

import json
from pathlib import Path

import pytest
import torch
from standins import write_mnist
from torch import nn

import mnist_cnn
import mnist_dbn
from common.models import dbn
from common.rbm import Rbm

pytestmark = pytest.mark.usefixtures("short_dreams")


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    write_mnist(tmp_path)
    return tmp_path


@pytest.mark.parametrize("experiment", [mnist_cnn, mnist_dbn], ids=["cnn", "dbn"])
def test_an_experiment_fills_its_table_and_measures_nothing_twice(
    experiment: object, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "mnist_cnn" if experiment is mnist_cnn else "mnist_dbn"
    shared = {"data": digits, "seeds": (0,), "device": "cpu", "output": digits / "runs", "results": digits, "epochs": 2}
    if experiment is mnist_cnn:
        options = mnist_cnn.Options(**shared, finetune_epochs=1)  # type: ignore[arg-type]
        mnist_cnn.main(options)
    else:
        options = mnist_dbn.Options(**shared, rbm_epochs=1, finetune_epochs=(1, 1))  # type: ignore[arg-type]
        mnist_dbn.main(options)
        assert (digits / "mnist_dbn_neurons.png").read_bytes()[:4] == b"\x89PNG"
    assert "ward" in capsys.readouterr().out
    stored = (digits / f"{name}.json").read_bytes()
    rows = json.loads(stored)["seeds"]["0"]["rows"]
    prefixes = [""] if name == "mnist_cnn" else ["table 1: ", "table 2: "]
    for prefix in prefixes:
        for method in ("ward", "kmeans", "random"):
            assert rows[f"{prefix}{method}"]["parameters"] in (54_785, 636_810, 188_210)
            for suffix in ("", ", fine-tuned"):
                assert 0 <= rows[f"{prefix}{method}{suffix}"]["error"] <= 100
    (mnist_cnn if experiment is mnist_cnn else mnist_dbn).main(options)  # type: ignore[arg-type]
    assert (digits / f"{name}.json").read_bytes() == stored


def test_dropout_is_laid_around_the_same_layers() -> None:
    torch.manual_seed(0)
    model = dbn((30, 20, 10))
    wrapped = mnist_dbn.with_dropout(model, 0.3)
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in model.parameters()]
    assert [layer.p for layer in wrapped if isinstance(layer, nn.Dropout)] == [0.3] * 3
    images = torch.rand(5, 1, 28, 28)
    assert not torch.equal(wrapped.train()(images), model(images))
    assert torch.equal(wrapped.eval()(images), model(images))


def test_a_restricted_boltzmann_machine_learns_its_data() -> None:
    """Contrastive divergence lowers the reconstruction error of two patterns far below that of their mean."""
    generator = torch.Generator().manual_seed(0)
    patterns = (torch.rand(2, 20, generator=generator) < 0.5).float()
    data = patterns[torch.arange(200) % 2]
    machine = Rbm(20, 8, torch.device("cpu"), generator)
    assert machine.parameters[0].shape == (8, 20)
    torch.manual_seed(0)
    for _ in range(1000):
        machine.step(data, rate=0.1, momentum=0.5, weight_decay=0.0)
    rebuilt = machine.down(machine.up(data))
    assert (data - rebuilt).square().mean() < 0.1 * (data - data.mean(0)).square().mean()
