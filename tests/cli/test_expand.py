from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.support.checkpoints import contents, mlp_state, relative_error, save_directory
from tests.support.process import Here, Mpoc


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    torch.save(mlp_state(), tmp_path / "mlp.pt")
    output = tmp_path / "mlp.mpo.safetensors"
    compress_checkpoint(tmp_path / "mlp.pt", output, make_recipe(None, {"bond": 6}))
    return output


def test_writes_to_the_current_directory(run: Mpoc, compressed: Path) -> None:
    done = run("expand", compressed)
    assert (done.returncode, done.stdout) == (0, "")
    assert "wrote mlp.dense.safetensors: 2 layers dense again, " in done.stderr
    assert contents(run.folder).keys() == {"mlp.dense.safetensors"}
    state = torch.load(compressed.with_name("mlp.pt"), weights_only=True)
    dense = load_file(run.folder / "mlp.dense.safetensors")
    assert dense.keys() == state.keys()
    assert relative_error(state["fc1.weight"], dense["fc1.weight"]) < 0.95
    assert torch.equal(dense["fc1.bias"], state["fc1.bias"])


def test_counts_rounded_layers(run: Mpoc, compressed: Path) -> None:
    small = run.folder / "small.safetensors"
    done = run("compress", compressed.with_name("mlp.pt"), "--bits", 4, "-o", small, "--json")
    assert json.loads(done.stdout)["options"] == {"bits": 4, "seed": 0}
    done = run("expand", small, "-o", "dense.safetensors")
    assert "wrote dense.safetensors: 2 layers dense again, " in done.stderr


def test_writes_a_directory_in_shards(here: Here, tmp_path: Path) -> None:
    source = save_directory(tmp_path / "bert", mlp_state())
    compress_checkpoint(source, tmp_path / "bert-mpo", make_recipe(None, {"bond": 6}))
    done = here("expand", tmp_path / "bert-mpo", "--max-shard-size", "10kB", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    names = contents(here.folder / "bert-dense").keys()
    assert {"config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"} < names
    assert len([name for name in names if name.endswith(".safetensors")]) == 3
    assert "mpoc.json" not in names


def test_existing_output_requires_force(here: Here, compressed: Path) -> None:
    (here.folder / "d.safetensors").write_text("mine")
    done = here("expand", compressed, "-o", "d.safetensors")
    assert (done.returncode, contents(here.folder)) == (2, {"d.safetensors": b"mine"})
    assert "error: d.safetensors: exists already" in done.stderr
    assert here("expand", compressed, "-o", "d.safetensors", "--force").returncode == 0
    assert "fc1.weight" in load_file(here.folder / "d.safetensors")


def test_rejects_uncompressed_files(here: Here, compressed: Path) -> None:
    done = here("expand", compressed.with_name("mlp.pt"))
    assert (done.returncode, contents(here.folder)) == (1, {})
    assert done.stderr.startswith("error: ")
    assert "mlp.pt: not compressed by mpoc" in done.stderr
