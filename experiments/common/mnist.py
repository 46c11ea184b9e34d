"""What the experiments on MNIST share: the measurements of one seed, the images held out, the printed table."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import nac_gpu as nac
from common.data import Images, load, normalise
from common.results import Measured, Results, mean_sd
from common.training import Extras, Precision, Recipe, error_rate, fit
from nac_gpu.reporting.text import table


@dataclass(frozen=True)
class Merging:
    """How a network is merged.

    Attributes:
        method: of clustering.
        rule: "centroid" is the paper's, Eq. (9); "compensated" the library's default.
        images: how many unlabelled training images help (0: none).
    """

    method: str
    rule: Literal["centroid", "compensated"]
    images: int = 0


#: Ways of merging by the names of their rows, in the order of the tables.
MERGINGS = {
    "ward": Merging("ward", "centroid"),
    "kmeans": Merging("kmeans", "centroid"),
    "random": Merging("random", "centroid"),
    "default": Merging("ward", "compensated"),
    "1,024 images": Merging("ward", "compensated", 1024),
}


@dataclass(frozen=True)
class Run:
    """The measurements of one seed.

    Attributes:
        seed: of everything drawn.
        train: images to learn from, on the device.
        test: images to measure on, on the device.
        precision: where and how the arithmetic is done.
        output: folder for checkpoints.
    """

    seed: int
    train: Images
    test: Images
    precision: Precision
    output: Path

    @property
    def folder(self) -> Path:
        """Where the checkpoints of this seed are."""
        return self.output / f"seed{self.seed}"

    def scale(self) -> tuple[Tensor, Tensor]:
        """The mean and deviation that are taken out of the pixels, in units of 0 to 1: [1], [1]."""
        raise NotImplementedError

    def fit(self, model: nn.Module, row: str, recipe: Recipe) -> float:
        """Train a model in place; its error in percent after the last epoch."""
        file = f"{row.replace(': ', '-').replace(', ', '-').replace(',', '').replace(' ', '-')}.pt"
        extras = Extras(checkpoint=self.folder / file, scale=self.scale())
        label = f"seed {self.seed}, {row}"
        errors = fit(model, self.train, self.test, recipe, self.precision, seed=self.seed, label=label, extras=extras)
        return errors[-1]

    def size(self, model: nn.Module) -> Measured:
        """Parameters, and FLOPs of one image (2 per multiply-add)."""
        cost = nac.cost(model, self.train.pixels[:1].float())
        return {"parameters": cost.parameters, "flops": cost.flops}

    def measured(self, model: nn.Module) -> Measured:
        """A network's size and error."""
        return {**self.size(model), "error": error_rate(model, self.test, self.scale(), self.precision)}

    def measure_merged(
        self, results: Results, row: str, merge: Callable[[], nn.Module], tune: Callable[[nn.Module], Measured]
    ) -> None:
        """The two rows of a merged network, without and with fine-tuning; it is merged only if one is missing.

        Args:
            results: where the rows go.
            row: name of the first; the second's ends in ", fine-tuned".
            merge: makes the network.
            tune: fine-tunes it in place, and measures it.
        """
        merged = cache(merge)
        results.measure(row, self.seed, lambda: self.measured(merged()))
        results.measure(f"{row}, fine-tuned", self.seed, lambda: tune(merged()))

    def compressed(self, model: nn.Module, widths: Mapping[str, int], how: Merging) -> nn.Module:
        """A copy merged to these widths."""
        calibration: nac.Calibration = "dream"
        if how.images:
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed))
            pixels = self.train.pixels[order[: how.images].to(self.precision.device)]
            calibration = list(normalise(pixels, *self.scale()).split(128))
        return nac.compress(
            model,
            self.train.pixels[:1].float(),
            width=dict(widths),
            method=how.method,
            rule=how.rule,
            neurons="folded" if how.rule == "centroid" else None,
            calibration=calibration,
            seed=self.seed,
        )


def split(path: Path, download: bool, images: int | None, validate: bool) -> tuple[Images, Images]:
    """Images to learn from and images to measure on.

    Args:
        path: folder of the data set.
        download: fetch it into that folder.
        images: use only so many training images.
        validate: measure on the last sixth of the training images, and leave the test set alone.
    """
    train, test = load("mnist", path, download)
    if validate:
        kept = len(train) - len(train) // 6
        train, test = train.part(0, kept), train.part(kept, len(train))
    return train.part(0, images or len(train)), test


def printed(results: Results, rows: Iterable[str], paper: Mapping[str, tuple[str, str]]) -> str:
    """Errors in percent, mean and sample standard deviation over the seeds, beside the paper's.

    Args:
        results: what was measured.
        rows: names of networks; what they came to by fine-tuning is in the rows of the same name + ", fine-tuned".
        paper: row -> error without and with fine-tuning.
    """
    lines = []
    for row in rows:
        sizes = [results.values(row, column)[:1] for column in ("parameters", "flops")]
        errors = [mean_sd(results.values(name, "error")) for name in (row, f"{row}, fine-tuned")]
        lines.append([row, *(f"{size[0]:,}" if size else "-" for size in sizes), *errors, *paper.get(row, ("-", "-"))])
    return table(["network", "parameters", "FLOPs", "error, %", "fine-tuned", "paper: error", "fine-tuned"], lines)
