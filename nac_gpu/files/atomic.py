"""Files that are either the old one or the whole new one, whenever the process is stopped."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path to write to in place of `path`, which it replaces once all has been written to the disk.

    Args:
        path: of the file; folders above it are made. If writing fails, or the process is killed, it is what it was.
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
        partial.chmod(0o666 & ~mask)  # mkstemp's are for their owner only
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomically_folder(path: Path) -> Iterator[Path]:
    """A folder to fill in place of `path`, which it becomes once it is complete.

    Args:
        path: of the folder.

    Raises:
        FileExistsError: it is there already.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already, expected a new folder; remove it or take another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
        partial = Path(name) / path.name
        partial.mkdir()
        yield partial
        os.replace(partial, path)


def write_text(text: str, path: Path) -> None:
    """A text file, UTF-8, that is either the old one or the whole new one."""
    with atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")
