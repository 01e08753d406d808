"""The page in a real browser: nothing sticks out, nothing is clipped, it sorts and opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpoc.reporting.contents import read_file, read_files
from mpoc.reporting.html import page
from tests.reporting.browser import ask
from tests.reporting.files import HOSTILE, compressed, every_kind

# Widths that are too large, labels outside their drawing, labels over each other.
LOOK = """(window, document) => {
  for (const one of document.querySelectorAll("details")) one.open = true;
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  const faults = [];
  for (const svg of document.querySelectorAll("svg")) {
    const { width, height } = svg.viewBox.baseVal;
    const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBBox()]);
    for (const [name, b] of texts) {
      const out = b.x < -0.5 || b.y < -0.5 || b.x + b.width > width + 0.5 || b.y + b.height > height + 0.5;
      if (out) faults.push("outside: " + name);
    }
    for (const [k, [name, a]] of texts.entries()) for (const [other, b] of texts.slice(k + 1)) {
      const over = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
      const down = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);
      if (over > 0.5 && down > 2) faults.push("over each other: " + name + " | " + other);
    }
  }
  const boxes = "main > *, section > *, figure .top, figure, .tiles div, .facts div, summary";
  for (const one of document.querySelectorAll(boxes)) {
    if (window.getComputedStyle(one).overflowX === "auto") continue;  // moves sideways by itself
    if (one.scrollWidth > one.clientWidth + 1 && one.clientWidth) faults.push("clipped: " + one.textContent);
  }
  const drawn = document.querySelectorAll("svg text").length;
  return { wide, faults, drawn, images: document.images.length };
}"""

BEHAVE = """(window, document) => {
  const table = document.querySelector("table.layers");
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((head) => head.textContent.startsWith("ρ"));
  const values = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.v));
  const press = () => { heads[column].querySelector("button").click(); return values(); };
  const order = values();
  const up = press(), upState = heads[column].getAttribute("aria-sort");
  const down = press(), downState = heads[column].getAttribute("aria-sort");
  const names = heads.findIndex((head) => head.textContent.startsWith("layer"));
  heads[names].querySelector("button").click();
  const sorted = [...table.tBodies[0].rows].map((row) => row.cells[names].textContent);
  const states = heads.filter((head) => head.hasAttribute("aria-sort")).length;
  const link = document.querySelector("table.layers a");
  const before = document.querySelectorAll("details.layer[open]").length;
  window.location.hash = link.getAttribute("href");
  window.dispatchEvent(new HashChangeEvent("hashchange"));
  const opened = [...document.querySelectorAll("details.layer[open]")].map((one) => "#" + one.id);
  window.dispatchEvent(new Event("beforeprint"));
  const printed = document.querySelectorAll("details:not([open])").length;
  window.dispatchEvent(new Event("afterprint"));
  const after = document.querySelectorAll("details.layer[open]").length;
  const href = link.getAttribute("href");
  return { order, up, down, upState, downState, sorted, states, before, opened, printed, after, href };
}"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_kind(tmp_path_factory.mktemp("file"))


def test_nothing_overflows_or_is_clipped(path: Path, tmp_path: Path) -> None:
    others = [compressed(tmp_path / name) for name in ("a", "b")]
    for answer in ask(tmp_path, page(read_files(path, others)), LOOK):
        assert answer["drawn"] > 100
        assert (answer["wide"], answer["faults"], answer["images"]) == (0, [], 0)


def test_layout_check_detects_faults(path: Path, tmp_path: Path) -> None:
    broken = page([read_file(path)]).replace("<main>", '<main><p style="width:2000px">wide</p>')
    broken = broken.replace("</svg>", '<text x="-9" y="20">out</text><text x="-5" y="20">out</text></svg>', 1)
    for answer in ask(tmp_path, broken, LOOK):
        assert answer["wide"] > 600
        assert {"outside: out", "over each other: out | out"} <= set(answer["faults"])


def test_sorts_opens_and_prints(path: Path, tmp_path: Path) -> None:
    for answer in ask(tmp_path, page([read_file(path)]), BEHAVE):
        assert answer["up"] == sorted(answer["order"]) != answer["order"]
        assert answer["down"] == sorted(answer["order"], reverse=True)
        assert (answer["upState"], answer["downState"], answer["states"]) == ("ascending", "descending", 1)
        assert HOSTILE in answer["sorted"]
        assert answer["before"] == 0
        assert answer["opened"] == [answer["href"]]
        assert (answer["printed"], answer["after"]) == (0, 1)
