from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpoc.data import open as module
from mpoc.data.open import data_fingerprint
from mpoc.data.recognise import recognise
from tests.data.samples import pixels, write_folder, write_idx


def of(path: Path) -> str:
    return data_fingerprint(path, recognise(path, None))


def idx(folder: Path) -> None:
    write_idx(folder, "train", pixels(6, 4, 4), [0, 1, 2, 0, 1, 2])


def images(folder: Path) -> None:
    write_folder(folder / "train", {"cat": list(pixels(3, 4, 4)), "dog": list(pixels(2, 4, 4, seed=1))})


def arrays(folder: Path) -> None:
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", x=pixels(6, 4, 4), y=np.arange(6))


@pytest.mark.parametrize("write", [idx, images, arrays])
@pytest.mark.parametrize("limit", [module.READ_AT_MOST, 600])
def test_depends_on_the_files_of_the_set_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], limit: int
) -> None:
    monkeypatch.setattr(module, "READ_AT_MOST", limit)
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder)
    before = of(folder)
    (folder / "train.log").write_text("log")
    moved = folder.rename(tmp_path / "moved")
    assert of(moved) == before
    for file in sorted(moved.rglob("*")):
        if file.is_file() and file.suffix != ".log":
            content = file.read_bytes()
            for changed in (content[:-1] + bytes([content[-1] ^ 1]), content + b"0"):
                file.write_bytes(changed)
                assert of(moved) != before
            file.write_bytes(content)
            if write is not idx:  # whose pairs are told by their names
                named = file.rename(file.with_name(f"train-0{file.name}"))
                assert of(moved) != before
                named.rename(file)
    assert of(moved) == before


def test_single_file_depends_on_its_bytes_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=pixels(6, 4, 4))
    before = of(tmp_path / "a.npz")
    assert of((tmp_path / "a.npz").rename(tmp_path / "b.npz")) == before


def test_samples_large_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_AT_MOST", 100)
    file, content = tmp_path / "a.txt", bytearray(b"a" * 1000)
    found = set()
    for place in (0, 49, 950, 999, 50, 500, 949):
        changed = content.copy()
        changed[place] = ord("b")
        file.write_bytes(changed)
        found.add(of(file))
    assert len(found) == 5  # the last three differ in what is not read
