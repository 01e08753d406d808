from __future__ import annotations

import json
import re

import pytest

import mpoc
from tests.support.process import Here, Mpoc


def test_reports_versions_and_passes(run: Mpoc) -> None:
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"mpoc        {mpoc.__version__} in ")
    titles = {line[:12].strip() for line in lines}
    assert {"Python", "torch", "safetensors", "numpy", "typer", "rich"} <= titles
    assert {"platform", "CPUs", "memory", "disk", "self-test", "mpoc[hf]", "mpoc[train]"} <= titles
    assert re.search(r"^self-test +cpu: passed, outputs differ by \d", done.stdout, re.MULTILINE)
    assert lines[-1] == "all is well"
    assert list(run.folder.iterdir()) == []


def test_fault_is_one_line_with_its_fix(run: Mpoc) -> None:
    done = run.without("torch", "doctor")
    assert (done.returncode, done.stderr) == (1, "")
    (fault,) = (line for line in done.stdout.splitlines() if line.startswith("fault"))
    assert re.fullmatch(
        r"fault: torch cannot be imported: .*: pip install --force-reinstall 'torch.*'", fault
    )
    assert done.stdout.splitlines()[-1] == "mpoc does not work as it should here"


def test_json_holds_the_same_facts(here: Here) -> None:
    done = here("doctor", "--json")
    value = json.loads(done.stdout)
    assert (done.returncode, done.stderr, value["schema"], value["well"]) == (0, "", "mpoc.doctor/1", True)
    assert value["trials"][0]["device"] == "cpu"
    assert {package["name"] for package in value["packages"]} > {"Python", "torch", "typer"}


def test_reports_a_failed_self_test(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpoc.cli.doctor.TOLERANCE", 0)
    done = here("doctor")
    assert done.returncode == 1
    assert "fault: self-test on cpu: MpocError: outputs differ by" in done.stdout
    assert "cpu: failed" in done.stdout
