from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpoc.compression.expand import default_dense_output, expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import Recipe, make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest_reader import read_manifest
from mpoc.models.zoo.cifar import resnet
from tests.support.architectures import AUTO, answer, tiny
from tests.support.checkpoints import contents, mlp_state, relative_error, save_directory
from tests.support.process import run_python

FULL: dict[str, Any] = {"bond": 10**6, "allow_growth": True, "embeddings": True}


def round_trip(source: Path, **options: Any) -> Path:
    """Compress beside the source, expand again; where the dense checkpoint is."""
    recipe = make_recipe(None, options or FULL)
    folder = source.parent
    ending = "" if source.is_dir() else ".safetensors"
    compressed, dense = folder / f"compressed{ending}", folder / f"dense{ending}"
    compress_checkpoint(source, compressed, recipe)
    expand_checkpoint(compressed, dense)
    return dense


@dataclass
class Chain:
    """Models compressed at full bond and expanded again, each in a folder of its name."""

    folder: Path
    expected: dict[str, Tensor]  # the originals' logits, from before they were saved
    logits: dict[str, Tensor]  # by folder, of every directory that transformers alone could load
    errors: dict[str, str]  # by folder, of every other one


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    expected = {}
    for name in AUTO:
        model = tiny(name)
        expected[name] = answer(model)
        model.save_pretrained(folder / name / "original")
        (folder / name / "original" / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
        round_trip(folder / name / "original")
        (folder / name / "compressed").rename(folder / name / f"{name}-compressed")
        (folder / name / "dense").rename(folder / name / f"{name}-dense")
    directories = [folder / name / f"{name}-{kind}" for name in AUTO for kind in ("dense", "compressed")]
    said = run_python("-m", "tests.support.architectures", folder / "logits.safetensors", *directories)
    return Chain(folder, expected, load_file(folder / "logits.safetensors"), json.loads(said))


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTO)
class TestWholeChain:
    """Each architecture from save_pretrained to from_pretrained, in a process without mpoc."""

    def test_expanded_directory_computes_like_the_original(self, chain: Chain, name: str) -> None:
        logits = chain.logits[f"{name}-dense"]
        assert logits.std() > 1e-3  # a model that answers at all
        torch.testing.assert_close(logits, chain.expected[name], rtol=0, atol=1e-4)

    def test_compresses_every_linear_map(self, chain: Chain, name: str) -> None:
        manifest = read_manifest(chain.folder / name / f"{name}-compressed")
        assert manifest.replaced == list(manifest.layers)
        kinds = {layer.kind for layer in manifest.replaced}
        assert kinds == ({"linear", "conv2d"} if name == "vit" else {"linear", "embedding"})
        transposed = [layer.name for layer in manifest.replaced if layer.transposed]
        assert len(transposed) == (8 if name == "gpt2" else 0)
        assert manifest.kinds_from == f"config.json ({name})"

    def test_transformers_alone_refuses_the_compressed_directory(self, chain: Chain, name: str) -> None:
        assert f"{name}-compressed" not in chain.logits
        assert "import-mpoc.hf-before-loading" in chain.errors[f"{name}-compressed"]

    def test_keeps_every_other_file(self, chain: Chain, name: str) -> None:
        before = contents(chain.folder / name / "original")
        after = contents(chain.folder / name / f"{name}-dense")
        assert after.keys() == before.keys()
        assert json.loads(after.pop("config.json")) == json.loads(before.pop("config.json"))
        after.pop("model.safetensors")
        before.pop("model.safetensors")
        assert after == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_full_bond_restores_weights_and_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    state = mlp_state(dtype)
    state["conv.weight"] = torch.randn(8, 6, 3, 3, dtype=dtype)
    state["steps"] = torch.tensor(7)
    torch.save({"state_dict": state}, tmp_path / "m.pt")
    dense = load_file(round_trip(tmp_path / "m.pt"))
    assert dense.keys() == state.keys()
    for name, tensor in state.items():
        assert (dense[name].dtype, dense[name].shape) == (tensor.dtype, tensor.shape)
        if tensor.dim() < 2:
            assert torch.equal(dense[name], tensor)  # untouched
        else:
            assert relative_error(tensor, dense[name]) < 20 * torch.finfo(dtype).eps


