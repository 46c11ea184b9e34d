"""What the experiments share, and the VGG experiment from end to end on a few small images."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from standins import blobs, write_tree
from torch import Tensor, nn

import budgets
import compress_time
import latency
import vgg_cifar
from common import processes
from common.data import Images, augment, load, normalise, statistics, warped
from common.fast_conv import fast_weight_gradients
from common.models import NETWORKS, Network
from common.padding import padded, train_padded
from common.results import Results
from common.training import Augmented, Extras, Precision, Recipe, error_rate, fit
from common.vgg import Run, Training

CPU = Precision(torch.device("cpu"), bfloat16=False)
RECIPE = Recipe(epochs=3, learning_rate=0.05, batch_size=16, shift=1, flip=True)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(512, 2)
    )


def test_fit_learns() -> None:
    model = small_network()
    errors = fit(model, blobs(128, 0), blobs(64, 1), RECIPE, CPU, seed=0, label="test")
    assert errors[-1] == 0
    assert not model.training


def test_errors_are_measured_as_often_as_wanted_and_in_the_end() -> None:
    train, test = blobs(64, 0), blobs(32, 1)
    every, some = (
        fit(small_network(), train, test, RECIPE, CPU, seed=0, label="test", extras=Extras(error_every=n))
        for n in (1, 2)
    )
    assert some == every[1:]


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = small_network(), small_network()
    expected = fit(whole, blobs(64, 0), blobs(32, 1), RECIPE, CPU, seed=3, label="whole")
    checkpoint = tmp_path / "run.pt"
    epochs = 0

    def stop_in_the_third_epoch(*_: object) -> float:
        nonlocal epochs
        epochs += 1
        if epochs == 3:
            raise KeyboardInterrupt
        return error_rate(*_)  # type: ignore[arg-type]

    def trained(model: nn.Module, recipe: Recipe = RECIPE) -> list[float]:
        kept = Extras(checkpoint=checkpoint)
        return fit(model, blobs(64, 0), blobs(32, 1), recipe, CPU, seed=3, label="test", extras=kept)

    with monkeypatch.context() as patch:
        patch.setattr("common.training.error_rate", stop_in_the_third_epoch)
        with pytest.raises(KeyboardInterrupt):
            trained(stopped)
    resumed = small_network()
    assert trained(resumed) == expected
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    loaded = small_network()
    assert trained(loaded) == expected
    assert torch.equal(loaded[0].weight, whole[0].weight)
    with pytest.raises(ValueError, match="was made with"):
        trained(loaded, replace(RECIPE, epochs=4))


def seeing_the_first_class() -> nn.Module:
    """In every image."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).train()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1.0, 0.0]))
    return model


def test_error_rate_counts_and_keeps_the_mode() -> None:
    model = seeing_the_first_class()
    images = blobs(10, 0)
    assert error_rate(model, images, statistics(images), CPU) == 50
    assert model.training


def test_fast_weight_gradients_are_the_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, 3, padding=1)
    images = torch.randn(6, 5, 4, 4, requires_grad=True)
    grads = []
    for context in (fast_weight_gradients(), torch.enable_grad()):
        with context, torch.autocast("cpu", torch.bfloat16):
            out = layer(images)
        assert out.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(out.float().square().sum(), [images, layer.weight, layer.bias]))
    for fast, plain in zip(*grads, strict=True):
        assert torch.allclose(fast, plain, rtol=0.02, atol=0.02 * float(plain.abs().max()))


def test_fast_weight_gradients_take_only_what_they_are_for() -> None:
    applies = fast_weight_gradients._applies
    images, weight = torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert applies(images, weight, None, (1, 1), (1, 1), (1, 1), 1)
        assert not applies(torch.zeros(1, 2, 8, 8), weight, None, (1, 1), (1, 1), (1, 1), 1)
        assert not applies(images, weight, None, (2, 2), (1, 1), (1, 1), 1)
        with torch.no_grad():
            assert not applies(images, weight, None, (1, 1), (1, 1), (1, 1), 1)
    assert not applies(images, weight, None, (1, 1), (1, 1), (1, 1), 1)


