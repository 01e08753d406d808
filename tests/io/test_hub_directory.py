from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError
from mpoc.io import hub_directory
from mpoc.io.hub_directory import GUARD, GUARD_KEY, copy_other_files, mark_compressed, other_files, unmark
from mpoc.io.manifest import Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.io.safetensors_writer import plan_shards
from tests.io.test_safetensors_writer import entry
from tests.support.checkpoints import CARD, CONFIG, contents, mlp_state, num_bytes, save_directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_directory(tmp_path / "model", mlp_state(), shards=2)


@pytest.fixture
def manifest(source: Path, tmp_path: Path) -> Manifest:
    return compress_checkpoint(source, tmp_path / "made", make_recipe(None, {"bond": 3})).manifest


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def weights(source: Path) -> list[Path]:
    return sorted(source.glob("model*.safetensors"))


def test_copies_everything_but_the_weights(source: Path) -> None:
    kept = ["vocab.txt", "merges.txt", "training_args.bin", "code/modeling.py", "1_Dense/model.safetensors"]
    copies = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.gguf"]
    copies += ["onnx/model.onnx", "pytorch_model.bin.index.json", "model.fp16.safetensors"]
    hidden = [".git/config", ".cache/huggingface/x", "__pycache__/modeling.pyc", "code/__pycache__/a.pyc"]
    put(source, *kept, *copies, *hidden)
    expected = {*kept, "config.json", "tokenizer.json", "README.md"}
    assert {str(name) for name in other_files(source, weights(source))} == expected


def test_keeps_weights_of_other_modules(source: Path) -> None:
    put(source, "2_Dense/pytorch_model.bin")
    inner = source / "2_Dense" / "pytorch_model.bin"
    assert inner.relative_to(source) in other_files(source, weights(source))
    assert inner.relative_to(source) not in other_files(source, [*weights(source), inner])


def test_copies_files_exactly_and_links_as_files(source: Path, tmp_path: Path) -> None:
    """Links as in a hub cache: snapshots/REVISION/NAME → blobs/HASH."""
    put(source, "code/modeling.py")
    (tmp_path / "cache" / "snapshots").mkdir(parents=True)
    source = source.rename(tmp_path / "cache" / "snapshots" / "a1b2")
    blob = tmp_path / "cache" / "blobs" / "hash"
    blob.parent.mkdir()
    blob.write_bytes(bytes(range(256)))
    (source / "vocab.txt").symlink_to(Path("../../blobs/hash"))
    target = tmp_path / "target"
    target.mkdir()
    copy_other_files(source, target, weights(source))
    copied = contents(target)
    assert copied == {name: data for name, data in contents(source).items() if not name.startswith("model")}
    assert copied["vocab.txt"] == blob.read_bytes()
    assert not any(file.is_symlink() for file in target.rglob("*"))


def test_skips_links_leading_outside(source: Path, tmp_path: Path) -> None:
    """Or a directory from a stranger would carry off what its user can read."""
    (tmp_path / "secret").write_text("key")
    (source / "vocab.txt").symlink_to(tmp_path / "secret")
    (source / "loop").symlink_to("loop")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(MpocError, match=r"vocab\.txt: a link to .*secret, outside the directory"):
        copy_other_files(source, target, weights(source))
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("limit", [10**6, 9000])
def test_writes_shards_and_index(tmp_path: Path, limit: int) -> None:
    state = mlp_state()
    shards = plan_shards([entry(name, tensor) for name, tensor in state.items()], limit)
    source = open_checkpoint(save_directory(tmp_path / "source", state))
    hub_directory.write_shards(tmp_path, shards, source)
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    if limit == 10**6:
        assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "source"}
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert index["weight_map"].keys() == state.keys()
    assert set(index["weight_map"].values()) == files
    assert len(files) > 1


