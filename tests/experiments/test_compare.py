"""Rules and peers side by side, and together with other methods."""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from standins import write_tree
from torch import nn

import combined
import compare
import nac_gpu as nac
from common import peers
from common.models import resnet18, resnet20, resnet56, vgg19


def small_vgg() -> nn.Module:
    torch.manual_seed(0)
    model = vgg19(10, 0.06).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 1.0)
    return model


def test_slimming_keeps_the_channels_of_the_largest_scales() -> None:
    model, example = small_vgg(), torch.zeros(1, 3, 32, 32)
    small = peers.slimmed(model, example, 0.5, rule="restored", calibration="none")
    before, after = (nac.cost(network, example).parameters for network in (model, small))
    assert 0.45 * before <= after <= 0.5 * before
    scales, kept = peers.channel_scales(model), peers.channel_scales(small)
    assert [len(scale) for scale in kept.values()] != [len(scale) for scale in scales.values()]
    for name, scale in kept.items():
        assert scale.tolist() == [value for value in scales[name].tolist() if value >= scale.min()]
    least = min(float(scale.min()) for scale in kept.values() if len(scale) > 1)
    gone = torch.cat(list(scales.values()))
    assert int((gone >= least).sum()) >= sum(len(scale) for scale in kept.values()) - len(kept)


def test_torch_pruning_is_given_the_same_budget() -> None:
    model, example = small_vgg(), torch.zeros(1, 3, 32, 32)
    small = peers.torch_pruned(model, example, 0.5)
    before, after = (nac.cost(network, example).parameters for network in (model, small))
    assert 0.4 * before <= after <= 0.5 * before
    assert nac.cost(model, example).parameters == before


def linear(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def gradient(layer: nn.Linear) -> torch.Tensor:
    assert layer.weight.grad is not None
    return layer.weight.grad


def test_global_sparse_momentum_tells_the_weights_that_matter_and_lets_the_others_decay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    original = copy.deepcopy(model)
    x = torch.randn(64, 10)
    y = original(x).argmax(1)
    kept = peers._kept_weights(model, 0.3)
    assert kept == int(0.3 * 283) - 23
    other = nn.Linear(4, 4)
    with peers.global_sparse_momentum(model, 0.3):
        for trained, inputs in ((model, x), (other, torch.randn(8, 4))):  # another model's weights are all told
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
            trained(inputs).square().sum().backward()
            optimizer.step()
    assert sum(int(gradient(layer).count_nonzero()) for layer in linear(model)) == kept
    assert int(gradient(other).count_nonzero()) == 16
    products = torch.cat([(layer.weight * gradient(layer)).abs().flatten() for layer in linear(model)])
    full = copy.deepcopy(original)
    full(x).square().sum().backward()
    every = torch.cat([(layer.weight * gradient(layer)).abs().flatten() for layer in linear(full)])
    assert torch.equal(products.topk(kept).values, every.topk(kept).values)

    def trained(sparse: bool) -> nn.Module:
        model = copy.deepcopy(original)
        with peers.global_sparse_momentum(model, 0.3) if sparse else contextlib.nullcontext():
            nac.finetune(model, [(x, y)], epochs=400, learning_rate=0.05, momentum=0.9, weight_decay=2e-2)
        return model

    lost = []
    for sparse in (False, True):
        dense = trained(sparse)
        pruned = peers.magnitude_pruned(dense, 0.3)
        assert peers.nonzero(pruned) <= 0.3 * 283
        with torch.no_grad():
            lost.append(float((pruned(x) - dense(x)).square().mean()))
    assert lost[1] < 0.1 * lost[0]


@pytest.mark.parametrize(("build", "parameters"), [(resnet18, 11_173_962), (resnet20, 272_474), (resnet56, 855_770)])
def test_resnets_have_the_sizes_that_they_are_known_for(build: Callable[..., nn.Module], parameters: int) -> None:
    assert sum(parameter.numel() for parameter in build(10).parameters()) == parameters


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(SystemExit, match="'Wart', expected some of: random; L1 filters"):
        compare.chosen_rules(compare.Options(rules=("Wart",)))
    assert not set(compare.SLIMMING) & set(compare.chosen_rules(compare.Options(network="resnet20")))


@pytest.mark.usefixtures("short_dreams")
def test_compare_measures_every_rule(tmp_path: Path) -> None:
    write_tree(tmp_path / "data")
    options = compare.Options(
        dataset="folder",
        data=tmp_path / "data",
        network="vgg19",
        multiplier=0.06,
        epochs=1,
        shares=(0.5,),
        finetune_epochs=2,
        distillation=0.5,
        images=16,
        device="cpu",
        output=tmp_path,
    )
    compare.main(options)
    path = tmp_path / "compare-vgg19-x0.06.json"
    rows = json.loads(path.read_text())["seeds"]["0"]["rows"]
    names = [compare.row(rule, 0.5) + suffix for rule in compare.NAMES for suffix in ("", compare.TUNED)]
    assert set(rows) == {"none", "none, sparse training", *names}
    whole = rows["none"]["parameters"]
    assert all(rows[name]["parameters"] <= 0.5 * whole for name in names)
    assert all(0.45 * whole <= rows[name]["parameters"] for name in names if "FLOPs" not in name)
    shares = ("Ward, Eq. 9", "Ward, dreams, FLOPs of the same share")
    same, kept = (rows[compare.row(rule, 0.5)]["flops"] for rule in shares)
    assert 0.8 * same <= kept <= same < rows[compare.row("Ward, images", 0.5)]["flops"]
    assert path.with_suffix(".png").exists()
    written = path.stat().st_mtime_ns
    compare.main(options)  # all is there
    assert path.stat().st_mtime_ns == written


def test_combined_with_pruning_and_eight_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    options = combined.Options(
        dataset="digits", multiplier=0.06, epochs=1, share=0.5, images=64, seconds=0.1, output=tmp_path
    )
    combined.main(options)
    rows = json.loads((tmp_path / "combined-vgg16-x0.06.json").read_text())["seeds"]["0"]["rows"]
    assert list(rows) == [name + stage for name in ("original", "merged") for stage in combined.STAGES]
    assert rows["merged"]["parameters"] <= 0.5 * rows["original"]["parameters"]
    for name in ("original", "merged"):
        plain, small, sparse = rows[name], rows[f"{name}, 8 bits"], rows[f"{name}, pruned"]
        assert small["bytes"] < 0.5 * plain["bytes"]
        assert sparse["packed"] < 0.75 * plain["packed"]
        assert abs(small["error"] - plain["error"]) < 5
        assert plain["batch 64"] > plain["batch 1"] > 0
    assert "| merged, pruned, 8 bits " in capsys.readouterr().out
    written = (tmp_path / "combined-vgg16-x0.06.json").stat().st_mtime_ns
    combined.main(options)  # all is there
    assert (tmp_path / "combined-vgg16-x0.06.json").stat().st_mtime_ns == written


def test_pruning_takes_the_smallest_weights() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -4.0], [3.0, -2.0]]))
    combined.pruned(nn.Sequential(layer), 0.5)
    assert layer.weight.tolist() == [[0, -4], [3, 0]]
    assert list(layer.state_dict()) == ["bias", "weight"]
