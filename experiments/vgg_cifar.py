"""VGG on CIFAR: train, compress, fine-tune. The shape of Tables 4 and 5 of the paper.

    python experiments/vgg_cifar.py --data PATH                      # VGG-16, CIFAR-10, the paper's budget
    python experiments/vgg_cifar.py --network vgg19 --dataset cifar100 --data PATH --width 0.5
    python experiments/vgg_cifar.py --dataset digits --multiplier 0.25 --width 0.4   # a few minutes, needs no data
    torchrun --nproc-per-node 8 experiments/vgg_cifar.py --data PATH             # together, a GPU for each process

Every method gets the same trained network, the same widths and the same fine-tuning; the test images choose nothing.
A run that was stopped goes on where it was: checkpoints after every epoch in --output, results after every row.
"""

import sys
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

import nac_gpu as nac
from common import processes
from common.data import load
from common.pictures import draw_compression
from common.results import Measured, Results, mean_sd
from common.training import Precision
from common.vgg import Run, Training, paper_widths
from nac_gpu.reporting.text import table

Method = Literal["random", "l1", "kmeans", "ward"]


@dataclass
class Options(Training):
    """Train a VGG, compress it with each method, fine-tune, print and keep the table."""

    data: Path = Path("data")
    """Where the data set is, or is downloaded to."""
    download: bool = False
    """Let torchvision fetch the data set."""
    width: str = "paper"
    """Neurons kept: a share such as 0.5, `paper`, the preset for VGG-16 at 2.37 M parameters, or `budget`: chosen for
    the paper's 2.37 M parameters and 3.72e8 FLOPs, multiples of 8."""
    methods: tuple[Method, ...] = ("random", "l1", "kmeans", "ward")
    """How neurons are chosen: merged at random, L1 filter pruning, merged by k-means, merged by Ward (NAC)."""
    rule: Literal["compensated", "restored", "centroid"] = "restored"
    """Whether what reads merged neurons makes up for the loss; without, what a merged channel with BatchNorm deviates
    by: as its members did, or (the paper) as their mean does."""
    finetune: tuple[Method, ...] = ("kmeans", "ward")
    """Methods whose result is fine-tuned."""
    control: bool = False
    """Also fine-tune the uncompressed network, to tell compression from longer training."""
    seeds: tuple[int, ...] = (0,)
    """One whole run each."""
    device: str | None = None
    """`cuda` or `cpu`; the default is CUDA where there is one."""
    results: Path | None = None
    """The JSON file (a PNG is put beside it); by default in --output."""


def widths(model: nn.Module, example: Tensor, calibration: nac.Calibration, options: Options) -> nac.Width:
    """What --width means for this network."""
    if options.width == "budget":
        budget = nac.plan(
            model,
            example,
            params=2_370_000,
            flops=372_000_000,
            multiple_of=8,
            calibration=calibration,
            process_group=dist.group.WORLD,
        )
        return budget.widths
    if options.width != "paper":
        return float(options.width)
    if options.network != "vgg16":
        sys.exit("--width paper is for --network vgg16; give a share, such as --width 0.5, or budget")
    return paper_widths(model, options.multiplier)


def compressed(
    model: nn.Module, example: Tensor, kept: nac.Width, method: Method, calibration: nac.Calibration, rule: nac.Rule
) -> nn.Module:
    """The network with fewer neurons, chosen by a method; all processes work on it."""
    return nac.compress(
        model,
        example,
        width=kept,
        method=method,
        rule=rule,
        calibration=calibration,
        process_group=dist.group.WORLD,
    )


def measure_seed(run: Run, options: Options, results: Results) -> None:
    """Train, compress with every method, fine-tune; every figure goes to the results."""
    model = run.baseline()
    example = torch.zeros(1, *run.train.pixels.shape[1:], device=run.precision.device)
    calibration = run.calibration()
    kept = widths(model, example, calibration, options)
    plan = nac.plan(model, example, width=kept, process_group=dist.group.WORLD)
    print(plan)

    def measured(network: nn.Module, error: float) -> Measured:
        return asdict(nac.cost(network, example)) | {"error": error}

    results.measure("baseline", run.seed, lambda: measured(model, run.error(model)))
    results.measure("widths", run.seed, lambda: {"before": before(plan), "after": plan.widths})
    for method in options.methods:
        # once, however many rows need it, and not at all where the results are known
        make = cache(partial(compressed, model, example, kept, method, calibration, options.rule))
        results.measure(method, run.seed, lambda make=make: measured(make(), run.error(make())))
        if method in options.finetune:
            results.measure(
                f"{method}, fine-tuned",
                run.seed,
                lambda make=make, method=method: measured(make(), run.finetune(make(), model, method)),
            )
    if options.control:

        def longer() -> Measured:
            again = run.baseline()
            return measured(again, run.finetune(again, model, "control"))

        results.measure("baseline, fine-tuned", run.seed, longer)


def before(plan: nac.Plan) -> dict[str, int]:
    """Neurons of every group before compression."""
    return {group.name: group.before for group in plan.groups}


def networks(results: Results) -> list[str]:
    """Names of the networks that were measured, each without its fine-tuning."""
    return [name for name in results.rows() if name != "widths" and not name.endswith(", fine-tuned")]


def show(results: Results) -> str:
    """The table: a row a method; errors in percent, mean and spread over the seeds."""
    rows = []
    for name in networks(results):
        parameters, flops = (results.values(name, column)[0] for column in ("parameters", "flops"))
        tuned = results.values(f"{name}, fine-tuned", "error")
        rows.append(
            [name, f"{parameters / 1e6:.3g} M", f"{flops:.3g}", mean_sd(results.values(name, "error")), mean_sd(tuned)]
        )
    return table(["method", "parameters", "FLOPs", "error %", "fine-tuned %"], rows)


def draw(results: Results, path: Path) -> None:
    """A picture: neurons per layer before and after, and the errors of the methods."""

    def mean(row: str) -> float | None:
        values = results.values(row, "error")
        return sum(values) / len(values) if values else None

    entry = next(iter(results.seeds.values()))["rows"]["widths"]
    errors = {name: (mean(name), mean(f"{name}, fine-tuned")) for name in networks(results)}
    draw_compression(entry["before"], entry["after"], errors, path)


def main(options: Options) -> None:
    """Run every seed, print the table, write the JSON and the picture; all processes do it together."""
    precision = Precision.best(options.device)
    with processes.together(precision.device):
        measure(options, precision)


def measure(options: Options, precision: Precision) -> None:
    """What `main` does, once the processes know each other."""
    with processes.first_ahead():
        train, test = load(options.dataset, options.data, options.download)
    path = options.results or options.output / f"{options.network}-x{options.multiplier:g}-{options.dataset}.json"
    configuration = {
        "dataset": options.dataset,
        "network": options.network,
        "multiplier": options.multiplier,
        "width": options.width,
        "rule": options.rule,
        **({"images": options.images} if options.rule == "compensated" else {}),
        "training": asdict(options.recipe),
        **({"further epochs": options.further_epochs} if any(options.further_epochs) else {}),
        "fine-tuning": options.told_finetuning(),
        "arithmetic": "bfloat16 autocast" if precision.bfloat16 else "float32",
    }
    results = Results(path, configuration, precision.device)
    for seed in options.seeds:
        measure_seed(Run(options, seed, train, test, precision), options, results)
    print(f"\n{show(results)}\n")
    if processes.first():
        draw(results, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
