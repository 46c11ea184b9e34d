"""How long compression takes, against one epoch of training on the same machine; and how much memory.

    python experiments/compress_time.py
    python experiments/compress_time.py --networks vgg16 --multiplier 1

Weights and images are random, because times do not depend on them. An epoch is that of `vgg_cifar.py`: 50,000 images in
batches of 256, of which some are timed. Each row does more than the one before: the second calibrates and compensates
where widths are known, the third chooses them for a budget, the last refines. The memory's peak is that of the
process: for its growth, measure one network at a time.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nac_gpu as nac
from common.data import Images, statistics
from common.models import NETWORKS, Network
from common.results import Results
from common.training import Augmented, Precision
from common.vgg import Training
from nac_gpu.reporting.text import table

_EPOCH = 50_000  # images
_BATCH = 128  # of calibration


@dataclass
class Options:
    """Time training and compression of networks for CIFAR."""

    networks: tuple[Network, ...] = ("vgg16", "vgg19", "resnet18", "resnet56")
    """As in vgg_cifar.py."""
    multiplier: float = 0.25
    """Width multiplier of every layer."""
    share: float = 0.25
    """Of the parameters, kept."""
    images: int = 512
    """To calibrate with."""
    refine: int = 80
    """How often the refinement looks at each image."""
    steps: int = 10
    """Training steps that are timed."""
    device: str | None = None
    """`cuda` or `cpu`; the default is CUDA where there is one."""
    results: Path = Path(__file__).parent / "results" / "compress_time.json"
    """Measurements (JSON), kept after every network."""


def measure(name: Network, options: Options, precision: Precision) -> dict[str, float]:
    """Seconds of everything, and the bytes by which calibration and compensation let the process grow."""
    device = precision.device
    torch.manual_seed(0)
    model = NETWORKS[name](10, options.multiplier).eval().to(device)
    images = torch.randn(options.images, 3, 32, 32, device=device)
    batches, example = list(images.split(_BATCH)), images[:1]

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    plan = nac.plan(model, example, width=options.share**0.5)
    before = _peak(device)
    known = seconds(lambda: nac.compress(model, example, plan, calibration=batches, refine=0))
    growth = _peak(device) - before
    chosen = seconds(lambda: nac.compress(model, example, params=options.share, calibration=batches, refine=0))
    refined = seconds(
        lambda: nac.compress(model, example, params=options.share, calibration=batches, refine=options.refine)
    )
    return {
        "weights, bytes": sum(value.nbytes for value in model.parameters()),
        "growth, bytes": growth,
        "widths known": known,
        "widths chosen": chosen,
        "refined": refined,
        "epoch": _epoch(model, options.steps, precision),
    }


def _epoch(model: torch.nn.Module, steps: int, precision: Precision) -> float:
    """Seconds of an epoch, from some steps of it; what the first step needs once is not in it."""
    recipe = Training(epochs=2).recipe
    count = steps * recipe.batch_size
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    train = Images(pixels, torch.arange(count) % 10, 10).to(precision.device)
    with precision():
        epochs = nac.finetune(
            precision.place(model),
            Augmented(train, statistics(train), recipe, precision, seed=0),
            epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            precision="bfloat16" if precision.bfloat16 else "float32",
        )
    return epochs[-1].seconds * _EPOCH / count


def _peak(device: torch.device) -> int:
    """The most bytes so far: of the process (1024 bytes a unit, as Linux has it), or of CUDA's tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(options: Options) -> None:
    """Time all networks, print the table, write the JSON."""
    precision = Precision.best(options.device)
    named = ("multiplier", "share", "images", "refine", "steps")
    results = Results(options.results, {name: getattr(options, name) for name in named}, precision.device)
    cells = []
    for name in options.networks:
        row = results.measure(name, 0, lambda name=name: measure(name, options, precision))
        times = (row[column] for column in ("epoch", "widths known", "widths chosen", "refined"))
        sizes = (row[column] / 1e6 for column in ("weights, bytes", "growth, bytes"))
        cells.append([name, *(f"{time:.1f}" for time in times), *(f"{size:.1f}" for size in sizes)])
    columns = ["epoch, s", "compensated, s", "widths chosen, s", "refined, s", "weights, MB", "growth, MB"]
    print(table(["network", *columns], cells))


if __name__ == "__main__":
    import tyro  # only the command line needs it: gpu_sanitise.sh does without

    main(tyro.cli(Options, description=__doc__))
