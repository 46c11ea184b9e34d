"""Does it work on the models that people use? Every model of several libraries, from its configuration.

Each is built with random weights and runs in a process of its own, so that one that hangs or crashes stops nothing.
Measured: what a plan finds and leaves alone, and why; whether copies of neurons merge with no change of the outputs, in
float64; whether a network of half the width runs and trains; seconds and memory. With --peer, the same network is
pruned by Torch-Pruning. With --time, only how long plans take is measured, in turns with Torch-Pruning.

    python experiments/zoo.py                                           # all suites whose packages are installed
    python experiments/zoo.py --suite torchvision --models 'resnet*' --peer
    python experiments/zoo.py --time --suite torchvision --models resnet50 --threads 1 --results runs/plan_time.json
    python experiments/zoo.py --table experiments/results/zoo.json      # the table of a file, in Markdown

A run that was stopped goes on with the models that are missing in --results.
"""

import contextlib
import importlib.metadata
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from common.plan_time import plan_time, printed_times
from common.results import environment, write_json
from common.zoo_measure import Row, compression, peer
from common.zoo_models import SUITES, case, images, installed
from nac_gpu.reporting.text import table

PACKAGES = ("torchvision", "timm", "transformers", "torch-pruning")
IDENTITY = 1e-8
OURS = {"plain": compression, "compensated": partial(compression, compensate=True)}


@dataclass(frozen=True)
class Options:
    """Plans, merges and compressions of many models.

    Attributes:
        suite: which suites; by default all whose package is installed.
        models: patterns of names, such as "resnet*" or "timm/*".
        timeout: seconds for a model.
        results: the measurements (JSON).
        again: measure models again that are in the file.
        compensate: the network of half the width is compensated and refined, too, on the example inputs; which for
            large models takes minutes on a CPU.
        peer: also run Torch-Pruning.
        time: measure how long plans take, beside Torch-Pruning, and nothing else; on one image of 224 x 224, for models
            of torchvision.
        threads: of PyTorch in each process.
        table: print the table of this file, and measure nothing.
    """

    suite: tuple[str, ...] = ()
    models: tuple[str, ...] = ("*",)
    timeout: float = 300
    results: Path = Path("runs/zoo.json")
    again: bool = False
    compensate: bool = False
    peer: bool = False
    time: bool = False
    threads: int = 2
    table: Path | None = None


def names(options: Options) -> list[str]:
    """The chosen models, as `suite/model`."""
    suites = options.suite or tuple(suite for suite in SUITES if installed(suite))
    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown:
        raise SystemExit(f"unknown suite {unknown[0]!r}, expected some of {', '.join(SUITES)}")
    found = [(f"{suite}/{model}", model) for suite in suites for model in SUITES[suite][1]()]
    chosen = [
        full for full, model in found if any(fnmatchcase(name, p) for p in options.models for name in (full, model))
    ]
    if not chosen:
        raise SystemExit(f"no model matches {', '.join(options.models)} in {', '.join(suites)}")
    return chosen


def in_process(options: Options, name: str, by: str) -> Row:
    """The row of a model, measured in a process of its own; what is known when the time is over."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, "-W", "ignore", __file__, "--one", name, by, str(path), str(options.threads)]
        failed = ""
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
            if ended.returncode:
                last = (ended.stderr.strip().splitlines() or [""])[-1]
                failed = f"process ended with {_ended(ended.returncode)}: {last[:300]}"
        except subprocess.TimeoutExpired:
            failed = f"hangs (> {options.timeout:g} s)"
        row: Row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"stage": "starting"}
        if failed:
            row["error" if by in OURS else "outcome"] = failed
        return row


def _ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"code {code}"


def measure_one(name: str, by: str, row: str, threads: str) -> None:
    """What the process of one model does: `--one` and these arguments."""
    torch.set_num_threads(int(threads))
    chosen = case(name)
    if by == "time" and name.startswith("torchvision/"):  # what both libraries show in their examples
        chosen = replace(chosen, inputs=lambda: images(224, 1))
    measure = {**OURS, "peer": peer, "time": plan_time}[by]
    measure(chosen, lambda known: write_json(known, Path(row)))


def versions() -> Iterator[tuple[str, str]]:
    """Versions of the packages that models come from, and of the peer."""
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def verdict(row: Row) -> str:
    """`ok`, `nothing`, or what went wrong."""
    if "error" in row:
        return f"{row['stage']}: {row['error']}"
    if row.get("groups") == 0:
        return "nothing to compress"
    if not row.get("identity", 0) < IDENTITY:
        return f"WRONG: merged copies change the outputs by {row['identity']:.1e}"
    return "vacuous" if row.get("vacuous") else "ok"


def printed(stored: dict[str, Any]) -> str:
    """The table of a file, in Markdown."""
    if any("seconds" in row and isinstance(row["seconds"], dict) for row in stored["rows"].values()):
        return printed_times(stored)
    peers = any("peer" in row for row in stored["rows"].values())
    rows = []
    for name, row in stored["rows"].items():
        share, error, after = row.get("share"), row.get("identity"), row.get("after")
        cells = [
            name,
            f"{row.get('parameters', 0) / 1e6:.2f} M",
            row.get("groups", "-"),
            "-" if share is None else f"{100 * share:.1f} %",
            "-" if error is None else f"{error:.0e}",
            "-" if after is None else f"{100 * after / row['parameters']:.1f} %",
            f"{row['seconds']:.1f}" if "seconds" in row else "-",
            verdict(row)[:80].replace("|", "/"),
        ]
        if peers:
            other = row.get("peer", {})
            kept = f" ({100 * other['after'] / other['parameters']:.1f} %)" if other.get("outcome") == "ok" else ""
            cells += [
                other.get("outcome", "-")[:60].replace("|", "/") + kept,
                f"{other['seconds']:.1f}" if "seconds" in other else "-",
            ]
        rows.append(cells)
    header = ["model", "parameters", "groups", "in groups", "identity", "half width", "plan, s", "outcome"]
    return table(header + ["Torch-Pruning", "s"] * peers, rows)


def measured(options: Options, name: str, row: Row) -> Row:
    """The row of a model with what was missing in it."""
    if options.again or "stage" not in row:
        kept = {key: row[key] for key in ("peer",) if key in row}
        by = "time" if options.time else "compensated" if options.compensate else "plain"
        row = in_process(options, name, by) | kept
        tqdm.write(f"{name}: {row.get('outcome', row['stage']) if options.time else verdict(row)}")
    if options.peer and (options.again or "peer" not in row):
        row["peer"] = in_process(options, name, "peer")
        tqdm.write(f"{name}: Torch-Pruning: {row['peer'].get('outcome')}")
    return row


def main(options: Options) -> None:
    """Measure every model that is missing, write the results after every one, print the table."""
    if options.table is not None:
        print(printed(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    known = environment(torch.device("cpu")) | {"threads": options.threads} | dict(versions())
    stored: dict[str, Any] = {"environment": known, "rows": {}}
    if options.results.exists():
        stored["rows"] = json.loads(options.results.read_text(encoding="utf-8"))["rows"]
    chosen = names(options)
    progress = tqdm(chosen, disable=None)
    try:
        for name in progress:
            progress.set_postfix_str(name)
            stored["rows"][name] = measured(options, name, stored["rows"].get(name, {}))
            write_json(stored, options.results)
    except KeyboardInterrupt:
        progress.close()
        print(f"stopped; what is finished is in {options.results}")
    print(printed({"rows": {name: stored["rows"][name] for name in chosen if name in stored["rows"]}}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure_one(*sys.argv[2:])
    else:
        main(tyro.cli(Options))
