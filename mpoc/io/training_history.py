"""What a checkpoint says of its training.  No torch here.

A compressed one keeps it in its manifest.  A dense file has it as JSON under the key
``mpoc.io.training_history`` of the safetensors header's metadata, a dense directory in
``mpoc-history.json``, so that ``mpoc eval`` numbers characters and scales images as training did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, shortened
from mpoc.io.safetensors_header import read_header
from mpoc.io.validation import parse_strictly, read_bounded

KEY = "mpoc.history"
HISTORY_FILE = "mpoc-history.json"
_LONGEST = 1000  # trainings one after another
# What reports, and data read as training did, take from a history.
_NUMBER = int | float
_NUMBERS = object()  # a dictionary of numbers
_HISTORY = {"steps": int, "task": str, "metric": str, "split": str, "start": _NUMBERS, "final": _NUMBERS}
_HISTORY |= {"test": _NUMBERS, "mean": _NUMBER, "sigma": _NUMBER, "runs": list, "data": dict, "earlier": dict}
_HISTORY |= {"images": dict, "tokenizer": dict, "classes": _NUMBERS}
_CALIBRATION = {"samples": int, "held_out": int, "data": dict, "shares": dict, "norms": dict | None}


def read_history(path: Path) -> dict[str, Any]:
    """The history of a dense checkpoint; {} where it has none.

    Raises:
        MpocError: it is damaged.
    """
    text: str | None = None
    if (path / HISTORY_FILE).is_file():
        text = read_bounded(path / HISTORY_FILE).decode("utf-8", errors="replace")
    elif path.is_file() and path.suffix == ".safetensors":
        text = read_header(path).metadata.get(KEY)
    if text is None:
        return {}
    try:
        history: dict[str, Any] = parse_strictly(text)
        check_history(history)
    except (ValueError, TypeError, RecursionError) as error:
        said = shortened(error)
        raise MpocError(f"{path}: the history of its training is damaged ({said})") from error
    return history


def check_history(history: Any) -> None:
    """Whether what is told of a training has the types that it is told with.

    Raises:
        TypeError, ValueError: it has not.
    """
    for _ in range(_LONGEST):
        _check_types(history, _HISTORY)
        if history.get("split") and history.get("final"):
            metric = history.get("metric", "loss")
            if metric not in history["final"]:
                raise ValueError(f"no {metric} at the end")
        if "sigma" in history and not {"mean", "runs"} <= history.keys():
            raise ValueError("a spread without a mean")
        if not (history := history.get("earlier", {})):
            return
    raise ValueError(f"more than {_LONGEST} trainings")


def check_calibration(calibration: Any) -> None:
    """The same of a calibration."""
    _check_types(calibration, _CALIBRATION)
    _check_types(calibration.get("shares", {}), {"chosen": str, "distances": _NUMBERS})
    _check_types(calibration.get("norms") or {}, {"before": _NUMBER, "after": _NUMBER})


def _check_types(record: Any, types: dict[str, Any]) -> None:
    if not isinstance(record, dict):
        raise TypeError(shortened(TypeError(record)))
    for name, expected in types.items():
        value = record.get(name)
        if name in record and not isinstance(value, dict if expected is _NUMBERS else expected):
            raise TypeError(f"{name} = {value!r}")
        if expected is _NUMBERS and not all(
            isinstance(one, _NUMBER | None) for one in (value or {}).values()
        ):
            raise TypeError(f"{name} = {value!r}")


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
