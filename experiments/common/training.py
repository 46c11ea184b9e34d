"""How every experiment trains: `nac_gpu.finetune` with a recipe, augmentation on tensors, the test error per epoch."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import nac_gpu as nac
from common import processes
from common.data import Images, augment, normalise, statistics
from common.fast_conv import fast_weight_gradients
from nac_gpu.network.precision import multiplies_bfloat16


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum; the rate rises linearly, then falls linearly to zero.

    Attributes:
        epochs: passes over the training images.
        learning_rate: the largest rate.
        warmup: share of all steps in which the rate rises.
        weight_decay: on weights only; biases and normalisation parameters are free.
        label_smoothing: share of the target spread over all classes.
        shift: augmentation, pixels (0: none).
        flip: augmentation, mirror half of the images; in the next epoch the other half (alternating flip, Jordan 2024).
        cutout: augmentation, side of a grey square in every image, pixels (0: none).
        warp: augmentation, how far each image is turned, stretched and slanted (0: not at all).
    """

    epochs: int
    learning_rate: float
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    label_smoothing: float = 0.0
    shift: int = 0
    flip: bool = False
    cutout: int = 0
    warp: float = 0.0


@dataclass(frozen=True)
class Teacher:
    """A network whose outputs are to be met.

    Attributes:
        model: on the device, in eval mode.
        share: of the loss.
    """

    model: nn.Module
    share: float


@dataclass(frozen=True)
class Precision:
    """Where and how the arithmetic is done; `bfloat16` uses autocast and channels_last."""

    device: torch.device
    bfloat16: bool

    @staticmethod
    def best(device: str | None = None, bfloat16: bool | None = None) -> "Precision":
        """CUDA if there is any; bfloat16 wherever the hardware multiplies it (CUDA, or a CPU with AMX or AVX-512)."""
        place = processes.device(device)
        return Precision(place, multiplies_bfloat16(place) if bfloat16 is None else bfloat16)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The context in which forward passes run."""
        if not self.bfloat16:
            yield
            return
        with torch.autocast(self.device.type, torch.bfloat16), fast_weight_gradients():
            yield

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the memory layout that suits it."""
        has_images = any(isinstance(module, nn.Conv2d) for module in model.modules())
        if self.bfloat16 and has_images:
            return model.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return model.to(self.device)


def _inputs(pixels: Tensor, scale: tuple[Tensor, Tensor], precision: Precision) -> Tensor:
    """Normalised float32 images in the memory layout that suits the arithmetic."""
    inputs = normalise(pixels, *scale)
    return inputs.contiguous(memory_format=torch.channels_last) if precision.bfloat16 else inputs


@torch.no_grad()
def error_rate(model: nn.Module, images: Images, scale: tuple[Tensor, Tensor], precision: Precision) -> float:
    """Share of misclassified images, in percent. The model's mode is put back.

    Processes divide the images; all hold the same model, and get the same answer.
    """
    training = model.training
    model.eval()
    wrong = 0
    own = images.part(*processes.part(len(images)))
    with precision():
        for start in range(0, len(own), 500):
            inputs = _inputs(own.pixels[start : start + 500], scale, precision)
            wrong += int((model(inputs).argmax(1) != own.labels[start : start + 500]).sum())
    model.train(training)
    return 100 * processes.summed(wrong, images.labels.device) / len(images)


