"""The options of the command: the settings of a run, and the options of the methods it chooses."""

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from hessianflow.bounds import without_bounds
from hessianflow.commands.parser import INSIDE
from hessianflow.config import CHOSEN, TrainConfig, chosen, hints, option, to_dict
from hessianflow.data.datasets import data_set
from hessianflow.effects import check_effects, is_ignored
from hessianflow.interfaces import HessianFlowError
from hessianflow.methods import KINDS, Choice, Kind, find, method_options, prefers, unknown_option
from hessianflow.resolve import resolve
from hessianflow.upgrade import moved


@dataclass(frozen=True)
class Given:
    """The names of the settings that were given.

    A setting that is null counts as open, but an option of a method does not.

    Attributes:
        typed: Settings from the command line; an option of a method is "controller.patience".
        in_files: Settings from files.
        notes: Notes about the files, to be printed if the run is possible.
    """

    typed: Set[str]
    in_files: Set[str]
    notes: Sequence[str] = ()

    def settings(self, arguments: Any) -> dict[str, Any]:
        """Return the values of the settings, a method with its options as one mapping."""
        named = sorted(self.typed | self.in_files)
        values: dict[str, Any] = {}
        for name in named:
            value = arguments[name.replace(".", INSIDE)]
            if "." not in name and value is not None:
                values[name] = value
        for name in named:
            if "." in name:
                _put(values, name, arguments)
        return values

    def check(self, config: TrainConfig) -> None:
        """Refuse typed settings without effect on the resolved ones, and note those of files.

        A file may serve several runs, so its settings may have no effect here. There is no note
        about those that have their default values.
        """
        names = [setting.name for setting in fields(TrainConfig)]
        check_effects(config, [name for name in names if name in self.typed])
        if "adversary" in self.typed and config.adversary and not _attacks(config.adversary):
            raise HessianFlowError(
                f"--adversary {config.adversary.name} does nothing with --adversary.share 0: leave"
                " it out"
            )
        for text in self.notes:
            note(text)
        only_in_files = self.in_files - self.typed
        unused = [name for name in names if name in only_in_files and is_ignored(config, name)]
        given = {name: getattr(config, name) for name in names}
        defaults = {each.name: each.default for each in fields(TrainConfig) if each.name in unused}
        usual = resolve(TrainConfig(**given | defaults))
        noted = [name for name in unused if getattr(usual, name) != getattr(config, name)]
        if noted:
            note(f"not used with these settings: {', '.join(noted)}")


def _attacks(adversary: Choice) -> bool:
    return adversary.name == "none" or adversary.options.get("share") != 0


def _put(values: dict[str, Any], name: str, arguments: Any) -> None:
    """Set an option of a method, which is the one in force if it was not named."""
    *outer, last = name.split(".")
    mapping = values
    for depth, setting in enumerate(outer):
        method = mapping.get(setting)
        if not isinstance(method, dict):
            dotted = ".".join(outer[: depth + 1])
            method = {"name": method or arguments.methods[dotted]}
        mapping[setting] = method
        mapping = method
    if not isinstance(mapping.get(last), dict):
        mapping[last] = arguments[name.replace(".", INSIDE)]


