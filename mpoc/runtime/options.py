"""Options of a command line as metadata of dataclass fields.

A dataclass declares type, default, help and names of each option once, beside the values that it holds.
The metadata are plain data, so that the dataclass needs neither typer nor torch; :mod:`mpoc.cli.options`
turns them into the parameters of a command.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any

# Panels of the help; those that begin with ADVANCED come last.
COMMON, ADVANCED = "Common options", "Advanced"


@dataclass(frozen=True)
class Option:
    """The option of a field on the command line.

    ``parse`` turns the text of the option into the field's value; without it the field's type says how.
    ``shown`` is the default that help names; without it the field's own default, unless that is empty.
    """

    help: str
    flags: tuple[str, ...] = ()  # (): the field's name with dashes
    metavar: str | None = None
    panel: str | None = None
    parse: Callable[[str], Any] | None = None
    repeated: bool = False  # a tuple, one item each time
    shown: str = ""
    is_argument: bool = False


@dataclass(frozen=True)
class Nested:
    """A field that holds the options of another dataclass."""

    options: type
    make: Callable[..., Any]  # called with the fields that were given
    only: tuple[str, ...] = ()  # (): all its options


def option(help: str, default: Any = MISSING, flags: str = "", **how: Any) -> Any:
    """A field that is an option; required without a default.

    Args:
        help: verb first, fewer than 15 words.
        default: default of the field.
        flags: names, as ``"--output -o"``.
        how: the other fields of :class:`Option`.
    """
    return field(default=default, metadata={"option": Option(help, tuple(flags.split()), **how)})


def argument(metavar: str, help: str, default: Any = MISSING, **how: Any) -> Any:
    """A field that is a positional argument; required without a default."""
    return option(help, default, metavar=metavar, is_argument=True, **how)


def nested(
    options: type,
    make: Callable[..., Any] | None = None,
    only: tuple[str, ...] = (),
    default: Any = MISSING,
) -> Any:
    """A field whose value is made of the options of another dataclass.

    Args:
        options: the other dataclass.
        make: makes the value of those given, ``dict`` keeps them as they are; None: ``options`` itself.
        only: names of fields; the others are not offered.
        default: default of the field, outside the command line.
    """
    return field(default=default, metadata={"nested": Nested(options, make or options, only)})
