"""``mpoc inspect``: against the tensors that were saved, and against what compression then selects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.support.checkpoints import CONFIG, contents, network_state, save_directory
from tests.support.process import Here


def saved(path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(network_state(), path)
    elif path.suffix:
        save_file(network_state(), path)
    else:
        save_directory(path, network_state(), shards=2, config=CONFIG | {"tie_word_embeddings": True})
    return path


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m"])
def test_json_names_every_tensor(here: Here, tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name)
    before = contents(path)
    done = here("inspect", path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    state = network_state()
    assert {(t["name"], tuple(t["shape"]), t["dtype"]) for t in found["tensors"]} == {
        (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in state.items()
    }
    kinds = {t["name"]: t["kind"] for t in found["tensors"] if t["kind"]}
    linear = dict.fromkeys(("fc1.weight", "fc2.weight", "tiny.weight", "half.weight"), "linear")
    assert kinds == linear | {"conv.weight": "conv2d", "embeddings.weight": "embedding"}
    assert all((t["kind"] is None) == bool(t["reason"]) for t in found["tensors"])
    assert found["parameters"] == sum(t.numel() for t in state.values() if t.is_floating_point())
    assert found["head_tied_to_embedding"] == (name == "m")
    assert found["architecture"] == ("TestModel" if name == "m" else None)
    files = [path] if path.is_file() else path.glob("*.safetensors")
    assert found["bytes"] == sum(file.stat().st_size for file in files)
    assert contents(path) == before


def test_table_counts_kinds_and_names_the_next_command(here: Here, tmp_path: Path) -> None:
    done = here("inspect", saved(tmp_path / "m"), "--verbose")
    rows = {line.split()[0]: line.split()[1:3] for line in done.stdout.splitlines() if line[:1].isalpha()}
    assert rows["linear"] == ["4", f"{48 * 64 * 2 + 64 * 32 + 6:,}"]
    assert rows["conv2d"] == ["1", "1,728"]
    assert "compressible: 6 tensors" in done.stdout
    assert "  steps: not a floating dtype (int64)" in done.stdout
    assert "--size 25% --dry-run" in done.stderr


def test_says_why_a_quantised_checkpoint_is_refused(here: Here, tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    done = here("inspect", save_directory(tmp_path / "m", network_state(), config=config))
    assert done.returncode == 0
    assert "not compressible: already quantised (gptq)" in done.stdout
    assert done.stderr == ""


def test_refuses_what_is_no_checkpoint(here: Here, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    compress_checkpoint(saved(tmp_path / "m.safetensors"), output, make_recipe(None, {"bond": 2}))
    (tmp_path / "text.safetensors").write_text("hello, world, hello")
    for path, status, said in (
        (output, 1, "already compressed by mpoc"),
        (tmp_path / "text.safetensors", 1, "not a safetensors file"),
        (tmp_path / "absent", 2, "no such file or directory"),
    ):
        done = here("inspect", path)
        assert (done.returncode, done.stdout) == (status, "")
        assert f"{path}: {said}" in done.stderr
