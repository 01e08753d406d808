"""A few hundred executions of the fuzzer, the same each time; and that it finds what it is to find."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mpoc.errors import MpocError
from mpoc.io.manifest_reader import read_manifest
from tests.robustness.fuzz.engine import Target, fault_of, fuzz
from tests.robustness.fuzz.targets import CORPUS, TARGETS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", TARGETS)
def test_finds_no_faults(name: str) -> None:
    target = TARGETS[name]
    found = fuzz(target, seed=7, executions=60 + len(target.seeds()))
    assert {place: repr(error) for place, (_, error) in found.faults.items()} == {}
    assert len(found.kept) >= len(target.seeds())


def test_run_is_deterministic() -> None:
    one, two = (fuzz(TARGETS["index"], seed=3, executions=40) for _ in range(2))
    assert one.kept == two.kept and one.seen == two.seen
    assert fuzz(TARGETS["index"], seed=4, executions=40).kept != one.kept


def test_coverage_guides_to_faults() -> None:
    """A reader that breaks where two unlikely bytes stand; only what is kept on the way leads to it."""

    def read(data: bytes) -> None:
        try:
            read_manifest(Path(data.decode("latin1").replace("\0", "")[:5] or "x"))
        except MpocError:
            if data[:1] == b"A":
                raise KeyError("broken") from None
            raise

    target = Target(lambda: [b"AB", b"x"], lambda data, choose: choose.randbytes(2), read)
    found = fuzz(target, seed=0, executions=10)
    assert list(found.faults) == ["KeyError at outside"] or "KeyError" in next(iter(found.faults))
    assert next(iter(found.faults.values()))[0] == b"AB"
    assert fault_of(target, b"x") is None


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_are_deterministic(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds():
        made = [[target.mutate(seed, random.Random(k)) for k in range(30)] for _ in range(2)]
        assert made[0] == made[1]
        assert len(set(made[0])) > 10


def test_corpus_is_small_and_valid() -> None:
    assert sum(file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()) < 60_000
    manifest = json.loads((CORPUS / "manifest" / "full").read_text())
    assert {layer["form"] for layer in manifest["layers"]} == {"mpo", "svd"}
    whole = {
        "manifest": ("full", "plain"),
        "config": ("saved",),
        "torch": ("zip", "legacy"),
        "index": ("index",),
    }
    for name, files in whole.items():
        for file in files:
            TARGETS[name].run((CORPUS / name / file).read_bytes())  # nothing is refused
