"""Which ideas carry how much: error against size, rule by rule, for one trained network. No fine-tuning.

    python experiments/compare.py --data PATH                              # VGG-16 of a quarter of the width, CIFAR-10
    python experiments/compare.py --dataset digits --epochs 4 --shares 0.5 0.1   # a few minutes, needs no data

Every rule gets the same trained network and the same number of parameters. Rules that choose no widths of their own
get the same share of every layer, or those that the data-free budget chose ("chosen widths"). A run that was stopped
goes on where it was.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import nac_gpu as nac
import vgg_cifar
from common.data import DatasetName, load
from common.results import Measured, Results, mean_sd
from common.training import Precision
from nac_gpu.report.text import table


@dataclass
class Options:
    """Train a VGG, compress it by every rule to every size, print and keep the table and the curves."""

    dataset: DatasetName = "cifar10"
    """What to learn; `folder` is any tree train/<class>/*.png, test/<class>/*.png of small square images."""
    data: Path = Path("data")
    """Where the data set is, or is downloaded to."""
    download: bool = False
    """Let torchvision fetch the data set."""
    network: Literal["vgg16", "vgg19"] = "vgg16"
    """As in vgg_cifar.py."""
    multiplier: float = 0.25
    """Width multiplier of every layer."""
    epochs: int = 16
    """Training epochs."""
    shares: tuple[float, ...] = (0.5, 0.25, 0.123, 0.076)
    """Parameters to keep."""
    images: int = 512
    """Unlabelled training images for the rules that take some."""
    seeds: tuple[int, ...] = (0,)
    """One whole run each."""
    device: str | None = None
    """`cuda` or `cpu`; the default is CUDA where there is one."""
    output: Path = Path("runs/compare")
    """Checkpoints; those of vgg_cifar.py fit if they were made with the same recipe."""
    results: Path | None = None
    """The JSON file (a PNG is put beside it); by default in --output."""


#: What `nac.compress` is called with, by rule. `widths` says where the widths are from: the same share of every layer,
#: the data-free budget, or the rule's own budget.
RULES: dict[str, dict[str, Any]] = {
    "random": {"widths": "share", "method": "random", "rule": "restored", "calibration": "none"},
    "L1 filters": {
        "widths": "share",
        "method": vgg_cifar.l1_filters,
        "neurons": "weights",
        "rule": "restored",
        "calibration": "none",
    },
    "k-means, Eq. 9": {"widths": "share", "method": "kmeans", "rule": "centroid", "calibration": "none"},
    "Ward, Eq. 9": {"widths": "share", "rule": "centroid", "calibration": "none"},
    "Ward, restored": {"widths": "share", "rule": "restored", "calibration": "none"},
    "L1 filters, chosen widths": {
        "widths": "chosen",
        "method": vgg_cifar.l1_filters,
        "neurons": "weights",
        "rule": "restored",
        "calibration": "none",
    },
    "Ward, restored, chosen widths": {"widths": "chosen", "rule": "restored", "calibration": "none"},
    "Ward, dreams, same share": {"widths": "share"},
    "L1 filters, dreams, chosen widths": {
        "widths": "chosen",
        "method": vgg_cifar.l1_filters,
        "neurons": "weights",
    },
    "k-means, dreams, chosen widths": {"widths": "chosen", "method": "kmeans"},
    "Ward by weights, dreams, chosen widths": {"widths": "chosen", "neurons": "folded"},
    "Ward, dreams (default)": {"widths": "own"},
    "Ward, images": {"widths": "own", "images": True},
}


def uniform(model: nn.Module, example: Tensor, share: float) -> nac.Plan:
    """The largest same share of every layer that keeps no more than a share of the parameters."""
    low, high = 0.0, 1.0
    best = None
    for _ in range(8):
        middle = (low + high) / 2
        plan = nac.plan(model, example, width=middle)
        if plan.after.parameters <= share * plan.before.parameters:
            low, best = middle, plan
        else:
            high = middle
    return best if best is not None else nac.plan(model, example, width=1e-9)


@dataclass
class Comparison:
    """One seed: a trained network, and the plans that rules share."""

    run: vgg_cifar.Run
    model: nn.Module
    example: Tensor
    images: nac.Calibration

    def __post_init__(self) -> None:
        """No plan has been made yet."""
        self._plans: dict[tuple[str, float], nac.Plan] = {}

    def plan(self, widths: str, share: float) -> nac.Plan:
        """The plan that rules without a budget of their own are given."""
        if (widths, share) not in self._plans:
            make = {
                "share": lambda: uniform(self.model, self.example, share),
                "chosen": lambda: nac.plan(self.model, self.example, params=share),
            }
            self._plans[widths, share] = make[widths]()
        return self._plans[widths, share]

    def __call__(self, rule: str, share: float) -> Measured:
        """Compress by a rule to a share of the parameters, and measure."""
        options = dict(RULES[rule])
        widths = options.pop("widths")
        if options.pop("images", False):
            options["calibration"] = self.images
        if widths == "own":
            small = nac.compress(self.model, self.example, params=share, **options)
        else:
            small = nac.compress(self.model, self.example, self.plan(widths, share), **options)
        return asdict(nac.cost(small, self.example)) | {"error": self.run.error(small)}


def row(rule: str, share: float) -> str:
    """The name of a row."""
    return f"{rule} @ {share:g}"


def measure(options: Options, seed: int, results: Results, make: Callable[[int], vgg_cifar.Run]) -> None:
    """Every rule at every size, for one seed."""
    run = make(seed)
    model = run.baseline().float()
    device = run.precision.device
    images = run.calibration()
    example = torch.zeros(1, *run.train.pixels.shape[1:], device=device)
    compare = Comparison(run, model, example, images)

    def baseline() -> Measured:
        return asdict(nac.cost(model, example)) | {"error": run.error(model)}

    results.measure("none", seed, baseline)
    todo = [(rule, share) for share in options.shares for rule in RULES]
    for rule, share in tqdm(todo, desc=f"seed {seed}", unit="network"):
        results.measure(row(rule, share), seed, lambda rule=rule, share=share: compare(rule, share))


def show(results: Results, shares: tuple[float, ...]) -> str:
    """The table: a row a rule, a column a size; test errors in percent."""
    rows = [["none", *[mean_sd(results.values("none", "error"))] * len(shares)]]
    rows += [[rule, *(mean_sd(results.values(row(rule, share), "error")) for share in shares)] for rule in RULES]
    return table(["rule", *(f"{100 * share:g} %" for share in shares)], rows)


def draw(results: Results, shares: tuple[float, ...], path: Path) -> None:
    """A picture: error against size, a line a rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    colours = plt.get_cmap("tab20")
    for number, rule in enumerate(RULES):
        values = [results.values(row(rule, share), "error") for share in shares]
        heights = [sum(v) / len(v) for v in values]
        width = 2.5 if "default" in rule or "images" in rule else 1
        axis.plot([100 * s for s in shares], heights, "o-", color=colours(number), linewidth=width, label=rule)
    whole = results.values("none", "error")
    axis.axhline(sum(whole) / len(whole), color="#888888", linestyle=":", label="not compressed")
    axis.set(xscale="log", xlabel="parameters kept, %", ylabel="test error, %, not fine-tuned")
    axis.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(options: Options) -> None:
    """Run every seed, print the table, write the JSON and the picture."""
    precision = Precision.best(options.device)
    train, test = load(options.dataset, options.data, options.download)
    trained = vgg_cifar.Options(
        dataset=options.dataset,
        network=options.network,
        multiplier=options.multiplier,
        epochs=options.epochs,
        images=options.images,
        output=options.output,
    )
    path = options.results or options.output / f"compare-{options.network}-x{options.multiplier:g}.json"
    configuration = {
        "dataset": options.dataset,
        "network": options.network,
        "multiplier": options.multiplier,
        "images": options.images,
        "training": asdict(vgg_cifar.recipe(trained)),
        "arithmetic": "bfloat16 autocast" if precision.bfloat16 else "float32",
    }
    results = Results(path, configuration, precision.device)
    for seed in options.seeds:
        measure(options, seed, results, lambda s: vgg_cifar.Run(trained, s, train, test, precision, results))
    print(f"\n{show(results, options.shares)}\n")
    draw(results, options.shares, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main(cast(Options, tyro.cli(Options, description=__doc__)))
