"""Files that commands write, checked before a long run."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from nac_gpu.files.atomic import atomically


def check_output(path: Path | None, suffixes: tuple[str, ...] = (), option: str = "--output") -> None:
    """Check before a long run that a file can be written.

    Args:
        path: of the file; None if nothing is to be written.
        suffixes: of which it must have one; any if there are none.
        option: of the command line, for error messages.

    Raises:
        ValueError: another suffix, a folder or a device in its place, or no folder around it that can be written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder, expected a file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path}: expected a name that ends in {' or '.join(suffixes)}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option} {path} is no regular file")
    _check_folder(path, option)


def check_model_output(path: Path) -> None:
    """The same for a compressed model: a file, .safetensors, or a folder that does not exist yet.

    Raises:
        ValueError: as `check_output`; a folder for output exists already.
    """
    if path.suffix == ".safetensors":
        check_output(path)
        return
    if path.exists():
        raise ValueError(f"--output {path} exists already; remove it or choose another name")
    _check_folder(path, "--output")


def _check_folder(path: Path, option: str) -> None:
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: the folder {folder} cannot be written to")


def size_of(path: Path) -> int:
    """Size in bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(file.stat().st_size for file in files)


def write_array(path: Path, values: "np.ndarray[Any, Any]") -> None:
    """Write an array as .npy."""
    with atomically(path) as partial, partial.open("wb") as file:
        np.save(file, values)
