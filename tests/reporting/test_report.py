"""The report: its numbers, what it finds out by itself, and errors."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import images, network, randomised
from reports import QUICK, Cnn, labelled
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.network.timing import batch_of, timings
from nac_gpu.planning.prepare import Prepared, plan_for
from nac_gpu.reporting import matching
from nac_gpu.reporting.contents import Filters
from nac_gpu.reporting.measuring import accuracy, bytes_on_disk


def test_sizes_are_those_of_cost_and_of_the_file(made: Any, tmp_path: Path) -> None:
    model, small, x, plan, report = made
    for side, network_, planned in ((report.before, model, plan.before), (report.after, small, plan.after)):
        assert nac.Cost(side.parameters, side.flops) == nac.cost(network_, x) == planned
        torch.save(network_.state_dict(), tmp_path / "weights.pt")
        assert side.bytes == pytest.approx((tmp_path / "weights.pt").stat().st_size, rel=0.02)  # it holds its own name
        file = io.BytesIO()
        torch.save(network_.state_dict(), file)
        assert side.bytes == bytes_on_disk(network_) == len(file.getvalue())


def test_times_have_their_spread(made: Any) -> None:
    report = made[-1]
    assert [timing.batch for timing in report.timings] == [1, 3]
    for timing in report.timings:
        assert timing.rounds >= 5
        for spread in (timing.before, timing.after, timing.speedup):
            assert 0 < spread.low <= spread.median <= spread.high
        assert timing.throughput == (timing.batch / timing.before.median, timing.batch / timing.after.median)


def test_accuracy_counts_right_answers(made: Any) -> None:
    model, small, _, _, report = made
    inputs, labels = (torch.cat(parts) for parts in zip(*labelled(30, 20), strict=True))
    with torch.no_grad():
        before, after = (network_(inputs).argmax(1) for network_ in (model, small))
    found = report.accuracy
    assert (found.labels, found.before, found.after) == (
        50,
        float((before == labels).double().mean()),
        float((after == labels).double().mean()),
    )
    assert found.agreement == float((before == after).double().mean())


def test_accuracy_of_maps_and_of_models_with_several_outputs() -> None:
    class Maps(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x.mean((1, 2, 3)), "out": x}

    scores = torch.randn(2, 5, 3, 3)
    found = accuracy(Maps(), Maps(), [(scores, scores.argmax(1))])
    assert (found.labels, found.before, found.after, found.agreement) == (18, 1, 1, 1)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([images(2, 3, 8, 8)], TypeError, "batch 0 of the data is Tensor, expected a pair"),
        ([(images(2, 3, 8, 8), torch.zeros(2))], TypeError, "tuple of float32, float32, expected a pair .* integer"),
        ([(images(2, 3, 8, 8), torch.zeros(5, dtype=torch.int64))], ValueError, r"outputs are \(2, 4\) and the labels"),
        ([], ValueError, "no labels, expected at least one batch"),
    ],
)
def test_data_that_does_not_fit_is_an_error(made: Any, data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        accuracy(made[0], made[1], data)


@pytest.mark.parametrize("name", ["cnn", "residual", "split", "conv1d", "sequence"])
def test_widths_are_found_without_the_plan(name: str) -> None:
    model, x = network(name)
    plan = nac.plan(model, x, width=0.4)
    small = nac.compress(model, x, plan, calibration="none")
    found = nac.report(model, small, x, calibration="none", timed={})
    assert found.plan == plan
    assert found.timings == ()


def test_widths_that_the_sizes_leave_open_ask_for_the_plan(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, x, _, _ = made

    def doubled(*options: Any) -> Prepared:
        prepared = plan_for(*options)
        return replace(prepared, choices=prepared.choices[:1] * 2)

    monkeypatch.setattr(matching, "plan_for", doubled)
    monkeypatch.setattr(matching, "origin_of", lambda _: None)
    with pytest.raises(ValueError, match="do not tell how many neurons each group kept; give plan="):
        nac.report(model, small, x, calibration="none", timed={})


@pytest.mark.parametrize(
    ("model", "layer", "group"),
    [
        ("residual", None, "stem"),
        ("residual", "block", "stem"),
        ("split", "make#2", "make#2"),
        ("split", "make", "make"),
    ],
)
def test_a_layer_names_the_group_that_it_makes(model: str, layer: str | None, group: str) -> None:
    original, x = network(model)
    small = nac.compress(original, x, width=0.5, calibration="none")
    found = nac.report(original, small, x, calibration="none", timed={}, layer=layer)
    assert found.tree.group.name == group


def test_nothing_is_changed_and_wrappers_do_not_matter(made: Any) -> None:
    model, small, x, plan, _ = made
    small.train()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    state = torch.get_rng_state()
    found = nac.report(nn.DataParallel(model), small, x, plan=plan, calibration="none", data=labelled(5), **QUICK)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in small.modules())
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    assert found.title == "Cnn, compressed"
    small.eval()


def test_a_batch_at_which_the_model_does_not_run_is_noted(made: Any) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, -1)

    measured, failed = timings(Fixed(), Fixed(), torch.randn(1, 3), {3: 0.005, 4: 0.005})
    assert [timing.batch for timing in measured] == [4]
    assert len(failed) == 1
    assert failed[0].startswith("not timed at batch 3: RuntimeError: ")
    assert f"{failed[0]}." in replace(made[-1], notes=tuple(failed)).to_text()


def test_batches_repeat_what_has_a_batch() -> None:
    inputs = {"ids": torch.arange(6).view(2, 3), "scale": torch.ones(7), "flag": True, "one": torch.tensor(1)}
    found: Any = batch_of(inputs, 3)
    assert found["ids"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert found["scale"] is inputs["scale"]
    assert found["flag"] is True
    with pytest.raises(ValueError, match=r"no tensor .* with a batch to repeat"):
        batch_of((1, 2), 3)


def refused(message: str, **options: Any) -> Any:
    return pytest.param(options, message, id=message[:24])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        refused(r"unknown layer 'nowhere'; expected layer= to be one of: layers\.first, ", layer="nowhere"),
        refused(r"layers\.head was left alone: model output; expected layer=", layer="layers.head"),
        refused("batch size 0, expected whole numbers from 1", timed={1: 1.0, 0: 1.0}),
        refused("0 seconds at batch size 1, expected more than 0", timed={1: 0}),
    ],
)
def test_wrong_options_are_errors(made: Any, options: dict[str, Any], message: str) -> None:
    model, small, x, plan, _ = made
    with pytest.raises(ValueError, match=message):
        nac.report(model, small, x, plan=plan, calibration="none", **(QUICK | options))


def halved(model: nn.Module, x: Tensor) -> nn.Module:
    return nac.compress(model, x, width=0.25, calibration="none")


def shallower(_: nn.Module, __: Tensor) -> nn.Module:
    other = Cnn()
    del other.layers.norm
    return other


def wider(_: nn.Module, __: Tensor) -> nn.Module:
    other = Cnn()
    other.layers.first, other.layers.norm = nn.Conv2d(3, 40, 3, bias=False), nn.BatchNorm2d(40)
    return other


@pytest.mark.parametrize(
    ("build", "planned", "message"),
    [
        (halved, True, r"layers\.first\.weight is \(3, 3, 3, 3\) in small, expected \(6, 3, 3, 3\) by the plan"),
        (
            shallower,
            True,
            r"small has no tensor layers\.norm\.weight, expected a model and what nac_gpu\.compress",
        ),
        (wider, False, "was not made of model; give the model and the plan"),
    ],
)
def test_models_that_do_not_belong_together_are_errors(
    made: Any, build: Callable[[nn.Module, Tensor], nn.Module], planned: bool, message: str
) -> None:
    model, _, x, plan, _ = made
    with pytest.raises(ValueError, match=message):
        nac.report(model, build(model, x), x, plan=plan if planned else None, calibration="none", **QUICK)


def test_both_models_must_be_on_one_device(made: Any) -> None:
    model, _, x, plan, _ = made
    with pytest.raises(ValueError, match="small is on meta, expected it on cpu beside model: move one of them"):
        nac.report(model, Cnn().to("meta"), x, plan=plan, **QUICK)


def test_on_every_device(device: torch.device) -> None:
    torch.manual_seed(0)
    model, x = randomised(Cnn()).to(device).eval(), images(2, 3, 8, 8).to(device)
    small = nac.compress(model, x, width=0.5, calibration=[images(64, 3, 8, 8)])
    found = nac.report(model, small, x, calibration=[images(64, 3, 8, 8)], data=labelled(5), **QUICK)
    assert isinstance(found.filters, Filters)
    assert found.filters.after is not None
    assert ("gpu" in found.environment) == (device.type == "cuda")
    assert found.to_html()
    assert found.to_json()
