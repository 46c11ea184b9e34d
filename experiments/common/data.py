"""Image data sets as tensors in memory: MNIST, CIFAR, scikit-learn's digits, or any ImageFolder tree."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from tqdm import tqdm

DatasetName = Literal["mnist", "cifar10", "cifar100", "digits", "folder"]


@dataclass(frozen=True)
class Images:
    """A labelled set of images.

    Attributes:
        pixels: uint8 [n, channels, height, width].
        labels: int64 [n].
        classes: how many classes there are.
    """

    pixels: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """The same images on a device."""
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)

    def part(self, start: int, stop: int) -> "Images":
        """Images from `start` up to `stop`."""
        return Images(self.pixels[start:stop], self.labels[start:stop], self.classes)


def _from_arrays(pixels: np.ndarray, labels: np.ndarray | list[int], classes: int) -> Images:
    """Images from uint8 [n, h, w, c] and labels [n]."""
    moved = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
    return Images(moved.contiguous(), torch.as_tensor(labels, dtype=torch.int64), classes)


def _read_folder(path: Path) -> Images:
    folder = datasets.ImageFolder(str(path))
    places = tqdm(range(len(folder)), desc=f"reading {path.name}", unit=" images", leave=False)
    pixels = [np.asarray(folder[place][0]) for place in places]
    return _from_arrays(np.stack(pixels), folder.targets, len(folder.classes))


def digits(side: int = 32, seed: int = 0) -> tuple[Images, Images]:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, as square RGB images of any size.

    Args:
        side: pixels.
        seed: of what goes into the test set, a fifth.

    Returns:
        Images to learn from, and images to measure on.
    """
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    small = torch.from_numpy(loaded.images).float().unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=side, mode="bilinear")
    pixels = large.round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(loaded.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Images(pixels[train], labels[train], 10), Images(pixels[test], labels[test], 10)


def load(name: DatasetName, path: Path, download: bool = False) -> tuple[Images, Images]:
    """Training and test images.

    Args:
        name: `mnist`, `cifar10`, `cifar100` (torchvision's own files, or for CIFAR a tree
            `train/<class>/*.png`, `test/<class>/*.png`), `digits` (ships with scikit-learn), or `folder`:
            any such tree of equally sized images.
        path: where the data set is, or is to be put.
        download: let torchvision fetch it.

    Raises:
        FileNotFoundError: there is no data set at `path`.
    """
    if name == "digits":
        return digits()
    if (path / "train").is_dir() and (path / "test").is_dir():
        train, test = _read_folder(path / "train"), _read_folder(path / "test")
        if train.classes != test.classes:
            raise ValueError(
                f"{path}: train has {train.classes} classes and test has {test.classes}, expected the same"
            )
        return train, test
    kinds = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    if name not in kinds:
        raise FileNotFoundError(f"{path} has no folders train/ and test/: --data must name an ImageFolder tree")
    try:
        sets = [kinds[name](str(path), train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(f"no {name} at {path}: give --data, or --download to fetch it") from error
    images = []
    for part in sets:
        pixels = np.asarray(part.data)
        images.append(_from_arrays(pixels[..., None] if pixels.ndim == 3 else pixels, part.targets, len(part.classes)))
    return images[0], images[1]


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """float32 [n, c, h, w] of uint8 pixels, with each channel's mean and deviation (in units of 0 to 1) taken out."""
    return (pixels.float() / 255 - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def statistics(images: Images) -> tuple[Tensor, Tensor]:
    """Each channel's mean and standard deviation over all pixels, in units of 0 to 1: float32 [c], [c]."""
    flat = images.pixels.transpose(0, 1).flatten(1).float() / 255
    return flat.mean(1), flat.std(1)


def augment(
    pixels: Tensor,
    shift: int,
    mirrored: Tensor | None,
    generator: torch.Generator,
    cutout: int = 0,
    warp: float = 0.0,
) -> Tensor:
    """Each image shifted by up to `shift` pixels both ways (edges reflected), and mirrored where `mirrored`, bool [n].

    With `cutout`, a square of so many pixels a side, anywhere in the image, is painted grey (DeVries and Taylor 2017).
    With `warp`, each image is turned, stretched and slanted first, as `warped` does.
    Works on whole batches where they lie: no worker processes.
    """
    if warp:
        pixels = warped(pixels, warp, generator)
    n, _, height, width = pixels.shape
    device = pixels.device
    if shift:
        padded = torch.nn.functional.pad(pixels.float(), (shift,) * 4, mode="reflect").to(pixels.dtype)
        dy, dx = (torch.randint(2 * shift + 1, (n,), generator=generator).to(device) for _ in range(2))
        rows = (dy[:, None] + torch.arange(height, device=device))[:, None, :, None]
        columns = (dx[:, None] + torch.arange(width, device=device))[:, None, None, :]
        channels = torch.arange(pixels.shape[1], device=device)[None, :, None, None]
        pixels = padded[torch.arange(n, device=device)[:, None, None, None], channels, rows, columns]
    if mirrored is not None:
        pixels = torch.where(mirrored.to(device).view(-1, 1, 1, 1), pixels.flip(3), pixels)
    if cutout:
        top, left = (torch.randint(size - cutout + 1, (n,), generator=generator) for size in (height, width))
        inside_rows = _between(torch.arange(height), top, cutout)  # [n, height]
        inside_columns = _between(torch.arange(width), left, cutout)  # [n, width]
        square = (inside_rows[:, :, None] & inside_columns[:, None, :]).to(device)
        pixels = pixels.masked_fill(square[:, None], 128)
    return pixels


def warped(pixels: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Each image under a linear map about its centre, black outside: uint8 of the same shape.

    Args:
        pixels: uint8 [n, channels, height, width].
        most: each of the four entries of the map differs from the identity's by up to this, independently. 0.15 is a
            turn by up to 9 degrees, and stretches and slants by up to 15 %.
        generator: on the CPU.
    """
    change = most * (2 * torch.rand(len(pixels), 2, 2, generator=generator) - 1)
    maps = torch.cat([torch.eye(2) + change, torch.zeros(len(pixels), 2, 1)], dim=2).to(pixels.device)
    grid = torch.nn.functional.affine_grid(maps, list(pixels.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixels.float(), grid, align_corners=False).round().to(pixels.dtype)


def _between(places: Tensor, start: Tensor, length: int) -> Tensor:
    """Which places lie in [start, start + length) for every start, bool [n, places]."""
    return (places >= start[:, None]) & (places < start[:, None] + length)
