"""VGG on CIFAR: train, compress, fine-tune. The shape of Tables 4 and 5 of the paper.

    python experiments/vgg_cifar.py --data PATH                      # VGG-16, CIFAR-10, the paper's budget
    python experiments/vgg_cifar.py --network vgg19 --dataset cifar100 --data PATH --width 0.5
    python experiments/vgg_cifar.py --dataset digits --multiplier 0.25 --width 0.4   # a minute or two, needs no data
    torchrun --nproc-per-node 8 experiments/vgg_cifar.py --data PATH             # together, a GPU for each process

Every method gets the same trained network, the same widths and the same fine-tuning; the test images choose nothing.
A run that was stopped goes on where it was: checkpoints after every epoch in --output, results after every row.
"""

import sys
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import nac_gpu as nac
from common import processes
from common.data import DatasetName, Images, load, normalise, statistics
from common.models import NETWORKS, Network
from common.padding import train_padded
from common.results import Measured, Results, mean_sd
from common.training import Precision, Recipe, Teacher, error_rate, fit, remeasure
from nac_gpu.report.text import table

Method = Literal["random", "l1", "kmeans", "ward"]

#: Neurons kept in the 13 convolutions and 2 hidden linear layers of VGG-16 at the paper's budget (2.37 M parameters,
#: 3.72e8 FLOPs, CIFAR-10). The paper gives only these totals; of four allocations within them, this one had the lowest
#: error on training images after merging, before fine-tuning.
PAPER_VGG16 = (64, 64, 128, 128, 240, 216, 208, 208, 120, 96, 80, 80, 112, 80, 80)


@dataclass
class Options:
    """Train a VGG, compress it with each method, fine-tune, print and keep the table."""

    dataset: DatasetName = "cifar10"
    """What to learn; `folder` is any tree train/<class>/*.png, test/<class>/*.png of small square images."""
    data: Path = Path("data")
    """Where the data set is, or is downloaded to."""
    download: bool = False
    """Let torchvision fetch the data set."""
    network: Network = "vgg16"
    """VGG-16 with two hidden linear layers (33.65 M parameters), network slimming's VGG-19 (20.04 M), or a ResNet."""
    multiplier: float = 1.0
    """Width multiplier of every layer."""
    width: str = "paper"
    """Neurons kept: a share such as 0.5, `paper`, the preset for VGG-16 at 2.37 M parameters, or `budget`: chosen for
    the paper's 2.37 M parameters and 3.72e8 FLOPs, multiples of 8."""
    methods: tuple[Method, ...] = ("random", "l1", "kmeans", "ward")
    """How neurons are chosen: merged at random, L1 filter pruning, merged by k-means, merged by Ward (NAC)."""
    rule: Literal["compensated", "restored", "centroid"] = "restored"
    """Whether what reads merged neurons makes up for the loss; without, what a merged channel with BatchNorm deviates
    by: as its members did, or (the paper) as their mean does."""
    images: int = 0
    """Unlabelled training images to choose widths and to compensate with; 0: inputs are dreamed up."""
    finetune: tuple[Method, ...] = ("kmeans", "ward")
    """Methods whose result is fine-tuned."""
    control: bool = False
    """Also fine-tune the uncompressed network, to tell compression from longer training."""
    epochs: int = 32
    """Training epochs."""
    further_epochs: tuple[int, int] = (0, 0)
    """Epochs of a second cycle at --finetune-rate, of training and of fine-tuning; what counts then is the mean of the
    weights at the ends of both cycles (stochastic weight averaging, Izmailov et al. 2018)."""
    finetune_epochs: int = 12
    """Fine-tuning epochs."""
    learning_rate: float = 0.1
    """Largest learning rate of the training."""
    finetune_rate: float = 0.04
    """Largest learning rate of the fine-tuning, and of --further-epochs."""
    finetune_dropout: float = 0.0
    """Share of the hidden linear units left out in fine-tuning; what is merged has few to spare."""
    distillation: float = 0.0
    """The original network's share of the loss of the fine-tuning."""
    weight_decay: float = 2e-3
    """Of weights; large, because the epochs are few."""
    cutout: int = 8
    """Side of the grey square painted into every training image, pixels (0: none)."""
    batch_size: int = 256
    """Images per step, of all processes together."""
    error_every: int = 1
    """Epochs from one measurement of the test error to the next; on a CPU, each costs 6 % of an epoch."""
    seeds: tuple[int, ...] = (0,)
    """One whole run each."""
    device: str | None = None
    """`cuda` or `cpu`; the default is CUDA where there is one."""
    output: Path = Path("runs/vgg")
    """Checkpoints."""
    results: Path | None = None
    """The JSON file (a PNG is put beside it); by default in --output."""


def recipe(options: Options) -> Recipe:
    """How the network is trained from scratch."""
    mirrored = options.dataset not in ("digits", "mnist")
    return Recipe(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        weight_decay=options.weight_decay,
        warmup=0.2,
        label_smoothing=0.1,
        shift=4 if mirrored else 2,
        flip=mirrored,
        cutout=options.cutout if mirrored else 0,
    )


