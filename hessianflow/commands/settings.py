"""Options of the command that are settings of a run, in the words of the one place that documents them."""

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_type_hints

from hessianflow.config import TrainConfig, option


def add_settings(parser: Any, names: Iterable[str] | None = None) -> None:
    """Add one option for each field of TrainConfig, or for those in `names`."""
    texts, hints = _field_texts(), get_type_hints(TrainConfig)
    chosen = None if names is None else set(names)
    # The fields of the classes that TrainConfig extends come after its own.
    for field in sorted(fields(TrainConfig), key=lambda f: f.name not in TrainConfig.__annotations__):
        if chosen is None or field.name in chosen:
            parser.add_argument(
                option(field.name),
                dest=field.name,
                type=hints[field.name],
                default=field.default,
                help=texts[field.name],
                **({"nargs": "?", "const": True} if field.default is False else {}),  # --elastic is --elastic true
            )


def in_options(message: str) -> str:
    """A message about parameters, with options in place of those at its beginning that are settings."""
    name = f"(?:{'|'.join(field.name for field in fields(TrainConfig))})"
    begins = re.match(rf"{name}(?: and {name})?(?= (?:\w+ )?must )", message)
    if begins:
        return " and ".join(map(option, begins[0].split(" and "))) + message[begins.end() :]
    return re.sub(rf"^unknown ({name})\b", lambda found: f"{option(found[1])}: {found[0]}", message)


def _field_texts() -> dict[str, str]:
    """Help texts from the docstrings of TrainConfig and of the classes it extends."""
    from docstring_parser import parse

    documented = [p for part in TrainConfig.__mro__[:-1] for p in parse(part.__doc__ or "").params]
    return {p.arg_name: " ".join((p.description or "").split()) for p in documented}
