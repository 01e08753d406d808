"""Markup: what is escaped, and what is not."""

from __future__ import annotations

from html import unescape
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.reporting.svg import Markup, breakable, join, tag

SOME = settings(max_examples=100, deadline=None, derandomize=True)


class Reader(HTMLParser):
    """Tags, attributes and text as a browser would take them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(markup: str) -> Reader:
    reader = Reader()
    reader.feed(markup)
    reader.close()
    return reader


def test_renders_an_element() -> None:
    assert tag("a", "x < y", href="#x", class_="n") == '<a href="#x" class="n">x &lt; y</a>'
    assert tag("p", tag("b", "x"), None, "&") == "<p><b>x</b>&amp;</p>"
    assert tag("line", x1=1.25, y1=3.0, stroke_width="2") == '<line x1="1.2" y1="3" stroke-width="2"/>'
    assert tag("details", open=True, hidden=False, id=None) == "<details open></details>"


@SOME
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")))
def test_escaping_round_trips_any_text(text: str) -> None:
    reader = read(tag("p", tag("b", text, title=text), text))
    assert reader.found == [("p", {}), ("b", {"title": text})]
    assert reader.text == text + text


@SOME
@given(st.text("ab._/<&\"'", max_size=20))
def test_names_may_break_after_dots(text: str) -> None:
    markup = breakable(text)
    assert isinstance(markup, Markup)
    assert unescape(markup.replace("<wbr>", "")) == text
    assert markup.count("<wbr>") == sum(map(text.count, "._/"))


def test_markup_is_escaped_once() -> None:
    assert join(Markup("<i>"), "<i>", None, "") == "<i>&lt;i&gt;"
