"""What the fields of a configuration ask for, and what its docstring says of them."""

from __future__ import annotations

import dataclasses
import functools
import typing
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

NEEDS = "the commands need jsonargparse and docstring-parser: pip install 'bae-fast[cli]'"


class Field(NamedTuple):
    """What an option is made from.

    Attributes:
        kind: the type of one value.
        number: None for one value, "+" or "*" for several, or their number.
        optional: whether null is a value.
    """

    kind: Any
    number: str | int | None
    optional: bool


def read_type(hint: Any) -> Field:
    """Type, number of values and whether None is allowed, of an annotation."""
    parts = list(get_args(hint)) if get_origin(hint) in (typing.Union, UnionType) else [hint]
    optional = type(None) in parts
    (kind,) = [part for part in parts if part is not type(None)]
    if get_origin(kind) is not tuple:
        return Field(kind, None, optional)
    values = get_args(kind)
    return Field(values[0], "*" if values[-1] is ... else len(values), optional)


@functools.cache
def documentation(config: type) -> tuple[str, dict[str, str]]:
    """What a configuration's docstring says of it, and of each field, bases included."""
    try:
        from docstring_parser import DocstringStyle, parse
    except ImportError as error:
        raise ImportError(NEEDS) from error
    helps: dict[str, str] = {}
    about = ""
    for cls in reversed(config.__mro__):
        if dataclasses.is_dataclass(cls):
            found = parse(cls.__doc__ or "", DocstringStyle.GOOGLE)
            about = found.short_description or about
            helps |= {p.arg_name: " ".join((p.description or "").split()) for p in found.params}
    return about, {name: text.replace("%", "%%") for name, text in helps.items()}
