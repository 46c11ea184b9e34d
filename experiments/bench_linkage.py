"""How fast `nac_gpu.ward_linkage` is: beside SciPy, fastcluster, scikit-learn, a naive loop in PyTorch, and the floor.

    python experiments/bench_linkage.py --preset neurons              # the sizes of VGG-16's layers
    python experiments/bench_linkage.py --preset large --device cuda  # up to 131072 points
    python experiments/bench_linkage.py --plot results.json           # draws results.png, measures nothing
    python experiments/bench_linkage.py --preset neurons --trace trace.json.gz  # one call, profiled on CUDA

Every provider runs in the same process on the same points, in turns, so that whatever slows the machine slows them all.
nac_gpu and the naive loop get points that are on the device already; the others run on its host, on float64 arrays.
What disagrees with SciPy is not timed: its row says `wrong`, and the exit status is 1. Results are written after each
workload, and a run that was stopped goes on with what is missing.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.device import copies_to_host, measure_rates, peak, reset_peak, trace
from common.linkage_report import Row, draw, growth, show
from common.progress import progress, say
from common.providers import PEERS, PROVIDERS, Inputs, Linkage, disagreement, nac_ward, read
from common.results import environment, write_json
from common.workloads import PRESETS, Preset, Workload

Name = Literal["scipy", "fastcluster", "fastcluster_vector", "sklearn", "naive", "nac_gpu", "floor"]

#: Entries of the matrix that a run by rounds of reciprocal neighbours reads or writes, as a multiple of n²: measured at
#: 8.2 to 9.0 for normal points.
TOUCHED = 9
#: Largest relative difference of a height. All arithmetic is float64, but float32 points get float32 heights.
TOLERANCE = {"float64": 1e-9, "float32": 1e-6}


@dataclass(frozen=True)
class Options:
    """Time Ward linkage.

    Attributes:
        preset: the workloads; `vgg16` is all hidden layers of the network in one call.
        providers: what is measured; what is not installed is left out.
        points: standard normal, or blobs of 32 points with a deviation of a tenth.
        dtype: of the points on the device; the peers always get float64.
        seed: of the points.
        repetitions: timed runs of every provider at every workload.
        seconds: a provider that has taken so long at a workload is not run there again.
        peer_limit: most points for the peers on the CPU; above, the fastest is extrapolated as n² and marked.
        naive_limit: most points for the naive loop.
        oracle_limit: most points for checks; of larger sets only the first so many are compared with SciPy.
        threads: of PyTorch on the CPU; by default its own choice.
        device: "cpu" or "cuda"; by default CUDA if there is any.
        results: the JSON file; by default results/linkage_DEVICE.json beside this script.
        again: measure what is in the file already.
        plot: draw this JSON file as a PNG beside it, and do nothing else.
        trace: profile one call of nac_gpu at the preset's last workload into this file (.json or .json.gz), and do
            nothing else.
    """

    preset: Preset = "neurons"
    providers: tuple[Name, ...] = ("scipy", "fastcluster", "fastcluster_vector", "sklearn", "naive", "nac_gpu", "floor")
    points: Literal["normal", "blobs"] = "normal"
    dtype: Literal["float64", "float32"] = "float64"
    seed: int = 0
    repetitions: int = 7
    seconds: float = 60.0
    peer_limit: int = 16384
    naive_limit: int = 4096
    oracle_limit: int = 8192
    threads: int | None = None
    device: Literal["cpu", "cuda"] | None = None
    results: Path | None = None
    again: bool = False
    plot: Path | None = None
    trace: Path | None = None


def draw_points(workload: Workload, options: Options) -> list[Tensor]:
    """Seeded points, [n, d] for each shape, on the CPU."""
    generator = torch.Generator().manual_seed(options.seed)
    batch = []
    for n, d in workload.shapes:
        points = torch.randn(n, d, generator=generator, dtype=torch.float64)
        if options.points == "blobs":
            centres = torch.randn(math.ceil(n / 32), d, generator=generator, dtype=torch.float64)
            points = 0.1 * points + centres[torch.randint(len(centres), (n,), generator=generator)]
        batch.append(points.to(getattr(torch, options.dtype)))
    return batch


def measure(
    workload: Workload, names: Sequence[str], options: Options, device: torch.device, assumed: Row | None = None
) -> list[Row]:
    """Check every provider, then time those that are right, in turns.

    The check warms up. It is timed as well, as the measurement of a peer too slow to be run again; of what runs on the
    device it never is, since that may compile its kernels then.

    Args:
        workload: what is clustered.
        names: of the providers.
        options: of the command line.
        device: where the tensors are.
        assumed: the extrapolated row of a peer, for the ratios where none is run.

    Returns:
        A row for each provider.
    """
    batch, limit = draw_points(workload, options), options.oracle_limit
    whole = Inputs(batch, device)
    sample = whole if workload.largest <= limit else Inputs([points[:limit] for points in batch], device)
    oracle = next((name for name in PEERS if PROVIDERS[name].installed), "nac_gpu")
    # Without any peer: this library on the CPU.
    reference = sample.run(oracle) if oracle in PEERS else _on_cpu(sample).run(oracle)
    expected = [read(found) for found in reference[1]]

    rows: dict[str, Row] = {}
    warm: dict[str, float] = {}
    for name in names:
        rows[name] = row = new_row(workload, name, options, device)
        row["checked"] = "all points" if sample is whole else f"first {limit} points"
        if name == oracle:
            row["checked"] = "oracle" if name in PEERS else f"{row['checked']}, against itself on the CPU"
        try:
            reset_peak(device)
            seconds, found = reference if name == oracle and name in PEERS else sample.run(name)
            complaint = first_disagreement([read(one) for one in found], expected, TOLERANCE[options.dtype])
            if complaint:
                row["status"] = "wrong"
            else:
                del found  # or it would count as memory of the next run
                warm[name] = seconds if sample is whole else whole.run(name)[0]
                row["peak_memory_bytes"] = peak(device) if PROVIDERS[name].on_device else None
        except (MemoryError, torch.OutOfMemoryError):
            row["status"] = complaint = "out of memory"
        except Exception as error:  # one that fails must not stop the others
            row["status"], complaint = "failed", f"{type(error).__name__}: {error}"
        if complaint:
            say(f"*** NOT TIMED, {row['status']} *** {name} at {workload.name}: {complaint}")

    spent = {name: 0.0 if PROVIDERS[name].on_device else seconds for name, seconds in warm.items()}
    times = {name: [seconds] if seconds > options.seconds else [] for name, seconds in spent.items()}
    for _ in range(options.repetitions):
        for name, taken in times.items():
            if spent[name] + sum(taken) <= options.seconds:
                taken.append(whole.run(name)[0])
    fill_in(rows, times, assumed)
    return list(rows.values())


def _on_cpu(inputs: Inputs) -> Inputs:
    return Inputs([points.cpu() for points in inputs.tensors], torch.device("cpu"))


def first_disagreement(found: Sequence[Linkage], expected: Sequence[Linkage], tolerance: float) -> str:
    """What is wrong with the linkages of several point sets, or ""."""
    if len(found) != len(expected):
        return f"{len(found)} linkages of {len(expected)} point sets"
    complaints = (disagreement(one, right, tolerance) for one, right in zip(found, expected, strict=True))
    return next(filter(None, complaints), "")


def new_row(workload: Workload, name: str, options: Options, device: torch.device) -> Row:
    """A row without figures: n and d are null for several point sets, p20 to p80 are seconds.

    `ratio` is the median of the fastest peer over the median of this provider: above 1 is faster. Its p20 and p80 are
    of the ratios run by run. It is null where no peer was timed in the same run. `extrapolated` says that a peer's
    time was not measured: the one in this row, or the one in its ratio.
    """
    n, d = workload.shapes[0] if len(workload.shapes) == 1 else (None, None)
    on_host = name in PEERS
    row: Row = {"workload": workload.name, "provider": name, "n": n, "d": d}
    row |= {"dtype": "float64" if on_host else options.dtype, "device": "cpu" if on_host else device.type}
    row |= {"repetitions": 0, "p20": None, "p50": None, "p80": None, "peak_memory_bytes": None}
    row |= {"peer": None, "ratio": None, "ratio_p20": None, "ratio_p80": None}
    return row | {"status": "ok", "checked": None, "extrapolated": False}


def fill_in(rows: dict[str, Row], times: dict[str, list[float]], assumed: Row | None) -> None:
    """Percentiles of the times, and ratios to the fastest peer: the one of this run, or the extrapolated one."""
    for name, taken in times.items():
        rows[name]["repetitions"] = len(taken)
        rows[name] |= dict(zip(("p20", "p50", "p80"), percentiles(taken), strict=True))
    timed_peers = [name for name in PEERS if name in times]
    if timed_peers:
        peer = min(timed_peers, key=lambda name: rows[name]["p50"])
        peer_times, peer_median = times[peer], rows[peer]["p50"]
    elif assumed:
        peer, peer_times, peer_median = assumed["provider"], [assumed["p50"]], assumed["p50"]
    else:
        return
    for name, taken in times.items():
        # A peer that was run less often is paired with its last run.
        paired = [peer_times[min(i, len(peer_times) - 1)] / seconds for i, seconds in enumerate(taken)]
        low, _, high = percentiles(paired)
        ratio = peer_median / rows[name]["p50"]
        rows[name] |= {"peer": peer, "ratio": ratio, "ratio_p20": low, "ratio_p80": high}
        rows[name]["extrapolated"] = not timed_peers


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return low, middle, high


def extrapolate(workload: Workload, measured: Sequence[Row], options: Options, device: torch.device) -> Row | None:
    """The fastest peer's time if it grew as n² from the largest n at which any was measured at this d; None if none."""
    if len(workload.shapes) != 1:
        return None
    n, d = workload.shapes[0]
    rows = [r for r in measured if r["provider"] in PEERS and r["repetitions"] and r["d"] == d and r["n"] < n]
    if not rows:
        return None
    largest = max(row["n"] for row in rows)
    fastest = min((row for row in rows if row["n"] == largest), key=lambda row: row["p50"])
    row = new_row(workload, fastest["provider"], options, device)
    row |= {column: fastest[column] * (n / largest) ** 2 for column in ("p20", "p50", "p80")}
    return row | {"status": f"n² from {largest}", "extrapolated": True}


