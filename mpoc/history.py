"""What a checkpoint says of its training.  No torch here.

A compressed one keeps it in its manifest.  A dense file has it as JSON under the key ``mpoc.history`` of the
safetensors header's metadata, a dense directory in ``mpoc-history.json``, so that ``mpoc eval`` numbers
characters and scales images as training did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError
from mpoc.header import read_header

KEY = "mpoc.history"
HISTORY_FILE = "mpoc-history.json"


def read_history(path: Path) -> dict[str, Any]:
    """The history of a dense checkpoint; {} where it has none.

    Raises:
        MpocError: it is damaged.
    """
    text: str | None = None
    if (path / HISTORY_FILE).is_file():
        text = (path / HISTORY_FILE).read_text("utf-8", errors="replace")
    elif path.is_file() and path.suffix == ".safetensors":
        text = read_header(path).metadata.get(KEY)
    if text is None:
        return {}
    try:
        history = json.loads(text)
        if not isinstance(history, dict):
            raise TypeError(type(history).__name__)
    except (ValueError, TypeError, RecursionError) as error:
        raise MpocError(f"{path}: the history of its training is damaged ({error!r})") from error
    return history


def metadata(history: dict[str, Any]) -> dict[str, str]:
    """Of the header of a dense file with this history."""
    return {"format": "pt"} | ({KEY: json.dumps(history, ensure_ascii=False)} if history else {})


def write_history(directory: Path, history: dict[str, Any]) -> None:
    """Into a dense directory; none of before stays."""
    file = directory / HISTORY_FILE
    file.unlink(missing_ok=True)
    if history:
        file.write_text(json.dumps(history, indent=1, ensure_ascii=False) + "\n", "utf-8")


def before_compression(history: dict[str, Any]) -> dict[str, Any]:
    """The history of a compressed checkpoint that was made of one with this history."""
    return {"earlier": history} if "steps" in history else history


def recorded(history: dict[str, Any], name: str) -> Any:
    """What the last training that says so has for ``name``; None where none does."""
    while history:
        if history.get(name):
            return history[name]
        history = history.get("earlier", {})
    return None
