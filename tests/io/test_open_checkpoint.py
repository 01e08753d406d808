from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

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


@pytest.mark.parametrize("name", ["m.onnx", "m.gguf", "m", "m.h5", "m.xyz"])
def test_unknown_suffix_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MpocError, match=r"not a kind of checkpoint known here \(\.pt .*\.safetensors"):
        open_checkpoint(tmp_path / name)


def _of(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A tensor of ones; by default a vector."""
    return {name: torch.ones(*(shape or (3,))).to(dtype)}


def _codes(dtype: torch.dtype, *sides: str, name: str = "l.q.weight") -> dict[str, Tensor]:
    """Codes of a weight with tensors beside it."""
    state = _of(name, 8, 6, dtype=dtype)
    return state | {f"l.{side}": torch.ones(8, 2) for side in sides}


F8, E5, U8, I8, I32, U32 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.uint32,
)
LAYOUTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "GPTQ": (_codes(I32, "q.qzeros", "q.scales", name="l.q.qweight") | _of("l.q.g_idx"), "GPTQ"),
    "AWQ": (_codes(I32, "q.qzeros", "q.scales", name="l.q.qweight"), "GPTQ or AWQ"),
    "Marlin": (_codes(I32, "q.s", name="l.q.B"), "integer codes"),
    "bitsandbytes nf4": (_of("l.q.weight.quant_state.bitsandbytes__nf4", dtype=U8), "bitsandbytes, 4 bits"),
    "bitsandbytes absmax": (_of("l.q.weight.absmax"), "bitsandbytes, 4 bits"),
    "bitsandbytes int8": (_of("l.q.SCB"), "bitsandbytes, 8 bits"),
    "compressed-tensors": (_codes(I32, "q.weight_scale", name="l.q.weight_packed"), "compressed-tensors"),
    "compressed-tensors 2:4": (_of("l.q.bitmask", 8, 6, dtype=U8), "compressed-tensors"),
    "NVFP4": (_codes(U8, "q.weight_scale", "q.weight_scale_2"), "NVFP4"),
    "fp8, one scale": (_codes(F8, "q.weight_scale"), "fp8 or int8 with scales"),
    "fp8, blocks": (_codes(F8, "q.weight_scale_inv"), "fp8 with block scales"),
    "fp8, blocks, .scale": (_codes(F8, "q.scale"), "fp8 (float8_e4m3fn)"),
    "fp8, experts": (_codes(F8, "gate_up_proj_scale", name="l.gate_up_proj"), "fp8 (float8_e4m3fn)"),
    "fp8, a cast": (_codes(E5), "fp8 (float8_e5m2)"),
    "MLX": (_codes(U32, "q.scales", "q.biases"), "MLX"),
    "HQQ": (_codes(U8, "q.scale", "q.zero", name="l.q.W_q"), "HQQ"),
    "quanto": (_codes(I8, "q.weight._scale", name="l.q.weight._data"), "quanto"),
    "torchao": (_codes(I8, "q._weight_scale", name="l.q._weight_qdata"), "torchao"),
    "MXFP4": (_codes(U8, "experts.down_proj_scales", name="l.experts.down_proj_blocks"), "MXFP4"),
    "AQLM": (_codes(I8, "q.codebooks", "q.scales", name="l.q.codes"), "AQLM"),
    "VPTQ": (_codes(I32, "q.centroids.weight", name="l.q.indices"), "VPTQ"),
    "BitNet": (_codes(U8, "q.weight_scale"), "fp8 or int8 with scales"),
    "EETQ": (_codes(I8, "q.weight_scales"), "EETQ"),
    "HIGGS, int8": (_codes(I8, "q.scales"), "integer codes"),
    "EXL2": (_of("l.q.q_invperm"), "EXL2"),
    "EXL3": (_of("l.q.trellis"), "EXL3"),
    "QuIP#": (_of("l.q.Qidxs"), "QuIP#"),
    "ComfyUI fp8": (_codes(F8, "q.scale_weight"), "ComfyUI, scaled"),
    "ComfyUI marks": (_of("l.q.comfy_quant", dtype=U8), "ComfyUI, scaled"),
    "torch.ao": (_of("l.q._packed_params.dtype"), "torch.ao"),
    "PEFT": (_of("base_model.model.q_proj.lora_A.weight", 3, 4), "a LoRA adapter"),
    "PEFT embedding": (_of("base_model.model.wte.lora_embedding_B", 3, 4), "a LoRA adapter"),
    "PEFT, a parameter": (_of("q_proj.lora_B", 3, 4), "a LoRA adapter"),
    "DoRA": (_of("q.lora_magnitude_vector") | _of("q.lora_A.weight", 3, 4), "a DoRA adapter"),
    "kohya": (_of("lora_unet_mid_q.lora_down.weight", 3, 4), "a LoRA adapter (kohya)"),
    "diffusers": (_of("unet.attn.to_q.lora.down.weight", 3, 4), "a LoRA adapter (diffusers)"),
    "processor": (_of("attn1.processor.to_q_lora.up.weight", 3, 4), "a LoRA adapter (diffusers)"),
    "XLabs": (_of("blocks.0.processor.qkv_lora1.down.weight", 3, 4), "a LoRA adapter (diffusers)"),
    "LoHa": (_of("lora_unet_q.hada_w1_a", 3, 4), "a LoHa adapter"),
    "LoKr": (_of("lora_unet_q.lokr_w2", 3, 4), "a LoKr adapter"),
    "IA3": (_of("base_model.model.k.ia3_l", 3, 1), "an IA3 adapter"),
    "VeRA": (_of("base_model.model.q.vera_lambda_b"), "a VeRA adapter"),
    "OFT": (_of("base_model.model.q.oft_r", 3, 4), "an OFT adapter"),
    "LyCORIS": (_of("lycoris_blocks_0_q.diff", 3, 4), "a LyCORIS adapter"),
    "FourierFT": (_of("base_model.model.q.fourierft_spectrum"), "a PEFT adapter"),
    "prompt tuning": (_of("prompt_embeddings", 8, 16), "a prompt"),
    "textual inversion": (_of("<cat-toy>", 1, 16), "a textual inversion"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_the_layout_of_weights_that_are_not_plain(tmp_path: Path, layout: str, suffix: str) -> None:
    state, said = LAYOUTS[layout]
    whole = {} if said == "a prompt" else mlp_state()
    path = tmp_path / f"m{suffix}"
    save_file({**whole, **state}, path) if suffix == ".safetensors" else torch.save({**whole, **state}, path)
    with pytest.raises(MpocError) as caught:
        open_checkpoint(path)
    assert said in str(caught.value)
    assert any(repr(name) in str(caught.value) for name in state)
    assert caught.value.hint


@pytest.mark.parametrize(
    "state",
    [
        _of("q_proj.weight", 3, 3),
        _of("lora.weight", 3, 3),
        _of("scale.weight", 3, 3),
        _of("dequant.weight", 3, 3),
        _of("q.weight", 3, 3) | _of("q.scale"),  # a learned scale beside a plain weight
        _of("relative_position_index", 3, 3, dtype=torch.int64) | _of("scale"),
        _of("block.w_lora.lora.0.weight", 3, 3),  # RWKV's own
        _of("prompt_encoder.mask_embed.weight", 3, 3),
        _of("prompt_embeddings", 3, 3) | mlp_state(),
        _of("attn.q_weight", 3, 3),
        _of("bone_encoder.weight", 3, 3),
        _of("kv_a.k_scale", 1),
    ],
    ids=lambda state: next(iter(state)),
)
def test_accepts_names_that_only_resemble_quantised_ones(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "m.safetensors")
    assert open_checkpoint(tmp_path / "m.safetensors").infos.keys() == state.keys()


FOREIGN = {
    "m.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a Git LFS pointer",
    ),
    "m.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "page.safetensors": (b"\n<!DOCTYPE html>\n<html>", "an HTML or XML page"),
    "page.bin": (b"<?xml version='1.0'?><Error>", "an HTML or XML page"),
    "m.bin": (b'{"error": "gated"}', "a JSON file"),
    "m.ckpt": (b"GGUF\x03\0\0\0", "a GGUF file"),
    "m.gguf": (b"GGUF\x03\0\0\0", "a GGUF file"),
    "m.h5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "m.pth": (b"\x1f\x8b\x08\0", "a gzip archive"),
    "m.onnx": (b"x", "an ONNX network"),
    "m.msgpack": (b"x", "Flax weights"),
    "model.safetensors.index.json": (b"{}", "an index of shards; give its directory"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_names_files_of_other_formats(tmp_path: Path, name: str) -> None:
    content, said = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MpocError, match=f"{name}: {said}") as caught:
        open_checkpoint(tmp_path / name)
    assert caught.value.hint


def test_names_files_under_another_suffix(tmp_path: Path) -> None:
    save_file(mlp_state(), tmp_path / "m.pt")
    torch.save(mlp_state(), tmp_path / "n.safetensors")
    for name, kind, renamed in (("m.pt", "safetensors", "m.safetensors"), ("n.safetensors", "torch", "n.pt")):
        with pytest.raises(MpocError, match=f"a {kind} file under another suffix") as caught:
            open_checkpoint(tmp_path / name)
        command = (caught.value.hint or "").removeprefix("rename it: ")
        subprocess.run(command, shell=True, check=True)
        assert open_checkpoint(tmp_path / renamed).infos.keys() == mlp_state().keys()


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
