"""What errors carry besides their message."""

from __future__ import annotations

import pickle
import traceback

import pytest

from mpoc.errors import MpocError, UsageError


@pytest.mark.parametrize("kind", [MpocError, UsageError])
def test_hint_is_a_note_and_not_in_the_message(kind: type[MpocError]) -> None:
    error = kind("m.pt: no weights", "mpoc compress m.pt --bond 8")
    assert (str(error), error.hint) == ("m.pt: no weights", "mpoc compress m.pt --bond 8")
    assert traceback.format_exception_only(error)[1:] == ["hint: mpoc compress m.pt --bond 8\n"]
    assert len(traceback.format_exception_only(kind("m.pt: no weights"))) == 1


def test_errors_pickle_with_their_hint() -> None:
    again = pickle.loads(pickle.dumps(UsageError("no such layer", "--layers fc1")))
    assert (type(again), str(again), again.hint) == (UsageError, "no such layer", "--layers fc1")
    assert traceback.format_exception_only(again)[1:] == ["hint: --layers fc1\n"]
