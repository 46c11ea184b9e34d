"""Atomic writes: if the process stops at any time, the file is either the old one or the complete new one."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` once everything is on the disk.

    Args:
        path: of the file; missing parent folders are created. It stays unchanged if writing fails or the process is
            killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # mkstemp makes files private to their owner
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomically_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which is renamed to `path` once it is complete.

    Args:
        path: of the folder, which must not exist.

    Raises:
        FileExistsError: it exists already.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already, expected a new folder; remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
        partial = Path(name) / path.name
        partial.mkdir()
        yield partial
        os.replace(partial, path)


def write_text(text: str, path: Path) -> None:
    """Write a text file in UTF-8 atomically."""
    with atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")
