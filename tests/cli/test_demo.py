from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mpoc.demo.data import accuracy, load_digits
from mpoc.demo.network import DigitsNet, load_network
from mpoc.demo.story import tell_story
from mpoc.errors import UsageError
from mpoc.manifest import read_manifest
from tests.checkpoints import contents
from tests.process import Mpoc

FILES = {"digits-cnn.safetensors", "digits-cnn.mpo.safetensors", "digits-cnn.dense.safetensors"}


def test_the_story_is_told_and_its_files_are_real(run: Mpoc) -> None:
    done = run("demo")
    assert done.returncode == 0, done.stderr
    folder = run.folder / "mpoc-demo"
    assert contents(folder).keys() == FILES
    before = re.search(r"accuracy before: ([\d.]+) %", done.stdout)
    after = re.search(r"accuracy after: +([\d.]+) %", done.stdout)
    assert before is not None
    assert after is not None
    _, _, images, labels = load_digits()
    dense = DigitsNet()
    dense.load_state_dict(load_file(folder / "digits-cnn.dense.safetensors"), strict=True)
    assert float(before[1]) == pytest.approx(accuracy(load_network(), images, labels), abs=0.01)
    assert float(after[1]) == pytest.approx(accuracy(dense, images, labels), abs=0.01)
    assert 97 < float(before[1]) <= 100
    assert 80 < float(after[1]) < float(before[1])
    manifest = read_manifest(folder / "digits-cnn.mpo.safetensors")
    assert f"ρ = {manifest.rho:.4f}" in done.stdout
    assert manifest.rho < 0.25
    assert done.stderr.splitlines()[-1] == "next: mpoc report mpoc-demo/digits-cnn.mpo.safetensors"


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        tell_story(tmp_path / "demo", 8, force=False)
    assert contents(tmp_path) == {"demo/mine": b"mine"}
    for _ in range(2):
        tell_story(tmp_path / "demo", 8, force=True)
        assert contents(tmp_path / "demo").keys() == FILES | {"mine"}


def test_a_larger_bond_loses_less(tmp_path: Path) -> None:
    stories = [tell_story(tmp_path / str(bond), bond, force=False) for bond in (4, 16, 40)]
    after = [story.accuracy_after for story in stories]
    assert after == sorted(after)
    assert len(set(after)) == 3


def test_a_bond_of_zero_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--bond 0"):
        tell_story(tmp_path / "demo", 0, force=False)
    assert list(tmp_path.iterdir()) == []