def test_reported_error_matches_the_expanded_weight(tmp_path: Path) -> None:
    state = mlp_state()
    torch.save(state, tmp_path / "m.pt")
    dense = load_file(round_trip(tmp_path / "m.pt", bond=6))
    manifest = read_manifest(tmp_path / "compressed.safetensors")
    assert len(manifest.replaced) == 2
    for layer in manifest.replaced:
        error = relative_error(state[layer.name], dense[layer.name])
        assert layer.relative_error == pytest.approx(error, rel=1e-4)
        assert error > 0.1


@pytest.mark.parametrize("legacy", [False, True])
def test_restores_tied_and_strided_tensors(tmp_path: Path, legacy: bool) -> None:
    shared = torch.randn(96, 64).t()  # not contiguous
    state = {"wte.weight": shared, "fc.weight": torch.randn(64, 128)[:, ::2], "head.weight": shared}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    dense = load_file(round_trip(tmp_path / "m.pt"))
    assert dense.keys() == state.keys()
    for name, tensor in state.items():
        assert relative_error(tensor, dense[name]) < 1e-6
    assert torch.equal(dense["wte.weight"], dense["head.weight"])
    stored = load_file(tmp_path / "compressed.safetensors")
    assert not any(name.startswith("head") for name in stored)


def test_torch_shards_expand_to_safetensors(tmp_path: Path) -> None:
    state = mlp_state()
    state["head.weight"] = state["fc2.weight"]
    source = save_directory(tmp_path / "m", state, shards=1, suffix=".bin")
    dense = round_trip(source)
    names = {"config.json", "tokenizer.json", "README.md", "model.safetensors"}
    assert contents(dense).keys() == names
    assert load_file(dense / "model.safetensors").keys() == state.keys()


def test_expanded_shards_have_a_correct_index(tmp_path: Path) -> None:
    state = mlp_state()
    source = save_directory(tmp_path / "m", state, shards=3)
    compress_checkpoint(source, tmp_path / "out", make_recipe(None, {**FULL, "max_shard_size": 5000}))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    expand_checkpoint(tmp_path / "out", tmp_path / "dense", max_shard_size=9000)
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "dense" / file, "pt") as handle:
            assert relative_error(state[name], handle.get_tensor(name)) < 1e-5


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("m.mpo.safetensors", "m.dense.safetensors"),
        ("folder/m.safetensors", "m.dense.safetensors"),
        ("m.tuned.mpo.safetensors", "m.tuned.dense.safetensors"),
        ("bert-mpo", "bert-dense"),
        ("folder/bert", "bert-dense"),
        (".", "folder-dense"),
    ],
)
def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, output: str) -> None:
    (tmp_path / "folder" / "bert-mpo").mkdir(parents=True)
    (tmp_path / "folder" / "folder" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "folder")
    assert default_dense_output(Path(source)) == Path(output)


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    torch.save({**mlp_state(), "tied": torch.ones(3)}, tmp_path / "m.pt")
    compress_checkpoint(tmp_path / "m.pt", tmp_path / "c.safetensors", Recipe(bond=4))
    return tmp_path / "c.safetensors"


def change(path: Path, tensors: dict[str, Tensor | None], **manifest: Any) -> None:
    """Write a compressed file again with some tensors replaced (None: gone) and manifest keys changed."""
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    state = {**load_file(path), **tensors}
    metadata["mpoc"] = json.dumps({**json.loads(metadata["mpoc"]), **manifest})
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path, metadata)


@pytest.mark.parametrize(
    ("tensors", "manifest", "said"),
    [
        ({"fc1.cores.1": None}, {}, "core 'fc1.cores.1' is missing"),
        ({"fc1.cores.1": torch.zeros(2, 2)}, {}, r"core 'fc1.cores.1' is \(2, 2\) float32; the manifest"),
        ({"fc2.cores.0": torch.zeros(1, 4, 2, 4).half()}, {}, "core 'fc2.cores.0' is .* float16"),
        ({}, {"tied": {"head.weight": "gone.weight"}}, "tensor 'gone.weight' is missing"),
        ({}, {"format": 99}, "manifest format 99, this mpoc reads format 1"),
        ({}, {"layers": [{"name": "x"}]}, "damaged manifest"),
    ],
)
def test_rejects_damaged_files_and_writes_nothing(
    compressed: Path, tensors: dict[str, Tensor | None], manifest: dict[str, Any], said: str
) -> None:
    change(compressed, tensors, **manifest)
    before = contents(compressed.parent)
    with pytest.raises(MpocError, match=said) as caught:
        expand_checkpoint(compressed, compressed.parent / "dense.safetensors")
    assert str(compressed) in str(caught.value)
    assert contents(compressed.parent) == before


