"""One training loop for every experiment: mixed precision, augmentation on tensors, resumable after every epoch."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.data import Images, augment, normalise, statistics
from common.fast_conv import fast_weight_gradients


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
        flip: augmentation, mirror half of the images.
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
class Precision:
    """Where and how the arithmetic is done; `bfloat16` uses autocast and channels_last."""

    device: torch.device
    bfloat16: bool

    @staticmethod
    def best(device: str | None = None, bfloat16: bool | None = None) -> "Precision":
        """CUDA if there is any; bfloat16 wherever the hardware multiplies it (CUDA, or a CPU with AMX or AVX-512)."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        multiplies = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        fast = place.type == "cuda" or (torch.backends.mkldnn.is_available() and multiplies)
        return Precision(place, fast if bfloat16 is None else bfloat16)

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
    """Share of misclassified images, in percent. The model's mode is put back."""
    training = model.training
    model.eval()
    wrong = 0
    with precision():
        for start in range(0, len(images), 500):
            inputs = _inputs(images.pixels[start : start + 500], scale, precision)
            wrong += int((model(inputs).argmax(1) != images.labels[start : start + 500]).sum())
    model.train(training)
    return 100 * wrong / len(images)


def _rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, as a share of the largest."""
    rise = max(1, round(steps * warmup))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


def save_atomically(value: object, path: Path) -> None:
    """torch.save to a file that is either the old one or the whole new one, whenever the process is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(value, partial)
    os.replace(partial, path)


def fit(
    model: nn.Module,
    train: Images,
    test: Images,
    recipe: Recipe,
    precision: Precision,
    *,
    seed: int,
    label: str,
    checkpoint: Path | None = None,
    scale: tuple[Tensor, Tensor] | None = None,
) -> list[float]:
    """Train a model in place.

    Args:
        model: changed in place, left in eval mode.
        train: images to learn from.
        test: images whose error is measured after every epoch (and never used to choose anything).
        recipe: how.
        precision: where.
        seed: of the order of the images and the augmentation.
        label: shown beside the progress bar.
        checkpoint: a file kept after every epoch; a run that was stopped goes on from it, and one that is
            complete is only loaded.
        scale: each channel's mean and deviation to take out of the pixels, in units of 0 to 1, [channels] each;
            by default those of the training images.

    Returns:
        The test error in percent after each epoch.
    """
    precision.place(model)
    train, test = train.to(precision.device), test.to(precision.device)
    mean, std = (value.to(precision.device) for value in scale or statistics(train))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        fused=True,
    )
    steps_per_epoch = -(-len(train) // recipe.batch_size)
    steps = steps_per_epoch * recipe.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, recipe.warmup))
    loss_of = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    errors: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=precision.device, weights_only=True)
        if Recipe(**state["recipe"]) != recipe:  # what is newer than the file has its default there
            raise ValueError(
                f"{checkpoint} was made with {state['recipe']}, not {asdict(recipe)}: remove it to start anew"
            )
        model.load_state_dict(state["model"])
        errors = state["errors"]
        if len(errors) < recipe.epochs:
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
    for epoch in range(len(errors), recipe.epochs):
        torch.manual_seed(seed * 1000 + epoch)  # dropout; an epoch is the same whether or not the run was resumed
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(len(train), generator=generator)
        model.train()
        bar = tqdm(range(steps_per_epoch), desc=f"{label} {epoch + 1}/{recipe.epochs}", unit="step", leave=False)
        for step in bar:
            index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size].to(precision.device)
            pixels = augment(train.pixels[index], recipe.shift, recipe.flip, generator, recipe.cutout, recipe.warp)
            with precision():
                outputs = model(_inputs(pixels, (mean, std), precision))
            loss = loss_of(outputs.float(), train.labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
        errors.append(error_rate(model, test, (mean, std), precision))
        tqdm.write(f"{label}: epoch {epoch + 1}/{recipe.epochs}, test error {errors[-1]:.2f} %")
        if checkpoint is not None:
            last = epoch + 1 == recipe.epochs
            save_atomically(
                {
                    "recipe": asdict(recipe),
                    "errors": errors,
                    "model": model.state_dict(),
                    "optimizer": None if last else optimizer.state_dict(),
                    "scheduler": None if last else scheduler.state_dict(),
                },
                checkpoint,
            )
    model.eval()
    return errors
