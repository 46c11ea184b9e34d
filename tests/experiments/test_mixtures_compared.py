"""Mixtures of experts beside methods of others: a tiny one, with random weights or trained for a moment."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixtures
from common import mixture_peers as peers
from common import mixture_training as training
from common.language_data import Batch

SHAPE = training.Shape(vocabulary=270, width=16, layers=2, heads=2, experts=4, picked=2, neurons=12)


def tiny() -> Any:
    """With weights that make experts differ."""
    model = training.untrained(SHAPE, 0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(1 + 0.2 * torch.randn_like(value) if "norm" in name else 0.3 * torch.randn_like(value))
    return model.eval().requires_grad_(False)


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(270, (4, 16), generator=generator)} for _ in range(3)]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten(0, 1) for batch in batches()])


def seen(model: Any, layer: int = 0) -> peers.Seen:
    (read,) = peers.reads(model, [peers.mixtures(model)[layer]], batches())
    return peers.Seen(peers.mixtures(model)[layer], read)


def duplicated(model: Any, source: int, target: int) -> None:
    """Make an expert of each layer a copy of another, with its neurons in another order."""
    order = torch.randperm(SHAPE.neurons)
    for mixture in peers.mixtures(model):
        experts = mixture.experts
        rows = experts.gate_up_proj[source].unflatten(0, (2, -1))[:, order].flatten(0, 1)
        experts.gate_up_proj[target], experts.down_proj[target] = rows, experts.down_proj[source][:, order]


@pytest.mark.parametrize("method", peers.PEERS)
def test_fewer_experts_and_removing_none_changes_nothing(method: str) -> None:
    model = tiny()
    before = outputs(model)
    for count in (4, 3, 2):
        small: Any = peers.reduced(model, peers.PEERS[method], count, batches())
        assert torch.equal(outputs(model), before), "the original is not changed"
        assert small.config.num_local_experts == count
        for mixture in peers.mixtures(small):
            assert mixture.experts.gate_up_proj.shape == (count, 2 * SHAPE.neurons, SHAPE.width)
            assert mixture.experts.down_proj.shape == (count, SHAPE.width, SHAPE.neurons)
            assert isinstance(mixture.gate, peers.Redirected) or mixture.gate.weight.shape == (count, SHAPE.width)
        error = (outputs(small) - before).abs().max()
        assert error < 1e-4 if count == 4 else 1e-3 < error < math.inf


def test_what_is_seen_of_a_mixture() -> None:
    model = tiny()
    found = seen(model, layer=1)
    mixture = peers.mixtures(model)[1]
    assert found.read.shape == (3 * 4 * 16, SHAPE.width)
    assert found.frequency.sum() == 2 * len(found.read)
    given: list[list[float]] = [[] for _ in range(4)]
    _, weights, picked = mixture.gate(found.read)
    every = torch.stack(
        [nn.functional.linear(peers.neurons(mixture, e, found.read), mixture.experts.down_proj[e]) for e in range(4)]
    )
    parts = [weights[:, k, None] * every[picked[:, k], torch.arange(len(picked))] for k in range(2)]
    assert torch.allclose(torch.stack(parts).sum(0), mixture(found.read[None])[0], atol=1e-5)
    for token in range(len(picked)):
        for k in range(2):
            expert = int(picked[token, k])
            given[expert].append(float(weights[token, k] * every[expert, token].norm()))
    assert found.saliency.tolist() == pytest.approx([sum(own) / len(own) for own in given], rel=1e-4)
    assert torch.allclose(found.outputs, every.mean(1), atol=1e-5)
    assert torch.allclose(found.likeness().diagonal(), torch.ones(4, dtype=torch.float64))


def test_an_expert_that_does_little_is_removed() -> None:
    model = tiny()
    for mixture in peers.mixtures(model):
        mixture.experts.down_proj[2] *= 1e-3
    small: Any = peers.reduced(model, peers.PEERS["REAP"], 3, batches())
    for before, after in zip(peers.mixtures(model), peers.mixtures(small), strict=True):
        assert torch.equal(after.gate.weight, before.gate.weight[[0, 1, 3]])
        assert torch.equal(after.experts.down_proj, before.experts.down_proj[[0, 1, 3]])


def test_clusters_of_equal_experts_keep_what_the_router_does() -> None:
    model = tiny()
    for mixture in peers.mixtures(model):
        for tensor in (mixture.experts.gate_up_proj, mixture.experts.down_proj):
            tensor[3] = tensor[1]
    small = peers.reduced(model, peers.PEERS["HC-SMoE"], 3, batches())
    assert (outputs(small) - outputs(model)).abs().max() < 1e-4


def test_neurons_are_put_in_order_before_they_are_averaged() -> None:
    model = tiny()
    duplicated(model, 1, 3)
    found = seen(model)
    experts = found.mixture.experts
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    aligned, mixed = (peers.averaged(found, [1, 3], weights, aligned=way) for way in (True, False))
    assert all(
        torch.allclose(a, b[1], atol=1e-6)
        for a, b in zip(aligned, (experts.gate_up_proj, experts.down_proj), strict=True)
    )
    assert (mixed[1] - experts.down_proj[1]).abs().max() > 0.1
    expected = (2 * experts.down_proj[1] + experts.down_proj[2]) / 3
    assert torch.allclose(peers.averaged(found, [1, 2], weights, aligned=False)[1], expected, atol=1e-6)


def test_the_most_salient_centres_take_the_others() -> None:
    found = seen(tiny())
    generator = torch.Generator()
    order = found.saliency.argsort(descending=True).tolist()
    all_in_one = peers.groups_of(found, peers.Reduction("centres"), 2, generator)
    assert sorted(map(len, all_in_one)) == [1, 3]
    assert next(group for group in all_in_one if len(group) == 3)[0] == order[0]
    pairs = peers.groups_of(found, peers.Reduction("centres", size=2), 2, generator)
    first = next(group for group in pairs if group[0] == order[0])
    likeness = found.likeness()[order[0]]
    assert sorted(map(len, pairs)) == [2, 2]
    assert first[1] == max(order[2:], key=lambda expert: float(likeness[expert]))
    with pytest.raises(ValueError, match="2 groups of 1 experts, expected room for 4"):
        peers.groups_of(found, peers.Reduction("centres", size=1), 2, generator)


def write(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    lines = [" ".join(f"w{number}" for number in torch.randint(20, (9,)).tolist()) for _ in range(150)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_text_is_split_at_a_line() -> None:
    assert training.split("one\ntwo\nthree\nfour\n", 0.3) == ("one\ntwo\n", "three\nfour\n")
    assert training.split("one\ntwo\n", 0.0) == ("one\ntwo\n", "")


def test_the_rate_rises_and_falls() -> None:
    rates = [training.rate_at(step / 100, 1.0) for step in range(101)]
    assert max(rates) == pytest.approx(1)
    assert rates[0] < 0.1
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)


def test_a_stopped_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(400) % 7
    recipe = training.Training(minutes=0.01, length=16, rows=4)
    monkeypatch.setattr(training, "_EVERY", 0.0)
    step, calls = training._State.step, []

    def stop_in_the_third_step(self: Any, *args: Any) -> None:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training._State, "step", stop_in_the_third_step)
        with pytest.raises(KeyboardInterrupt):
            training.trained(SHAPE, recipe, tokens, tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["steps"] == 2
    model, told = training.trained(SHAPE, recipe, tokens, tmp_path)
    assert told["steps"] > 2
    again, same = training.trained(SHAPE, recipe, tokens, tmp_path)  # it is complete
    assert same == told
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="give another --folder"):
        training.trained(SHAPE, training.Training(minutes=1), tokens, tmp_path)


@pytest.mark.usefixtures("short_dreams")
@pytest.mark.filterwarnings("ignore")  # of other libraries
def test_every_method_is_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixtures, "PASSES", 1)
    texts = [write(tmp_path / name, seed) for seed, name in enumerate(("valid.txt", "test.txt"))]
    options = mixtures.Options(
        folder=tmp_path / "kept",
        train=tuple(texts),
        test=(texts[1], write(tmp_path / "other.txt", 2)),
        minutes=0.005,
        tokens=2048,
        windows=1,
        experts=(2,),
        methods=mixtures.DEFAULT,
        shape=SHAPE,
        output=tmp_path / "out.json",
    )
    mixtures.main(options)
    stored = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    rows = stored["seeds"]["0"]["rows"]
    assert list(rows) == ["original", *(mixtures.row(method, 2) for method in mixtures.DEFAULT)]
    assert str(tmp_path) not in json.dumps(stored)
    assert all(math.isfinite(values[text]) for values in rows.values() for text in ("test", "other"))
    assert all(values["kept"] < 0.9 for name, values in rows.items() if name != "original")
    trained_on = stored["configuration"]["trained on"]
    assert trained_on["test.txt"] < 0.9 * trained_on["valid.txt"], "its last part tests"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == len(rows) + 2
    written = (tmp_path / "out.json").stat().st_mtime_ns
    mixtures.main(copy.copy(options))  # all is there
    assert (tmp_path / "out.json").stat().st_mtime_ns == written


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    options = mixtures.Options(folder=tmp_path, train=(), test=(), methods=("REAPER",))
    with pytest.raises(SystemExit, match="'REAPER', expected some of: nac; nac, not refined"):
        mixtures.main(options)