def test_config_describes_the_cores(source: Path, manifest: Manifest) -> None:
    mark_compressed(source, manifest)
    config = json.loads((source / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config.pop(GUARD_KEY) == GUARD
    assert config == CONFIG
    assert quantization["quant_method"] == "mpo"
    layer = quantization["layers"]["fc1.weight"]
    record = manifest.replaced[0]
    assert record.name == "fc1.weight"
    assert layer["shape"] == [64, 48] == list(record.shape)
    assert layer["bonds"] == list(record.bonds)
    assert layer["output_factors"] == list(record.output_factors)
    assert layer["input_factors"] == list(record.input_factors)
    assert (layer["form"], layer["kind"], layer["dtype"]) == ("mpo", "linear", "float32")
    assert read_manifest(source) == manifest


def test_model_card_keeps_its_text_and_gains_a_table(source: Path, manifest: Manifest) -> None:
    mark_compressed(source, manifest)
    card = (source / "README.md").read_text()
    assert card.startswith(CARD)
    for record in manifest.replaced:
        row = next(line for line in card.splitlines() if line.startswith(f"| {record.layer} |"))
        assert f"{record.num_original:,} → {record.num_stored:,}" in row
        assert f"{record.rho:.4f}" in row
    assert f"ρ = {manifest.rho:.4f}" in card


@pytest.mark.parametrize(
    "card",
    [
        None,
        b"# A model\n",
        b"# A model",
        b"# A model\n\n\n",
        b"\n# A model\r\n\r\nwritten on Windows\r\n",
        "# Ein Modell für alles, 模型\n".encode(),
        b"caf\xe9, in Latin-1\n",
        b"---\nlicense: mit\n---\n",
    ],
)
@pytest.mark.parametrize(
    "config", [CONFIG, {"é": "模型", "eps": 1e-12, "big": 10**20, "n": None, "z": [1.0]}]
)
def test_unmarking_restores_the_directory(
    source: Path, manifest: Manifest, card: bytes | None, config: dict[str, Any]
) -> None:
    (source / "README.md").unlink()
    if card is not None:
        (source / "README.md").write_bytes(card)
    (source / "config.json").write_text(json.dumps(config))
    before = contents(source)
    mark_compressed(source, manifest)
    assert contents(source) != before
    unmark(source)
    after = contents(source)
    assert json.loads(after.pop("config.json")) == config
    before.pop("config.json")
    assert after == before


def test_marking_does_not_depend_on_the_source_of_the_text(
    source: Path, manifest: Manifest, tmp_path: Path
) -> None:
    shards = plan_shards([entry(name, tensor) for name, tensor in mlp_state().items()], 9000)
    checkpoint = open_checkpoint(source)
    predicted = hub_directory.overhead(checkpoint, shards, manifest)
    target = tmp_path / "target"
    target.mkdir()
    copy_other_files(source, target, weights(source))
    hub_directory.write_shards(target, shards, checkpoint)
    mark_compressed(target, manifest)
    assert num_bytes(target) == predicted + sum(tensor.nbytes for tensor in mlp_state().values())


def test_handles_missing_config_and_card(tmp_path: Path) -> None:
    source = save_directory(tmp_path / "bare", {"fc.weight": torch.randn(64, 64)})
    for name in ("config.json", "README.md", "tokenizer.json"):
        (source / name).unlink()
    compress_checkpoint(source, tmp_path / "out", make_recipe(None, {"bond": 3}))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.keys() == {"quantization_config", GUARD_KEY}
    assert (tmp_path / "out" / "README.md").read_text().startswith("<!-- mpoc: begin -->")


def test_names_skipped_and_further_weights(source: Path) -> None:
    assert hub_directory.notes_on_files(source, weights(source)) == []
    put(source, "vision.safetensors", "checkpoint-5/model.safetensors", "onnx/model.onnx", "vocab.txt")
    skipped, further = hub_directory.notes_on_files(source, weights(source))
    assert skipped.endswith("weights: checkpoint-5/model.safetensors, onnx/model.onnx")
    assert further == "copied as they are: vision.safetensors"
    assert Path("vocab.txt") in other_files(source, weights(source))


@pytest.mark.parametrize(
    ("name", "is_copy"),
    [
        *(("original/consolidated.00.pth", True), ("original/params.json", True), ("metal/model.bin", True)),
        *(
            ("fp32/weights.safetensors", True),
            ("fp32/notes.txt", False),
            ("2_Dense/model.safetensors", False),
        ),
        *(("consolidated.safetensors", True), ("whole.pth", True), ("optimizer.pt", True)),
        *(("same/pytorch_model.bin", True), ("draft/model.safetensors", False), ("vae.ckpt", False)),
        *(("global_step9/x.pt", True), ("diffusion_pytorch_model.fp16.safetensors", True)),
    ],
)
def test_leaves_second_copies_of_the_model_behind(source: Path, name: str, is_copy: bool) -> None:
    size = sum(file.stat().st_size for file in weights(source))
    put(source, name)
    if name.startswith(("fp32/w", "2_Dense", "whole", "draft")):
        (source / name).write_bytes(b"x" * size)
    for folder, config in (("same", CONFIG), ("draft", {"model_type": "other"})):
        put(source, f"{folder}/config.json")
        (source / folder / "config.json").write_text(json.dumps(config))
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    assert (Path(name) not in other_files(source, weights(source))) == is_copy


@pytest.mark.parametrize("text", ["[1]", "{}", "not JSON"])
def test_keeps_modules_whose_configuration_names_no_class(source: Path, text: str) -> None:
    put(source, "head/config.json", "head/model.safetensors")
    (source / "head" / "config.json").write_text(text)
    assert Path("head/model.safetensors") in other_files(source, weights(source))
    (source / "config.json").write_text("{}")
    assert Path("head/model.safetensors") in other_files(source, weights(source))


def test_names_links_to_folders_and_refuses_those_that_lead_out(source: Path, tmp_path: Path) -> None:
    put(source, "code/modeling.py")
    (source / "again").symlink_to("code")
    assert hub_directory.notes_on_files(source, weights(source)) == ["not copied, links to folders: again"]
    (source / "out").symlink_to(tmp_path)
    with pytest.raises(MpocError, match="outside the directory"):
        other_files(source, weights(source))


def test_expand_adds_no_config(source: Path, manifest: Manifest) -> None:
    (source / "config.json").unlink()
    mark_compressed(source, manifest)
    unmark(source)
    assert not (source / "config.json").exists()
