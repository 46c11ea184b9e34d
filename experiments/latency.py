"""Whether budgets become time: VGG-16 and ResNet-50 at 224 x 224, at half their FLOPs and at shares of their time.

    python experiments/latency.py
    python experiments/latency.py --device cuda --seconds 20

Networks are timed in turn with their original, in one run, in eval mode; weights are random, because times do not
depend on them. Widths are chosen for the budget and are multiples of 8. "Kept" is how much of the saving in FLOPs
became a saving in time: the speed-up as a share of the one that FLOPs promise. Whether a budget of time holds is
measured anew, after the compression.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
import tyro
from torch import nn
from tqdm import tqdm

import nac_gpu as nac
from common.results import write_json
from nac_gpu.network.machine import environment
from nac_gpu.network.timing import timings
from nac_gpu.reporting.text import table


@dataclass
class Options:
    """Time networks at half their FLOPs, and at shares of their time."""

    models: tuple[str, ...] = ("vgg16_bn", "resnet50")
    """Of torchvision."""
    flops: float = 0.5
    """The share of the operations that is kept."""
    latencies: tuple[float, ...] = (0.75, 0.5)
    """Shares of the time that may be taken."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Images of a pass."""
    size: int = 224
    """Height and width of the images."""
    seconds: float = 20.0
    """How long to time each network."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where."""
    channels_last: bool = True
    """The memory layout that convolutions like best."""
    results: Path = Path(__file__).parent / "results" / "latency.json"
    """Measurements (JSON)."""


def measure(name: str, asked: dict[str, Any], batch: int, options: Options) -> dict[str, Any]:
    """The row of a budget at a batch size."""
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    size = batch, 3, options.size, options.size
    images = torch.randn(size, device=options.device).contiguous(memory_format=layout)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval().to(options.device)
    model = model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    small = nac.compress(model, images, **asked, multiple_of=8, calibration="none")
    small = small.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    before, after = nac.cost(model, images), nac.cost(small, images)
    found, failed = timings(model, small, images, {batch: options.seconds})
    if failed:
        raise RuntimeError("; ".join(failed))
    shares = {"flops": after.flops / before.flops, "parameters": after.parameters / before.parameters}
    times = {"time": 1 / found[0].speedup.median, "kept": found[0].speedup.median * shares["flops"]}
    return {"model": name, "asked": asked, **shares, **asdict(found[0]), **times}


def main(options: Options) -> None:
    """Time all networks, print the table, write the JSON."""
    budgets = [{"flops": options.flops}, *({"latency": share} for share in options.latencies)]
    todo = [(name, asked, batch) for name in options.models for asked in budgets for batch in options.batch_sizes]
    rows = [measure(*item, options) for item in tqdm(todo, unit="network")]
    device = torch.device(options.device)
    setting = {"environment": environment(device), "channels_last": options.channels_last}
    write_json({**setting, "rows": rows}, options.results)
    header = ["model", "batch", "asked", "FLOPs", "before, ms", "after, ms", "time", "kept"]
    cells = [
        [
            row["model"],
            row["batch"],
            ", ".join(f"{key}={value:g}" for key, value in row["asked"].items()),
            f"{100 * row['flops']:.0f} %",
            *(f"{1000 * row[when]['median']:.1f}" for when in ("before", "after")),
            f"{100 * row['time']:.1f} %",
            f"{row['kept']:.2f}",
        ]
        for row in rows
    ]
    print(table(header, cells))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
