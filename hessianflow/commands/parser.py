"""The argument parser, which reports a mistake on one line in the words of the command line."""

import difflib
import re
import sys
from argparse import ArgumentTypeError
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_loader

from hessianflow.bounds import LONGEST, option, shortened, user_path
from hessianflow.commands.yaml_text import UnfitTextError, load_value
from hessianflow.interfaces import HessianFlowError

MODE = "bounded-yaml"
"""Name, for jsonargparse, of the reader of values that :func:`main_parser` registers."""
INSIDE = "__"
"""The dot between a method and its option, in names that jsonargparse would split at a dot."""


class Parser(ArgumentParser):
    """A parser that reports a mistake on one line.

    Attributes:
        options: Every option, as typed.
        settings: Names of the options that are settings of a run.
        chosen: Settings that choose a method, and the group of its options, which are added when
            it is known.
        methods: Methods in force, by the setting that chooses them.
        values: Options whose words are read as YAML; text is not.
        switches: Options that are true or false, and true if nothing follows.
        children: Commands below this one.
        current: Command that is being parsed, if it is another; errors point to its help.
        origin: Source of the words, for errors; empty for the command line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.options: list[str] = []
        self.settings: set[str] = set()
        self.chosen: dict[str, Any] = {}
        self.methods: dict[str, str] = {}
        self.values: set[str] = set()
        self.switches: set[str] = set()
        self.children: dict[str, Parser] = {}
        self.current: Parser | None = None
        self.origin = ""
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add(self, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        """Add an argument as `add_argument` does, to a group if one is given.

        It has a name of its own because jsonargparse compiles the source of an overridden
        `add_argument` again for its groups.
        """
        self.options += [word for word in args if word.startswith("--")]
        if kwargs.get("type") in (bool, bool | None):
            self.switches.update(args)
        if "type" in kwargs and kwargs["type"] not in (str, str | None, path):
            self.values.update(args)
        return (group or self).add_argument(*args, **kwargs)

    def add_option(self, name: str, hint: Any, default: Any, text: str) -> None:
        """Add an option of type `hint`; `text` is its help."""
        self.add(name, type=hint, default=default, help=text)

    def add_open(self, name: str, hint: Any, text: str) -> None:
        """Add an option whose default is null."""
        self.add_option(name, hint, None, text)

    def announce(self, origin: str) -> None:
        """Set the source that errors name for the words that are parsed from now on."""
        for parser in (self, self.current):
            if parser is not None:
                parser.origin = origin

    def print_help(self, file: Any = None) -> None:
        """Print the help, and fail if it cannot be written, which argparse would ignore."""
        (file or sys.stdout).write(self.format_help())

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002
        """Print the mistake and end with status 2."""
        parser = self.current or self
        line = self._in_options(" ".join(message.split()))
        sys.stderr.write(f"{parser.prog}: error: {self.origin}{line} (see {parser.prog} --help)\n")
        sys.exit(2)

    def _in_options(self, line: str) -> str:
        """Return the mistake in the words of the command line."""
        parser = self.current or self
        if key := re.match(r'Parser key "(?:[\w-]+\.)*(\w+)":? ?(?:element \d+: )?(.*)', line):
            name = option(key[1].replace(INSIDE, "."))
            if name not in parser.options:
                name = key[1]
            return f"{name}: {plain(key[2])}"
        if unknown := re.match(r"unrecognized arguments: ((--[^\s=]+).*|.*)", line):
            return (
                "unknown option:"
                f" {shortened(unknown[1])}{did_you_mean(unknown[2] or '', parser.options)}"
            )
        if choice := re.match(r"argument (\w+): invalid choice: '(.*)' \(choose from (.*)\)", line):
            known = re.findall(r"'([^']*)'", choice[3])
            hint = did_you_mean(choice[2], known)
            return (
                f"unknown {choice[1].lower()} {shortened(choice[2])!r}{hint}; there are"
                f" {', '.join(known)}"
            )
        if not_given := re.match(
            r'expected "[\w.]+" to be one of \{(.*)\}, but it was not provided', line
        ):
            return f"name what to do: {' or '.join(not_given[1].split(','))}"
        line = re.sub(r"(arguments are required: )(?:\w+\.)*(\w+)", r"\1\2", line)
        return shortened(line, 5 * LONGEST)


def main_parser(prog: str, description: str) -> Parser:
    """Return the parser of all commands.

    It reads values within the bounds of :mod:`hessianflow.commands.yaml_text`.
    """
    set_loader(MODE, load_value, exceptions=(UnfitTextError.__base__ or Exception,))
    return Parser(prog=prog, description=description, parser_mode=MODE)


def add_command(commands: Any, name: str, help_text: str, *, prefix: str = "hessianflow") -> Parser:
    """Return a parser for the command `name`, listed with `help_text`."""
    parser = Parser(description=help_text[0].upper() + help_text[1:] + ".")
    commands.add_subcommand(name, parser, help=help_text)
    commands.parent_parser.children[name] = parser
    parser.prog = f"{prefix} {name}"
    parser.usage = f"{parser.prog} [OPTIONS]"
    return parser


class UnfitPathError(ArgumentTypeError, ValueError):
    """Text that cannot be a path.

    argparse repeats the message of its first base class, and jsonargparse that of the second.
    """


class _Path:
    """The type of an option that is a path."""

    def __call__(self, text: str) -> str:
        """Return the path, with the home folder for a leading `~`, or refuse it."""
        if not text or "\0" in text:
            raise UnfitPathError("a path must not be empty, nor hold a NUL character")
        try:
            return user_path(text, "path")
        except HessianFlowError as error:
            raise UnfitPathError(str(error)) from None

    def __repr__(self) -> str:
        return "path"  # the name of the type in help texts


path = _Path()


def did_you_mean(word: str, known: list[str]) -> str:
    """Return a hint at the nearest known word; empty if none is near."""
    close = difflib.get_close_matches(word.replace("_", "-").lower(), known, n=1)
    if not close:
        return ""
    return f" (did you mean {close[0]}?)"


def plain(message: str) -> str:
    """Return a message of jsonargparse in plain words, without the names of Python's types."""
    union = re.search(r"Subtypes: \[(.*)\] Errors: .* Given value: (.*)", message)
    if union:
        message = f"Expected a {union[1]}. Got value: {union[2]}".replace(
            ", <class 'NoneType'>", ""
        )
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", message)
    message = message.replace("tuple[int, ...]", "list of whole numbers like [30, 60]")
    message = message.replace("tuple[float, ...]", "list of numbers like [0.1, 0.2]")
    message = re.sub(r"Expected a tuple\b", "Expected a list", message)
    message = message.replace("Expected a ", "expected ")
    expected, comma, value = message.partition(". Got value: ")
    if not comma:
        return shortened(message, 5 * LONGEST)
    hint = did_you_mean(value, re.findall(r"'([^']*)'", expected))
    if value == "None":
        value = "null"
    return f"{expected}, got {shortened(value)}{hint}"
