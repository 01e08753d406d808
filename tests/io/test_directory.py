from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io.open_checkpoint import open_checkpoint
from tests.support.architectures import tiny
from tests.support.checkpoints import CONFIG, mlp_state, save_directory

both_suffixes = pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
INDEX = "model.safetensors.index.json"


def assert_holds(path: Path, state: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.infos.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)


def refusal(path: Path) -> MpocError:
    with pytest.raises(MpocError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    return caught.value


@both_suffixes
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_single_files_and_shards(tmp_path: Path, shards: int, suffix: str) -> None:
    state = mlp_state()
    path = save_directory(tmp_path / "m", state, shards, suffix=suffix)
    assert_holds(path, state)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == CONFIG
    assert len(checkpoint.weight_files) == shards
    assert checkpoint.nbytes_on_disk == sum(file.stat().st_size for file in path.glob(f"*model*{suffix}"))


@both_suffixes
def test_strips_wrapper_prefixes_in_shards(tmp_path: Path, suffix: str) -> None:
    state = mlp_state()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    assert_holds(save_directory(tmp_path / "m", wrapped, 2, suffix=suffix), state)


def test_reads_tied_tensors_of_torch_shards(tmp_path: Path) -> None:
    state = mlp_state()
    state["head.weight"] = state["fc2.weight"]
    path = save_directory(tmp_path / "m", state, suffix=".bin")
    checkpoint = open_checkpoint(path)
    assert checkpoint.tied == {"head.weight": "fc2.weight"}
    assert "head.weight" not in checkpoint.infos


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_reads_shards_of_transformers(tmp_path: Path, architecture: str) -> None:
    model = tiny(architecture)
    model.save_pretrained(tmp_path / "m", max_shard_size="30kB")
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    state = {name: tensor for name, tensor in model.state_dict().items() if name in index["weight_map"]}
    checkpoint = open_checkpoint(tmp_path / "m")
    assert len(checkpoint.weight_files) == len(set(index["weight_map"].values())) > 2
    assert checkpoint.config is not None
    assert checkpoint.config["model_type"] == architecture
    assert_holds(tmp_path / "m", state)


def test_prefers_model_safetensors(tmp_path: Path) -> None:
    state = mlp_state()
    path = save_directory(tmp_path / "m", state)
    save_file({"fc1.weight": torch.zeros(2, 2)}, path / "consolidated.safetensors")
    torch.save({"fc1.weight": torch.zeros(2, 2)}, path / "pytorch_model.bin")
    (path / "optimizer.bin").write_bytes(b"something else")
    assert_holds(path, state)


def test_reads_weights_under_another_name(tmp_path: Path) -> None:
    state = mlp_state()
    path = save_directory(tmp_path / "m", state)
    (path / "model.safetensors").rename(path / "diffusion_model.safetensors")
    assert_holds(path, state)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin"])
def test_prefers_usual_names_to_safetensors_of_any_name(tmp_path: Path, name: str) -> None:
    state = mlp_state()
    torch.save(state, tmp_path / name)
    save_file({"proj.weight": torch.zeros(2, 2)}, tmp_path / "projector.safetensors")
    assert_holds(tmp_path, state)


def test_reads_a_hub_cache_snapshot(tmp_path: Path) -> None:
    state = mlp_state()
    blobs = save_directory(tmp_path / "blobs", state, shards=2)
    snapshot = tmp_path / "snapshots" / "a1b2"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(list(blobs.iterdir())):
        blob = file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(blob)
    assert_holds(snapshot, state)


def test_reads_a_directory_without_config(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "m", mlp_state())
    (path / "config.json").unlink()
    assert open_checkpoint(path).config is None


def test_rejects_several_weight_files_without_index(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2)
    (path / INDEX).unlink()
    error = refusal(path)
    assert "2 weight files and no index" in str(error)
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in str(error)
    assert error.hint == f"download their index too: {INDEX}"
    for name in ("a", "b"):
        save_file({f"{name}.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    error = refusal(tmp_path)
    assert "2 weight files and no index" in str(error)
    assert "name one of the files" in (error.hint or "")


def test_says_what_a_directory_without_weights_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "no weights in this directory; it holds config.json" in str(refusal(tmp_path))
    torch.save(mlp_state(), tmp_path / "last one.pt")
    error = refusal(tmp_path)
    assert "can be compressed: last one.pt" in str(error)
    assert error.hint == f"mpoc compress '{tmp_path}/last one.pt' --bond 8"
    for number, name in enumerate(("vae", "unet")):
        state = mlp_state() if number else {"a.weight": torch.ones(2, 2)}
        save_directory(tmp_path / name, state)
    error = refusal(tmp_path)
    assert "can be compressed: unet, vae" in str(error)
    assert error.hint == f"mpoc compress {tmp_path}/unet --bond 8"


def test_names_parts_of_tensor_parallelism(tmp_path: Path) -> None:
    for number in range(2):
        torch.save(mlp_state(), tmp_path / f"consolidated.0{number}.pth")
    said = "consolidated.00.pth, consolidated.01.pth are parts of one model"
    assert said in str(refusal(tmp_path))
    (note,) = open_checkpoint(tmp_path / "consolidated.01.pth").notes
    assert note == "one of 2 parts of a model whose matrices are split across devices"


def test_names_a_pointer_in_the_place_of_a_configuration(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "m", mlp_state())
    (path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "config.json: a Git LFS pointer" in str(refusal(path))


@pytest.mark.parametrize(
    ("files", "said", "command"),
    [
        ((".metadata", "__0_0.distcp"), "a torch distributed checkpoint", "dcp_to_torch {0} {1}.pt"),
        (
            ("fsdp_0/__0_0.distcp", "x.txt"),
            "a torch distributed checkpoint",
            "dcp_to_torch {0}/fsdp_0 {1}.pt",
        ),
        (
            ("global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt",),
            "of DeepSpeed ZeRO",
            "zero_to_fp32 {0} ",
        ),
        (("latest_checkpointed_iteration.txt",), "a Megatron-LM checkpoint", "export_ckpt('{0}', OUT)"),
        (("mp_rank_00/model_optim_rng.pt",), "a Megatron-LM checkpoint", "export_ckpt('{0}', OUT)"),
        (("model.gguf",), "it holds model.gguf", "gguf_file='model.gguf'"),
    ],
)
def test_names_distributed_checkpoints(
    tmp_path: Path, files: tuple[str, ...], said: str, command: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    error = refusal(tmp_path)
    assert said in str(error)
    assert command.format(tmp_path, tmp_path.name) in (error.hint or "")


@both_suffixes
def test_names_a_missing_shard(tmp_path: Path, suffix: str) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2, suffix=suffix)
    shard = next(path.glob(f"*00002-of-00002{suffix}"))
    shard.unlink()
    error = refusal(path)
    assert f"shard {shard.name} is missing (tensor 'fc2.weight'" in str(error)
    assert "download" in (error.hint or "")


@both_suffixes
def test_names_a_truncated_shard(tmp_path: Path, suffix: str) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2, suffix=suffix)
    shard = next(path.glob(f"*00002-of-00002{suffix}"))
    shard.write_bytes(shard.read_bytes()[:-200])
    assert shard.name in str(refusal(path))


@both_suffixes
def test_rejects_index_naming_a_missing_tensor(tmp_path: Path, suffix: str) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2, suffix=suffix)
    index_file = next(path.glob("*.index.json"))
    index = json.loads(index_file.read_text())
    index["weight_map"]["fc3.weight"] = index["weight_map"]["fc1.weight"]
    index_file.write_text(json.dumps(index))
    assert "puts tensor 'fc3.weight' into" in str(refusal(path))


@both_suffixes
def test_keeps_tensors_and_shards_that_the_index_omits(tmp_path: Path, suffix: str) -> None:
    state = mlp_state()
    path = save_directory(tmp_path / "m", state, shards=2, suffix=suffix)
    index_file = next(path.glob("*.index.json"))
    index = json.loads(index_file.read_text())
    lost = ["fc1.bias", *(name for name, file in index["weight_map"].items() if "-00002-" in file)]
    for name in lost:
        del index["weight_map"][name]
    index_file.write_text(json.dumps(index))
    assert_holds(path, state)
    (note,) = open_checkpoint(path).notes
    assert sorted(note.removeprefix("not in the index, kept: ").split(", ")) == sorted(lost)


@both_suffixes
def test_rejects_a_tensor_of_two_shards_and_no_index(tmp_path: Path, suffix: str) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2, suffix=suffix)
    extra = {"extra.weight": torch.ones(2, 2)}
    for file in path.glob(f"*-of-*{suffix}"):
        if suffix == ".bin":
            torch.save(torch.load(file) | extra, file)
        else:
            save_file(load_file(file) | extra, file)
    assert "tensor 'extra.weight' is in " in str(refusal(path))


@both_suffixes
@pytest.mark.parametrize("indexed", [False, True])
def test_rejects_directories_that_lack_a_shard(tmp_path: Path, indexed: bool, suffix: str) -> None:
    """The names of the shards say how many there are, whether or not the index names them all."""
    path = save_directory(tmp_path / "m", mlp_state(), shards=2, suffix=suffix)
    shard, index_file = next(path.glob(f"*00002-of-00002{suffix}")), next(path.glob("*.index.json"))
    index = json.loads(index_file.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    shard.unlink()
    index_file.write_text(json.dumps(index)) if indexed else index_file.unlink()
    said = str(refusal(path))
    if suffix == ".bin" and not indexed:
        assert "shards of weights without their index (pytorch_model-00001-of-00002.bin)" in said
    else:
        assert "shard 2 of 2 is missing" in said


@pytest.mark.parametrize(
    "outside",
    [
        *("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", 3, None, ["x"], {"x": 1}),
        *("..\\x.safetensors", "a\0b", "x\n.safetensors", "\x1b[2J", "x" * 250, "\ud800"),
    ],
)
def test_rejects_index_leading_outside(tmp_path: Path, outside: Any) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2)
    save_file({"fc1.weight": torch.randn(2, 2)}, tmp_path / "x.safetensors")
    (path / "sub").mkdir()
    save_file({"fc1.weight": torch.randn(2, 2)}, path / "sub" / "x.safetensors")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["fc1.weight"] = outside
    (path / INDEX).write_text(json.dumps(index))
    said = str(refusal(path))
    if outside == "\ud800":
        assert "not valid JSON" in said
    else:
        assert f"tensor 'fc1.weight' is in {outside!r}, outside the directory" in said


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", INDEX])
def test_rejects_links_leading_outside(tmp_path: Path, file: str) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2)
    (path / file).rename(tmp_path / "elsewhere")
    (path / file).symlink_to(Path("..") / "elsewhere")
    error = refusal(path)
    assert f"{file}: a link to " in str(error) and "elsewhere, outside the directory" in str(error)
    assert "replace the link by the file" in (error.hint or "")


