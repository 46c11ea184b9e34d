"""A network of any kind, compressed in several ways: each is measured once; random removal keeps what it says."""

import json
from pathlib import Path

import pytest
import torch

import any_model

pytestmark = pytest.mark.usefixtures("short_dreams")


def options(folder: Path) -> any_model.Options:
    for name, count in (("inputs", 40), ("test", 30)):
        torch.save(torch.randn(count, 3, 16, 16), folder / f"{name}.pt")
    model, inputs, test = "tinymodels:small", folder / "inputs.pt", folder / "test.pt"
    return any_model.Options(model, inputs, test, params=(0.5,), images=32, output=folder / "out.json")


def test_every_way_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(tmp_path)
    any_model.main(given)
    stored = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    rows = stored["seeds"]["0"]["rows"]
    assert stored["configuration"] == {"model": "small", "inputs": 32, "test": 30}
    assert list(rows) == ["original", *(any_model.row(way, 0.5) for way in any_model.WAYS)]
    whole = rows.pop("original")
    assert (whole["agreement"], whole["error"]) == (1, 0)
    assert all(0 < row["parameters"] <= 0.5 * whole["parameters"] and row["error"] > 0 for row in rows.values())
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == len(rows) + 3
    written = (tmp_path / "out.json").stat().st_mtime_ns
    any_model.main(given)  # all is there
    assert (tmp_path / "out.json").stat().st_mtime_ns == written


def test_removal_at_random() -> None:
    labels = any_model.removed_at_random(torch.zeros(9, 2), 4, seed=1)
    assert labels[labels >= 0].tolist() == [0, 1, 2, 3]
    assert labels.tolist() != any_model.removed_at_random(torch.zeros(9, 2), 4, seed=2).tolist()


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    given = options(tmp_path)
    given.ways = ("inputs: magic",)
    with pytest.raises(SystemExit, match="'inputs: magic', expected some of: inputs: default; "):
        any_model.main(given)
    torch.save([torch.zeros(1), torch.zeros(1)], given.test)
    given.ways = None
    with pytest.raises(SystemExit, match=r"test\.pt: expected one tensor, found 2"):
        any_model.main(given)
