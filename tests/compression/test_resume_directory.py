from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mpoc.compression.resume import (
    calibration_folder,
    existing_resume_directory,
    layers_folder,
    resume_directory,
)
from mpoc.errors import MpocError, UsageError
from mpoc.runtime.distributed import ProcessGroup

ASKED = {"MODEL": "m.pt", "--bond": "4"}


def test_moves_the_result_to_the_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("old")
    for resume in (False, True):
        with resume_directory(output, ProcessGroup(), ASKED if resume else None) as target:
            assert layers_folder(target).is_dir()
            assert (target.parent.parent == existing_resume_directory(output)) == resume
            target.write_text(f"new {resume}")
        assert output.read_text() == f"new {resume}"
        assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("failure", [MpocError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_failure_keeps_finished_layers_with_resume(tmp_path: Path, failure: BaseException) -> None:
    output = tmp_path / "out"
    for resume in (False, True):
        with (
            pytest.raises(type(failure)),
            resume_directory(output, ProcessGroup(), ASKED if resume else None) as target,
        ):
            target.mkdir()
            (layers_folder(target) / "0").write_text("a layer")
            raise failure
        assert list(tmp_path.iterdir()) == ([existing_resume_directory(output)] if resume else [])
    assert "layers are in out.partial" in failure.__notes__[-1]
    with resume_directory(output, ProcessGroup(), ASKED) as target:
        assert not target.exists()  # half an output is not gone on with
        assert (layers_folder(target) / "0").read_text() == "a layer"
        target.write_text("whole")
    assert list(tmp_path.iterdir()) == [output]


def test_failed_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def full(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if self.name == "output":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        mkdir(self, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="out") as caught, resume_directory(tmp_path / "out", ProcessGroup()):
        pass
    assert caught.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_recovers_from_a_kill_during_cleanup(tmp_path: Path) -> None:
    """What marks the folder goes last."""
    output, partial = tmp_path / "out", existing_resume_directory(tmp_path / "out")
    gone: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpoc.io.atomic.shutil.rmtree", lambda path, **_: gone.append(path.name))
        with resume_directory(output, ProcessGroup(), ASKED) as target:
            target.write_text("whole")
    assert gone == ["calibration", "layers", "output", partial.name]
    assert (partial / "mpoc-partial.json").exists()
    with resume_directory(output, ProcessGroup(), ASKED) as target:
        target.write_text("whole again")
    assert list(tmp_path.iterdir()) == [output]


def test_never_touches_a_foreign_directory(tmp_path: Path) -> None:
    output = tmp_path / "out"
    existing_resume_directory(output).mkdir()
    (existing_resume_directory(output) / "notes.txt").write_text("mine")
    with (
        pytest.raises(UsageError, match=r"out\.partial: exists, and is not"),
        resume_directory(output, ProcessGroup(), ASKED),
    ):
        pass
    assert (existing_resume_directory(output) / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["layers", "output", "mpoc-partial.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_output_may_have_the_name_of_the_work_directory(tmp_path: Path, name: str, resume: bool) -> None:
    with resume_directory(tmp_path / name, ProcessGroup(), ASKED if resume else None) as target:
        target.mkdir()
        (target / "file").write_text("whole")
    assert (tmp_path / name / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_reuses_an_empty_work_directory(tmp_path: Path) -> None:
    existing_resume_directory(tmp_path / "out").mkdir()
    with resume_directory(tmp_path / "out", ProcessGroup(), ASKED) as target:
        target.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rejects_a_directory_in_use(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with resume_directory(output, ProcessGroup(), ASKED) as target:
        target.write_text("whole")
        refused = pytest.raises(MpocError, match="another mpoc is at work")
        with refused as caught, resume_directory(output, ProcessGroup(), ASKED):
            pass
        assert "finished layers" not in str(caught.value.__notes__)
        assert target.read_text() == "whole"  # of the other, which goes on
    assert output.read_text() == "whole"


def test_keeps_nothing_before_the_first_layer(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UsageError) as caught, resume_directory(output, ProcessGroup(), ASKED):
        raise UsageError("no such data")
    assert not hasattr(caught.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_removes_partial_calibration_files(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), resume_directory(output, ProcessGroup(), ASKED) as target:
        (calibration_folder(target) / "allocation.safetensors").write_text("{}")
        (calibration_folder(target) / ".moments.safetensors.x.partial").mkdir()
        raise KeyboardInterrupt
    with resume_directory(output, ProcessGroup(), ASKED) as target:
        assert [path.name for path in calibration_folder(target).iterdir()] == ["allocation.safetensors"]
        target.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damaged", [False, True])
def test_keeps_results_of_other_work(tmp_path: Path, damaged: bool) -> None:
    output, other = tmp_path / "out", {**ASKED, "--bond": "5"}
    with pytest.raises(KeyboardInterrupt), resume_directory(output, ProcessGroup(), ASKED) as target:
        (layers_folder(target) / "0").write_text("a layer")
        raise KeyboardInterrupt
    refused = pytest.raises(UsageError, match="holds the layers of other work: --bond was 4 and is 5\n")
    with refused as caught, resume_directory(output, ProcessGroup(), other):
        pass
    assert "--force starts over" in str(caught.value.hint)
    if damaged:  # layers say themselves what they are of
        (existing_resume_directory(output) / "mpoc-partial.json").write_text('{"MODEL"')
    for asked, anew in ((ASKED, False), (other, not damaged)):
        with (
            pytest.raises(KeyboardInterrupt),
            resume_directory(output, ProcessGroup(), asked, anew) as target,
        ):
            assert (layers_folder(target) / "0").exists() == (asked is ASKED or damaged)
            if damaged:
                (existing_resume_directory(output) / "mpoc-partial.json").write_text("")
            raise KeyboardInterrupt
