"""The training history of a checkpoint, which ``mpoc finetune`` records.  No torch here.

A compressed checkpoint keeps it in its manifest, a dense file as JSON under the key ``mpoc.history`` of the
safetensors header's metadata, a dense directory in ``mpoc-history.json``.  From it ``mpoc eval`` numbers
characters and scales images as training did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypedDict

from mpoc.errors import MpocError, shortened
from mpoc.io.safetensors_header import read_header
from mpoc.io.validation import Whole, check_fields, parse_strictly, read_bounded

KEY = "mpoc.history"
HISTORY_FILE = "mpoc-history.json"
_LONGEST = 1000  # trainings one after another
Scores = dict[str, float | None]


class TrainingHistory(TypedDict, total=False):
    """The entries of a history that reports and later commands use; others are kept as they are."""

    steps: int
    task: str
    metric: str
    split: str
    start: Scores
    final: Scores
    test: Scores
    mean: float
    sigma: float
    runs: list[Any]
    data: dict[str, Any]
    earlier: dict[str, Any]  # the history of the training before
    images: dict[str, Any]
    tokenizer: dict[str, Any]
    classes: Scores


class AllocationFacts(TypedDict, total=False):
    """The chosen allocation of a budget, and the distance of each allocation that was tried."""

    chosen: str
    distances: dict[str, float]


class BatchNormFacts(TypedDict, total=False):
    """Batch-norm recalibration: the distance of held-out outputs before and after it."""

    before: float
    after: float


class CalibrationFacts(TypedDict, total=False):
    """The entries of a manifest's ``calibration`` that reports use."""

    samples: int
    held_out: int
    data: dict[str, Any]
    shares: AllocationFacts
    likeness: dict[str, dict[str, float]]
    norms: BatchNormFacts | None


class Measured(TypedDict, total=False):
    """What ``mpoc compress --eval`` measured; all scores by name."""

    data: Annotated[str, "name of the data set"]
    split: str
    examples: Whole
    metric: Annotated[str, "the score that counts"]
    before: Scores
    after: Scores


def read_history(path: Path) -> dict[str, Any]:
    """The history of a dense checkpoint; {} if it has none.

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
        reason = shortened(error)
        raise MpocError(f"{path}: the history of its training is damaged ({reason})") from error
    return history


def check_history(history: Any) -> None:
    """Check the types of a history, and of those of earlier trainings within it.

    Raises:
        TypeError, ValueError: a field of another type, or fields that contradict each other.
    """
    for _ in range(_LONGEST):
        check_fields(history, TrainingHistory)
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
    """Check the types of a manifest's ``calibration``.

    Raises:
        TypeError: a field of another type.
    """
    check_fields(calibration, CalibrationFacts)


def metadata(history: dict[str, Any]) -> dict[str, str]:
    """What the header's metadata of a dense file says of this history."""
    return {KEY: json.dumps(history, ensure_ascii=False)} if history else {}


def write_history(directory: Path, history: dict[str, Any]) -> None:
    """Write a dense directory's history in the place of an older one."""
    file = directory / HISTORY_FILE
    file.unlink(missing_ok=True)
    if history:
        file.write_text(json.dumps(history, indent=1, ensure_ascii=False) + "\n", "utf-8")


def before_compression(history: dict[str, Any]) -> dict[str, Any]:
    """The history of a compressed checkpoint whose source has this history."""
    return {"earlier": history} if "steps" in history else history


def recorded(history: dict[str, Any], name: str) -> Any:
    """The value of ``name`` in the last training that records one; None if none does."""
    while history:
        if history.get(name):
            return history[name]
        history = history.get("earlier", {})
    return None
