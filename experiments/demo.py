"""What the library does, in a minute: a network is trained, made eight times as small, and fine-tuned.

    python experiments/demo.py

A VGG with BatchNorm learns scikit-learn's handwritten digits (nothing is downloaded). Then it is compressed in three
ways to the same number of parameters: as `nac_gpu.compress` does by itself, which needs no data; with unlabelled
training images; and by the rule of Wang et al. (2020), Eq. 9, to the widths of the first. That rule is meant to be
followed by fine-tuning. All three are fine-tuned in the same way, with the original as teacher, at a rate that was
chosen on held-out training images. The test images choose nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import nac_gpu as nac
from common.data import digits, normalise, statistics
from common.models import vgg8
from common.pictures import draw_compression
from common.training import Extras, Precision, Recipe, Teacher, error_rate, fit
from nac_gpu.reporting.text import count, table, times

ORIGINAL, DEFAULT, IMAGES, PAPER = "original", "default, without data", "with unlabelled images", "the paper's rule"


@dataclass
class Options:
    """Train a network on digits, compress it, fine-tune it, print a table and draw a picture."""

    share: float = 0.125
    """Of the parameters, kept."""
    images: int = 256
    """Unlabelled training images for the second way."""
    epochs: int = 20
    """Training epochs."""
    finetune_epochs: int = 5
    """Fine-tuning epochs."""
    seed: int = 0
    """Of everything drawn."""
    device: str | None = None
    """`cuda` or `cpu`; the default is CUDA where there is one."""
    output: Path = Path("runs/demo")
    """Folder for the picture."""


@dataclass(frozen=True)
class Row:
    """A network of the table.

    Attributes:
        cost: parameters and FLOPs.
        error: on the test images, percent.
        tuned: the same after fine-tuning; None where there is none.
    """

    cost: nac.Cost
    error: float
    tuned: float | None = None


class Digits:
    """The images, and how networks learn them.

    Args:
        options: of the command line.
    """

    def __init__(self, options: Options) -> None:
        self._precision, self._seed = Precision.best(options.device, bfloat16=False), options.seed
        train, test = digits(side=8)
        self.train, self.test = (images.to(self._precision.device) for images in (train, test))
        self._scale = statistics(self.train)
        self.example = self.unlabelled(1)

    def unlabelled(self, number: int) -> Tensor:
        """So many training images, as networks see them."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self._seed))
        return normalise(self.train.pixels[order[:number].to(self._precision.device)], *self._scale)

    def fit(self, model: nn.Module, recipe: Recipe, name: str, teacher: Teacher | None = None) -> float:
        """Train a network in place, and give its test error in percent."""
        extras = Extras(teacher=teacher, error_every=recipe.epochs)
        seed = self._seed
        return fit(model, self.train, self.test, recipe, self._precision, seed=seed, label=name, extras=extras)[-1]

    def error(self, model: nn.Module) -> float:
        """A network's test error in percent."""
        return error_rate(model, self.test, self._scale, self._precision)


def widths(model: nn.Module) -> dict[str, int]:
    """Neurons of every hidden layer."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    return {name: len(layer.weight) for name, layer in list(layers.items())[:-1]}


def measure(options: Options) -> tuple[dict[str, Row], dict[str, int], dict[str, int]]:
    """All rows of the table, and the widths before and after."""
    data = Digits(options)
    example, share, seed = data.example, options.share, options.seed
    training = Recipe(options.epochs, 0.1, batch_size=64, label_smoothing=0.1, shift=1)
    finetuning = replace(training, epochs=options.finetune_epochs, learning_rate=0.01)
    torch.manual_seed(seed)
    model = vgg8(data.train.classes)
    small: dict[str, nn.Module] = {}
    ways: dict[str, Callable[[], nn.Module]] = {
        DEFAULT: lambda: nac.compress(model, example, params=share, seed=seed),
        IMAGES: lambda: nac.compress(
            model, example, params=share, calibration=[data.unlabelled(options.images)], seed=seed
        ),
        PAPER: lambda: nac.compress(model, example, width=widths(small[DEFAULT]), rule="centroid", calibration="none"),
    }
    with tqdm(total=1 + 2 * len(ways), desc="training", unit="step") as progress:
        error = data.fit(model, training, ORIGINAL)
        rows = {ORIGINAL: Row(nac.cost(model, example), error)}
        for name, compress in ways.items():
            progress.update()
            progress.set_description(f"compressing: {name}")
            network = small[name] = compress()
            error = data.error(network)
            progress.update()
            progress.set_description(f"fine-tuning: {name}")
            tuned = data.fit(network, finetuning, f"{name}, fine-tuned", Teacher(model, 0.5))
            rows[name] = Row(nac.cost(network, example), error, tuned)
        progress.update()
    return rows, widths(model), widths(small[DEFAULT])


def show(rows: Mapping[str, Row]) -> str:
    """The table."""
    cells = [
        [
            name,
            f"{row.cost.parameters:,}",
            count(row.cost.flops),
            f"{row.error:.2f}",
            "-" if row.tuned is None else f"{row.tuned:.2f}",
        ]
        for name, row in rows.items()
    ]
    return table(["network", "parameters", "FLOPs", "error %", "fine-tuned %"], cells)


def gained(rows: Mapping[str, Row]) -> str:
    """What the default gained, in a line."""
    before, after = rows[ORIGINAL], rows[DEFAULT]
    return (
        f"gained: {times(before.cost.parameters / after.cost.parameters)} fewer parameters, "
        f"{times(before.cost.flops / after.cost.flops)} fewer FLOPs, test error {before.error:.2f} % -> "
        f"{after.error:.2f} % without data ({after.tuned:.2f} % fine-tuned)"
    )


def main(options: Options) -> None:
    """Measure, print the table, draw the picture."""
    rows, before, after = measure(options)
    path = options.output / "demo.png"
    draw_compression(before, after, {name: (row.error, row.tuned) for name, row in rows.items()}, path)
    print(f"\n{show(rows)}\n\npicture: {path}\n{gained(rows)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
