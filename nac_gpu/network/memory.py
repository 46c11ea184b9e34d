"""Memory that was freed is returned to the system.

The C library keeps what was freed for later, in pieces between what is still used. Large matrices that are made and
freed in turn can leave more memory in such pieces than is in use.
"""

import contextlib
import ctypes
import os


def trim() -> None:
    """Return what is free to the system, where the C library can: glibc, which takes milliseconds."""
    if os.name == "posix":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