def test_augmented_images_are_shifted_and_mirrored_originals() -> None:
    images = blobs(20, 0).pixels
    mirrored = torch.arange(len(images)) % 2 == 1
    found = augment(images, 2, mirrored, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    padded = nn.functional.pad(images.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # [n, c, 5, 5, 8, 8]
    for i, image in enumerate(found):
        candidates = windows[i].permute(1, 2, 0, 3, 4).reshape(25, 3, 8, 8)
        assert any(torch.equal(image.flip(2) if mirrored[i] else image, c) for c in candidates)
    assert not torch.equal(found, images)
    assert augment(images, 0, None, torch.Generator()) is images


def test_an_image_that_is_mirrored_in_an_epoch_is_not_in_the_next() -> None:
    images = Images(torch.arange(24, dtype=torch.uint8).view(6, 1, 1, 4), torch.arange(6), 6)
    scale = torch.zeros(1), torch.ones(1)
    batches = Augmented(images, scale, Recipe(1, 0.1, batch_size=6, flip=True), Precision.best("cpu", False), seed=0)
    seen = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        pixels, labels = next(iter(batches))
        seen.append((255 * pixels[labels.argsort()]).round().to(torch.uint8))
    assert torch.equal(seen[0], seen[1].flip(3))
    assert torch.equal(seen[0], seen[2])
    assert 0 < int((seen[0] == images.pixels).all(3).sum()) < 6


def test_warped_images_are_near_their_originals_and_black_outside() -> None:
    pixels = torch.zeros(40, 1, 28, 28, dtype=torch.uint8)
    pixels[:, :, 10:18, 12:16] = 200
    found = warped(pixels, 0.15, torch.Generator().manual_seed(0))
    assert found.shape == pixels.shape
    assert found.dtype == torch.uint8
    assert (found[:, :, 13:15, 13:15] == 200).all()
    assert (found[:, :, :6] == 0).all()
    assert len({image.numpy().tobytes() for image in found}) == 40
    area = found.double().sum((1, 2, 3)) / 200
    assert ((area > 32 / 1.4) & (area < 32 / 0.68)).all()
    assert torch.equal(augment(pixels, 0, None, torch.Generator().manual_seed(0), warp=0.15), found)
    bright = warped(torch.full_like(pixels, 200), 0.3, torch.Generator().manual_seed(0))
    assert (bright[:, :, 0, 0] < 200).any()
    assert torch.equal(warped(pixels, 0.0, torch.Generator()), pixels)


def test_normalised_images_have_mean_zero_and_deviation_one() -> None:
    images = blobs(50, 0)
    pixels = normalise(images.pixels, *statistics(images))
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.ones(3), atol=1e-4)


def test_digits_ship_with_scikit_learn() -> None:
    train, test = load("digits", Path("nowhere"))
    assert (len(train), len(test)) == (1438, 359)
    assert train.pixels.shape[1:] == (3, 32, 32)
    assert train.pixels.max() == 255


def test_an_image_folder_tree_and_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folders train/ and test/"):
        load("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no cifar10 at .*: give --data, or --download"):
        load("cifar10", tmp_path)
    write_tree(tmp_path)
    train, test = load("folder", tmp_path)
    assert (len(train), len(test), train.classes) == (24, 8, 2)
    assert sorted(train.labels.tolist()) == [0] * 12 + [1] * 12
    assert train.pixels[train.labels == 1].float().mean() > train.pixels[train.labels == 0].float().mean() + 100
    (tmp_path / "train" / "class2").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "train" / "class2" / "0.png")
    with pytest.raises(ValueError, match="train has 3 classes and test has 2"):
        load("folder", tmp_path)


@pytest.mark.parametrize("network", ["vgg16", "vgg19"])
def test_the_vgg_experiment_from_end_to_end(network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "data")
    options = vgg_cifar.Options(
        dataset="folder",
        data=tmp_path / "data",
        network="vgg16" if network == "vgg16" else "vgg19",
        multiplier=0.0625,
        width="paper" if network == "vgg16" else "0.5",
        finetune=("ward",),
        control=True,
        epochs=2,
        further_epochs=(1, 1),
        finetune_epochs=1,
        batch_size=8,
        device="cpu",
        output=tmp_path / "runs",
        results=tmp_path / "results.json",
    )
    vgg_cifar.main(options)
    printed = capsys.readouterr().out
    assert "left alone: classifier" in printed
    for method in ("baseline", "random", "l1", "kmeans", "ward"):
        assert f"| {method} " in printed
    assert {name.name.split("-seed0-")[1] for name in (tmp_path / "runs").glob("*-further.pt")} == {
        *("baseline-further.pt", "ward-further.pt", "control-further.pt")
    }
    rows = json.loads((tmp_path / "results.json").read_text())["seeds"]["0"]["rows"]
    assert rows["ward"]["parameters"] == rows["l1"]["parameters"] < rows["baseline"]["parameters"]
    assert rows["ward, fine-tuned"]["flops"] == rows["ward"]["flops"] < rows["baseline"]["flops"]
    assert rows["baseline, fine-tuned"]["parameters"] == rows["baseline"]["parameters"]
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "results.json").read_bytes()
    vgg_cifar.main(options)  # everything is there: nothing is trained or measured again
    assert (tmp_path / "results.json").read_bytes() == before