def finetune_recipe(options: Options) -> Recipe:
    """The same, shorter and gentler."""
    return replace(recipe(options), epochs=options.finetune_epochs, learning_rate=options.finetune_rate, warmup=0.1)


def told_finetuning(options: Options) -> dict[str, Any]:
    """The fine-tuning as results tell of it."""
    more = {"dropout": options.finetune_dropout, "distillation": options.distillation}
    return asdict(finetune_recipe(options)) | more


def l1_filters(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
    """L1 filter pruning (Li et al. 2017): the k neurons with the largest sum of absolute weights stay, unmerged.

    Args:
        points: neurons, [n, d], BatchNorm not folded in.
        k: how many stay.
        weights: not used.
        seed: not used.

    Returns:
        Labels, int64 [n]: 0 to k - 1 for those that stay, in order, -1 for those that are removed.
    """
    labels = torch.full((len(points),), -1, dtype=torch.int64, device=points.device)
    kept = points.abs().sum(1).topk(k).indices.sort().values
    labels[kept] = torch.arange(k, device=points.device)
    return labels


def widths(model: nn.Module, example: Tensor, calibration: nac.Calibration, options: Options) -> nac.Width:
    """What --width means for this network."""
    if options.width == "budget":
        group = dist.group.WORLD
        budget = nac.plan(
            model,
            example,
            params=2_370_000,
            flops=372_000_000,
            multiple_of=8,
            calibration=calibration,
            process_group=group,
        )
        return budget.widths
    if options.width != "paper":
        return float(options.width)
    if options.network != "vgg16":
        sys.exit("--width paper is for --network vgg16; give a share, such as --width 0.5, or budget")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)][:-1]
    return {layer: max(1, round(kept * options.multiplier)) for layer, kept in zip(layers, PAPER_VGG16, strict=True)}


def compressed(
    model: nn.Module,
    example: Tensor,
    kept: nac.Width,
    method: Method,
    calibration: nac.Calibration,
    rule: Literal["compensated", "restored", "centroid"],
) -> nn.Module:
    """The network with fewer neurons, chosen by a method; all processes work on it."""
    group = dist.group.WORLD
    compress = partial(nac.compress, model, example, width=kept, calibration=calibration, process_group=group)
    if method == "l1":
        return compress(method=l1_filters, rule="restored" if rule == "centroid" else rule, neurons="weights")
    return compress(method=method, rule=rule)


@dataclass
class Run:
    """One seed."""

    options: Options
    seed: int
    train: Images
    test: Images
    precision: Precision
    results: Results

    def checkpoint(self, name: str) -> Path:
        """Where a training is kept."""
        o = self.options
        return o.output / f"{o.network}-x{o.multiplier:g}-{o.dataset}-seed{self.seed}-{name}.pt"

    def fit(
        self,
        model: nn.Module,
        how: Recipe,
        name: str,
        teacher: Teacher | None = None,
        sparsity: float = 0.0,
        further: int = 0,
    ) -> float:
        """Train, in two cycles where there are further epochs, and give the last test error in percent."""
        error = self._cycle(model, how, name, teacher, sparsity)
        if not further:
            return error
        mean = AveragedModel(model)
        mean.update_parameters(model)
        again = replace(finetune_recipe(self.options), epochs=further)
        self._cycle(model, again, f"{name}-further", teacher, sparsity)
        mean.update_parameters(model)
        remeasure(mean, self.train, how, self.precision, seed=self.seed)
        model.load_state_dict(mean.module.state_dict())
        error = self.error(model)
        tqdm.write(f"{name} (seed {self.seed}): mean of both cycles' ends, test error {error:.2f} %")
        return error

    def _cycle(self, model: nn.Module, how: Recipe, name: str, teacher: Teacher | None, sparsity: float) -> float:
        """One cycle of training."""
        errors = fit(
            model,
            self.train,
            self.test,
            how,
            self.precision,
            seed=self.seed,
            label=f"{name} (seed {self.seed})",
            checkpoint=self.checkpoint(name),
            teacher=teacher,
            sparsity=sparsity,
            error_every=self.options.error_every,
        )
        return errors[-1]

    def finetune(self, model: nn.Module, original: nn.Module, name: str, epochs: int | None = None) -> float:
        """Train what was compressed, for --finetune-epochs or so many, and give the last test error in percent."""
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.options.finetune_dropout
        recipe = finetune_recipe(self.options)
        recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
        share = self.options.distillation
        teacher = Teacher(original, share) if share else None

        def train(network: nn.Module) -> float:
            return self.fit(network, recipe, name, teacher, further=self.options.further_epochs[1])

        on_cpu = self.precision.bfloat16 and self.precision.device.type == "cpu"
        return train_padded(model, train) if on_cpu else train(model)

    def calibration(self) -> nac.Calibration:
        """Unlabelled training images, or dreams."""
        if not self.options.images:
            return "dream"
        mean, std = (value.to(self.precision.device) for value in statistics(self.train))
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed))
        pixels = self.train.pixels[order[: self.options.images]].to(self.precision.device)
        return list(normalise(pixels, mean, std).split(128))

    def error(self, model: nn.Module) -> float:
        """Test error in percent."""
        mean, std = statistics(self.train)
        device = self.precision.device
        return error_rate(model, self.test.to(device), (mean.to(device), std.to(device)), self.precision)

    def baseline(self, name: str = "baseline", sparsity: float = 0.0) -> nn.Module:
        """The trained network; with `sparsity` as network slimming trains it."""
        torch.manual_seed(self.seed)
        model = NETWORKS[self.options.network](self.train.classes, self.options.multiplier)
        self.fit(model, recipe(self.options), name, sparsity=sparsity, further=self.options.further_epochs[0])
        return model

    def __call__(self) -> None:
        """Train, compress with every method, fine-tune; every figure goes to the results."""
        options = self.options
        model = self.baseline()
        example = torch.zeros(1, *self.train.pixels.shape[1:], device=self.precision.device)
        calibration = self.calibration()
        kept = widths(model, example, calibration, options)
        plan = nac.plan(model, example, width=kept, process_group=dist.group.WORLD)
        print(plan)

        def measured(network: nn.Module, error: float, **more: float) -> Measured:
            return asdict(nac.cost(network, example)) | {"error": error, **more}

        self.results.measure("baseline", self.seed, lambda: measured(model, self.error(model)))
        self.results.measure("widths", self.seed, lambda: {"before": before(plan), "after": plan.widths})
        for method in options.methods:
            # once, however many rows need it, and not at all where the results are known
            make = cache(partial(compressed, model, example, kept, method, calibration, options.rule))
            self.results.measure(method, self.seed, lambda make=make: measured(make(), self.error(make())))
            if method in options.finetune:
                self.results.measure(
                    f"{method}, fine-tuned",
                    self.seed,
                    lambda make=make, method=method: measured(make(), self.finetune(make(), model, method)),
                )
        if options.control:

            def longer() -> Measured:
                again = self.baseline()
                return measured(again, self.finetune(again, model, "control"))

            self.results.measure("baseline, fine-tuned", self.seed, longer)