def test_rejects_truncated_files(compressed: Path) -> None:
    compressed.write_bytes(compressed.read_bytes()[:-10])
    with pytest.raises(MpocError, match=r"c\.safetensors: truncated: 10 bytes missing"):
        expand_checkpoint(compressed, compressed.parent / "dense.safetensors")


def test_existing_output_requires_force(compressed: Path) -> None:
    dense = compressed.parent / "dense.safetensors"
    dense.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        expand_checkpoint(compressed, dense)
    assert dense.read_text() == "mine"
    expand_checkpoint(compressed, dense, force=True)
    assert "fc1.weight" in load_file(dense)
    with pytest.raises(UsageError, match="over or into the input"):
        expand_checkpoint(compressed, compressed, force=True)


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 9])
def test_rejects_uncompressed_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.safetensors"
    save_file(mlp_state(), path) if content is None else path.write_bytes(content)
    with pytest.raises(MpocError, match=r"m\.safetensors: not "):
        expand_checkpoint(path, tmp_path / "dense.safetensors")


@pytest.mark.parametrize(("options", "error"), [({"bond": 8}, 0.97), (FULL, 1e-5)])
def test_restores_a_published_resnet(
    data: Path, tmp_path: Path, options: dict[str, Any], error: float
) -> None:
    original = data / "checkpoints" / "resnet20-12fca82f.th"
    compress_checkpoint(original, tmp_path / "c.safetensors", make_recipe(None, options))
    expand_checkpoint(tmp_path / "c.safetensors", tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    network = resnet(20)
    network.load_state_dict(dense, strict=True)
    assert network.eval()(torch.randn(2, 3, 32, 32)).isfinite().all()
    state = torch.load(original, "cpu", weights_only=True)["state_dict"]
    assert len(state) == len(dense) > 90
    for name, tensor in state.items():
        again = dense[name.removeprefix("module.")]
        if tensor.dim() > 1:
            assert relative_error(tensor, again) <= error, name
        else:
            assert torch.equal(again, tensor), name


def test_restores_tied_weights_without_the_wrapper_prefix(tmp_path: Path) -> None:
    weight = torch.randn(32, 32)
    state = {"module.fc.weight": weight, "module.fc.bias": torch.zeros(32), "head.weight": weight}
    torch.save(state, tmp_path / "m.pt")
    dense = load_file(round_trip(tmp_path / "m.pt"))
    assert dense.keys() == state.keys()
    assert torch.equal(dense["head.weight"], dense["module.fc.weight"])


def test_rejects_files_with_a_missing_tensor(tmp_path: Path) -> None:
    save_file(mlp_state(), tmp_path / "m.safetensors")
    compressed = tmp_path / "c.safetensors"
    compress_checkpoint(tmp_path / "m.safetensors", compressed, make_recipe(None, {"bond": 3}))
    with safe_open(compressed, framework="pt") as file:
        metadata = file.metadata()
    kept = load_file(compressed)
    del kept[next(name for name in kept if name.endswith("bias"))]
    save_file(kept, compressed, metadata)
    with pytest.raises(MpocError, match=r"some of the tensors of m\.safetensors are missing"):
        expand_checkpoint(compressed, tmp_path / "dense.safetensors")
    assert not (tmp_path / "dense.safetensors").exists()


def test_rejects_outputs_with_another_suffix(tmp_path: Path) -> None:
    torch.save(mlp_state(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="must be named like one") as caught:
        compress_checkpoint(tmp_path / "m.pt", tmp_path / "out.pt", make_recipe(None, {"bond": 3}))
    assert caught.value.hint == f"-o {tmp_path / 'out.safetensors'}"


def test_rejects_directories_with_a_damaged_config(tmp_path: Path) -> None:
    source, output = save_directory(tmp_path / "m", mlp_state()), tmp_path / "m-mpo"
    compress_checkpoint(source, output, make_recipe(None, {"bond": 2}))
    (output / "config.json").write_text('{"quantization_config": ')
    with pytest.raises(MpocError, match=r"config\.json: not valid JSON"):
        expand_checkpoint(output, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
