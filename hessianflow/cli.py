"""The `hessianflow` command: every mistake or bad input is one line on standard error and exit status 2."""

import sys
from collections.abc import Sequence

from hessianflow.commands import curvature, data, records, training
from hessianflow.commands.parser import Parser
from hessianflow.interfaces import HessianFlowError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = Parser(prog="hessianflow", description="Train with a batch size that the curvature of the loss drives.")
    commands = parser.add_subcommands(required=False, title="commands", metavar="COMMAND")
    runs = {name: run for room in (training, records, curvature, data) for name, run in room.add(commands).items()}
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parser.parse_args(["--print_config" if word == "--print-config" else word for word in given])
    if parsed.subcommand is None:
        parser.print_help()
        return 0
    try:
        status: int = runs[parsed.subcommand](parsed[parsed.subcommand])
        return status
    except HessianFlowError as error:
        sys.stderr.write(f"hessianflow {parsed.subcommand}: error: {' '.join(str(error).split())}\n")
        return 2