def before(plan: nac.Plan) -> dict[str, int]:
    """Neurons of every group before compression."""
    return {group.name: group.before for group in plan.groups}


def show(results: Results) -> str:
    """The table: a row a method; errors in percent, mean and spread over the seeds."""
    rows = []
    for name in results.rows():
        if name == "widths" or name.endswith(", fine-tuned"):
            continue
        parameters, flops = (results.values(name, column)[0] for column in ("parameters", "flops"))
        tuned = results.values(f"{name}, fine-tuned", "error")
        rows.append(
            [name, f"{parameters / 1e6:.3g} M", f"{flops:.3g}", mean_sd(results.values(name, "error")), mean_sd(tuned)]
        )
    return table(["method", "parameters", "FLOPs", "error %", "fine-tuned %"], rows)


def draw(results: Results, path: Path) -> None:
    """A picture: neurons per layer before and after, and the errors of the methods."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entry = next(iter(results.seeds.values()))["rows"]["widths"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    places = range(len(entry["before"]))
    left.bar(places, list(entry["before"].values()), color="#c8d3e0", label="before")
    left.bar(places, list(entry["after"].values()), color="#2f6da8", label="after")
    left.set(title="neurons per layer", yscale="log", xlabel="layer", xticks=list(places))
    left.set_xticklabels([str(place + 1) for place in places])
    left.legend(frameon=False)
    names = [n for n in results.rows() if n != "widths" and not n.endswith(", fine-tuned")]
    for offset, suffix, colour, label in (
        (-0.2, "", "#e0a458", "not fine-tuned"),
        (0.2, ", fine-tuned", "#2f6da8", "fine-tuned"),
    ):
        values = [results.values(name + suffix, "error") for name in names]
        heights = [sum(v) / len(v) if v else 0.0 for v in values]
        bars = right.bar([i + offset for i in range(len(names))], heights, 0.4, color=colour, label=label)
        right.bar_label(bars, [f"{h:.1f}" if v else "" for h, v in zip(heights, values, strict=True)], fontsize=8)
    right.set(title="test error, %", xticks=list(range(len(names))))
    right.set_xticklabels(names)
    right.legend(frameon=False, loc="upper left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
        "training": asdict(recipe(options)),
        **({"further epochs": options.further_epochs} if any(options.further_epochs) else {}),
        "fine-tuning": told_finetuning(options),
        "arithmetic": "bfloat16 autocast" if precision.bfloat16 else "float32",
    }
    results = Results(path, configuration, precision.device)
    for seed in options.seeds:
        Run(options, seed, train, test, precision, results)()
    print(f"\n{show(results)}\n")
    if processes.first():
        draw(results, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    import tyro  # only the command line needs it: others import this file

    main(cast(Options, tyro.cli(Options, description=__doc__)))
