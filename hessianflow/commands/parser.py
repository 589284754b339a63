"""The argument parser: every mistake is one line in the words of the command line, with exit status 2."""

import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from hessianflow.config import option


class Parser(ArgumentParser):
    """Reports a mistake on one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002
        """Print the mistake and end with status 2."""
        line = " ".join(message.split())
        key = re.match(r'Parser key "(\w+)": (.*)', line)
        if key:
            line = f"{option(key[1])}: {plain(key[2])}"
        line = re.sub(r"arguments are required: (\w+)\.(\w+)", r"arguments are required: \2", line)
        line = line.replace("unrecognized arguments:", "unknown option:")
        sys.stderr.write(f"{self.prog}: error: {line} (see {self.prog} --help)\n")
        sys.exit(2)


def add_command(commands: Any, name: str, help_text: str, *, prefix: str = "hessianflow") -> Parser:
    """A parser for the command `name`, listed with `help_text`."""
    parser = Parser(description=help_text[0].upper() + help_text[1:] + ".")
    commands.add_subcommand(name, parser, help=help_text)
    parser.prog = f"{prefix} {name}"
    return parser


def plain(message: str) -> str:
    """jsonargparse's words without Python's."""
    union = re.search(r"Subtypes: \[(.*)\] Errors: .* Given value: (.*)", message)
    if union:
        message = f"Expected a {union[1]}. Got value: {union[2]}".replace(", <class 'NoneType'>", "")
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", message)
    message = message.replace("tuple[int, ...]", "list of whole numbers like [30, 60]")
    return message.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")
