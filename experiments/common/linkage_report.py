"""What bench_linkage.py prints and draws from its rows."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.providers import PROVIDERS
from nac_gpu.reporting.text import table

Row = dict[str, Any]


def growth(rows: Sequence[Row]) -> dict[str, float]:
    """For every d with several n: the exponent p of nac_gpu's time ~ n^p, by least squares of the logarithms."""
    exponents = {}
    timed = [row for row in rows if row["provider"] == "nac_gpu" and row["n"] and row["repetitions"]]
    for d in sorted({row["d"] for row in timed}):
        n, seconds = zip(*((row["n"], row["p50"]) for row in timed if row["d"] == d), strict=True)
        if len(n) > 1:
            exponents[str(d)] = float(np.polyfit(np.log(n), np.log(seconds), 1)[0])
    return exponents


def show(rows: Sequence[Row]) -> str:
    """The table. Ratios above 1 are faster than the fastest peer; `~` marks what rests on an extrapolated time."""
    header = ["workload", "provider", "median, s", "20 - 80 %", "runs", "ratio", "MiB", "checked", "status"]
    cells = []
    for row in rows:
        memory, mark = row["peak_memory_bytes"], "~" if row["extrapolated"] else ""
        median, spread, ratio = "-", "-", "-"
        if row["p50"] is not None:
            median = f"{'' if row['repetitions'] else mark}{row['p50']:.3g}"
            spread = f"{row['p20']:.3g} - {row['p80']:.3g}"
        if row["ratio"] is not None:
            ratio = f"{mark}{row['ratio']:.3g} ({row['ratio_p20']:.3g} - {row['ratio_p80']:.3g})"
        mib = "-" if memory is None else f"{memory / 2**20:.0f}"
        figures = [median, spread, row["repetitions"], ratio, mib]
        cells.append([row["workload"], row["provider"], *figures, row["checked"] or "-", row["status"]])
    return table(header, cells)


def draw(path: Path) -> Path:
    """Draw a JSON file beside itself: times against n for every d with several n, ratios at all other workloads.

    Args:
        path: the JSON file.

    Returns:
        The PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["p50"]]
    sizes: dict[int, set[int]] = {}
    for row in rows:
        if row["d"]:
            sizes.setdefault(row["d"], set()).add(row["n"])
    curves = sorted(d for d, several in sizes.items() if len(several) > 1)
    compared = [row for row in rows if row["d"] not in curves and row["ratio"]]
    panels = max(1, len(curves) + bool(compared))
    wide, high = min(panels, 3), math.ceil(panels / 3)
    figure, axes = plt.subplots(high, wide, figsize=(5.5 * wide, 4.2 * high), squeeze=False, layout="constrained")
    free = list(axes.flat)
    for d in curves:
        draw_times(free.pop(0), [row for row in rows if row["d"] == d], d)
    if compared:
        draw_ratios(free.pop(0), compared)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in free:
        axis.set_axis_off()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture


def colours() -> dict[str, str]:
    """The same for a provider in every panel."""
    return {name: f"C{i}" for i, name in enumerate(PROVIDERS)} | {"floor": "grey"}


def draw_times(axis: Any, rows: Sequence[Row], d: int) -> None:
    """Seconds against n: a line with dots for what was measured, dashes for what was computed."""
    for name, colour in colours().items():
        mine = sorted((row for row in rows if row["provider"] == name), key=lambda row: row["n"])
        if not mine:
            continue
        measured = [row for row in mine if row["repetitions"]]
        for part, style, label in ((mine, "--", None if measured else name), (measured, "o-", name)):
            if part:
                n, seconds = [row["n"] for row in part], [row["p50"] for row in part]
                axis.plot(n, seconds, style, color=colour, markersize=4, label=label)
    axis.set(xscale="log", yscale="log", xlabel="points", ylabel="seconds", title=f"d = {d}")
    axis.set_xticks(ticks := sorted({row["n"] for row in rows}), [str(n) for n in ticks], rotation=45)
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def draw_ratios(axis: Any, rows: Sequence[Row]) -> None:
    """How many times as fast as the fastest peer each provider is: bars by workload, whiskers from p20 to p80."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    names = [name for name in colours() if any(row["provider"] == name for row in rows)]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        mine = [row for row in rows if row["provider"] == name]
        middles = [workloads.index(row["workload"]) - 0.4 + (place + 0.5) * width for row in mine]
        axis.bar(middles, [row["ratio"] for row in mine], width, color=colours()[name], label=name)
        axis.vlines(middles, [row["ratio_p20"] for row in mine], [row["ratio_p80"] for row in mine], color="black")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(yscale="log", ylabel="times as fast as the fastest peer", title="ratios", xticks=range(len(workloads)))
    axis.set_xticklabels(workloads, rotation=20)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
