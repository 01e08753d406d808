"""Directories for transformers without mpoc: loaded in a process that cannot import it, decoded by hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.hf.export import export_directory
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import open_compressed
from mpoc.models.loading import open_network
from mpoc.quantize.storage import Grid
from tests.support.architectures import answer, tiny
from tests.support.process import run_python

LOADING = """if True:
    import sys
    sys.modules["mpoc"] = None
    from pathlib import Path
    from safetensors.torch import save_file
    import transformers
    from tests.support.architectures import ALL, answer
    answers = {}
    for folder in map(Path, sys.argv[2:]):
        load, options = getattr(transformers, ALL[folder.name]).from_pretrained, {}
        if (folder / "modeling_low_rank.py").exists():
            try:
                load(folder, trust_remote_code=False)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error)
                options = {"trust_remote_code": True}
        model, info = load(folder, output_loading_info=True, **options)
        assert not any(info.values()), info
        transformers.AutoModel.from_pretrained(folder, **options)
        answers[folder.name] = answer(model.eval())
    save_file(answers, sys.argv[1])
"""
SENTENCES = """if True:
    import sys
    sys.modules["mpoc"] = None
    import torch
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(sys.argv[2], trust_remote_code=True)
    save_file({"y": model.encode(["b c d", "d e"], convert_to_tensor=True)}, sys.argv[1])
