"""Whether half the operations take half the time: VGG-16 and ResNet-50 at 224 x 224, compressed to half their FLOPs.

    python experiments/latency.py
    python experiments/latency.py --device cuda --seconds 20

Both networks are timed in turn, in one run, in eval mode; weights are random, because times do not depend on them.
Widths are chosen for the budget and are multiples of 8. "Kept" is how much of the saving in FLOPs became a saving in
time: the speed-up as a share of the one that FLOPs promise.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
import tyro
from torch import nn

import nac_gpu as nac
from common.results import write_json
from nac_gpu.report.machine import environment
from nac_gpu.report.measure import timings
from nac_gpu.report.text import table


@dataclass
class Options:
    """Time networks at half their FLOPs."""

    models: tuple[str, ...] = ("vgg16_bn", "resnet50")
    """Of torchvision."""
    flops: float = 0.5
    """The share of the operations that is kept."""
    batch_sizes: tuple[int, ...] = (1, 64)
    """Images of a pass."""
    size: int = 224
    """Height and width of the images."""
    seconds: float = 60.0
    """How long to time each network, in all."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where."""
    channels_last: bool = True
    """The memory layout that convolutions like best."""
    results: Path = Path(__file__).parent / "results" / "latency.json"
    """Measurements (JSON)."""


def measure(name: str, options: Options) -> list[dict[str, Any]]:
    """A row for each batch size."""
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    image = torch.randn(1, 3, options.size, options.size, device=options.device).contiguous(memory_format=layout)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval().to(options.device)
    model = model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    small = nac.compress(model, image, flops=options.flops, multiple_of=8, calibration="none")
    small = small.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    before, after = nac.cost(model, image), nac.cost(small, image)
    found, failed = timings(model, small, image, options.batch_sizes, options.seconds)
    if failed:
        raise RuntimeError("; ".join(failed))
    rows = []
    for timing in found:
        shares = {"flops": after.flops / before.flops, "parameters": after.parameters / before.parameters}
        kept = timing.speedup.median * shares["flops"]
        rows.append({"model": name, **shares, **asdict(timing), "kept": kept})
    return rows


def main(options: Options) -> None:
    """Time all networks, print the table, write the JSON."""
    rows = [row for name in options.models for row in measure(name, options)]
    device = torch.device(options.device)
    setting = {"environment": environment(device), "channels_last": options.channels_last}
    write_json({**setting, "rows": rows}, options.results)
    header = ["model", "batch", "FLOPs", "before, ms", "after, ms", "speed-up", "kept"]
    cells = [
        [
            row["model"],
            row["batch"],
            f"{100 * row['flops']:.0f} %",
            *(f"{1000 * row[when]['median']:.1f}" for when in ("before", "after")),
            f"{row['speedup']['median']:.2f}",
            f"{row['kept']:.2f}",
        ]
        for row in rows
    ]
    print(table(header, cells))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