def floor(workload: Workload, rates: dict[str, float], options: Options, device: torch.device) -> Row:
    """An ideal run with the matrix in memory: half of it by products, TOUCHED · n² entries moved, at measured rates."""
    operations = sum(n**2 * d for n, d in workload.shapes)  # n²/2 entries of d multiply-adds
    moved = sum(TOUCHED * n**2 * 8 for n, _ in workload.shapes)
    seconds = operations / rates["float64_product_flops"] + moved / rates["copy_bytes_per_second"]
    row = new_row(workload, "floor", options, device)
    return row | {"p20": seconds, "p50": seconds, "p80": seconds, "status": "computed"}


@dataclass
class Store:
    """The JSON file: what the measurements depend on, and the rows. One file is for one machine and configuration.

    Attributes:
        path: the file.
        environment: hardware, versions and kind of points.
        rates: see `measure_rates`.
        rows: by workload and provider.
    """

    path: Path
    environment: dict[str, Any]
    rates: dict[str, float] = field(default_factory=dict)
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, current: dict[str, Any]) -> "Store":
        """Read the file, or begin it.

        Raises:
            ValueError: the file was measured elsewhere, or with other points.
        """
        if not path.exists():
            return cls(path, current)
        stored = json.loads(path.read_text(encoding="utf-8"))
        differing = {
            key: (stored["environment"].get(key), value)
            for key, value in current.items()
            if key != "date" and stored["environment"].get(key) != value
        }
        if differing:
            raise ValueError(f"{path} was measured with other {differing}: remove it or give another --results")
        rows = {(row["workload"], row["provider"]): row for row in stored["rows"]}
        return cls(path, stored["environment"], stored["rates"], rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Put rows in place of older ones, and write."""
        self.rows |= {(row["workload"], row["provider"]): row for row in rows}
        everything = list(self.rows.values())
        content = {"environment": self.environment, "rates": self.rates, "growth": growth(everything)}
        write_json(content | {"rows": everything}, self.path)

    def has(self, workload: Workload, name: str) -> bool:
        """Whether a time is there that was measured."""
        return bool(self.rows.get((workload.name, name), {}).get("repetitions"))


def versions() -> dict[str, str]:
    """Of the packages that matter here, besides those of `environment`; those not installed are left out."""
    found = {}
    for package in ("numpy", "scipy", "fastcluster", "scikit-learn", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def allowed(workload: Workload, options: Options) -> list[str]:
    """The providers that are asked for, installed, and not given more points than their limit."""
    limits = dict.fromkeys(PEERS, options.peer_limit) | {"naive": options.naive_limit}
    return [
        name
        for name, provider in PROVIDERS.items()
        if name in options.providers and provider.installed and workload.largest <= limits.get(name, math.inf)
    ]


def run(options: Options, device: torch.device) -> int:
    """Measure what is missing and print the table; 1 if a provider was wrong or failed, else 0."""
    chosen: dict[str, Any] = {"device": device.type, "points": options.points, "dtype": options.dtype}
    path = options.results or Path(__file__).parent / "results" / f"linkage_{device.type}.json"
    store = Store.open(path, environment(device) | versions() | chosen | {"seed": options.seed})
    if absent := [name for name in options.providers if name != "floor" and not PROVIDERS[name].installed]:
        print(f"not installed: {', '.join(absent)}")
    if "floor" in options.providers and not store.rates:
        store.rates = measure_rates(device)
    failed = False
    for workload in progress(PRESETS[options.preset], options.preset, "workload"):
        rows = []
        assumed = None
        if workload.largest > options.peer_limit and not any(store.has(workload, peer) for peer in PEERS):
            assumed = extrapolate(workload, list(store.rows.values()), options, device)
        names = [name for name in allowed(workload, options) if options.again or not store.has(workload, name)]
        if names:
            rows = measure(workload, names, options, device, assumed)
        failed |= any(row["status"] in ("wrong", "failed") for row in rows)
        rows += [assumed] if assumed else []
        rows += [floor(workload, store.rates, options, device)] if "floor" in options.providers else []
        store.add(rows)
    names = {workload.name for workload in PRESETS[options.preset]}
    print(show([row for row in store.rows.values() if row["workload"] in names]))
    for d, exponent in growth(list(store.rows.values())).items():
        print(f"nac_gpu's time grows as n^{exponent:.2f} at d = {d}")
    print(f"written: {path}")
    return int(failed)


def profile(options: Options, device: torch.device, path: Path) -> int:
    """Profile one call at the preset's last workload and print what it copied to the host; the exit status."""
    if device.type != "cuda":
        sys.exit("--trace needs CUDA: give --device cuda on a machine that has it")
    workload = PRESETS[options.preset][-1]
    batch = Inputs(draw_points(workload, options), device).tensors
    trace(lambda: nac_ward(batch), path)
    copies = copies_to_host(path)
    largest = max((size for size in copies if size is not None), default=None)
    print(f"{workload.name}: {len(copies)} copies to the host, the largest of {largest} bytes; written: {path}")
    return 0


def main(options: Options) -> int:
    """Measure, or draw, or profile; the exit status."""
    if options.plot:
        print(f"written: {draw(options.plot)}")
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return profile(options, device, options.trace) if options.trace else run(options, device)


if __name__ == "__main__":
    import tyro  # only the command line needs it: gpu_check.sh does without

    sys.exit(main(tyro.cli(Options)))
