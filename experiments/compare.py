"""Which ideas carry how much: error against size, rule by rule, for one trained network.

    python experiments/compare.py --data PATH                              # VGG-16 of a quarter of the width, CIFAR-10
    python experiments/compare.py --dataset digits --epochs 4 --shares 0.5 0.1   # a few minutes, needs no data
    python experiments/compare.py --data PATH --network resnet56 --multiplier 1 --shares 0.75 0.5 --finetune-epochs 8

Every rule gets the same trained network, the same number of parameters and, if any, the same fine-tuning. Rules that
choose no widths of their own get the same share of every layer, or those that the data-free budget chose ("chosen
widths"). In two stages, half of the fine-tuning comes between two compressions. Network slimming gets a network that
was trained as it asks for. Global sparse momentum (GSM) removes single weights, no neurons: its rows count parameters
that are not zero, in a network that is as large as before; its fine-tuning is the training that makes them zero. A run
that was stopped goes on where it was.
"""

import copy
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import nac_gpu as nac
from common.data import DatasetName, load
from common.models import Network
from common.peers import global_sparse_momentum, magnitude_pruned, nonzero, slimmed, torch_pruned
from common.results import Measured, Results, mean_sd
from common.training import Precision
from common.vgg import Run, Training
from nac_gpu.reporting.text import table

TUNED = ", fine-tuned"


@dataclass
class Options:
    """Train a VGG, compress it by every rule to every size, print and keep the table and the curves."""

    dataset: DatasetName = "cifar10"
    """What to learn; `folder` is any tree train/<class>/*.png, test/<class>/*.png of small square images."""
    data: Path = Path("data")
    """Where the data set is, or is downloaded to."""
    download: bool = False
    """Let torchvision fetch the data set."""
    network: Network = "vgg16"
    """As in vgg_cifar.py."""
    multiplier: float = 0.25
    """Width multiplier of every layer."""
    epochs: int = 16
    """Training epochs."""
    shares: tuple[float, ...] = (0.5, 0.25, 0.123, 0.076)
    """Parameters to keep."""
    images: int = 512
    """Unlabelled training images for the rules that take some."""
    rules: tuple[str, ...] | None = None
    """Names of rules, as in the table; by default all that can be used."""
    finetune_epochs: int = 0
    """Epochs of fine-tuning of what every rule makes; 0: none."""
    finetune_rate: float = 0.04
    """Largest learning rate of the fine-tuning."""
    distillation: float = 0.0
    """The original network's share of the loss of the fine-tuning."""
    error_every: int = 1
    """Epochs from one measurement of the test error to the next while training."""
    sparsity: float = 1e-3
    """Weight of the penalty on BatchNorm's scales with which network slimming trains (1e-4 in the paper, whose training
    has 160 epochs)."""
    seeds: tuple[int, ...] = (0,)
    """One whole run each."""
    device: str | None = None
    """`cuda` or `cpu`; the default is CUDA where there is one."""
    output: Path = Path("runs/compare")
    """Checkpoints; those of vgg_cifar.py fit if they were made with the same recipe."""
    results: Path | None = None
    """The JSON file (a PNG is put beside it); by default in --output."""


#: What `nac.compress` is called with, by rule. `widths` says where the widths are from: the same share of every layer,
#: the data-free budget, or the rule's own budget; `flops`: no more FLOPs than with the same share of every layer.
RULES: dict[str, dict[str, Any]] = {
    "random": {"widths": "share", "method": "random", "rule": "restored", "calibration": "none"},
    "L1 filters": {"widths": "share", "method": "l1", "rule": "restored", "calibration": "none"},
    "k-means, Eq. 9": {"widths": "share", "method": "kmeans", "rule": "centroid", "calibration": "none"},
    "Ward, Eq. 9": {"widths": "share", "rule": "centroid", "calibration": "none"},
    "Ward, restored": {"widths": "share", "rule": "restored", "calibration": "none"},
    "folding (k-means, restored)": {"widths": "share", "method": "kmeans", "rule": "restored", "calibration": "none"},
    "L1 filters, chosen widths": {"widths": "chosen", "method": "l1", "rule": "restored", "calibration": "none"},
    "Ward, restored, chosen widths": {"widths": "chosen", "rule": "restored", "calibration": "none"},
    "Ward, dreams, same share": {"widths": "share"},
    "L1 filters, dreams, chosen widths": {"widths": "chosen", "method": "l1"},
    "k-means, dreams, chosen widths": {"widths": "chosen", "method": "kmeans"},
    "Ward by weights, dreams, chosen widths": {"widths": "chosen", "neurons": "folded"},
    "Ward, dreams, not refined": {"widths": "own", "refine": 0},
    "Ward, dreams (default)": {"widths": "own"},
    "Ward, dreams, FLOPs of the same share": {"widths": "own", "flops": True},
    "Ward, images, not refined": {"widths": "own", "images": True, "refine": 0},
    "Ward, images": {"widths": "own", "images": True},
}
TORCH_PRUNING = "Torch-Pruning"
SLIMMING: dict[str, dict[str, Any]] = {
    "network slimming": {"rule": "restored", "calibration": "none"},
    "network slimming, dreams": {},
}
STAGED = "Ward, images, in two stages"
GSM = "GSM, zeros counted"
_GSM_MOMENTUM = 0.98  # as its authors'; the rate falls as much as the momentum's sum rises
NAMES = (*RULES, STAGED, TORCH_PRUNING, *SLIMMING, GSM)
_SPARSE = "none, sparse training"