def test_two_cycles_end_with_the_mean_of_their_weights(tmp_path: Path) -> None:
    training = Training(epochs=2, further_epochs=(1, 0), batch_size=16, cutout=0, output=tmp_path)
    train = blobs(64, 0)
    run = Run(training, 0, train, blobs(32, 1), CPU)
    model = small_network()
    error = run.fit(model, training.recipe, "run", further=1)
    ends = [torch.load(run.checkpoint(name), weights_only=True)["model"] for name in ("run", "run-further")]
    assert not torch.equal(ends[0]["0.weight"], ends[1]["0.weight"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, (ends[0][name] + ends[1][name]) / 2)
    norm, images = model[1], normalise(train.pixels, *statistics(train))
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    made = model[0](images).mean((0, 2, 3))
    assert (norm.running_mean - made).abs().max() < 0.1 * made.abs().max()  # images are shifted and mirrored
    assert error == run.error(model)
    assert not model.training


def as_process(rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "rank_and_size", lambda: (rank, size))


def test_the_parts_of_processes_are_the_batches_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    images, how = blobs(29, 0), replace(RECIPE, batch_size=12, cutout=3, warp=0.1)

    def batches() -> list[tuple[Tensor, Tensor]]:
        return list(Augmented(images, statistics(images), how, CPU, seed=4))

    alone, parts = batches(), []
    for rank in range(3):
        as_process(rank, 3, monkeypatch)
        parts.append(batches())
    assert [[len(labels) for _, labels in part] for part in parts] == [[4, 4, 2]] * 3
    for batch, (inputs, labels) in enumerate(alone):
        found_inputs, found_labels = (torch.cat([part[batch][i] for part in parts]) for i in (0, 1))
        assert torch.equal(found_labels[: len(labels)], labels)
        if batch < 2:  # one image more, and other numbers are drawn for the last batch
            assert torch.equal(found_inputs, inputs)
        else:
            assert found_labels[len(labels) :].tolist() == [alone[0][1][0]]
    with pytest.raises(ValueError, match="batch_size=16, expected a multiple of the 3 processes"):
        Augmented(images, statistics(images), RECIPE, CPU, seed=4)


def test_processes_divide_the_test_images_and_the_first_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, model, path = blobs(11, 0), seeing_the_first_class(), tmp_path / "r.json"
    found = []
    for rank in (2, 1, 0):
        as_process(rank, 3, monkeypatch)
        found.append(error_rate(model, images, statistics(images), CPU))
        Results(path, {}, torch.device("cpu")).measure("row", 0, lambda: {"error": 1.0})
        assert path.exists() == (rank == 0)
    assert found == pytest.approx([100 * wrong / 11 for wrong in (2, 2, 1)])
    assert json.loads(path.read_text())["seeds"]["0"]["environment"]["processes"] == 3


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """All is trained, compressed and fine-tuned under `torchrun`; then one process goes through its checkpoints."""
    small = "--dataset digits --multiplier 0.0625 --width 0.5 --methods l1 ward --finetune ward --control --device cpu"
    arguments = f"{small} --epochs 1 --finetune-epochs 1".split()
    arguments += ["--output", str(tmp_path / "runs"), "--results"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, vgg_cifar.__file__, *arguments, str(tmp_path / "two.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == done.stdout.count("left alone: ") == 1
    checkpoints = {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    assert {name.rsplit("-")[-1] for name in checkpoints} == {"baseline.pt", "ward.pt", "control.pt"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "two.json", "two.png"}
    vgg_cifar.main(tyro.cli(vgg_cifar.Options, args=[*arguments, str(tmp_path / "one.json")]))
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()} == checkpoints
    two, one = (json.loads((tmp_path / f"{name}.json").read_text())["seeds"]["0"] for name in ("two", "one"))
    assert (two["environment"]["processes"], "processes" in one["environment"]) == (2, False)
    rows = ["baseline", "widths", "l1", "ward", "ward, fine-tuned", "baseline, fine-tuned"]
    assert list(two["rows"]) == list(one["rows"]) == rows
    assert two["rows"]["widths"] == one["rows"]["widths"]
    for row in set(rows) - {"widths"}:
        for column in ("parameters", "flops"):
            assert two["rows"][row][column] == one["rows"][row][column]
        assert two["rows"][row]["error"] == pytest.approx(one["rows"][row]["error"], abs=0.3)  # rounding: one image


def test_results_of_another_configuration_are_not_mixed(tmp_path: Path) -> None:
    Results(tmp_path / "r.json", {"epochs": 1}, torch.device("cpu")).measure("row", 0, lambda: {"error": 1.0})
    for other in ({"epochs": 2}, {}, {"epochs": 1, "warp": 0.1}):
        with pytest.raises(ValueError, match="was measured with"):
            Results(tmp_path / "r.json", other, torch.device("cpu"))
    newer = Results(tmp_path / "r.json", {"epochs": 1, "warp": 0.0}, torch.device("cpu"))
    assert newer.values("row", "error") == [1.0]


def test_latency_is_compared_with_flops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latency.json"
    sizes = {"models": ("squeezenet1_1",), "size": 64, "batch_sizes": (1, 2), "latencies": (0.9,), "seconds": 0.2}
    with mock.patch("nac_gpu.planning.latency.seconds_in_turn", return_value=(np.ones(5), np.full(5, 0.89))):
        latency.main(latency.Options(**sizes, device="cpu", results=path))  # type: ignore[arg-type]
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["asked"]) for row in rows] == [
        (batch, asked) for asked in ({"flops": 0.5}, {"latency": 0.9}) for batch in (1, 2)
    ]
    for row in rows:
        assert 0.4 < row["flops"] <= row["asked"].get("flops", 0.9)
        assert row["kept"] == pytest.approx(row["speedup"]["median"] * row["flops"])
        assert row["time"] == pytest.approx(1 / row["speedup"]["median"])
    assert "squeezenet1_1" in capsys.readouterr().out


def test_budgets_are_counted_in_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budgets.main(budgets.Options(models=("squeezenet1_1",), size=64, results=tmp_path / "budgets.json"))
    rows = json.loads((tmp_path / "budgets.json").read_text())["seeds"]["0"]["rows"]
    assert list(rows) == ["squeezenet1_1, params", "squeezenet1_1, flops"]
    assert all(-1 < row["off"] <= 0 for row in rows.values())
    assert "squeezenet1_1" in capsys.readouterr().out


def test_compression_is_timed_against_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "compress_time.json"
    compress_time.main(
        compress_time.Options(networks=("resnet20",), images=16, refine=1, steps=1, device="cpu", results=path)
    )
    row = json.loads(path.read_text())["seeds"]["0"]["rows"]["resnet20"]
    assert row.pop("growth, bytes") >= 0
    assert min(row.values()) > 0
    assert row["weights, bytes"] == 4 * sum(value.numel() for value in NETWORKS["resnet20"](10, 0.25).parameters())
    assert "resnet20" in capsys.readouterr().out


@pytest.mark.parametrize("network", ["vgg19", "resnet20"])
def test_dead_channels_change_nothing_that_is_trained(network: Network) -> None:
    torch.manual_seed(0)
    narrow = NETWORKS[network](10, 0.1).double()
    images, labels = torch.randn(32, 3, 32, 32, dtype=torch.float64), torch.randint(10, (32,))

    def train(model: nn.Module) -> float:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    beside = copy.deepcopy(narrow)
    assert train_padded(beside, train) == pytest.approx(train(narrow), rel=1e-9)
    for (name, expected), found in zip(narrow.state_dict().items(), beside.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=name)
    wide = padded(narrow)
    assert {module.out_channels % 16 for module in wide.modules() if isinstance(module, nn.Conv2d)} == {0}
    torch.testing.assert_close(wide.eval()(images), narrow.eval()(images))
