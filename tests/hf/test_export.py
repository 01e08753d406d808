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


def compressed(folder: Path, kind: str, **options: Any) -> Path:
    tiny(kind).save_pretrained(folder / kind)
    compress_checkpoint(folder / kind, folder / "out", make_recipe(None, {"min_params": 1, **options}))
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
        found = export_directory(source, folders[-1])
        assert bool(found.pairs) == (form == "svd") == (tmp_path / kind / "modeling_low_rank.py").is_file()
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


@pytest.mark.parametrize(("bits", "width"), [(3, 4), (6, 8)])
def test_codes_are_those_of_compressed_tensors(tmp_path: Path, bits: int, width: int) -> None:
    """Decoded here by the definition of "pack-quantized": (code − zero point) · scale."""
    source = compressed(tmp_path, "bert", bits=bits)
    found = export_directory(source, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    said = json.loads((tmp_path / "hf/config.json").read_text())["quantization_config"]
    weights = said["config_groups"]["group_0"]["weights"]
    assert (said["format"], weights["num_bits"], weights["symmetric"]) == ("pack-quantized", width, False)
    stored = open_compressed(source, read_manifest(source))
    shifts = torch.arange(0, 32, width)
    for layer in found.grids:
        part = {key: tensors[f"{layer}.weight_{key}"] for key in ("packed", "scale", "zero_point", "shape")}
        rows, columns = part["shape"].tolist()
        codes, zeros = (
            (words.long()[..., None] >> shifts & (1 << width) - 1).flatten(1)
            for words in (part["packed"], part["zero_point"].T)
        )
        grouped = codes[:, :columns].unflatten(1, (-1, weights["group_size"])) - zeros.T[:rows, :, None]
        values = (grouped * part["scale"][:, :, None]).flatten(1)
        assert torch.equal(values, stored.read(f"{layer}.weight"))
        assert f"{layer}.weight" not in tensors
    assert found.grids and all(f"{layer}.weight" in tensors for layer in found.dense)


@pytest.mark.slow
def test_transformers_decodes_the_codes(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = compressed(tmp_path, "llama", bits=4)
    export_directory(source, tmp_path / "hf" / "llama")
    given = answers_without_mpoc(tmp_path / "hf" / "llama")["llama"]
    torch.testing.assert_close(given, answer(open_network(source, None)), rtol=0, atol=1e-5)


def test_refuses_files_existing_outputs_and_unknown_classes(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.randn(32, 32)}, tmp_path / "m.safetensors")
    file = tmp_path / "m.mpo.safetensors"
    compress_checkpoint(tmp_path / "m.safetensors", file, make_recipe(None, {"bond": 2}))
    with pytest.raises(UsageError, match="--hf needs a Hugging Face directory"):
        export_directory(file, tmp_path / "hf")
    source = compressed(tmp_path, "llama", form="svd", bond=4)
    export_directory(source, tmp_path / "again")
    export_directory(source, tmp_path / "again", force=True)
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
