"""Directories for transformers without mpoc: loaded in a process that cannot import it, decoded by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    from safetensors.torch import save_file
    import transformers
    from tests.support.architectures import AUTO, answer
    folder, kind, file = sys.argv[1:]
    load = getattr(transformers, AUTO[kind]).from_pretrained
    model, info = load(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    save_file({"y": answer(model.eval())}, file)
"""


def compressed(folder: Path, kind: str, **options: Any) -> Path:
    tiny(kind).save_pretrained(folder / kind)
    compress_checkpoint(folder / kind, folder / "out", make_recipe(None, {"min_params": 1, **options}))
    return folder / "out"


def answer_without_mpoc(folder: Path, kind: str) -> torch.Tensor:
    run_python("-c", LOADING, folder, kind, folder.parent / "y.safetensors")
    return load_file(folder.parent / "y.safetensors")["y"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form", "pairs"), [("llama", "svd", True), ("gpt2", "mpo", False)])
def test_loads_without_mpoc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: str, pairs: bool
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = compressed(tmp_path, kind, form=form, bond=6)
    found = export_directory(source, tmp_path / "hf")
    assert bool(found.pairs) == pairs == (tmp_path / "hf/modeling_low_rank.py").is_file()
    replaced = [layer.layer for layer in read_manifest(source).replaced]
    assert sorted([*found.pairs, *found.dense]) == sorted(replaced)
    expected = answer(open_network(source, None))
    torch.testing.assert_close(answer_without_mpoc(tmp_path / "hf", kind), expected, rtol=0, atol=1e-5)


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
    export_directory(source, tmp_path / "hf")
    expected = answer(open_network(source, None))
    torch.testing.assert_close(answer_without_mpoc(tmp_path / "hf", "llama"), expected, rtol=0, atol=1e-5)


def test_refuses_files_existing_outputs_and_unknown_classes(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.randn(32, 32)}, tmp_path / "m.safetensors")
    file = tmp_path / "m.mpo.safetensors"
    compress_checkpoint(tmp_path / "m.safetensors", file, make_recipe(None, {"bond": 2}))
    with pytest.raises(UsageError, match="--hf needs a Hugging Face directory"):
        export_directory(file, tmp_path / "hf")
    source = compressed(tmp_path, "llama", form="svd", bond=4)
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
