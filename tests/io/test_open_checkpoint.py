from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.io.open_checkpoint import open_checkpoint
from tests.support.checkpoints import mlp_state, save_directory


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    state = mlp_state()
    torch.save(state, tmp_path / "m.pt")
    save_file(state, tmp_path / "m.safetensors")
    save_directory(tmp_path / "one", state)
    save_directory(tmp_path / "many", state, shards=3)
    save_directory(tmp_path / "bin", state, shards=2, suffix=".bin")
    fingerprints = set()
    for name in ("m.pt", "m.safetensors", "one", "many", "bin"):
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.path == tmp_path / name
        assert checkpoint.is_directory == (tmp_path / name).is_dir()
        assert (checkpoint.config is None) == (not checkpoint.is_directory)
        fingerprints.add(checkpoint.fingerprint())
        for tensor in state:
            torch.testing.assert_close(checkpoint.read(tensor), state[tensor], rtol=0, atol=0)
    assert len(fingerprints) == 1


@pytest.mark.parametrize("hub_id", ["bert-base-uncased", "org/name", "meta-llama/Llama-3.2-1B", "gpt2"])
def test_never_downloads_a_hub_id(hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        open_checkpoint(Path(hub_id))
    assert f"{hub_id}: no such file or directory" in str(caught.value)
    assert "does not download" in str(caught.value)
    assert f"hf download {hub_id} --local-dir" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.pt", "models/m.th", "m.safetensors", "/nowhere/at/all", "a/b/c"])
def test_missing_file_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(UsageError, match=r"no such file or directory$") as caught:
        open_checkpoint(Path(name))
    assert caught.value.hint is None


@pytest.mark.parametrize("name", ["m.onnx", "m.gguf", "m", "m.h5"])
def test_unknown_suffix_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MpocError, match=r"not a kind of checkpoint known here \(\.pt .*\.safetensors"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.q_proj.lora_A.weight", "LoRA adapter"),
        ("q_proj.lora_B", "LoRA adapter"),
        ("q_proj.qweight", "already quantised"),
        ("q_proj.weight.absmax", "already quantised"),
        ("q_proj.weight.quant_state.bitsandbytes__nf4", "already quantised"),
        ("q_proj.weight_scale", "already quantised"),
        ("q_proj.SCB", "already quantised"),
    ],
)
def test_rejects_names_of_quantised_weights(tmp_path: Path, name: str, said: str, suffix: str) -> None:
    state = {**mlp_state(), name: torch.randn(3, 3)}
    path = tmp_path / f"m{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(MpocError, match=said) as caught:
        open_checkpoint(path)
    assert repr(name) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["q_proj.weight", "lora.weight", "scale.weight", "dequant.weight"])
def test_accepts_names_that_only_resemble_quantised_ones(tmp_path: Path, name: str) -> None:
    save_file({name: torch.randn(3, 3)}, tmp_path / "m.safetensors")
    assert list(open_checkpoint(tmp_path / "m.safetensors").infos) == [name]


def test_rejects_files_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors", {"format": "pt"})
    with pytest.raises(MpocError, match="holds no tensors"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("directory", [False, True])
def test_compressed_input_suggests_expand(tmp_path: Path, directory: bool) -> None:
    source, output = tmp_path / "m.pt", tmp_path / "out.safetensors"
    if directory:
        source, output = save_directory(tmp_path / "m", mlp_state()), tmp_path / "out"
    else:
        torch.save(mlp_state(), source)
    compress_checkpoint(source, output, make_recipe(None, {"bond": 2}))
    with pytest.raises(MpocError, match="already compressed by mpoc") as caught:
        open_checkpoint(output)
    assert f"mpoc expand {output}" in (caught.value.hint or "")
