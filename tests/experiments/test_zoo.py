"""The zoo: rows of single models, processes that fail, the table."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from common import plan_time
from common.zoo_measure import Row, compression
from common.zoo_models import SUITES, Case, case, installed, torchvision_models


def row(model: Case) -> Row:
    found: list[Row] = []
    compression(model, lambda known: found.append(dict(known)), compensate=True)
    return found[-1]


def test_a_row_says_what_was_found() -> None:
    found = row(case("handwritten/siren"))
    assert found["stage"] == "done"
    assert found["groups"] == 2
    assert found["identity"] < 1e-8
    assert not found["vacuous"]
    assert 0.9 < found["share"] < 1
    assert found["after"] < found["parameters"]
    assert zoo.verdict(found) == "ok"


def test_nothing_to_compress_is_not_an_error() -> None:
    found = row(Case(lambda: nn.Linear(2, 2), case("handwritten/siren").inputs))
    assert found["groups"] == 0
    assert zoo.verdict(found) == "nothing to compress"


def test_what_fails_is_told_with_its_stage() -> None:
    found = row(Case(lambda: nn.Linear(3, 2), case("handwritten/siren").inputs))
    assert zoo.verdict(found).startswith("planning: RuntimeError: the example inputs do not fit")


def test_wrong_networks_and_vacuous_tests_are_told() -> None:
    assert zoo.verdict({"stage": "done", "groups": 1, "identity": 0.5}).startswith("WRONG")
    assert zoo.verdict({"stage": "done", "groups": 1, "identity": float("nan")}).startswith("WRONG")
    assert zoo.verdict({"stage": "done", "groups": 1, "identity": 0.0, "vacuous": True}) == "vacuous"


def test_every_suite_lists_models() -> None:
    assert len(torchvision_models()) >= 80
    assert all(SUITES[suite][1]() for suite in SUITES if installed(suite) or suite == "timm")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown suite"):
        case("nonsense/x")
    with pytest.raises(ValueError, match="unknown model"):
        case("torchvision/x")
    with pytest.raises(SystemExit, match="no model matches x"):
        zoo.names(zoo.Options(suite=("torchvision",), models=("x",)))


def test_a_run_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One model that ends, none that is run twice, and the table of the file."""
    results = tmp_path / "zoo.json"
    options = zoo.Options(suite=("handwritten",), models=("siren",), results=results)
    zoo.main(options)
    stored = json.loads(results.read_text())
    assert stored["rows"]["handwritten/siren"]["stage"] == "done"
    stored["rows"]["handwritten/siren"]["groups"] = 77
    results.write_text(json.dumps(stored))
    zoo.main(options)
    capsys.readouterr()
    zoo.main(zoo.Options(table=results))
    assert "| handwritten/siren |" in capsys.readouterr().out.replace("  ", " ")
    assert json.loads(results.read_text())["rows"]["handwritten/siren"]["groups"] == 77


def test_times_of_plans_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with heads, a peer that takes no time, and rows that have no peer or nothing at all."""
    tried: list[bool] = []

    def peer_seconds(model: nn.Module, inputs: object, *, heads: bool) -> dict[str, float]:
        tried.append(heads)
        return {"all": 2.0 if heads else 4.0}

    monkeypatch.setattr(plan_time, "peer_seconds", peer_seconds)
    found: list[Row] = []
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    plan_time.plan_time(Case(lambda: layer, lambda: torch.randn(2, 5, 16)), lambda row: found.append(dict(row)), 2)
    row = found[-1]
    assert row["stage"] == "done"
    assert tried == [False, True] * 3
    for asked in plan_time.ASKED:
        assert all(0 < run["record"] + run["trial"] < run["all"] for run in row["seconds"][asked])
    row["seconds"]["width=0.5"] = [{"record": 9.0, "trial": 9.0, "all": 99.0}] + [
        {"record": 1.0, "trial": 0.5, "all": total} for total in (2.0, 3.0)
    ]
    stored = {"rows": {"a": row, "b": {"stage": "x", "outcome": "hangs"}}}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in zoo.printed(stored).splitlines()]
    assert cells[2] == ["a", "width=0.5", "1.00", "0.50", "1.00", "2.50", "2.00", "1.25 (1.00 - 1.50)"]
    assert cells[4] == ["b", "width=0.5", "-", "-", "-", "-", "-", "hangs"]


def test_a_model_without_a_plan_has_no_times() -> None:
    found: list[Row] = []
    plan_time.plan_time(Case(lambda: nn.Linear(2, 2), lambda: torch.randn(1, 2)), lambda row: found.append(dict(row)))
    assert found[-1]["outcome"].startswith("fails: ValueError: nothing to compress")


def test_a_model_that_takes_too_long_is_ended() -> None:
    found = zoo.in_process(zoo.Options(timeout=0.2), "handwritten/siren", "plain")
    assert found == {"stage": "starting", "error": "hangs (> 0.2 s)"}