def chosen_rules(options: Options) -> list[str]:
    """The rules to be compared.

    Raises:
        SystemExit: a rule that does not exist.
    """
    unknown = sorted(set(options.rules or ()) - set(NAMES))
    if unknown:
        sys.exit(f"--rules {unknown[0]!r}, expected some of: {'; '.join(NAMES)}")
    if options.rules is not None:
        return list(options.rules)
    left_out = [] if importlib.util.find_spec("torch_pruning") else [TORCH_PRUNING]
    left_out += [] if options.network.startswith("vgg") else list(SLIMMING)  # elsewhere layers share their channels
    for name in left_out:
        print(f"left out: {name}")
    return [name for name in NAMES if name not in left_out]


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

    run: Run
    model: nn.Module
    example: Tensor
    images: nac.Calibration
    sparsity: float

    def __post_init__(self) -> None:
        """No plan has been made yet."""
        self._plans: dict[tuple[str, float], nac.Plan] = {}

    def sparse(self) -> nn.Module:
        """The network as network slimming trains it."""
        return self.run.baseline("sparse", self.sparsity).float()

    def plan(self, widths: str, share: float) -> nac.Plan:
        """The plan that rules without a budget of their own are given."""
        if (widths, share) not in self._plans:
            make = {
                "share": lambda: uniform(self.model, self.example, share),
                "chosen": lambda: nac.plan(self.model, self.example, params=share),
            }
            self._plans[widths, share] = make[widths]()
        return self._plans[widths, share]

    def network(self, rule: str, share: float) -> nn.Module:
        """The network with a share of the parameters that a rule makes."""
        if rule == TORCH_PRUNING:
            return torch_pruned(self.model, self.example, share)
        if rule == GSM:
            return magnitude_pruned(self.model, share)
        if rule == STAGED:
            return self.staged(share, lambda small, _: small)
        if rule in SLIMMING:
            return slimmed(self.sparse(), self.example, share, **SLIMMING[rule])
        options = dict(RULES[rule])
        widths = options.pop("widths")
        if options.pop("images", False):
            options["calibration"] = self.images
        if options.pop("flops", False):
            options["flops"] = self.plan("share", share).after.flops
        if widths == "own":
            return nac.compress(self.model, self.example, params=share, **options)
        return nac.compress(self.model, self.example, self.plan(widths, share), **options)

    def measured(self, network: nn.Module, error: float | None = None) -> Measured:
        """Cost and error; zeros are no parameters."""
        error = self.run.error(network) if error is None else error
        return asdict(nac.cost(network, self.example)) | {"parameters": nonzero(network), "error": error}

    def finetuned(self, rule: str, share: float, make: Callable[[], nn.Module]) -> Measured:
        """The same after fine-tuning of the network that `make` gives, or of one that the rule tunes on its way."""
        file = re.sub(r"\W+", "-", row(rule, share).lower())
        if rule == GSM:
            return self.measured(self.sparsely_trained(share, file))
        if rule == STAGED:
            whole = self.run.training.finetune_epochs
            parts = iter((whole // 2, whole - whole // 2))

            def tuned(small: nn.Module, stage: int) -> nn.Module:
                if epochs := next(parts):
                    self.run.finetune(small, self.model, f"{file}-{stage}", epochs)
                return small

            return self.measured(self.staged(share, tuned))
        small = make()
        original = self.sparse() if rule in SLIMMING else self.model
        return self.measured(small, self.run.finetune(small, original, file))

    def staged(self, share: float, tuned: Callable[[nn.Module, int], nn.Module]) -> nn.Module:
        """Compressed a little, tuned, compressed to the rest of the way, and tuned."""
        whole = nac.cost(self.model, self.example).parameters
        model = self.model
        for stage, kept in enumerate((share**0.5, share), 1):
            model = nac.compress(model, self.example, params=int(kept * whole), calibration=self.images)
            model = tuned(model, stage)
        return model

    def sparsely_trained(self, share: float, name: str) -> nn.Module:
        """The network after GSM's training, as long as others are fine-tuned, without its smallest weights."""
        model = copy.deepcopy(self.model)
        tuning = self.run.training.finetuning
        rate = tuning.learning_rate * (1 - _GSM_MOMENTUM) / (1 - tuning.momentum)
        recipe = replace(tuning, momentum=_GSM_MOMENTUM, learning_rate=rate)
        with global_sparse_momentum(model, share):
            self.run.fit(model, recipe, name)
        return magnitude_pruned(model.float(), share)


def row(rule: str, share: float) -> str:
    """The name of a row."""
    return f"{rule} @ {share:g}"


def measure(options: Options, seed: int, results: Results, make: Callable[[int], Run]) -> None:
    """Every rule at every size, for one seed."""
    run = make(seed)
    model = run.baseline().float()
    device = run.precision.device
    images = run.calibration()
    example = torch.zeros(1, *run.train.pixels.shape[1:], device=device)
    compare = Comparison(run, model, example, images, options.sparsity)
    results.measure("none", seed, lambda: compare.measured(model))
    rules = chosen_rules(options)
    if any(rule in SLIMMING for rule in rules):
        results.measure(_SPARSE, seed, lambda: compare.measured(compare.sparse()))
    todo = [(rule, share) for share in options.shares for rule in rules]
    for rule, share in tqdm(todo, desc=f"seed {seed}", unit="network"):
        name = row(rule, share)
        # once for both rows, and not at all where the results are known
        small = cache(partial(compare.network, rule, share))
        results.measure(name, seed, lambda small=small: compare.measured(small()))
        if options.finetune_epochs:
            tuned = partial(compare.finetuned, rule, share, small)
            results.measure(name + TUNED, seed, tuned)


def show(results: Results, shares: tuple[float, ...], suffix: str = "") -> str:
    """The table: a row a rule, a column a size; test errors in percent."""
    rows = [[name, *[mean_sd(results.values(name, "error"))] * len(shares)] for name in ("none", _SPARSE)]
    for rule in NAMES:
        rows.append([rule, *(mean_sd(results.values(row(rule, share) + suffix, "error")) for share in shares)])
    measured = [found for found in rows if set(found[1:]) != {"-"}]
    return table(["rule", *(f"{100 * share:g} %" for share in shares)], measured)


def draw(results: Results, shares: tuple[float, ...], path: Path) -> None:
    """A picture: error against size, a line a rule; fine-tuned beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suffixes = ["", TUNED] if any(name.endswith(TUNED) for name in results.rows()) else [""]
    figure, axes = plt.subplots(
        1, len(suffixes), figsize=(4 + 6 * len(suffixes), 5), layout="constrained", squeeze=False
    )
    colours = plt.get_cmap("tab20")
    for axis, suffix in zip(axes[0], suffixes, strict=True):
        for number, rule in enumerate(NAMES):
            values = {100 * share: results.values(row(rule, share) + suffix, "error") for share in shares}
            known = {share: sum(found) / len(found) for share, found in values.items() if found}
            width = 2.5 if "default" in rule or "images" in rule else 1
            label = rule if known and not suffix else None
            colour = colours(number % colours.N)
            axis.plot(list(known), list(known.values()), "o-", color=colour, linewidth=width, label=label)
        whole = results.values("none", "error")
        axis.axhline(
            sum(whole) / len(whole), color="#888888", linestyle=":", label=None if suffix else "not compressed"
        )
        axis.set(xscale="log", xlabel="parameters kept, %", ylabel=f"test error, %{suffix or ', not fine-tuned'}")
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
    trained = Training(
        dataset=options.dataset,
        network=options.network,
        multiplier=options.multiplier,
        epochs=options.epochs,
        images=options.images,
        finetune_epochs=options.finetune_epochs,
        finetune_rate=options.finetune_rate,
        distillation=options.distillation,
        error_every=options.error_every,
        output=options.output,
    )
    path = options.results or options.output / f"compare-{options.network}-x{options.multiplier:g}.json"
    configuration = {
        "dataset": options.dataset,
        "network": options.network,
        "multiplier": options.multiplier,
        "images": options.images,
        "training": asdict(trained.recipe),
        "arithmetic": "bfloat16 autocast" if precision.bfloat16 else "float32",
    }
    if options.finetune_epochs:
        configuration["fine-tuning"] = trained.told_finetuning()
    results = Results(path, configuration, precision.device)
    for seed in options.seeds:
        measure(options, seed, results, lambda s: Run(trained, s, train, test, precision))
    print(f"\n{show(results, options.shares)}\n")
    if options.finetune_epochs:
        print(f"fine-tuned:\n{show(results, options.shares, TUNED)}\n")
    draw(results, options.shares, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main(cast(Options, tyro.cli(Options, description=__doc__)))