class Augmented:
    """Training images in batches, in another order and augmented in another way in every epoch.

    Of several processes each gets its part of every batch, so all together train on the same batches as one alone. The
    parts are equally large, because the processes' gradients are averaged: where the last batch cannot be divided, the
    epoch's first images, fewer than there are processes, are in it again.

    Attributes:
        images: on the device.
        scale: each channel's mean and deviation, in units of 0 to 1.
        recipe: how large batches are, and how images are augmented.
        precision: decides about the memory layout.
        seed: of order and augmentation.
        epoch: 0 for the first.
    """

    def __init__(
        self, images: Images, scale: tuple[Tensor, Tensor], recipe: Recipe, precision: Precision, seed: int
    ) -> None:
        self.images, self.scale, self.recipe, self.precision = images, scale, recipe, precision
        self.seed, self.epoch = seed, 0
        _, size = processes.rank_and_size()
        if recipe.batch_size % size:
            raise ValueError(f"batch_size={recipe.batch_size}, expected a multiple of the {size} processes")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.images) // self.recipe.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """An epoch is the same whether or not the run was stopped before it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs, float32 [n, channels, height, width], and labels, int64 [n]."""
        how = self.recipe
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        first_mirrored = torch.rand(len(self.images), generator=torch.Generator().manual_seed(self.seed)) < 0.5
        mirrored = first_mirrored ^ (self.epoch % 2 == 1) if how.flip else None
        _, size = processes.rank_and_size()
        order = order[torch.arange(-(-len(order) // size) * size) % len(order)]
        for index in order.split(how.batch_size):
            mirror = None if mirrored is None else mirrored[index]
            index = index.to(self.precision.device)
            # each process augments all, so that its own part is what it would be in one process
            pixels = augment(self.images.pixels[index], how.shift, mirror, generator, how.cutout, how.warp)
            own = slice(*processes.part(len(index)))
            yield _inputs(pixels[own], self.scale, self.precision), self.images.labels[index[own]]


_BATCHES = 32  # on which BatchNorm's statistics are measured


def remeasure(model: nn.Module, train: Images, recipe: Recipe, precision: Precision, *, seed: int) -> None:
    """Measure the statistics of BatchNorm on training images, as for a mean of several models' weights.

    Args:
        model: changed in place, on the device.
        train: images, of which some batches are taken.
        recipe: how they are augmented.
        precision: where.
        seed: of the choice of images and the augmentation.
    """
    train = train.to(precision.device)
    mean, std = (value.to(precision.device) for value in statistics(train))
    batches = islice(Augmented(train, (mean, std), recipe, precision, seed), _BATCHES)
    with precision():
        update_bn(batches, model)
    processes.share_buffers(model)


@dataclass(frozen=True)
class Extras:
    """What a training may have besides its recipe.

    Attributes:
        checkpoint: a file kept after every epoch; a run that was stopped goes on from it, and one that is complete is
            only loaded. All processes must see it.
        scale: each channel's mean and deviation to take out of the pixels, in units of 0 to 1, [channels] each; by
            default those of the training images.
        teacher: for distillation.
        sparsity: weight in the loss of the sum of BatchNorm's absolute scales (network slimming, Liu et al. 2017).
        error_every: after how many epochs the test error is measured each time; it is after the last one in any case.
    """

    checkpoint: Path | None = None
    scale: tuple[Tensor, Tensor] | None = None
    teacher: Teacher | None = None
    sparsity: float = 0.0
    error_every: int = 1


NO_EXTRAS = Extras()


def fit(
    model: nn.Module,
    train: Images,
    test: Images,
    recipe: Recipe,
    precision: Precision,
    *,
    seed: int,
    label: str,
    extras: Extras = NO_EXTRAS,
) -> list[float]:
    """Train a model in place; several processes train it together, and all have the same one in the end.

    Args:
        model: changed in place, left in eval mode.
        train: images to learn from.
        test: images whose error is measured after epochs (and never used to choose anything).
        recipe: how; a batch is that of all processes together.
        precision: where.
        seed: of the order of the images and the augmentation.
        label: shown beside the progress bar.
        extras: checkpoint, distillation and the like.

    Returns:
        The test error in percent after each epoch where it was measured.
    """
    precision.place(model)
    train, test = train.to(precision.device), test.to(precision.device)
    mean, std = (value.to(precision.device) for value in extras.scale or statistics(train))

    def measure(_: nn.Module, epoch: nac.Epoch) -> dict[str, float]:
        if epoch.number % extras.error_every and epoch.number < recipe.epochs:
            return {}
        processes.share_buffers(model)
        error = error_rate(model, test, (mean, std), precision)
        tqdm.write(f"{label}: epoch {epoch.number}/{recipe.epochs}, test error {error:.2f} %")
        return {"error": error}

    teacher, sparsity = extras.teacher, extras.sparsity
    with fast_weight_gradients() if precision.bfloat16 else contextlib.nullcontext():
        epochs = nac.finetune(
            processes.parallel(model, precision.device),
            Augmented(train, (mean, std), recipe, precision, seed),
            epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            warmup=recipe.warmup,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            loss=_loss(model, recipe, sparsity),
            teacher=teacher.model if teacher else None,
            distillation=teacher.share if teacher else 0.0,
            precision="bfloat16" if precision.bfloat16 else "float32",
            checkpoint=extras.checkpoint,
            settings=asdict(recipe) | ({"sparsity": sparsity} if sparsity else {}),
            callbacks=[measure],
            progress=processes.first(),
            seed=seed,
        )
    model.eval()
    return [epoch.measured["error"] for epoch in epochs if "error" in epoch.measured]


def _loss(model: nn.Module, recipe: Recipe, sparsity: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy, with the penalty on BatchNorm's scales if there is any."""
    of_targets = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    if not sparsity:
        return of_targets
    scales: list[Tensor] = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return lambda outputs, targets: of_targets(outputs, targets) + sparsity * torch.cat(scales).abs().sum()
