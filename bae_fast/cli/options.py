"""Options of a command from the fields of its configuration."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_origin, get_type_hints

from bae_fast.cli.fields import NEEDS, documentation, read_type

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# the result as JSON, for machines; no part of a configuration
JSON = "--json"


class GivenPath:
    """What stands for ``Path`` in a parser: an empty text is none, where Python takes it for the
    folder that the command runs in."""


def _path(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or str(value) == "" or "\0" in str(value):
        raise ValueError(f"got {value!r}")
    return Path(value)


def make_parser(name: str, config: type, positional: tuple[str, ...] = ()) -> ArgumentParser:
    """A parser with an option for every field of a configuration.

    Args:
        name: the command's name, for its usage.
        config: a dataclass whose docstring describes it and its fields.
        positional: fields that are given by their place.

    Raises:
        ImportError: jsonargparse or docstring-parser is missing.
    """
    try:
        from jsonargparse import SUPPRESS, ActionYesNo, ArgumentParser
        from jsonargparse.typing import register_type
    except ImportError as error:
        raise ImportError(NEEDS) from error

    class Parser(ArgumentParser):
        def format_help(self, *given: Any, **named: Any) -> str:
            # a path is said as the types of other options are
            text = re.sub(
                r"<class\s+'GivenPath'>", "path", str(super().format_help(*given, **named))
            )
            return text.replace("GivenPath", "path")

    register_type(GivenPath, str, _path, type_check=lambda value, _kind: isinstance(value, Path))
    about, helps = documentation(config)
    parser = Parser(
        prog=f"bae-fast {name}", description=about, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="A YAML file that sets any option.")
    about_json = "Print the result as one line of JSON, and all else on standard error."
    parser.add_argument(JSON, action="store_true", default=SUPPRESS, help=about_json)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, count, optional = read_type(hints[field.name])
        options: dict[str, Any] = {"help": helps[field.name]}
        default = field.default
        if default is not dataclasses.MISSING:
            options["default"] = list(default) if isinstance(default, tuple) else default
        kind = GivenPath if kind is Path else kind
        option = "--" + field.name.replace("_", "-")
        if field.name in positional:
            option = field.name
            # how many there are is checked by the command
            count = "+" if isinstance(field.default, tuple) else None
            options["metavar"] = field.name.upper() if count is None else "FOLDER"
            options.pop("default", None)
        if kind is bool:
            parser.add_argument(option, action=ActionYesNo(no_prefix="no-"), **options)
            continue
        if count is not None:
            options["nargs"] = count
        elif optional:
            kind = kind | None if get_origin(kind) is not Literal else typing.Optional[kind]  # noqa: UP045
        parser.add_argument(option, type=kind, **options)
    return parser


def read(parser: ArgumentParser, config: type, arguments: list[str]) -> Any:
    """The configuration that a command line and its YAML files give.

    Raises:
        ValueError: null for an option that has to have a value, which the parser lets pass.
    """
    found = parser.parse_args(arguments)
    values = {field.name: found[field.name] for field in dataclasses.fields(config)}
    hints = get_type_hints(config)
    for name, value in values.items():
        if value is None and not read_type(hints[name]).optional:
            raise ValueError(f"--{name.replace('_', '-')} must have a value; got null")
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
