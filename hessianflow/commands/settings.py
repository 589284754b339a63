"""Options of the command that are settings of a run, in the words of the one place that documents
them."""

import os
import re
import sys
from collections.abc import Iterable, Set
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from hessianflow.config import TrainConfig, option, resolve
from hessianflow.effects import check_effects, is_ignored


@dataclass(frozen=True)
class Given:
    """Which settings somebody gave; what is null counts as left open.

    Attributes:
        typed: on the command line.
        in_files: in files of settings.
    """

    typed: Set[str]
    in_files: Set[str]

    def settings(self, arguments: Any) -> dict[str, Any]:
        """Their values."""
        names = [
            f.name for f in fields(TrainConfig) if f.name in self.typed or f.name in self.in_files
        ]
        return {name: arguments[name] for name in names if arguments[name] is not None}

    def check(self, config: TrainConfig) -> None:
        """Refuse settings typed that nothing would look at; say which of a file's are not used.

        A file may serve several choices. Of its settings, those are passed over that are as they
        would be anyway.

        Args:
            config: resolved.

        Raises:
            HessianFlowError: naming the option and what it belongs to.
        """
        names = [field.name for field in fields(TrainConfig)]
        check_effects(config, [name for name in names if name in self.typed])
        unused = [
            name
            for name in names
            if name in self.in_files - self.typed and is_ignored(config, name)
        ]
        defaults: dict[str, Any] = {
            field.name: field.default for field in fields(TrainConfig) if field.name in unused
        }
        usual = resolve(replace(config, **defaults))
        said = [name for name in unused if getattr(usual, name) != getattr(config, name)]
        if said and os.environ.get("RANK", "0") == "0":
            sys.stderr.write(
                f"hessianflow: note: not used with these settings: {', '.join(said)}\n"
            )


def add_settings(parser: Any, names: Iterable[str] | None = None) -> None:
    """Add one option for each field of TrainConfig, or for those in `names`."""
    texts, hints = _field_texts(), get_type_hints(TrainConfig)
    chosen = None if names is None else set(names)
    # The fields of the classes that TrainConfig extends come after its own.
    for field in sorted(
        fields(TrainConfig), key=lambda f: f.name not in TrainConfig.__annotations__
    ):
        if chosen is None or field.name in chosen:
            parser.settings.add(field.name)
            parser.add(
                option(field.name),
                dest=field.name,
                type=hints[field.name],
                default=field.default,
                help=texts[field.name],
            )


def in_options(message: str) -> str:
    """Return a message about parameters, with options in place of those at its beginning that are
    settings."""
    name = f"(?:{'|'.join(field.name for field in fields(TrainConfig))})"
    begins = re.match(rf"{name}(?: and {name})?(?= (?:\w+ )?must )", message)
    if begins:
        return " and ".join(map(option, begins[0].split(" and "))) + message[begins.end() :]
    return re.sub(rf"^unknown ({name})\b", lambda found: f"{option(found[1])}: {found[0]}", message)


def _field_texts() -> dict[str, str]:
    """Return help texts from the docstrings of TrainConfig and of the classes it extends."""
    from docstring_parser import parse

    documented = [p for part in TrainConfig.__mro__[:-1] for p in parse(part.__doc__ or "").params]
    return {p.arg_name: " ".join((p.description or "").split()) for p in documented}