"""


def compressed(folder: Path, kind: str, file: Path | None = None, **options: Any) -> Path:
    tiny(kind, layers=1).save_pretrained(folder / kind)
    compress_checkpoint(folder / kind, folder / "out", make_recipe(file, {"min_params": 1, **options}))
    return folder / "out"


def answers_without_mpoc(*folders: Path) -> dict[str, torch.Tensor]:
    """By the name of the folder, which is the kind."""
    file = folders[0].parent / "answers.safetensors"
    run_python("-c", LOADING, file, *folders)
    return load_file(file)


@pytest.mark.slow
def test_loads_without_mpoc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected, folders = {}, []
    for kind, form in (("llama", "svd"), ("qwen2", "svd"), ("t5", "svd"), ("gpt2", "mpo")):
        source = compressed(tmp_path / form / kind, kind, form=form, bond=6)
        folders.append(tmp_path / kind)
        found = export_directory(source, folders[-1], multiple=16 if kind == "qwen2" else None)
        assert set(found.pairs.values()) <= {16 if kind == "qwen2" else 6}
        assert bool(found.pairs) == (form == "svd") == (tmp_path / kind / "modeling_low_rank.py").is_file()
        if found.pairs:  # what optimum's exporters ask for
            code = (tmp_path / kind / "modeling_low_rank.py").read_text()
            assert f'export_model_type = "{kind}"' in code
        replaced = [layer.layer for layer in read_manifest(source).replaced]
        assert sorted([*found.pairs, *found.dense]) == sorted(replaced)
        expected[kind] = answer(open_network(source, None))
    for kind, given in answers_without_mpoc(*folders).items():
        torch.testing.assert_close(given, expected[kind], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sentence_transformers_without_mpoc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooling and a dense layer come along, and embeddings are those of the network loaded by mpoc."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    tiny("bert").bert.save_pretrained(tmp_path / "body")
    (tmp_path / "vocab.txt").write_text("[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e".replace(" ", "\n"))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "body")
    models = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    parts = [models.Transformer(str(tmp_path / "body")), models.Pooling(32), models.Dense(32, 7)]
    sentence_transformers.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "dense"))
    recipe = make_recipe(None, {"min_params": 1, "form": "svd", "bond": 6})
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", recipe)
    assert export_directory(tmp_path / "out", tmp_path / "hf").pairs
    expand_checkpoint(tmp_path / "out", tmp_path / "expanded")
    expected = sentence_transformers.SentenceTransformer(str(tmp_path / "expanded"), device="cpu")
    run_python("-c", SENTENCES, tmp_path / "y.safetensors", tmp_path / "hf")
    given = load_file(tmp_path / "y.safetensors")["y"]
    wanted = expected.encode(["b c d", "d e"], convert_to_tensor=True)
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)


def test_pads_ranks_with_zeros(tmp_path: Path) -> None:
    source = compressed(tmp_path, "llama", form="svd", bond=6)
    found = export_directory(source, tmp_path / "hf", multiple=16)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    stored = open_compressed(source, read_manifest(source))
    assert found.pairs
    for layer, rank in found.pairs.items():
        a, b = tensors[f"{layer}.0.weight"], tensors[f"{layer}.1.weight"]
        cores = [stored.read(f"{layer}.cores.{site}") for site in (0, 1)]
        assert rank == len(a) == b.shape[1] == 16
        assert torch.equal(b[:, :6].flatten(), cores[0].flatten()) and not b[:, 6:].any()
        assert torch.equal(a[:6].flatten(), cores[1].flatten()) and not a[6:].any()
    sizes = [tensors[f"{layer}.{k}.weight"].nbytes for layer in found.pairs for k in (0, 1)]
    assert found.padding_bytes * 16 == sum(sizes) * 10


@pytest.mark.parametrize(("storage", "bits", "width"), [("grid", 3, 4), ("grid", 6, 8), ("coded", 4, 8)])
def test_codes_are_those_of_compressed_tensors(tmp_path: Path, storage: str, bits: int, width: int) -> None:
    """Decoded here by the definition of "pack-quantized": (code − zero point) · scale."""
    source = compressed(tmp_path, "bert", bits=bits, storage=storage)
    found = export_directory(source, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    said = json.loads((tmp_path / "hf/config.json").read_text())["quantization_config"]
    weights = said["config_groups"]["group_0"]["weights"]
    assert (said["format"], weights["num_bits"], weights["symmetric"]) == ("pack-quantized", width, False)
    stored = open_compressed(source, read_manifest(source))
    shifts = torch.arange(0, 32, width)
    assert found.codes.layers
    assert found.codes.modules == found.codes.layers
    for layer in found.codes.layers:
        part = {key: tensors[f"{layer}.weight_{key}"] for key in ("packed", "scale", "zero_point", "shape")}
        rows, columns = part["shape"].tolist()
        codes, zeros = (
            (words.long()[..., None] >> shifts & (1 << width) - 1).flatten(1)
            for words in (part["packed"], part["zero_point"].T)
        )
        grouped = codes[:, :columns].unflatten(1, (-1, weights["group_size"])) - zeros.T[:rows, :, None]
        values = (grouped * part["scale"][:, :, None]).flatten(1)
        wanted = stored.read(f"{layer}.weight")
        error = float((values - wanted).norm() / wanted.norm())
        assert error == (0.0 if storage == "grid" else pytest.approx(found.codes.errors[layer]))
        assert error < 0.007
        assert f"{layer}.weight" not in tensors
    assert all(f"{layer}.weight" in tensors for layer in found.dense)


@pytest.mark.parametrize("storage", ["grid", "coded"])
def test_the_grid_is_that_of_most_numbers(tmp_path: Path, storage: str) -> None:
    """Here by row: no group divides the 40 inputs of most layers, and one the 96 of two small ones."""
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=40, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    recipe = make_recipe(None, {"min_params": 1, "bits": 4, "storage": storage})
    compress_checkpoint(tmp_path / "llama", tmp_path / "out", recipe)
    found = export_directory(tmp_path / "out", tmp_path / "hf")
    assert found.codes.grid == Grid(4 if storage == "grid" else 8, None)
    assert len(found.codes.layers) == 13
    assert len([layer for layer in found.dense if "mlp.down_proj" in layer]) == 2


def test_codes_on_a_grid_become_floats_by_option(tmp_path: Path) -> None:
    """Also those of pairs, which stay pairs; GPT-2, of which nothing is codes, takes the option too."""
    source = compressed(tmp_path / "svd", "llama", form="svd", bond=32, bits=4, allow_growth=True)
    found = export_directory(source, tmp_path / "hf", coded="dense")
    assert found.pairs and not found.codes.layers
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())
    tensors = load_file(tmp_path / "hf/model.safetensors")
    stored = open_compressed(source, read_manifest(source))
    for layer, rank in found.pairs.items():
        b, a = (stored.read(f"{layer}.cores.{site}") for site in (0, 1))
        assert torch.equal(tensors[f"{layer}.0.weight"], a.reshape(rank, -1))
        assert torch.equal(tensors[f"{layer}.1.weight"], b.reshape(-1, rank))
    own = compressed(tmp_path / "bits", "gpt2", bits=4)
    assert export_directory(own, tmp_path / "gpt2", coded="dense").dense


@pytest.mark.slow
def test_transformers_decodes_the_codes(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    (tmp_path / "hf").mkdir()
    (tmp_path / "recipe.toml").write_text('[layer."*mlp*"]\nform = "svd"\nbond = 6\n')
    own: dict[str, dict[str, Any]] = {
        "llama": {"storage": "grid"},
        "qwen2": {"storage": "coded", "file": tmp_path / "recipe.toml"},
        "t5": {"storage": "grid", "form": "svd", "bond": 32, "allow_growth": True},
    }
    sources = {kind: compressed(tmp_path / kind, kind, bits=4, **options) for kind, options in own.items()}
    found = {kind: export_directory(source, tmp_path / "hf" / kind) for kind, source in sources.items()}
    assert found["qwen2"].pairs and found["qwen2"].codes.errors and not found["t5"].codes.errors
    assert all(set(each.pairs) & set(each.codes.layers) for each in (found["qwen2"], found["t5"]))
    given = answers_without_mpoc(*(tmp_path / "hf" / kind for kind in sources))
    expected = {kind: answer(open_network(source, None)) for kind, source in sources.items()}
    for kind in ("llama", "t5"):
        torch.testing.assert_close(given[kind], expected[kind], rtol=0, atol=1e-5)
    difference = (given["qwen2"] - expected["qwen2"]).norm() / expected["qwen2"].norm()
    assert difference < 2 * max(found["qwen2"].codes.errors.values())


def test_refuses_files_existing_outputs_and_unknown_classes(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.randn(32, 32)}, tmp_path / "m.safetensors")
    file = tmp_path / "m.mpo.safetensors"
    compress_checkpoint(tmp_path / "m.safetensors", file, make_recipe(None, {"bond": 2}))
    with pytest.raises(UsageError, match="--hf needs a Hugging Face directory"):
        export_directory(file, tmp_path / "hf")
    source = compressed(tmp_path, "llama", form="svd", bond=4)
    export_directory(source, tmp_path / "again")
    export_directory(source, tmp_path / "again", force=True)
    with pytest.raises(UsageError, match=r"--coded applies to .* stored coded, and there are none"):
        export_directory(source, tmp_path / "hf", coded="4")
    with pytest.raises(UsageError, match="--coded must be one of 8, 4, dense, got '5'"):
        export_directory(source, tmp_path / "hf", coded="5")
    with pytest.raises(UsageError, match="--multiple must be one of 16, 32, 64, 128, got 24"):
        export_directory(source, tmp_path / "hf", multiple=24)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="there"):
        export_directory(source, tmp_path / "there")
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["NoSuchModel"]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(MpocError, match="NoSuchModel"):
        export_directory(source, tmp_path / "hf")
    (source / "config.json").write_text(json.dumps(config | {"model_type": "no such type"}))
    with pytest.raises(MpocError, match=r"transformers cannot read config\.json"):
        export_directory(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_coded_layers_are_dense_by_option_or_refused(tmp_path: Path) -> None:
    model = tiny("bert", layers=1)
    layer = "bert.encoder.layer.0.attention.output.dense"
    model.get_submodule(layer).weight.data *= 1e12
    model.save_pretrained(tmp_path / "bert")
    recipe = make_recipe(None, {"min_params": 1, "bits": 4, "storage": "coded"})
    compress_checkpoint(tmp_path / "bert", tmp_path / "out", recipe)
    with pytest.raises(MpocError, match=f"{layer}.weight: weights of .* too large for a grid"):
        export_directory(tmp_path / "out", tmp_path / "hf")
    with pytest.raises(UsageError, match="--multiple applies to pairs"):
        export_directory(tmp_path / "out", tmp_path / "hf", multiple=16)
    found = export_directory(tmp_path / "out", tmp_path / "hf", coded="dense")
    stored = open_compressed(tmp_path / "out", read_manifest(tmp_path / "out"))
    assert layer in found.dense and not found.codes.layers
    tensors = load_file(tmp_path / "hf/model.safetensors")
    assert torch.equal(tensors[f"{layer}.weight"], stored.read(f"{layer}.weight"))
