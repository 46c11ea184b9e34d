"""How long a plan takes, part by part, beside Torch-Pruning's graph and pruning step in the same process."""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from torch import nn

import nac_gpu as nac
from common.zoo_measure import WIDTH, Row, built, heads_of, pruned, said, started
from common.zoo_models import Case
from nac_gpu.planning import taking
from nac_gpu.planning.trial import Trial
from nac_gpu.reporting.text import table

#: What is asked of a plan.
ASKED: Mapping[str, dict[str, Any]] = {
    "width=0.5": {"width": WIDTH},
    "params=0.5": {"params": WIDTH, "calibration": "none"},
}
PEERS = ("Torch-Pruning", "Torch-Pruning, heads")  # the latter where there are heads
ROUNDS = 5
Seconds = dict[str, float]


@contextlib.contextmanager
def timed(owner: object, name: str, seconds: Seconds, part: str) -> Iterator[None]:
    """Add up the processor seconds that a function takes, as those of a part."""
    function = getattr(owner, name)

    def timing(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.process_time() - start

    with mock.patch.object(owner, name, timing):
        yield


def plan_seconds(model: nn.Module, inputs: Any, asked: Mapping[str, Any]) -> Seconds:
    """Processor seconds of a plan: `all`, and of it `record` and `trial`; the rest are clustering and the budget."""
    seconds: Seconds = {"record": 0.0, "trial": 0.0, "all": 0.0}
    with timed(taking, "record", seconds, "record"), timed(Trial, "run", seconds, "trial"):
        start = time.process_time()
        nac.plan(model, inputs, **asked)
        seconds["all"] = time.process_time() - start
    return seconds


def peer_seconds(model: nn.Module, inputs: Any, *, heads: bool) -> Seconds:
    """Processor seconds of Torch-Pruning on a copy of the model; copying it does not count."""
    model = copy.deepcopy(model)
    start = time.process_time()
    pruned(model, inputs, heads=heads)
    return {"all": time.process_time() - start}


def plan_time(case: Case, note: Callable[[Row], None], rounds: int = ROUNDS) -> None:
    """Plans and Torch-Pruning in turns, after a round to warm up.

    Args:
        case: the model.
        note: takes what is known so far, after every measurement.
        rounds: how many count.
    """
    row, reached = started(note)
    try:
        model, inputs = built(case)
        seconds: dict[str, list[Seconds]] = {}
        for turn in range(rounds + 1):
            for name in (*ASKED, *PEERS[: 2 if heads_of(model) else 1]):
                reached(f"{name}, round {turn}", seconds=seconds)
                found = (
                    plan_seconds(model, inputs, ASKED[name])
                    if name in ASKED
                    else peer_seconds(model, inputs, heads=name == PEERS[1])
                )
                seconds.setdefault(name, []).append(found)
        reached("done", seconds=seconds)
    except Exception as error:  # whatever goes wrong is the result
        reached(row["stage"], outcome=f"fails: {said(error)}")


def counted(runs: list[Seconds], part: str) -> list[float]:
    """The seconds of a part, by round; the first round warmed up, and counts only where it is the only one."""
    return [run[part] for run in runs[1:] or runs]


def lines(name: str, row: Row) -> Iterator[list[str]]:
    """The rows of a model in the table: medians, and the ratio to the faster way of Torch-Pruning with its spread."""
    seconds = row.get("seconds", {})
    peers = [counted(seconds[peer], "all") for peer in PEERS if peer in seconds]
    peer = min(peers, key=statistics.median) if peers else []
    for asked in ASKED:
        if asked not in seconds:
            yield [name, asked, *["-"] * 5, row.get("outcome", row["stage"])]
            continue
        runs = {part: counted(seconds[asked], part) for part in ("record", "trial", "all")}
        runs["rest"] = [a - r - t for r, t, a in zip(runs["record"], runs["trial"], runs["all"], strict=True)]
        cells = [f"{statistics.median(runs[part]):.2f}" for part in ("record", "trial", "rest", "all")]
        ratios = sorted(ours / theirs for ours, theirs in zip(runs["all"], peer, strict=False))
        last = row.get("outcome", "-") if not ratios else f"{statistics.median(ratios):.2f}"
        spread = f" ({ratios[0]:.2f} - {ratios[-1]:.2f})" if ratios else ""
        yield [name, asked, *cells, f"{statistics.median(peer):.2f}" if peer else "-", last[:60] + spread]


def printed_times(stored: Mapping[str, Any]) -> str:
    """The table of times, in Markdown: processor seconds, and ours by those of Torch-Pruning."""
    rows = [line for name, row in stored["rows"].items() for line in lines(name, row)]
    return table(["model", "plan", "record", "trial", "clustering, budget", "all", "Torch-Pruning", "ratio"], rows)
