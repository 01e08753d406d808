"""HTML and SVG as text: whatever is not markup already is escaped, for names come from strangers."""

from __future__ import annotations

import re
from html import escape


class Markup(str):
    """Text that is markup and is not escaped again."""

    __slots__ = ()


def tag(name: str, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """An element; ``tag("a", "x < y", href="#x", class_="n")`` → ``<a href="#x" class="n">x &lt; y</a>``.

    Args:
        name: of the element.
        children: :class:`Markup` as it is, other text escaped, None left out.
        attributes: a final underscore falls off, others become hyphens; None and False are left out, True
            has no value, figures are written short.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    inner = join(*children)
    return Markup(
        f"<{name}{written}>{inner}</{name}>" if inner or name not in _EMPTY else f"<{name}{written}/>"
    )


_SPLIT = re.compile(r"([._/])")
_EMPTY = ("circle", "line", "path", "rect")


def join(*children: str | None) -> Markup:
    """Markup after markup, other text escaped, None left out."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escape(child) for child in children if child)
    )


def breakable(name: str) -> Markup:
    """A dotted name that may go on in a new line behind a dot or an underscore."""
    return join(
        *(part if k % 2 == 0 else Markup(escape(part) + "<wbr>") for k, part in enumerate(_SPLIT.split(name)))
    )


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{escape(value) if isinstance(value, str) else short(value)}"'


def short(value: float) -> str:
    """A length in a drawing: one digit behind the point, none where it is whole."""
    return f"{value:.1f}".removesuffix(".0")
