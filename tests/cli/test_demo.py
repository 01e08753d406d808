from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from mpoc.cli.demo import run_demo
from mpoc.compression.expand import expand_checkpoint
from mpoc.demo.data import accuracy, load_digits
from mpoc.demo.network import DigitsNet, load_network
from mpoc.errors import UsageError
from mpoc.io.manifest_reader import read_manifest
from tests.support.checkpoints import contents
from tests.support.process import Here, Mpoc

COMPRESSED = {
    "digits-cnn.safetensors", "digits-cnn.mpo.safetensors", "digits-cnn.dense.safetensors", "digits.npz",
}  # fmt: skip
TUNED = {"digits-cnn.tuned.safetensors", "digits-cnn.tuned.jsonl"}


def said(title: str, text: str) -> float:
    found = re.search(rf"^accuracy {title}: ([\d.]+) %", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def by_hand(state: dict[str, Tensor]) -> float:
    _, _, images, labels = load_digits()
    network = DigitsNet()
    network.load_state_dict(state, strict=True)
    return accuracy(network, images, labels)


@pytest.mark.slow
def test_demo_reports_accuracies_of_the_files_it_writes(here: Here) -> None:
    done = here("demo")
    assert done.returncode == 0, done.stderr
    folder = here.folder / "mpoc-demo"
    assert contents(folder).keys() == COMPRESSED | TUNED
    before, after, healed = (
        said(t, done.stdout) for t in ("before", "after compression", "after fine-tuning")
    )
    assert before == pytest.approx(by_hand(load_network().state_dict()), abs=0.01)
    assert after == pytest.approx(by_hand(load_file(folder / "digits-cnn.dense.safetensors")), abs=0.01)
    expand_checkpoint(folder / "digits-cnn.tuned.safetensors", here.folder / "tuned.safetensors")
    assert healed == pytest.approx(by_hand(load_file(here.folder / "tuned.safetensors")), abs=0.2)
    assert min(before, healed) > 97
    assert after < 50
    manifest = read_manifest(folder / "digits-cnn.mpo.safetensors")
    assert f"ρ = {manifest.rho:.4f}" in done.stdout
    assert manifest.rho < 0.06
    assert done.stderr.splitlines()[-1] == "next: mpoc report mpoc-demo/digits-cnn.tuned.safetensors"
    # the commands that are printed do the same
    tuned = (folder / "digits-cnn.tuned.safetensors").read_bytes()
    commands = re.findall(r"^  mpoc (.*)", done.stdout, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["finetune", "eval"]
    results = [here(*shlex.split(command)) for command in commands]
    assert [result.returncode for result in results] == [0, 0], results
    assert (folder / "digits-cnn.tuned.safetensors").read_bytes() == tuned
    assert f"accuracy {healed:.2f} %" in results[1].stdout


def test_without_accelerate_demo_skips_fine_tuning(run: Mpoc) -> None:
    done = run.without("accelerate", "demo")
    assert done.returncode == 0, done.stderr
    assert "fine-tuning was skipped: it needs accelerate, pip install '.[train]'" in done.stdout
    assert "accuracy after compression: " in done.stdout
    assert "mpoc finetune" not in done.stdout
    assert contents(run.folder / "mpoc-demo").keys() == COMPRESSED


@pytest.mark.slow
def test_existing_folder_requires_force(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        run_demo(tmp_path / "demo", 8, force=False)
    assert contents(tmp_path) == {"demo/mine": b"mine"}
    for _ in range(2):
        run_demo(tmp_path / "demo", 8, force=True)
        assert contents(tmp_path / "demo").keys() == COMPRESSED | {"mine"}


def test_accuracy_rises_with_the_bond(tmp_path: Path) -> None:
    stories = [run_demo(tmp_path / str(bond), bond, force=False) for bond in (4, 16, 40)]
    after = [story.accuracy_after for story in stories]
    assert after == sorted(after)
    assert len(set(after)) == 3


def test_rejects_bond_zero(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--bond 0"):
        run_demo(tmp_path / "demo", 0, force=False)
    assert list(tmp_path.iterdir()) == []
