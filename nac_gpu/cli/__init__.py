"""The command line `nac`."""

import sys
from typing import Any

_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def main(arguments: list[str] | None = None) -> None:
    """Make trained PyTorch models smaller by merging similar neurons: plan, compress, fine-tune, report, export.

    The process ends with the exit code 0, 1 for an error, 2 for a wrong call, 130 when interrupted.
    """
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
            "nac: interrupted; called again in the same way, a training goes on from its last whole epoch",
            file=sys.stderr,
        )
        sys.exit(130)
    except _ERRORS as error:
        print(f"nac: error: {error}", file=sys.stderr)
        sys.exit(1)
