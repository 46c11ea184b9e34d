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
