"""The forms of a report: text, JSON, and the page, also in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import images
from reports import QUICK
from torch import nn

import nac_gpu as nac
from nac_gpu.reporting.contents import Filters, GroupCurve, Tree
from nac_gpu.reporting.pictures import curve, dendrogram

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


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
