"""Made-up images in place of the experiments' data sets, in memory and in the data sets' own files."""

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data import Images


def blobs(n: int, seed: int, size: int = 8) -> Images:
    """Two classes of images: dark and bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    noise = torch.randint(0, 60, (n, 3, size, size), generator=generator)
    return Images((noise + 120 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, 2)


def write_tree(path: Path, classes: int = 2, size: int = 32) -> None:
    """An ImageFolder tree of dark and bright images."""
    for split, count in (("train", 24), ("test", 8)):
        images = blobs(count, len(split), size)
        for i, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
            folder = path / split / f"class{label % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(folder / f"{i}.png")


def write_idx(values: Tensor, path: Path) -> None:
    """The file format of MNIST: a magic number, big-endian sizes, bytes."""
    header = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def write_mnist(path: Path) -> None:
    """A tiny MNIST: a bright bar whose place tells the class."""
    raw = path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 120), ("t10k", 40)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 40, (count, 28, 28), generator=torch.Generator().manual_seed(count))
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 * label + 3 : 2 * label + 6] += 180
        write_idx(images, raw / f"{prefix}-images-idx3-ubyte")
        write_idx(labels, raw / f"{prefix}-labels-idx1-ubyte")
