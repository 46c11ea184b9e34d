"""The report: its numbers, its three forms, and the page in a real browser."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import images, network, randomised
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.plan import Prepared, prepare
from nac_gpu.report.contents import GroupCurve, Tree
from nac_gpu.report.filters import Filters
from nac_gpu.report.measure import accuracy, batch_of, bytes_on_disk, timings
from nac_gpu.report.pictures import curve, dendrogram

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUICK: dict[str, Any] = {"batch_sizes": (1, 3), "seconds": 0.02}


class Cnn(nn.Module):
    """A small network for images whose layers are called what nobody should call them."""

    def __init__(self) -> None:
        super().__init__()
        names = ["first", "norm", "act", "<b>\"$x_1$&'</b>", "more", "pool", "flat", "head"]
        layers = [
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 8, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ]
        self.layers = nn.Sequential()
        for name, layer in zip(names, layers, strict=True):
            self.layers.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def labelled(*counts: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator)) for n in counts]


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, nn.Module, Tensor, nac.Plan, nac.Report]:
    torch.manual_seed(0)
    model, x = randomised(Cnn()).eval(), images(2, 3, 8, 8)
    calibration = [images(64, 3, 8, 8)]
    plan = nac.plan(model, x, width=0.5)
    small = nac.compress(model, x, plan, calibration=calibration)
    found = nac.report(model, small, x, plan=plan, calibration=calibration, data=labelled(30, 20), **QUICK)
    return model, small, x, plan, found


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


def test_the_text_says_it_all(made: Any) -> None:
    report = made[-1]
    text = report.to_text()
    assert str(report.plan) in text
    assert "left alone: layers.head (4): model output" in text
    for words in ("size on disk", "latency, batch 3", "throughput, batch 1", "accuracy", "calibration data", "torch: "):
        assert words in text
    assert f"{report.before.parameters:,}" in text


def test_the_json_has_every_curve_and_the_dendrogram(made: Any) -> None:
    report = made[-1]
    found = json.loads(report.to_json())
    assert [item["group"] for item in found["curves"]] == [group.name for group in report.plan.groups]
    for item, group in zip(found["curves"], report.plan.groups, strict=True):
        errors = {point["kept"]: point["error"] for point in item["errors"]}
        assert errors[group.before] == 0
        assert 0 < errors[1] <= 1
        assert errors[1] >= item["error"] >= 0
    tree = found["dendrogram"]
    assert tree["group"] == "layers.first"
    assert len(tree["linkage"]) == 11
    assert len(set(tree["labels"])) == 6
    assert sorted(member for members in found["filters"]["clusters"] for member in members) == list(range(12))
    assert found["plan"]["left_alone"][0]["reason"] == "model output"
    assert found["timings"][0]["throughput_before"] > 0


def test_the_page_stands_alone_and_escapes_names(made: Any) -> None:
    report = made[-1]
    page = replace(report, title="<script>alert(1)</script>").to_html()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>&quot;" not in page
    assert page.count("&lt;b&gt;&quot;$x_1$&amp;&#x27;&lt;/b&gt;") >= 3
    assert "http" not in page
    for reference in re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page):
        assert reference.startswith(("data:", "#"))
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert page.count("<svg") == len(report.plan.groups) + 1
    assert "#010203" not in page
    assert "model output" in page
    assert page.count('class="result"') == sum(len(members) > 1 for members in report.filters.clusters)
    assert page == replace(report, title="<script>alert(1)</script>").to_html()


def test_saving_is_all_or_nothing(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = made[-1]
    for name, start in (("a.html", "<!DOCTYPE"), ("b/a.json", "{"), ("a.txt", report.title), ("a.MD", report.title)):
        report.save(tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)
    with pytest.raises(ValueError, match=r"a\.pdf does not say what to write, expected a name in \.html"):
        report.save(tmp_path / "a.pdf")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    old = (tmp_path / "a.txt").read_text(encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        replace(report, title="new").save(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == old


def test_without_matplotlib_text_and_json_remain(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = made[-1]
    with pytest.raises(ImportError, match=r"pip install 'nac-gpu\[cli\]'"):
        report.to_html()
    assert report.to_text()
    assert report.to_json()


@pytest.mark.parametrize("name", ["cnn", "residual", "split", "conv1d", "sequence"])
def test_widths_are_found_without_the_plan(name: str) -> None:
    model, x = network(name)
    plan = nac.plan(model, x, width=0.4)
    small = nac.compress(model, x, plan, calibration="none")
    found = nac.report(model, small, x, calibration="none", batch_sizes=())
    assert found.plan == plan
    assert found.timings == ()


def test_widths_that_the_sizes_leave_open_ask_for_the_plan(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, x, _, _ = made

    def doubled(*options: Any) -> Prepared:
        prepared = prepare(*options)
        twice = prepared.groups[:1] * 2
        return replace(prepared, graph=replace(prepared.graph, groups=twice))

    monkeypatch.setattr(sys.modules["nac_gpu.report.matching"], "prepare", doubled)
    with pytest.raises(ValueError, match="do not tell how many neurons each group kept; give plan="):
        nac.report(model, small, x, calibration="none", batch_sizes=())


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
    found = nac.report(original, small, x, calibration="none", batch_sizes=(), layer=layer)
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

    measured, failed = timings(Fixed(), Fixed(), torch.randn(1, 3), [3, 4], 0.01)
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
        refused("batch size 0, expected whole numbers from 1", batch_sizes=(1, 0)),
        refused("seconds=0, expected more than 0", seconds=0),
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


def test_merged_filters_stand_beside_what_they_became() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    x = images(2, 1, 8, 8)
    small = nac.compress(model, x, width=0.5, rule="centroid", neurons="folded")
    filters = nac.report(model, small, x, calibration="none", **QUICK).filters
    assert isinstance(filters, Filters)
    assert filters.before.shape == (10, 8, 8, 1)
    assert filters.after is not None
    for members, merged in zip(filters.clusters, filters.after, strict=True):
        torch.testing.assert_close(filters.before[list(members)].mean(0), merged)

    with torch.no_grad():
        small.get_parameter("1.weight").normal_()
    other = nac.report(model, small, x, calibration="none", **QUICK)
    assert isinstance(other.filters, Filters)
    assert other.filters.after is None
    assert "are not these merged ones" in other.to_html()


@pytest.mark.parametrize(
    ("width", "shape", "reason"),
    [(0.5, (2, 64), "reads no images"), ({"3": 2}, (2, 1, 8, 8), "no filters of 1 were merged")],
)
def test_filters_are_left_out_with_a_reason(width: Any, shape: tuple[int, ...], reason: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3)]
    model, x = nn.Sequential(*layers).eval(), images(*shape)
    small = nac.compress(model, x, width=width, calibration="none")
    found = nac.report(model, small, x, calibration="none", **QUICK)
    assert reason in str(found.filters)
    assert f"Left out: {found.filters}." in found.to_html()
    assert found.tree.group.name == ("1" if width == 0.5 else "3")


def test_large_models_are_drawn_in_part(made: Any) -> None:
    report = made[-1]
    curves = tuple(replace(report.curves[0], group=replace(report.plan.groups[0], name=f"g{n}")) for n in range(100))
    plan = replace(report.plan, groups=tuple(found.group for found in curves))
    page = replace(report, curves=curves, plan=plan).to_html()
    assert page.count("<figure>") == 24 + 1
    assert "The 24 groups that lost most; the JSON report has the curves of the other 76." in unescape(page)

    n = 1100
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    grown = replace(report.plan.groups[0], before=n, after=1060)
    tree = nac.ward_linkage(points)
    svg = dendrogram(Tree(grown, tree, tree.cut(1060)), "t")
    assert "1,024 largest branches" in svg


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


def test_a_group_that_keeps_all_has_no_cut(made: Any) -> None:
    group = replace(made[-1].plan.groups[0], before=2, after=2)
    tree = nac.ward_linkage(torch.tensor([[0.0], [0.0]]))
    assert "cut:" not in dendrogram(Tree(group, tree, tree.cut(2)), "t")
    assert curve(GroupCurve(group, {1: 0.0, 2: 0.0}, by_activations=True), "c").startswith('<svg role="img"')


LOOK = """<script>addEventListener("load", () => {
  const shown = [...document.querySelectorAll("svg, img")].map(e => e.getBoundingClientRect());
  document.title = JSON.stringify({
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:")),
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    pictures: shown.length,
    hidden: shown.filter(box => box.width < 20 || box.height < 20).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    small: [...document.querySelectorAll("svg text")].filter(e => e.getBoundingClientRect().height < 8).length,
  });
})</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_the_page(made: Any, tmp_path: Path, width: int) -> None:
    assert BROWSER is not None
    report = made[-1]
    page = tmp_path / "report.html"
    page.write_text(report.to_html().replace("</body>", LOOK), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --enable-logging=stderr --dump-dom"
    own = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=1000"]
    run = subprocess.run(
        [BROWSER, *flags.split(), *own, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in run.stderr
    title = re.search(r"<title>(.*?)</title>", run.stdout)
    assert title is not None
    found = json.loads(unescape(title[1]))
    merged = [cluster for cluster in report.filters.clusters if len(cluster) > 1]
    pictures = len(report.plan.groups) + 1 + sum(len(cluster) + 1 for cluster in merged)
    assert found == {"fetched": [], "broken": 0, "pictures": pictures, "hidden": 0, "overflow": 0, "small": 0}
