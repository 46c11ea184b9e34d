"""Fine-tuning learns, resumes to the same bits, listens to its teacher, and says what is wrong."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nac_gpu as nac
from nac_gpu.training.loss import Objective


def data(count: int = 64) -> TensorDataset:
    """Points of the plane, and on which side of a line they lie."""
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(points, (points.sum(1) > 0).long())


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


def loader(shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(data(), batch_size=16, shuffle=shuffle)


def accuracy(model: nn.Module, _: object = None) -> dict[str, float]:
    points, sides = data(256).tensors
    return {"accuracy": float((model.eval()(points).argmax(1) == sides).float().mean())}


def test_it_learns_in_place_and_gives_the_epochs() -> None:
    model = network().eval()
    state = torch.get_rng_state()
    epochs = nac.finetune(model, loader(), epochs=12, learning_rate=0.1, callbacks=[accuracy])
    assert [epoch.number for epoch in epochs] == list(range(1, 13))
    assert epochs[-1].loss < 0.5 * epochs[0].loss
    assert epochs[-1].measured["accuracy"] > 0.9
    assert epochs[-1].learning_rate == 0
    assert not model.training, "the mode in which it came"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, stopped, resumed = network(), network(), network()
    options: dict[str, Any] = {"epochs": 4, "learning_rate": 0.1, "seed": 5}
    expected = nac.finetune(whole, loader(), **options, callbacks=[accuracy])

    def stop(_: nn.Module, epoch: nac.Epoch) -> None:
        if epoch.number == 3:
            raise KeyboardInterrupt

    path = tmp_path / "folder" / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        nac.finetune(stopped, loader(), **options, checkpoint=path, callbacks=[accuracy, stop])
    found = nac.finetune(resumed, loader(), **options, checkpoint=path, callbacks=[accuracy])
    assert [epoch.loss for epoch in found] == [epoch.loss for epoch in expected]
    assert [epoch.measured for epoch in found] == [epoch.measured for epoch in expected]
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    again = network(1)
    assert nac.finetune(again, loader(), **options, checkpoint=path) == found, "complete: only loaded"
    assert torch.equal(again[0].weight, whole[0].weight)
    with pytest.raises(ValueError, match=r"made with {'epochs': 4}, not {'epochs': 5}: remove it"):
        nac.finetune(again, loader(), **(options | {"epochs": 5}), checkpoint=path)
    with pytest.raises(ValueError, match=r"made with {'cutout': None}, not {'cutout': 8}"):
        nac.finetune(again, loader(), **options, checkpoint=path, settings={"cutout": 8})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a checkpoint"):
        nac.finetune(again, loader(), **options, checkpoint=path)


def test_a_student_comes_to_agree_with_its_teacher_without_labels() -> None:
    teacher, student = network(1).train(), network(2)
    points = data(256).tensors[0]

    @torch.no_grad()
    def distance() -> float:
        taught, wanted = student.eval()(points).softmax(1), teacher.eval()(points).softmax(1)
        return float((taught - wanted).abs().mean())

    before = distance()
    teacher.train()
    statistics = teacher[1].running_mean.clone()
    nac.finetune(student, list(points.split(32)), epochs=30, learning_rate=0.1, teacher=teacher)
    assert teacher.training
    assert distance() < 0.5 * before
    assert torch.equal(teacher[1].running_mean, statistics)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_loss_is_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = torch.randn(2, 5, 3, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1])
    teacher = nn.Identity()
    share, temperature = 0.25, 3.0
    value = Objective(None, teacher, share, temperature)(found, wanted, labels)
    p, q = (wanted / temperature).softmax(1), (found / temperature).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.75 * nn.functional.cross_entropy(found, labels) + 0.25 * temperature**2 * divergence
    assert torch.allclose(value, expected)
    assert torch.allclose(
        Objective(None, teacher, share, temperature)(found, wanted, None), temperature**2 * divergence
    )
    own = SimpleNamespace(loss=torch.tensor(7.0), logits=found)
    assert Objective(None, None, 0, 1)(own, None, None) == 7
    assert Objective(lambda o, t: (o - t).square().sum(), None, 0, 1)(found, None, wanted) > 0
    for outputs in ((found, None), {"logits": found}, SimpleNamespace(logits=found)):
        assert torch.allclose(
            Objective(None, None, 0, 1)(outputs, None, labels), nn.functional.cross_entropy(found, labels)
        )
    with pytest.raises(TypeError, match="returns str, expected a tensor"):
        Objective(None, None, 0, 1)("scores", None, labels)
    with pytest.raises(ValueError, match=r"shape \(5, 2\), expected that of the model's, \(5, 3\)"):
        Objective(None, teacher, share, temperature)(found, wanted[:, :2], labels)


class Words(nn.Module):
    """Takes keyword arguments, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, points: Tensor, labels: Tensor) -> SimpleNamespace:
        scores = self.layer(points)
        return SimpleNamespace(loss=nn.functional.cross_entropy(scores, labels), logits=scores)


def test_mappings_other_optimisers_and_frozen_parameters() -> None:
    model = Words()
    points, sides = data().tensors
    model.layer.bias.requires_grad_(False)
    bias = model.layer.bias.clone()
    batches = [{"points": points, "labels": sides}] * 5
    epochs = nac.finetune(
        model, batches, epochs=8, learning_rate=0.05, optimizer=torch.optim.AdamW, max_norm=1.0, precision="float32"
    )
    assert epochs[-1].loss < 0.7 * epochs[0].loss
    assert torch.equal(model.layer.bias, bias)


def test_a_distributed_sampler_is_told_the_epoch_and_loaders_without_length_go() -> None:
    told: list[int] = []

    class Stream:
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

        def __iter__(self) -> Any:
            return iter([tuple(data().tensors)] * 100)

    epochs = nac.finetune(network(), Stream(), epochs=3, steps_per_epoch=2, progress=True)
    assert told == [0, 1, 2]
    assert len(epochs) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs=0, expected at least 1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0, expected a number above 0"),
        ({"warmup": 1.5}, ValueError, "warmup=1.5, expected a share"),
        ({"precision": "half"}, ValueError, "unknown precision 'half'"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch=0"),
        ({"steps_per_epoch": 9}, ValueError, "gave 4 batches in epoch 1, expected 9"),
        ({"learning_rate": 1e30, "epochs": 3}, ValueError, "expected a finite one; lower learning_rate"),
        ({"loader": []}, ValueError, "no batch"),
        ({"loader": torch.zeros(3, 2)}, TypeError, "loader is a tensor"),
        ({"loader": 3}, TypeError, "loader is int"),
        ({"loader": (x for x in ())}, TypeError, "no length"),
        ({"loader": ["text"]}, TypeError, "a batch is str"),
        ({"loader": [(1, 2, 3)]}, TypeError, "3 parts, expected two"),
        ({"loader": [torch.zeros(4, 2)]}, TypeError, "no targets"),
    ],
)
def test_errors_say_what_was_expected(options: dict[str, Any], error: type[Exception], message: str) -> None:
    batches = options.pop("loader", loader())
    with pytest.raises(error, match=message):
        nac.finetune(network(), batches, **options)
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        nac.finetune(network().requires_grad_(False), loader())
