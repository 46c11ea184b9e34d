"""What an experiment measured: kept per seed in one JSON file, summed up as mean and spread."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import processes
from nac_gpu.files.atomic import write_text
from nac_gpu.network.machine import environment

Measured = dict[str, Any]


def write_json(value: object, path: Path) -> None:
    """Write a file that is either the old one or the whole new one, whenever the process is stopped."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


class Results:
    """The measurements of one experiment, by seed and row, in a JSON file that is written after every one of them.

    A run that was stopped goes on with what is missing, and another run with other seeds adds to the file. Of several
    processes all measure, and the first one writes.

    Attributes:
        seeds: seed -> `{"environment": ..., "rows": {row: {column: value}}}`.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any], device: torch.device) -> None:
        """Open the file, or begin it.

        Args:
            path: the JSON file.
            configuration: recipes and sizes; only measurements made with the same ones are kept together.
            device: where the arithmetic is done.

        Raises:
            ValueError: the file holds measurements of another configuration.
        """
        self.path = path
        self.configuration = json.loads(json.dumps(configuration))  # tuples become lists, as they do in the file
        _, size = processes.rank_and_size()
        self.environment = environment(device) | ({"processes": size} if size > 1 else {})
        self.seeds: dict[str, dict[str, Any]] = {}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if not _same(stored["configuration"], self.configuration):
                raise ValueError(
                    f"{path} was measured with {stored['configuration']}, not {self.configuration}: "
                    "remove it or give another --results"
                )
            self.seeds = stored["seeds"]
        processes.wait()  # until all have read what the first one is about to change

    def measure(self, row: str, seed: int, make: Callable[[], Measured]) -> Measured:
        """The values of a row for a seed: from the file if they are there, else measured by `make` and written."""
        entry = self.seeds.setdefault(str(seed), {"environment": self.environment, "rows": {}})
        if row not in entry["rows"]:
            entry["rows"][row] = make()
            self.write()
        return entry["rows"][row]

    def values(self, row: str, column: str) -> list[float]:
        """A column of a row, one value per seed that has it."""
        rows = (entry["rows"].get(row, {}) for entry in self.seeds.values())
        return [values[column] for values in rows if column in values]

    def rows(self) -> list[str]:
        """Names of the rows, in the order in which they were first measured."""
        return list(dict.fromkeys(row for entry in self.seeds.values() for row in entry["rows"]))

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Row -> column -> mean and sample standard deviation over the seeds, and how many there are."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for row in self.rows():
            entries = [entry["rows"][row] for entry in self.seeds.values() if row in entry["rows"]]
            numbers = [column for column, value in entries[0].items() if isinstance(value, int | float)]
            found[row] = {column: spread(self.values(row, column)) for column in numbers}
        return found

    def write(self) -> None:
        """Write the file anew, summary first."""
        if processes.first():
            write_json({"configuration": self.configuration, "summary": self.summary(), "seeds": self.seeds}, self.path)


def _same(stored: Any, now: Any) -> bool:
    """Whether two configurations are the same. What is newer than the file was 0 or False when it was written."""
    if isinstance(stored, dict) and isinstance(now, dict):
        old = all(key in now and _same(value, now[key]) for key, value in stored.items())
        return old and not any(value for key, value in now.items() if key not in stored)
    return stored == now


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value), and the number of values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values)}


def mean_sd(values: Sequence[float], digits: int = 2) -> str:
    """`1.03 ± 0.02`: mean and sample standard deviation; a single value alone; a dash for none."""
    if not values:
        return "-"
    found = spread(values)
    mean = f"{found['mean']:.{digits}f}"
    return f"{mean} ± {found['sd']:.{digits}f}" if len(values) > 1 else mean