def test_follows_links_inside_the_directory(tmp_path: Path) -> None:
    state = mlp_state()
    path = save_directory(tmp_path / "m", state)
    (path / "model.safetensors").rename(path / "weights")
    (path / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(path)
    assert_holds(path, state)
    assert_holds(tmp_path / "link", state)


@pytest.mark.slow
def test_names_the_first_of_many_missing_tensors(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2)
    index = json.loads((path / INDEX).read_text())
    shard = index["weight_map"]["fc1.weight"]
    index["weight_map"] |= {f"x{k}": shard for k in range(50_000)}
    (path / INDEX).write_text(json.dumps(index))
    assert f"the index puts tensor 'x0' into {shard}, which lacks it" in str(refusal(path))


def test_rejects_contradictory_indexes(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2)
    text = (path / INDEX).read_text()
    (path / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"fc1.weight": "x", ', 1))
    assert "'fc1.weight' occurs twice" in str(refusal(path))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", "[1]", "config.json: not a JSON object"),
        ("config.json", b"\xff\xfe", "config.json: not valid JSON"),
        ("config.json", "[" * 100_000, "config.json: not valid JSON"),
        (INDEX, "not json", "index.json: not valid JSON"),
        (INDEX, "{}", "the index has no weight_map"),
        (INDEX, '{"weight_map": {}}', "the index has no weight_map"),
        (INDEX, '{"weight_map": ["a"]}', "the index has no weight_map"),
    ],
)
def test_names_damaged_json(tmp_path: Path, file: str, text: str | bytes, said: str) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), shards=2)
    (path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in str(refusal(path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "a LoRA (PEFT) adapter"),
        ({"peft_type": "LOHA"}, "a LoHa (PEFT) adapter"),
        ({"peft_type": "IA3"}, "an IA3 (PEFT) adapter"),
        ({"peft_type": "PROMPT_TUNING"}, "a prompt tuning (PEFT) adapter"),
    ],
)
def test_rejects_adapters(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    path = save_directory(tmp_path / "m", mlp_state())
    (path / "adapter_config.json").write_text(json.dumps(config))
    error = refusal(path)
    assert said in str(error)
    assert ("cannot be merged" if "prompt" in said else "merge_and_unload") in (error.hint or "")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        *(({"quantization_config": {"quant_method": m, "bits": 4}}, m) for m in ("gptq", "awq", "fp8")),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
        ({"parts": [{"compression_config": {"config_groups": {}}}]}, "unknown method"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": "int8"}, "int8"),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        ({"quantization": {"num_codebooks": 8}}, None),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False}}, None),
    ],
)
def test_rejects_quantised_models(tmp_path: Path, config: dict[str, Any], method: str | None) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), config={**CONFIG, **config})
    if method is None:
        assert open_checkpoint(path).config == {**CONFIG, **config}
    else:
        assert f"already quantised ({method})" in str(refusal(path))


def test_recognises_compressed_directories_without_manifest(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "mpo"}}
    error = refusal(save_directory(tmp_path / "m", mlp_state(), config=config))
    assert "already compressed by mpoc" in str(error)


def test_prefers_a_single_file_to_an_index(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "m", mlp_state(), 3)
    save_file({"lone.weight": torch.ones(2, 2)}, path / "model.safetensors")
    assert open_checkpoint(path).infos.keys() == {"lone.weight"}


def test_strips_wrapper_prefixes_across_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shards = {"a.bin": {"module.a.weight": torch.randn(4, 4)}, "b.bin": {"head.weight": torch.randn(4, 4)}}
    for file, state in shards.items():
        torch.save(state, tmp_path / file)
    index = {"weight_map": {name: file for file, state in shards.items() for name in state}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.infos.keys() == {"module.a.weight", "head.weight"}
    assert torch.equal(checkpoint.read("head.weight"), shards["b.bin"]["head.weight"])
