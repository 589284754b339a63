"""Options of the command that are settings of a run: those of every run, and those of the methods
that were chosen."""

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
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
    """Which settings somebody gave; what is null counts as left open, but for options of methods.

    Attributes:
        typed: settings from the command line; an option of a method is "controller.patience".
        in_files: settings from files.
        notes: what to say of the files, if the settings are those of a run that can be.
    """

    typed: Set[str]
    in_files: Set[str]
    notes: Sequence[str] = ()

    def settings(self, arguments: Any) -> dict[str, Any]:
        """Return their values, a method with its options as one mapping."""
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
        """Refuse settings typed that nothing would look at; say which of a file's are not used.

        A file may serve several choices. Of its settings, those are passed over that are as they
        would be anyway.

        Args:
            config: resolved.

        Raises:
            HessianFlowError: naming the option and what it belongs to.
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
        defaults: dict[str, Any] = {
            setting.name: setting.default
            for setting in fields(TrainConfig)
            if setting.name in unused
        }
        usual = resolve(replace(TrainConfig(**_as_given(config)), **defaults))
        said = [name for name in unused if getattr(usual, name) != getattr(config, name)]
        if said:
            note(f"not used with these settings: {', '.join(said)}")


def _as_given(config: TrainConfig) -> dict[str, Any]:
    return {setting.name: getattr(config, setting.name) for setting in fields(TrainConfig)}


def _attacks(adversary: Choice) -> bool:
    return adversary.name == "none" or adversary.options.get("share") != 0


def _put(values: dict[str, Any], name: str, arguments: Any) -> None:
    """Set an option of a method; the method is the one in force where it was not named."""
    *outer, last = name.split(".")
    place = values
    for depth, part in enumerate(outer):
        method = place.get(part)
        if not isinstance(method, dict):
            dotted = ".".join(outer[: depth + 1])
            method = {"name": method or arguments.methods[dotted]}
        place[part] = method
        place = method
    value = arguments[name.replace(".", INSIDE)]
    if isinstance(place.get(last), dict):
        return
    place[last] = value


def note(text: str) -> None:
    """Say something on standard error, once where several processes run."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"hessianflow: note: {text}\n")


def add_settings(parser: Any, names: Iterable[str] | None = None) -> None:
    """Add one option for each setting, or for those in `names`, under the title of its group.

    The options of methods are added once it is known which are chosen: :func:`add_methods`.
    """
    texts = _texts()
    types = hints()
    titles: dict[str, Any] = {}
    wanted = None if names is None else set(names)
    for setting in fields(TrainConfig):
        if wanted is not None and setting.name not in wanted:
            continue
        title = setting.metadata["group"]
        if title not in titles:
            titles[title] = parser.add_argument_group(title)
        text = texts[setting.name]
        default = setting.default
        hint = without_bounds(types[setting.name])
        if setting.name in CHOSEN:
            text = f"{text.rstrip('.')}. One of {', '.join(_named(setting.name))}, or"
            text += " package.module:Class of your own; with --help, its options are listed."
            hint = str | None if default is None else str
            default = getattr(default, "name", None)
            parser.chosen.append(setting.name)
        parser.settings.add(setting.name)
        parser.add(
            option(setting.name),
            dest=setting.name,
            type=hint,
            default=default,
            help=text,
            group=titles[title],
        )


def _named(setting: str) -> list[str]:
    names = list(KINDS[setting].methods)
    return [*names, "none"] if setting == "adversary" else names


def add_methods(parser: Any, named: Mapping[str, str]) -> dict[str, str]:
    """Add the options of the methods in force to a parser that lets them be chosen.

    Args:
        parser: a parser with the options of :func:`add_settings`.
        named: the methods named, by the setting that names them; those inside others as
            "adversary.attack".

    Returns:
        The method in force for each of these settings.

    Raises:
        HessianFlowError: an unknown method.
    """
    found: dict[str, str] = {}
    controller = named.get("controller", "absa")
    for setting in parser.chosen:
        name = named.get(setting) or _default(setting, controller, named.get("data", "digits"))
        if name != "none":
            _add_method(parser, KINDS[setting], setting, name, named, found)
        found[setting] = name
    return found