def note(text: str) -> None:
    """Print a note on standard error, from the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"hessianflow: note: {text}\n")


def add_settings(parser: Any, names: Iterable[str] | None = None) -> None:
    """Add an option for each setting, or for those in `names`, under the title of its group.

    :func:`add_methods` adds the options of methods once it is known which are chosen.
    """
    texts = _texts()
    types = hints()
    titles: dict[str, Any] = {}
    wanted = set(names or types)
    for setting in fields(TrainConfig):
        if setting.name not in wanted:
            continue
        title = setting.metadata["group"]
        if title not in titles:
            titles[title] = parser.add_argument_group(title)
        text = texts[setting.name]
        default = setting.default
        hint = without_bounds(types[setting.name])
        if setting.name in CHOSEN:
            text = f"{text.rstrip('.')}. One of {', '.join(_named(setting.name))}, or"
            text += " package.module:Class of your own; --help lists the options of the one named."
            hint = str
            if default is None:
                hint = str | None
            default = getattr(default, "name", None)
            parser.chosen[setting.name] = None
        parser.settings.add(setting.name)
        about = {"type": hint, "default": default, "help": text, "group": titles[title]}
        parser.add(option(setting.name), dest=setting.name, **about)
        if list(parser.chosen) == [name for name in CHOSEN if name in wanted]:
            # Their options follow in the help, before settings that everyone leaves alone.
            for name, group in parser.chosen.items():
                parser.chosen[name] = group or parser.add_argument_group(name)


def _named(setting: str) -> list[str]:
    names = list(KINDS[setting].methods)
    if setting == "adversary":
        names.append("none")
    return names


def add_methods(parser: Any, named: Mapping[str, str]) -> dict[str, str]:
    """Add the options of the methods in force to a parser with those of :func:`add_settings`.

    Methods are `named` by the setting that chooses them; for a method inside another that is a
    setting like "adversary.attack". Return the method in force for each such setting.
    """
    in_force: dict[str, str] = {}
    controller = named.get("controller", "absa")
    for setting in parser.chosen:
        name = named.get(setting) or _default(setting, controller, named.get("data", "digits"))
        if name != "none":
            _add_method(parser, KINDS[setting], setting, name, named, in_force)
        in_force[setting] = name
    return in_force


def _default(setting: str, controller: str, data: str) -> str:
    """Return the method that a setting chooses by default."""
    usual = {"controller": "absa"}
    if setting != "controller":
        usual |= data_set(data, "--data: ").preset.usual_methods
    if setting in ("schedule", "adversary"):
        usual |= prefers(KINDS["controller"], chosen("controller", controller))
    return usual[setting]


def _add_method(
    parser: Any,
    kind: Kind,
    where: str,
    name: str,
    named: Mapping[str, str],
    in_force: dict[str, str],
) -> None:
    """Add the options of a method and of those inside it, which are added to `in_force`."""
    options = method_options(kind, name, where)
    group = parser.chosen[where.partition(".")[0]]
    if where in parser.chosen:
        about = (find(kind, name, where).__doc__ or "").partition("\n\n")[0]
        group.title = f"{where} {name}"
        group.description = " ".join(about.split())
    for known in options.values():
        dotted = f"{where}.{known.name}"
        default = known.default
        if known.is_required:
            default = None
        default = kind.defaults.get(name, {}).get(known.name, default)
        metavar = known.name.upper()
        if known.hint in (bool, bool | None):
            metavar = "{true,false}"
        parser.settings.add(dotted.replace(".", INSIDE))
        parser.add(
            f"--{where}.{known.name.replace('_', '-')}",
            dest=dotted.replace(".", INSIDE),
            type=known.hint,
            default=default,
            help=known.help or "see the documentation of the class",
            group=group,
            metavar=metavar,
        )
        if known.kind:
            inner = named.get(dotted) or default
            if isinstance(inner, str):
                in_force[dotted] = inner
                _add_method(parser, KINDS[known.kind], dotted, inner, named, in_force)


def misplaced(parser: Any, name: str, methods: Mapping[str, str]) -> str:
    """Return an error text for an option with a dot that the parser does not have, or ""."""
    where, _, last = name.removeprefix("--").rpartition(".")
    kind = KINDS.get(where.rpartition(".")[-1])
    if where not in methods or kind is None or where.partition(".")[0] not in parser.chosen:
        return ""
    if methods[where] == "none":
        return f"{name} needs an adversary: name one with --adversary, or leave the option out"
    return unknown_option(kind, methods[where], last.replace("-", "_"), where)


@cache
def homes(name: str) -> tuple[str, ...]:
    """Return the options of methods, as typed, that an unknown option may stand for.

    They have its name, or had it in an older release.
    """
    methods: dict[str, list[str]] = {}
    for setting in CHOSEN:
        kind = KINDS[setting]
        holders = [method for method in kind.methods if name in method_options(kind, method)]
        if holders:
            methods[f"{setting}.{name}"] = holders
    for setting, method, known in moved(name):
        holders = methods.setdefault(f"{setting}.{known}", [])
        if method not in holders:
            holders.append(method)
    return tuple(
        f"--{dotted.replace('_', '-')} with --{dotted.partition('.')[0]} {' or '.join(holders)}"
        for dotted, holders in methods.items()
    )


def commented(config: TrainConfig) -> str:
    """Return settings as a YAML file that loads again, with the meaning of each above it."""
    texts = _texts()
    lines: list[str] = []
    for name, value in to_dict(config).items():
        lines += ["", *_comment(texts[name], "")]
        lines += _entry(name, value, KINDS.get(name), "")
    return "\n".join(lines[1:])


def _entry(name: str, value: Any, kind: Kind | None, indent: str) -> list[str]:
    """Return the lines of a setting; a method has one for each of its options."""
    if kind is None or not isinstance(value, dict):
        return [f"{indent}{name}: {json.dumps(value)}"]
    lines = [f"{indent}{name}:", f"{indent}  name: {value['name']}"]
    if value["name"] == "none":
        return lines
    for known in method_options(kind, value["name"]).values():
        lines += _comment(known.help, f"{indent}  ")
        lines += _entry(known.name, value[known.name], KINDS.get(known.kind), f"{indent}  ")
    return lines


def _comment(text: str, indent: str) -> list[str]:
    begin = f"{indent}# "
    return textwrap.wrap(text, 96, initial_indent=begin, subsequent_indent=begin)


def _texts() -> dict[str, str]:
    """Return the help text of each setting, from the docstring of TrainConfig."""
    from docstring_parser import parse

    parameters = parse(TrainConfig.__doc__ or "").params
    return {p.arg_name: " ".join((p.description or "").split()) for p in parameters}
