"""The command line `nac`."""

import contextlib
import os
import sys
import traceback
from typing import Any

#: Errors whose messages say all; others are bugs, or are raised by code of the user.
_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)
_CLOSED = 141  # what shells report of a program that a closed pipe has ended


def main(arguments: list[str] | None = None) -> None:
    """Make trained PyTorch models smaller by merging similar neurons: plan, compress, fine-tune, report, export.

    Exit codes: 0 for success, 1 for an error, 2 for wrong arguments, 130 for an interruption, 141 if the output was
    closed.
    """
    try:
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()  # here, where the error can be caught, and not while the interpreter ends
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a stream without a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(_CLOSED)


def _run(arguments: list[str] | None) -> None:
    try:
        import tyro
    except ImportError as error:
        sys.exit(f"nac: error: the command line needs packages: pip install 'nac-gpu[cli]' ({error})")
    from nac_gpu.cli.commands import COMMANDS

    assert main.__doc__ is not None, "written above"
    command: Any = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="nac", description=main.__doc__.partition("\n")[0], args=arguments
    )
    try:
        command.run()
    except KeyboardInterrupt:
        print(
            "nac: interrupted; run the same command again to resume training after the last complete epoch",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        raise
    except Exception as error:
        print(f"nac: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: Exception) -> str:
    """An error as a single line; with its type and place if its message cannot be expected to say enough."""
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, MemoryError):
        return f"there is not enough memory{': ' + said if said else ''}"
    if isinstance(error, _ERRORS) and said:
        return said
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said or 'without a message'} ({place.filename}, line {place.lineno})"