def _default(setting: str, controller: str, data: str) -> str:
    """Return the method that a run has for a setting unless one is named."""
    usual = {"controller": "absa", "optimizer": "sgd", "adversary": "fgsm"}
    if setting == "schedule":
        usual["schedule"] = data_set(data).preset.schedule
    if setting in ("schedule", "adversary"):
        usual |= prefers(KINDS["controller"], chosen("controller", controller))
    return usual[setting]


def _add_method(
    parser: Any,
    kind: Kind,
    where: str,
    name: str,
    named: Mapping[str, str],
    found: dict[str, str],
) -> None:
    options = method_options(kind, name, where)
    group = None
    if options:
        about = " ".join((find(kind, name, where).__doc__ or "").partition("\n\n")[0].split())
        group = parser.add_argument_group(f"{where} {name}", about)
    for known in options.values():
        dotted = f"{where}.{known.name}"
        usual = kind.defaults.get(name, {}).get(known.name, known.default)
        parser.settings.add(dotted.replace(".", INSIDE))
        parser.add(
            f"--{where}.{known.name.replace('_', '-')}",
            dest=dotted.replace(".", INSIDE),
            type=known.hint,
            default=None if known.is_required and usual is known.default else usual,
            help=known.help or "see the documentation of the class",
            group=group,
            metavar=None if known.hint in (bool, bool | None) else known.name.upper(),
        )
        if known.kind:
            inner = named.get(dotted) or usual
            if isinstance(inner, str):
                found[dotted] = inner
                _add_method(parser, KINDS[known.kind], dotted, inner, named, found)


def misplaced(parser: Any, name: str, methods: Mapping[str, str]) -> str:
    """Return what is wrong about an option with a dot that the parser does not have; empty where
    nothing is known about it."""
    where, _, last = name.removeprefix("--").rpartition(".")
    kind = KINDS.get(where.rpartition(".")[-1])
    if where not in methods or kind is None or where.partition(".")[0] not in parser.chosen:
        return ""
    if methods[where] == "none":
        return f"{name} needs an adversary: name one with --adversary, or leave the option out"
    return unknown_option(kind, methods[where], last.replace("-", "_"), where)


@cache
def homes(name: str) -> tuple[str, ...]:
    """Return the options of methods, as typed, that are called as an unknown option is, or were
    called so in an older release."""
    places: dict[str, list[str]] = {}
    for setting in CHOSEN:
        kind = KINDS[setting]
        holders = [method for method in kind.methods if name in method_options(kind, method)]
        if holders:
            places[f"{setting}.{name}"] = holders
    for setting, method, known in moved(name):
        holders = places.setdefault(f"{setting}.{known}", [])
        if method not in holders:
            holders.append(method)
    return tuple(
        f"--{dotted.replace('_', '-')} with --{dotted.partition('.')[0]} {' or '.join(holders)}"
        for dotted, holders in places.items()
    )


def commented(config: TrainConfig) -> str:
    """Return settings as a YAML file that loads again, with what each means above it."""
    texts = _texts()
    lines: list[str] = []
    for name, value in to_dict(config).items():
        lines += ["", *_comment(texts[name], "")]
        lines += _entry(name, value, KINDS.get(name), "")
    return "\n".join(lines[1:])


def _entry(name: str, value: Any, kind: Kind | None, indent: str) -> list[str]:
    """Return the lines of one setting, of a method with one line for each of its options."""
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
    """Return help texts from the docstring of TrainConfig."""
    from docstring_parser import parse

    parameters = parse(TrainConfig.__doc__ or "").params
    return {p.arg_name: " ".join((p.description or "").split()) for p in parameters}
