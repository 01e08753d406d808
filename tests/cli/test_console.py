from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from mpoc.cli.console import Output, plain, reported_errors
from mpoc.cli.progress import stage_lines
from mpoc.compression.run_context import Later
from mpoc.errors import MpocError


@pytest.fixture
def handlers() -> Iterator[None]:
    """As a process has them at its start, and afterwards as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped_in_native_code(signum: int) -> None:
    """As torch does where its native code calls back into Python."""
    try:
        signal.raise_signal(signum)
    except BaseException:
        raise ValueError("could not determine the shape") from None


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_swallowed_by_native_code_is_still_reported(
    signum: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, reported_errors():
        stopped_in_native_code(signum)
    assert stop.value.code == status
    said = f"error: {'interrupted' if signum == signal.SIGINT else 'stopped by SIGTERM'}\n"
    assert capsys.readouterr().err == said


@pytest.mark.usefixtures("handlers")
def test_restores_signal_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with reported_errors():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.usefixtures("handlers")
def test_other_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="a fault"), reported_errors():
        raise ValueError("a fault")


@pytest.mark.usefixtures("handlers")
def test_keeps_ignoring_an_ignored_signal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with reported_errors():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("handlers")
def test_prints_notes_and_the_hint_once(capsys: pytest.CaptureFixture[str]) -> None:
    error = MpocError("m.pt: no weights", "--layers fc1")
    error.add_note("finished layers are kept")
    with pytest.raises(SystemExit), reported_errors():
        raise error
    said = ["error: m.pt: no weights", "note: finished layers are kept", "hint: --layers fc1"]
    assert capsys.readouterr().err.splitlines() == said


HOSTILE = "a\x1b[2J\x9b1m\x07\u202e[red]b\r\udcff"


def test_escapes_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    Output().say(HOSTILE)
    with pytest.raises(SystemExit), reported_errors():
        raise MpocError(HOSTILE, HOSTILE)
    said = capsys.readouterr().err
    assert said.count("a\\x1b[2J\\x9b1m\\x07\\u202e[red]b\\r\\udcff") == 3
    assert not set("\x1b\x9b\x07\u202e\r\udcff") & set(said)


def test_keeps_printable_text() -> None:
    for text in ("layer.0 × ρ → 模型", "[bold]a:heart:b", "two\n\tlines", ""):
        assert plain(text) == text


def test_prints_markup_and_emoji_codes_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output, name = Output(), "[bold]a:heart:b[/]"
    output.say(name)
    output.result.print(name)
    with pytest.raises(SystemExit), reported_errors():
        raise MpocError(name, name)
    said = capsys.readouterr()
    assert said.out == f"{name}\n"
    assert said.err.splitlines() == [name, f"error: {name}", f"hint: {name}"]


def test_stages_say_the_time_left_of_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own steps, and by what follows it; a stage may begin beyond the first step, as when resumed."""
    clock = iter([1e6, 1e6 + 1, 1e6 + 7, 1e6 + 8, 1e6 + 13])
    monkeypatch.setattr("mpoc.cli.progress.monotonic", lambda: next(clock))
    tell = stage_lines(Output())
    assert tell is not None
    for stage, number in (("done:", 2), ("layer", 1), ("layer", 4), ("layer", 5)):
        tell(stage, number, 9, Later())
    tell("layer", 7, 9, Later(times=2, seconds=60))
    assert capsys.readouterr().err.splitlines() == [
        "done: 2 of 9",
        "layer 1 of 9",
        "layer 4 of 9 (0:12 left)",
        "layer 7 of 9 (1:42 left)",  # 3 steps of 2 s, twice 9 of them, and a minute
    ]
