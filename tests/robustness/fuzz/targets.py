"""What is fuzzed: each way in which a file from a stranger reaches mpoc, through its public functions."""

from __future__ import annotations

import json
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mpoc
from mpoc.cli.tables import print_report
from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.source import CompressionSource, open_source
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.quantize.codes import CodedTensor
from mpoc.quantize.coding import decode, encode
from mpoc.quantize.packing import EXPANSION
from mpoc.reporting.summary import report_dict, to_csv, to_json
from tests.robustness.fuzz import mutate
from tests.robustness.fuzz.engine import Target

CORPUS = Path(__file__).resolve().parent / "corpus"


@cache
def _folder() -> Path:
    """One for the whole process; its files are written over and over."""
    holder = tempfile.TemporaryDirectory(prefix="mpoc-fuzz-")
    _HOLDERS.append(holder)
    return Path(holder.name)


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def network() -> nn.Module:
    """The dense network of the compressed files in the corpus."""
    layers = {
        "fc1": nn.Linear(12, 8),
        "fc2": nn.Linear(8, 12),
        "conv": nn.Conv2d(4, 4, 3),
        "map": nn.Conv2d(2, 2, 3, padding=1),
    }
    return nn.ModuleDict(layers)


def _read_all(checkpoint: Checkpoint) -> None:
    assert checkpoint.num_parameters >= 0 and len(checkpoint.fingerprint()) == 64
    for name, info in checkpoint.infos.items():
        tensor = checkpoint.read(name)
        assert tuple(tensor.shape) == info.shape and str(tensor.dtype) == f"torch.{info.dtype}", name
        bool(tensor.isfinite().all() if tensor.is_floating_point() else True)
    for first in checkpoint.tied.values():
        assert first in checkpoint.infos


def _told(manifest: Manifest, path: Path) -> None:
    """Everything that ``mpoc report`` can print."""
    nbytes = path.stat().st_size
    json.loads(to_json(report_dict(manifest, nbytes)), parse_constant=_no_constant)
    to_csv(manifest)
    with (_folder() / "report.txt").open("w", encoding="utf-8") as sink:
        print_report(Console(file=sink, width=200), manifest, nbytes, verbose=True)


def _no_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def _each(*calls: Callable[[], object]) -> None:
    """All of them, whichever refuse; the first refusal is handed on."""
    refused: list[mpoc.errors.MpocError] = []
    for call in calls:
        try:
            call()
        except mpoc.errors.MpocError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def _compressed(path: Path) -> None:
    """Report, load and expand."""
    manifest = read_manifest(path)
    output = _folder() / ("dense" if path.is_dir() else "dense.safetensors")
    _each(
        partial(_told, manifest, path),
        partial(mpoc.load, path, network()),
        partial(expand_checkpoint, path, output, force=True, projected=lambda layer, error: None),
    )


def _checkpoint(data: bytes) -> None:
    path = _folder() / "m.safetensors"
    path.write_bytes(data)
    _each(lambda: _read_all(open_checkpoint(path)), partial(_compressed, path))


def _torch(data: bytes) -> None:
    path = _folder() / "m.pt"
    path.write_bytes(data)
    _read_all(open_checkpoint(path))


def _manifest(data: bytes) -> None:
    """In the header of a file, and beside one in a directory."""
    folder = _folder() / "compressed"
    folder.mkdir(exist_ok=True)
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights.write_bytes((CORPUS / "compressed.safetensors").read_bytes())
    (folder / "mpoc.json").write_bytes(data)
    _compressed(folder)


@cache
def _plain_weights() -> dict[str, torch.Tensor]:
    return load_file(CORPUS / "compressed.safetensors")


def _config(data: bytes) -> None:
    """As transformers saves it: no manifest, ``quantization_config`` and headers alone."""
    folder = _folder() / "saved"
    folder.mkdir(exist_ok=True)
    if not (folder / "model.safetensors").exists():
        save_file(_plain_weights(), folder / "model.safetensors", {"mpoc_saved_again": "1"})
    (folder / "config.json").write_bytes(data)
    _compressed(folder)


def _index(data: bytes) -> None:
    folder = _folder() / "sharded"
    if not folder.exists():
        folder.mkdir()
        state = {name: torch.zeros(2) for name in "abcd"}
        for k, names in enumerate(("ab", "cd"), start=1):
            save_file({name: state[name] for name in names}, folder / f"model-0000{k}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(data)
    _read_all(open_checkpoint(folder))


def _recipe(data: bytes) -> None:
    file = _folder() / "recipe.toml"
    file.write_bytes(data)
    recipe = make_recipe(file, {"device": "cpu"})
    opened = _opened()
    recipe = recipe.with_form(calibrated=False)
    opened = open_source(opened.checkpoint.path, recipe, None, False)
    for plan in opened.plan(recipe):
        plan.record()


def _coded(data: bytes) -> None:
    """Rows, columns (uint32 each) and the stream: numbers of that shape in bounded memory, or one error."""
    rows, columns = struct.unpack("<2I", data[:8].ljust(8, b"\0"))
    stream = torch.tensor(list(data[8:]), dtype=torch.uint8)
    tracemalloc.start()
    try:
        codes = CodedTensor.from_tensors({"w_coded": stream}, "w", (rows, columns))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 * (len(data) * EXPANSION + (1 << 16)), f"{peak:,} bytes for a stream of {len(data)}"
    values = codes.values()
    assert values.shape == (rows, columns) and bool(values.isfinite().all())
    exponents = codes.row_exponents, codes.column_exponents
    again = decode(encode(codes.codes, *exponents, codes.scale), rows, columns)
    assert torch.equal(again[0], codes.codes) and again[3] == codes.scale


@cache
def _opened() -> CompressionSource:
    path = _folder() / "dense.pt"
    torch.save(network().state_dict(), path)
    return open_source(path, make_recipe(None, {"bond": 2}), None, False)


def _seeds(name: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


def _target(name: str, change: Callable[..., bytes], run: Callable[[bytes], None]) -> Target:
    return Target(partial(_seeds, name), change, run)


TARGETS = {
    "checkpoint": _target("checkpoint", mutate.safetensors_bytes, _checkpoint),
    "torch": _target("torch", mutate.torch_bytes, _torch),
    "manifest": _target("manifest", mutate.json_bytes, _manifest),
    "config": _target("config", mutate.json_bytes, _config),
    "index": _target("index", mutate.json_bytes, _index),
    "coded": _target("coded", mutate.coded_bytes, _coded),
    "recipe": _target("recipe", mutate.toml_bytes, _recipe),
}


def manifest_of(path: Path) -> str:
    """The manifest in a file's header."""
    with safe_open(path, framework="pt") as handle:
        return str(handle.metadata()["mpoc"])
