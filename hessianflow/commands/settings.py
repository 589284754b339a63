"""Options of the command that are settings of a run, in the words of the one place that documents them."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_type_hints

from hessianflow.config import TrainConfig, option


def add_settings(parser: Any, names: Iterable[str] | None = None) -> None:
    """Add one option for each field of TrainConfig, or for those in `names`."""
    texts, hints = _field_texts(), get_type_hints(TrainConfig)
    chosen = None if names is None else set(names)
    for field in fields(TrainConfig):
        if chosen is None or field.name in chosen:
            parser.add_argument(
                option(field.name),
                dest=field.name,
                type=hints[field.name],
                default=field.default,
                help=texts[field.name],
            )


def _field_texts() -> dict[str, str]:
    """Help texts from the docstring of TrainConfig."""
    from docstring_parser import parse

    return {p.arg_name: " ".join((p.description or "").split()) for p in parse(TrainConfig.__doc__ or "").params}
