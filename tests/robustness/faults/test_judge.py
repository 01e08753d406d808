from __future__ import annotations

from pathlib import Path

import pytest

from tests.robustness.faults.child import Ended
from tests.robustness.faults.judge import Before, judge_words

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("status", "err", "wrong"),
    [
        (0, "device cpu\n", 0),
        (1, "error: no\nhint: yes\n", 0),
        (1, "", 1),
        (1, "error: a\nerror: b\n", 1),
        (0, "error: a\n", 1),
        (1, "Traceback (most recent call last):\n", 2),
        (-11, "", 1),
        (2, "error: no\n", 1),
    ],
)
def test_judges_messages(status: int, err: str, wrong: int) -> None:
    found = list(judge_words(Ended(status, "", err), (0, 1)))
    assert [one.kind for one in found] == ["words"] * wrong


def test_judges_a_hang() -> None:
    assert [one.kind for one in judge_words(Ended(-9, "", "", hung=True), (1,))] == ["hang"]


@pytest.mark.parametrize(
    ("changes", "status", "err", "kinds"),
    [
        ({}, 1, "", []),
        ({"out/a": "new"}, 0, "", []),
        ({"out/a": "ne"}, 1, "", ["loss"]),
        ({"out/a": None}, 1, "", ["loss"]),
        ({"out/b": "more"}, 1, "", ["loss"]),
        ({}, 0, "", ["loss"]),
        ({"in": "other"}, 1, "", ["loss"]),
        ({"in": None}, 1, "", ["loss"]),
        ({"left": ""}, 1, "", ["debris"]),
        ({"kept": ""}, 1, "", []),
        ({"out/a": "new"}, 130, "note: out is as it was", ["words"]),
        ({}, 130, "note: out is as it was", []),
        ({}, 130, "note: out is not written", ["words"]),
        ({}, 130, "note: out is written", ["words"]),
    ],
)
def test_judges_files(
    tmp_path: Path, changes: dict[str, str | None], status: int, err: str, kinds: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    for name, text in {"in": "input", "out/a": "old"}.items():
        (tmp_path / name).write_text(text)
    before = Before.of(tmp_path, "out", {"a": b"new"})
    assert before.inputs == {"in": b"input"} and before.old == {"a": b"old"}
    for name, changed in changes.items():
        (tmp_path / name).unlink() if changed is None else (tmp_path / name).write_text(changed)
    found = before.judge_files(tmp_path, Ended(status, "", err), lambda name: name == "kept")
    assert [one.kind for one in found] == kinds
