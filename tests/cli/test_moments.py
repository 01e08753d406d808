"""``mpoc compress --calibrate --moments``, on the demo's network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.compression.digits import ARCHITECTURE, write_network
from tests.support.checkpoints import contents
from tests.support.process import Here

LAYERS = ("--layers", "conv2", "--layers", "fc2", "--form", "svd")
COMMAND = ("compress", "net.safetensors", *ARCHITECTURE, "--device", "cpu", *LAYERS)
CALIBRATE = ("--calibrate", "digits.npz", "--calibration-samples", 40)


@pytest.fixture
def folder(here: Here) -> Path:
    write_network(here.folder)
    return here.folder


@pytest.mark.slow
def test_dry_run_keeps_moments_for_later_runs(here: Here, folder: Path) -> None:
    done = here(*COMMAND, *CALIBRATE, "--ratio", 0.5, "--moments", "m", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "note: moments: 35 examples kept in m\n" in done.stderr
    said = r"the fits would take about 0:\d\d minutes; the run about [\d.]+ [MG]B of memory and up to "
    assert re.search(said, done.stderr)
    assert "reading the dense network: step 1 of" in done.stderr
    assert "what each form would cost: layer 1 of " in done.stderr
    assert contents(folder).keys() == {"net.safetensors", "digits.npz", "m"}
    done = here(*COMMAND, *CALIBRATE, "--ratio", 0.5, "--moments", "m", "-o", "with.safetensors")
    assert "note: moments: 35 examples read from m\n" in done.stderr
    assert "reading the dense network" not in done.stderr
    done = here(*COMMAND, *CALIBRATE, "--ratio", 0.5, "-o", "without.safetensors", "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    assert Path("with.safetensors").read_bytes() == Path("without.safetensors").read_bytes()


@pytest.mark.slow
def test_search_reuses_moments(here: Here, folder: Path) -> None:
    words = (*COMMAND, *CALIBRATE, "--max-drop", 60, "--eval", "digits.npz", "--moments", "m", "--force")
    first, again = here(*words, "-o", "a.safetensors"), here(*words, "-o", "b.safetensors")
    assert first.returncode == again.returncode == 0, first.stderr
    assert "kept in m\n" in first.stderr and "read from m\n" in again.stderr
    assert first.stderr.count("reading the dense network") == 1
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--moments", "m"], 2, "--moments requires --calibrate"),
        ([*CALIBRATE, "--moments", "net.safetensors"], 2, "is the same as net.safetensors, or inside it"),
        ([*CALIBRATE, "--moments", "o.safetensors"], 2, "is the same as o.safetensors, or inside it"),
        ([*CALIBRATE, "--moments", "./digits.npz"], 2, "is the same as digits.npz, or inside it"),
        (["--calibrate", ".", "--moments", "m"], 2, "--moments m: is the same as ., or inside it"),
        ([*CALIBRATE, "--moments", ".."], 2, "--moments ..: is not a file"),
        ([*CALIBRATE, "--moments", "no/m"], 1, "--moments no/m: there is no directory"),
    ],
)
def test_rejects_bad_options_before_any_work(
    here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[object], status: int, said: str
) -> None:
    monkeypatch.setattr("mpoc.compression.pipeline.open_to_calibrate", None)  # nothing is opened
    before = contents(folder)
    done = here(*COMMAND, "--ratio", 0.5, "-o", "o.safetensors", *words)
    assert done.returncode == status, done.stderr
    assert said in done.stderr.replace("\n", " ")
    assert contents(folder) == before


def test_never_replaces_a_foreign_file(here: Here, folder: Path) -> None:
    Path("m").write_text("of somebody")
    before = contents(folder)
    done = here(*COMMAND, *CALIBRATE, "--ratio", 0.5, "--moments", "m", "-o", "o.safetensors")
    assert done.returncode == 1 and "error: m: not a safetensors file" in done.stderr
    assert contents(folder) == before
