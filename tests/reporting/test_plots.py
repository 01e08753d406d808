"""The figures as files."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from mpoc.errors import UsageError
from mpoc.reporting.plots import refuse_existing_folder, write_plots
from tests.reporting.files import HOSTILE, compressed, one_layer


@pytest.mark.slow
def test_writes_every_figure_in_two_formats(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "a")
    told: list[str] = []
    names = write_plots(path, tmp_path / "one", [path], told.append)
    assert names == sorted(file.name for file in (tmp_path / "one").iterdir())
    stems = [Path(name).stem for name in names[::2]]
    assert stems[::2] == ["comparison", "layers"] and stems[3] == "training"
    assert re.fullmatch(r"layer-1-[A-Za-z0-9._-]+", stems[1])
    assert told == [f"drawing {HOSTILE}"]
    for file in (tmp_path / "one").glob("*.svg"):
        ElementTree.parse(file)
    for file in (tmp_path / "one").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_output_is_deterministic(tmp_path: Path) -> None:
    path = compressed(tmp_path / "a", {"a.weight": torch.randn(16, 16)}, bond=2, sites=2)
    for name in ("one", "two"):
        write_plots(path, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_never_replaces_a_foreign_directory(tmp_path: Path) -> None:
    source, folder = tmp_path / "m.safetensors", tmp_path / "figures"
    refuse_existing_folder(folder, source, False)
    folder.mkdir()
    (folder / "layers.svg").touch()
    with pytest.raises(UsageError, match="exists already"):
        refuse_existing_folder(folder, source, False)
    refuse_existing_folder(folder, source, True)
    (folder / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds thesis\.tex, which is not a figure"):
        refuse_existing_folder(folder, source, True)
    with pytest.raises(UsageError, match="is a file"):
        refuse_existing_folder(folder / "thesis.tex", source, True)


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compressed(tmp_path / "a", {"a.weight": torch.randn(16, 16)}, bond=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpoc.reporting.plots._save", full)
    with pytest.raises(OSError, match="No space"):
        write_plots(path, tmp_path / "figures")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
