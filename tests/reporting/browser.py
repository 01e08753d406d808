"""A page in a real browser without a window, at several widths at once; and what it says of itself."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FRAME = '<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>'
_WRAPPER = """<!doctype html><body>{frames}<pre id="said"></pre><script>
addEventListener("load", () => {{
  const ask = {question};
  const said = [...document.querySelectorAll("iframe")].map((frame) => {{
    try {{ return ask(frame.contentWindow, frame.contentDocument); }}
    catch (error) {{ return String(error); }}
  }});
  document.getElementById("said").textContent = JSON.stringify(said);
}});
</script></body>"""


def ask(folder: Path, page: str, question: str, widths: tuple[int, ...] = (1280, 390)) -> list[Any]:
    """What ``question``, a JavaScript function of window and document, answers at each width.

    Skips the test where there is no browser.
    """
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser ({', '.join(_NAMES)}): the page is not looked at")
    frames = "".join(_FRAME.format(width=width, page=html.escape(page)) for width in widths)
    wrapper = folder / "wrapper.html"
    wrapper.write_text(_WRAPPER.format(frames=frames, question=question), "utf-8")
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *(
                "--window-size=1400,2000",
                "--virtual-time-budget=4000",
                f"--user-data-dir={folder / 'profile'}",
            ),
            *("--dump-dom", wrapper.as_uri()),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "HOME": str(folder)},
    )
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr[-2000:]
    answers: list[Any] = json.loads(html.unescape(found[1]))
    assert len(answers) == len(widths)
    return answers
