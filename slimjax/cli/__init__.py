"""The command line ``slimjax``: one module per subcommand, each with ``add_arguments`` and ``run``.

A new subcommand is one module here and one line in ``COMMANDS``.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from slimjax.cli import convert, cost, inspect, plan, transcribe, verify


class Command(Protocol):
    """What a subcommand's module offers. Its docstring's first line is its help."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the subcommand's arguments."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Do it; the exit status. What the user got wrong raises ValueError, NotImplementedError or OSError."""
        ...


COMMANDS: dict[str, Command] = {
    "inspect": inspect,
    "plan": plan,
    "convert": convert,
    "verify": verify,
    "transcribe": transcribe,
    "cost": cost,
}

# Raised for what a user can put right; anything else is a fault of slimjax and keeps its traceback.
MISTAKES = (ValueError, NotImplementedError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments name. A user's mistake is one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except MISTAKES as mistake:
        if options.traceback:
            raise
        print(f"slimjax {options.command}: error: {one_line(mistake)}", file=sys.stderr)
        return 2


def one_line(mistake: BaseException) -> str:
    """A message without line breaks, as a file's name and reason where the system raised it."""
    if isinstance(mistake, OSError) and mistake.filename is not None and mistake.strerror:
        return f"{mistake.filename}: {mistake.strerror}"
    return " ".join(str(mistake).split()) or type(mistake).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slimjax", description="Small attention caches, with proof.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        first = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=first, description=first)
        module.add_arguments(command)
        command.add_argument("--traceback", action="store_true", help="on an error, show where it arose")
    return parser
