"""The command line `nac`."""

import sys
from typing import Any

_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def main(arguments: list[str] | None = None) -> None:
    """Make trained PyTorch models smaller by merging similar neurons: plan, compress, fine-tune, report, export.

    Exit codes: 0 for success, 1 for an error, 2 for wrong arguments, 130 for an interruption.
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
            "nac: interrupted; run the same command again to resume training after the last complete epoch",
            file=sys.stderr,
        )
        sys.exit(130)
    except _ERRORS as error:
        print(f"nac: error: {error}", file=sys.stderr)
        sys.exit(1)
