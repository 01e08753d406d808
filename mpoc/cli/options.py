"""Turn a dataclass of options into the parameters of a command, and its command line into one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand

from mpoc.cli.console import reported_errors
from mpoc.errors import UsageError
from mpoc.runtime.options import ADVANCED, COMMON, Nested, Option

T = TypeVar("T")
# Options that were renamed: command → name before version 0.3 → name.
RENAMED = {
    "eval": {"--size": "--image-size"},
    "finetune": {"--size": "--image-size"},
}


class Command(TyperCommand):
    """A command that answers an option's old name with the new one."""

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``, in the panel of the common options where there is one."""
        option = super().get_help_option(ctx)
        if option is not None and COMMON in {getattr(each, "rich_help_panel", None) for each in self.params}:
            option.rich_help_panel = COMMON
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The command line, unless it holds a name that was changed."""
        renamed = RENAMED.get(ctx.info_name, {})
        for word in args:
            name = word.partition("=")[0]
            if name in renamed:
                with reported_errors():
                    raise UsageError(f"{name} is now {renamed[name]}")
        return super().parse_args(ctx, args)


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Decorate a function of one ``options`` object, so that typer sees a parameter for each of its fields.

    Errors in the values given, and those of the function, become messages and exit statuses.
    """
    parameters = sorted(_parameters(options), key=_is_advanced)

    def decorate(function: Callable[[T], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            with reported_errors():
                function(options(**_given(options, values)))

        command.__name__, command.__doc__ = function.__name__, escape(function.__doc__ or "")
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameters(options: type, only: tuple[str, ...] = ()) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(options)
    for each in fields(options):
        if "nested" in each.metadata:
            inner: Nested = each.metadata["nested"]
            yield from _parameters(inner.options, inner.only)
        elif "option" in each.metadata and (not only or each.name in only):
            yield _parameter(each, hints[each.name])


def _parameter(each: Field[Any], hint: Any) -> inspect.Parameter:
    option: Option = each.metadata["option"]
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
    kind: Any = str if option.parse else kinds[0]
    kind = list[kind] if option.repeated else kind
    is_required = each.default is MISSING
    how: dict[str, Any] = {"help": _help(each, option), "metavar": option.metavar, "show_default": False}
    if option.is_argument:
        how["show_default"] = False
        info = typer.Argument(**how)
    else:
        info = typer.Option(*(option.flags or (_flag(each.name),)), **how, rich_help_panel=option.panel)
    return inspect.Parameter(
        each.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else None,
        annotation=Annotated[kind if is_required else kind | None, info],
    )


def _help(each: Field[Any], option: Option) -> str:
    is_empty = each.default in (MISSING, None, False, ())
    shown = option.shown or ("" if is_empty else f"{each.default}")
    return escape(option.help) + (escape(f" [default: {shown}]") if shown else "")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_advanced(parameter: inspect.Parameter) -> bool:
    """Whether its panel comes last."""
    panel = getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None) or ""
    return panel.startswith(ADVANCED)


def _given(options: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that the command line gives, parsed."""
    given: dict[str, Any] = {}
    for each in fields(options):
        if "nested" in each.metadata:
            inner: Nested = each.metadata["nested"]
            given[each.name] = inner.make(**_given(inner.options, values))
        elif "option" in each.metadata and values.get(each.name) not in (None, []):
            option: Option = each.metadata["option"]
            given[each.name] = _parsed(option, values[each.name], option.flags or (_flag(each.name),))
    return given


def _parsed(option: Option, value: Any, flags: tuple[str, ...]) -> Any:
    if option.parse is None:
        return tuple(value) if option.repeated else value
    try:
        return tuple(map(option.parse, value)) if option.repeated else option.parse(value)
    except UsageError as error:
        raise UsageError(f"{flags[0]}: {error}", error.hint) from error
