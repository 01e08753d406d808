from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mpoc.errors import MpocError
from mpoc.io.keyed_store import Scratch, digest, find_item, open_item, put_item, scratch_folder
from mpoc.io.safetensors_writer import Entry

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.int64)}
RECORD = {"bond": 3, "error": 0.1, "é": [None, float("inf")]}
FINGERPRINT = {"weights": "1f", "data": "2e"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    put_item(tmp_path / "item", RECORD, FINGERPRINT, [Entry.of(*named) for named in TENSORS.items()])
    return tmp_path / "item"


def test_round_trip_keeps_items(path: Path) -> None:
    item = open_item(path)
    assert (item.record, item.fingerprint, item.is_whole()) == (RECORD, FINGERPRINT, True)
    for found in (item.read_all(), load_file(path), {name: item.entry(name).read() for name in TENSORS}):
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert [file.name for file in path.parent.iterdir()] == ["item"]


def test_finds_items_by_fingerprint(path: Path) -> None:
    assert find_item(path, FINGERPRINT) is not None
    assert find_item(path, {**FINGERPRINT, "data": "3d"}) is None
    assert find_item(path, {"weights": "1f"}) is None
    assert find_item(path.with_name("none"), FINGERPRINT) is None


@pytest.mark.slow
def test_detects_any_changed_byte(path: Path) -> None:
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        assert find_item(path, FINGERPRINT) is None, at
        with pytest.raises(MpocError, match="item"):
            open_item(path).read_all()


def test_rejects_other_safetensors_files(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors")
    with pytest.raises(MpocError, match="holds no intermediate results"):
        open_item(tmp_path / "m.safetensors")


def test_failing_write_keeps_the_old_item(path: Path) -> None:
    def fail() -> torch.Tensor:
        raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        put_item(path, None, entries=[Entry(Entry.of("a", TENSORS["a"]).info, fail)])
    assert find_item(path, FINGERPRINT) is not None
    assert [file.name for file in path.parent.iterdir()] == ["item"]


def test_digest_depends_on_names_shapes_dtypes_and_values() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.zeros(0), "c": torch.tensor(1)}
    same = digest(tensors.items())
    assert digest(reversed(tensors.items())) == same
    assert digest({**tensors, "a": torch.arange(12.0)[::2] / 2}.items()) == same  # wherever they lie
    others = [
        {**tensors, "a": torch.arange(6.0).reshape(2, 3)},
        {**tensors, "a": torch.arange(6.0) + 2**-20},
        {**tensors, "a": torch.arange(6.0).view(torch.int32)},
        {"a": tensors["a"], "b": tensors["b"], "d": tensors["c"]},
        {"a": tensors["a"], "c": tensors["c"]},
    ]
    found = {digest(other.items()) for other in others} | {digest(tensors.items(), "words")}
    assert len(found) == len(others) + 1 and same not in found


def test_scratch_holds_a_limit_in_memory_and_the_rest_in_files(tmp_path: Path) -> None:
    tensors = {key: [torch.arange(10) + key, torch.ones(2, 3).mT * key] for key in range(4)}  # 80 + 24 bytes
    with scratch_folder(tmp_path) as folder:
        scratch = Scratch(folder, limit=250)
        for key, value in tensors.items():
            scratch.put(key, value)
        assert scratch.nbytes == 208 and len(list(folder.glob("*.safetensors"))) == 2
        assert all(
            torch.equal(a, b) for key in tensors for a, b in zip(scratch.get(key), tensors[key], strict=True)
        )
        scratch.put(3, tensors[0])
        assert torch.equal(scratch.get(3)[0], tensors[0][0])
        scratch.drop(3)
        scratch.drop(0)
        assert scratch.nbytes == 104 and len(list(folder.glob("*.safetensors"))) == 1
        scratch.put(4, tensors[1])
        assert scratch.most == 416 and scratch.nbytes == 208  # there were four, now there are three
        assert 2 in scratch and 3 not in scratch
    assert list(tmp_path.iterdir()) == []


def test_scratch_maps_tensors_from_files_that_are_gone(tmp_path: Path) -> None:
    tensor = torch.arange(6).reshape(2, 3).mT
    assert Scratch(tmp_path).mapped(tensor) is tensor, "too small for a file of its own"
    found = Scratch(tmp_path, limit=0).mapped(tensor)
    assert found.data_ptr() != tensor.data_ptr() and list(tmp_path.iterdir()) == []
    assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    assert str(tmp_path) in Path("/proc/self/maps").read_text()


def test_scratch_without_a_folder_holds_everything_in_memory() -> None:
    scratch = Scratch(limit=1)
    assert scratch.mapped(tensor := torch.ones(3)) is tensor
    scratch.put("a", [torch.ones(4)])
    assert scratch.nbytes == 16 and not scratch.has_room(1)


def test_scratch_that_is_not_required_holds_in_memory_what_the_disk_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, tensor = shutil.disk_usage(tmp_path), torch.arange(4.0)

    def fill(_: Any, path: Path) -> None:
        path.touch()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for name, fault in {"shutil.disk_usage": lambda _: usage._replace(free=15), "save_file": fill}.items():
        with monkeypatch.context() as patch, scratch_folder(tmp_path) as folder:
            patch.setattr(f"mpoc.io.keyed_store.{name}", fault)
            scratch = Scratch(folder, limit=0, required=False)
            scratch.put("a", [tensor])
            assert scratch.get("a")[0] is tensor and scratch.mapped(tensor) is tensor
            assert "so memory held the rest; --scratch DIR" in scratch.notes[0]
            assert [path.name for path in folder.iterdir()] == ["lock"]


def test_scratch_that_is_not_required_leaves_half_of_the_free_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, free = shutil.disk_usage(tmp_path), [100]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    scratch, required = Scratch(tmp_path, limit=0, required=False), Scratch(tmp_path, limit=0)
    assert scratch.has_room(50) and not scratch.has_room(51) and required.has_room(51)
    free[0] = 60  # others have filled the disk meanwhile
    scratch.put("a", [torch.ones(4)])
    assert scratch.nbytes == 16 and list(tmp_path.iterdir()) == []
    required.put("a", [torch.ones(4)])
    assert required.nbytes == 0 and len(list(tmp_path.iterdir())) == 1
    assert scratch.notes and not required.notes and not Scratch().notes


def test_scratch_of_a_killed_run_is_removed_and_of_a_living_one_kept(tmp_path: Path) -> None:
    dead = tmp_path / ".mpoc-scratch-dead"
    dead.mkdir()
    for name in ("lock", "1.safetensors"):
        (dead / name).touch()
    nameless, starting = tmp_path / ".mpoc-new-dead", tmp_path / ".mpoc-new-alive"
    nameless.mkdir()
    os.utime(nameless, (0, 0))
    starting.mkdir()
    with scratch_folder(tmp_path) as living, scratch_folder(tmp_path) as folder:
        assert {living, folder, starting} == set(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_scratch_leaves_nothing_where_it_ends_as_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def lock(*_: Any) -> None:
        if error is OSError:
            raise OSError(errno.ENOLCK, "No locks available")
        signal.raise_signal(signal.SIGINT)  # takes effect once the folder has its name

    monkeypatch.setattr("mpoc.io.keyed_store.fcntl.flock", lock)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        with pytest.raises(error), scratch_folder(tmp_path):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []


def test_scratch_is_left_by_processes_that_start_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tempfile.mkdtemp

    def make_while_another_starts(**options: Any) -> str:
        folder = make(**options)
        monkeypatch.setattr(tempfile, "mkdtemp", make)
        with scratch_folder(tmp_path):
            pass
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", make_while_another_starts)
    with scratch_folder(tmp_path) as folder:
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_scratch_names_what_is_wrong_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(MpocError, match=r"--scratch .*nowhere: not a directory"),
        scratch_folder(tmp_path / "nowhere"),
    ):
        pass
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=15))
    with scratch_folder(tmp_path) as folder, pytest.raises(MpocError, match="16 B more do not fit"):
        Scratch(folder, limit=0).put("a", [torch.ones(4)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def fill(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mpoc.io.keyed_store.save_file", fill)
    with scratch_folder(tmp_path) as folder, pytest.raises(MpocError, match="16 B more do not fit"):
        Scratch(folder, limit=0).put("a", [torch.ones(4)])
