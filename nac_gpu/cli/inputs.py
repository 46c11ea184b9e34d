"""Example inputs by shape or from files, and folders of images as calibration and training data."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nac_gpu.cli.models import Scale, Source, first_line
from nac_gpu.network.running import ExampleInputs

_SHAPE = re.compile(r"(int:)?\d+(,\d+)*")


def example_inputs(given: Sequence[str], source: Source, model: nn.Module) -> ExampleInputs:
    """The example inputs that `--inputs` describes.

    Args:
        given: for each argument a shape (`1,3,224,224`, integers as `int:1,16`) or a file of tensors (.npy,
            .safetensors, .pt), with the prefix `name=` for keyword arguments; empty for the default of the source.
        source: where the model comes from.
        model: the model.

    Raises:
        ValueError: inputs are not given and not known, or they cannot be parsed.
    """
    if not given:
        if source.inputs is None:
            raise ValueError(f"{source.name}: its inputs are not known; give --inputs, such as --inputs 1,3,32,32")
        return source.inputs(model)
    named = [text.partition("=") for text in given if re.match(r"[A-Za-z_]\w*=", text)]
    if named and len(named) < len(given):
        raise ValueError("--inputs: either all with names (x=1,3,32,32) or none")
    if named:
        return {name: _input(value) for name, _, value in named}
    values = [_input(text) for text in given]
    return values[0] if len(values) == 1 else values


def _input(text: str) -> Any:
    if _SHAPE.fullmatch(text):
        whole = text.startswith("int:")
        shape = [int(size) for size in text.removeprefix("int:").split(",")]
        return torch.ones(shape, dtype=torch.int64) if whole else torch.zeros(shape)
    values = read_tensors(Path(text))
    return values[0] if len(values) == 1 else values


def read_tensors(path: Path) -> list[Tensor]:
    """The tensors of a file: .npy, .safetensors, or from `torch.save` (a tensor, a list or a mapping of tensors).

    Raises:
        ValueError: no such file, or a file of another type.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file, and it is no shape such as 1,3,224,224")
    try:
        if path.suffix == ".npy":
            return [torch.from_numpy(np.load(path, allow_pickle=False))]
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as tensors: {first_line(error)}") from error
    values = list(found.values()) if isinstance(found, dict) else found if isinstance(found, list | tuple) else [found]
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise ValueError(f"{path} holds {'other things than' if values else 'no'} tensors")
    return list(values)


def image_of(example: ExampleInputs) -> tuple[str | None, Tensor | None]:
    """The name (None if positional) and the tensor [batch, channels, height, width] of a model whose only input is one.

    The tensor is None for all other models.
    """
    name = next(iter(example)) if isinstance(example, dict) and len(example) == 1 else None
    image: Any = example[name] if name is not None else example  # type: ignore[index]
    return name, image if isinstance(image, Tensor) and image.ndim == 4 else None


class Images:
    """Batches from a folder of images, with one subfolder for each class, in the form that a model takes them."""

    def __init__(
        self, path: Path, example: ExampleInputs, scale: Scale | None, batch_size: int, *, training: bool = False
    ) -> None:
        """Open the folder.

        Args:
            path: of a folder `<class>/<image>`.
            example: example inputs, which define the size of the images and the name of the argument.
            scale: mean and standard deviation for normalisation, for pixels in [0, 1].
            batch_size: images of a batch.
            training: shuffle, and augment by random crops and mirroring.

        Raises:
            ValueError: no such folder, or a model that takes no images.
        """
        try:
            from torchvision.datasets import ImageFolder
            from torchvision.transforms import v2
        except ImportError as error:
            raise ImportError("folders of images need torchvision: pip install torchvision") from error
        self.name, image = image_of(example)
        if image is None or image.shape[1] not in (1, 3):
            raise ValueError(f"{path}: the model does not take images [batch, 1 or 3, height, width] as its only input")
        size = [int(image.shape[2]), int(image.shape[3])]
        mean, std = scale or ((0.0,), (1.0,))
        steps: list[Any] = [v2.ToImage(), *([v2.Grayscale()] if image.shape[1] == 1 else [])]
        if training and min(size) > 64:
            steps += [v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        else:
            steps += [v2.Resize(min(size), antialias=True), v2.CenterCrop(size)]
            if training:
                steps += [v2.RandomCrop(size, padding=max(1, min(size) // 8), padding_mode="reflect")]
                steps += [v2.RandomHorizontalFlip()]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        try:
            self.folder = ImageFolder(str(path), transform=v2.Compose(steps))
        except (FileNotFoundError, OSError) as error:
            raise ValueError(f"{path} is no tree <class>/<image>: {error}") from error
        self.loader: DataLoader[Any] = DataLoader(self.folder, batch_size, shuffle=training)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.loader)

    def __iter__(self) -> Any:
        """Pairs (images, labels), or mappings with "labels" for models with keyword arguments."""
        for images, labels in self.loader:
            yield (images, labels) if self.name is None else {self.name: images, "labels": labels}


def calibration_images(path: Path, example: ExampleInputs, scale: Scale | None, count: int, seed: int) -> list[Any]:
    """Batches of `count` images drawn at random from a folder, or the first `count` inputs in a file of tensors.

    Raises:
        ValueError: as `Images`.
    """
    if path.is_file():
        return [batch for tensor in read_tensors(path) for batch in tensor[:count].split(64)]
    images = Images(path, example, scale, 64)
    order = torch.randperm(len(images.folder), generator=torch.Generator().manual_seed(seed))[:count]
    drawn = [torch.stack([images.folder[int(place)][0] for place in part]) for part in order.split(64)]
    return drawn if images.name is None else [{images.name: batch} for batch in drawn]
