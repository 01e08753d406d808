"""Write a compressed directory so that plain transformers loads it, without mpoc.

Linear layers of two factors (``svd``) become pairs of ``nn.Linear``: fewer numbers and operations in anything
that runs linear layers. Everything else becomes a dense weight. Where there is a pair, a small
modelling file comes with the directory and ``auto_map`` names it, so that it is loaded with
``trust_remote_code=True``; else the directory needs no code.

Weights and factors that are stored in few bits become codes on a grid, which transformers decodes
(:mod:`mpoc.hf.compressed_tensors`).

A layer is a pair, or stays codes, only where the network has an ``nn.Linear`` of its stored name, with or
without the prefix that transformers puts before the names of a body. T5's ``wo`` is never a pair, since its
``weight`` is read, nor is the head of a language model, which vLLM replaces by a layer of its own.

With pairs, config.json gets a model type of its own: without the code, transformers refuses the directory
instead of continuing with random weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, initialization
from transformers.models.auto import modeling_auto

from mpoc.errors import MpocError, UsageError, command_line
from mpoc.hf.compressed_tensors import WrittenCodes, matrices_of, pack_matrices, write_quantization
from mpoc.io import hub_directory
from mpoc.io.atomic import refuse_existing, staged
from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import CompressedCheckpoint, check_cores, open_compressed
from mpoc.io.safetensors_header import ITEMSIZE, TensorInfo
from mpoc.io.safetensors_writer import Entry, plan_shards
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import working_dtype

_MODULE = "modeling_low_rank"
_SHARD = 5 * 10**9  # bytes
MULTIPLES = (16, 32, 64, 128)
_CODE = '''"""{classes}: networks of transformers whose linear layers are pairs, as config.low_rank says.

Written by `mpoc export --hf`. A layer of rank r computes x → (x Aᵀ) Bᵀ + b, A (r, inputs), B (outputs, r).
"""

from torch import nn
from transformers import {bases}, {config}


class LowRankConfig({config}):
    model_type = "low_rank_{kind}"
    export_model_type = "{kind}"  # as optimum's exporters know it


def use_pairs(model):
    """Replace the linear layers that config.low_rank names by pairs of the rank that it gives."""
    modules, prefix = dict(model.named_modules()), model.base_model_prefix + "."
    for name, rank in model.config.low_rank.items():
        names = (name, name.removeprefix(prefix), prefix + name)
        found = next((each for each in names if isinstance(modules.get(each), nn.Linear)), None)
        if found is None:
            continue  # a layer of the head, in a body alone
        old = modules[found]
        like = {{"device": old.weight.device, "dtype": old.weight.dtype}}
        pair = nn.Sequential(
            nn.Linear(old.in_features, rank, bias=False, **like),
            nn.Linear(rank, old.out_features, bias=old.bias is not None, **like),
        )
        model.set_submodule(found, pair)
'''
_CLASS = """

class LowRank{base}({base}):
    config_class = LowRankConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        use_pairs(self)
"""


@dataclass(frozen=True)
class ExportedDirectory:
    """What :func:`export_directory` wrote."""

    pairs: dict[str, int]  # layer → rank, padding included
    padding_bytes: int  # zeros of the pairs, of factors that are floats
    codes: WrittenCodes
    dense: list[str]  # layers that were cores or codes, and are dense now
    dense_bytes: int


def export_directory(
    source: Path, output: Path, force: bool = False, coded: str | None = None, multiple: int | None = None
) -> ExportedDirectory:
    """Write a compressed directory of transformers for use without mpoc.

    Args:
        source: the compressed directory.
        output: the directory to write.
        force: replace an existing one.
        coded: what becomes of coded matrices: codes of "8" bits (None too) or "4"; "dense" writes floats in
            place of all codes.
        multiple: pad the ranks of pairs with zeros to a multiple of this number, one of ``MULTIPLES``.

    Raises:
        UsageError: the source is a file or names no network, the output exists, or an option does not apply.
        MpocError: the source is damaged, holds a convolution as one map, its class is not known, or numbers
            are too large for a grid.
    """
    manifest, stored = _opened(source, output, force)
    classes = _classes(source)
    linear, ranks = _linear_layers(manifest, next(iter(classes.values())), source)
    pairs = _padded(ranks, multiple)
    codes, packed = pack_matrices(stored, matrices_of(linear, pairs), coded)
    entries = list(_entries(stored, manifest, pairs, packed))
    with staged(output) as target:
        target.mkdir()
        hub_directory.copy_other_files(stored.path, target, stored.weight_files)
        hub_directory.write_shards(target, plan_shards(entries, _SHARD, stored.stem), stored)
        hub_directory.unmark(target)
        if pairs:
            _write_code(target, classes, pairs)
        if codes.grid is not None:
            write_quantization(target, codes.grid, codes.modules)
    dense = [layer for layer in manifest.changed if layer.layer not in {*pairs, *codes.layers}]
    padding = sum(
        (pairs[layer.layer] - ranks[layer.layer]) * layer.shape[1 - factor] * ITEMSIZE[layer.dtype]
        for layer in linear
        for factor in (0, 1)
        if layer.layer in pairs and f"{layer.layer}.{factor}" not in codes.modules
    )
    dense_bytes = sum(layer.num_original * ITEMSIZE[layer.dtype] for layer in dense)
    return ExportedDirectory(pairs, padding, codes, [layer.layer for layer in dense], dense_bytes)


def _opened(source: Path, output: Path, force: bool) -> tuple[Manifest, CompressedCheckpoint]:
    """The source, once it is known that it can be exported."""
    manifest = read_manifest(source)
    if not (source / "config.json").is_file():
        hint = command_line("mpoc", "expand", source) + " writes a dense file"
        raise UsageError(f"{source}: --hf needs a Hugging Face directory, with config.json", hint)
    refuse_existing(output, source, force)
    stored = open_compressed(source, manifest)
    for layer in manifest.replaced:
        check_cores(stored, layer)
        if layer.geometry is not None:
            hint = command_line("mpoc", "expand", source, "--project")
            raise MpocError(
                f"{source}: layer {layer.layer}: a convolution as one map cannot be exported", hint
            )
    return manifest, stored


def _padded(ranks: dict[str, int], multiple: int | None) -> dict[str, int]:
    """The ranks of pairs as they are written: the next multiple."""
    if multiple is None:
        return ranks
    if multiple not in MULTIPLES:
        raise UsageError(f"--multiple must be one of {', '.join(map(str, MULTIPLES))}, got {multiple}")
    if not ranks:
        raise UsageError("--multiple applies to pairs of linear layers (svd), and there are none")
    return {layer: math.ceil(rank / multiple) * multiple for layer, rank in ranks.items()}


def _classes(source: Path) -> dict[str, type[PreTrainedModel]]:
    """The class that config.json names, by its Auto class, and that of its body.

    Raises:
        MpocError: transformers cannot read config.json, or has no such class.
    """
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise MpocError(f"{source}: transformers cannot read config.json: {error}") from error
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise MpocError(f"{source}: config.json names {name or 'no class'}, which transformers does not have")
    found: dict[str, type[PreTrainedModel]] = {}
    for auto, mapping in vars(modeling_auto).items():
        if auto.startswith("AutoModel") and name in _names_of(getattr(mapping, "_model_mapping", {}), config):
            found[auto] = cls
    if not found:
        raise MpocError(f"{source}: no Auto class of transformers makes a {name}")
    bodies = _names_of(transformers.AutoModel._model_mapping, config)
    return found | {"AutoModel": getattr(transformers, bodies[0], cls)} if bodies else found


def _names_of(mapping: Any, config: Any) -> list[str]:
    """The names of the classes that a mapping of an Auto class gives for a configuration."""
    classes = mapping.get(type(config), ()) if type(config) in mapping else ()
    return [cls.__name__ for cls in (classes if isinstance(classes, tuple | list) else [classes])]


def _linear_layers(
    manifest: Manifest, cls: type[PreTrainedModel], source: Path
) -> tuple[list[LayerRecord], dict[str, int]]:
    """The layers that are an ``nn.Linear`` of the network, whose weight nothing else uses; ranks of pairs."""
    with torch.device("meta"), initialization.no_init_weights():
        model = cls(AutoConfig.from_pretrained(source))
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # vLLM makes its own of it
    found, pairs = [], {}
    for layer in manifest.changed:
        names = (layer.layer, layer.layer.removeprefix(prefix), prefix + layer.layer)
        module = next((modules[name] for name in names if type(modules.get(name)) is nn.Linear), None)
        if module is None or layer.kind != "linear":
            continue
        if layer.name not in manifest.tied.values() and not layer.transposed:
            found.append(layer)
            # T5 asks for the dtype of the weights that it keeps in float32, and a pair has none.
            is_read = layer.layer.rpartition(".")[2] in (cls._keep_in_fp32_modules or ())
            if layer.form == "svd" and module is not head and not is_read:
                pairs[layer.layer] = layer.all_bonds[1]
    return found, pairs


def _entries(
    stored: CompressedCheckpoint,
    manifest: Manifest,
    pairs: Mapping[str, int],
    packed: Mapping[str, list[Entry]],
) -> Iterator[Entry]:
    """Every tensor of the new directory, in the order of the source."""
    replaced = {layer.core_name(0): layer for layer in manifest.replaced}
    cores = {name for layer in manifest.replaced for name in layer.core_names}
    biases = {f"{layer}.bias": f"{layer}.1.bias" for layer in pairs}
    dense = {}
    for name, info in stored.infos.items():
        if name in replaced:
            layer = replaced[name]
            if layer.layer in pairs:
                for entry in _pair(stored, layer, pairs[layer.layer]):
                    yield from packed.get(entry.info.name, [entry])
                continue
            info = TensorInfo(layer.name, layer.dtype, layer.shape)
            entry = Entry(info, lambda layer=layer: _dense(stored, layer))  # type: ignore[misc]
        elif name in cores:
            continue
        elif name in packed:
            yield from packed[name]
            continue
        else:
            info = TensorInfo(biases.get(name, name), info.dtype, info.shape)
            entry = Entry(info, lambda name=name: stored.read(name))  # type: ignore[misc]
        dense[entry.info.name] = entry
        yield entry
    for alias, first in manifest.tied.items():
        info = TensorInfo(alias, dense[first].info.dtype, dense[first].info.shape)
        yield Entry(info, dense[first].read)


def _pair(stored: CompressedCheckpoint, layer: LayerRecord, rank: int) -> Iterator[Entry]:
    """The two weights of a layer: A (rank, inputs), then B (outputs, rank), with zeros up to the rank."""
    own, dtype = layer.all_bonds[1], getattr(torch, layer.dtype)

    def b() -> Tensor:
        core = stored.read(layer.core_names[0]).reshape(layer.shape[0], own)
        return nn.functional.pad(core.to(dtype), (0, rank - own))

    def a() -> Tensor:
        core = stored.read(layer.core_names[1]).reshape(own, layer.shape[1])
        return nn.functional.pad(core.to(dtype), (0, 0, 0, rank - own))

    yield Entry(TensorInfo(f"{layer.layer}.0.weight", layer.dtype, (rank, layer.shape[1])), a)
    yield Entry(TensorInfo(f"{layer.layer}.1.weight", layer.dtype, (layer.shape[0], rank)), b)


def _dense(stored: CompressedCheckpoint, layer: LayerRecord) -> Tensor:
    wide = working_dtype(getattr(torch, layer.dtype))
    cores = [stored.read(name).to(wide) for name in layer.core_names]
    return form_of(cores, layer.structure).to_weight().to(getattr(torch, layer.dtype))


def _write_code(target: Path, classes: Mapping[str, type[PreTrainedModel]], pairs: Mapping[str, int]) -> None:
    """Write the modelling file, and what config.json says of it."""
    bases = sorted({cls.__name__ for cls in classes.values()})
    names = ", ".join(f"LowRank{base}" for base in bases)
    kind: Any = next(iter(classes.values())).config_class
    code = _CODE.format(classes=names, bases=", ".join(bases), config=kind.__name__, kind=kind.model_type)
    code += "".join(_CLASS.format(base=base) for base in bases)
    (target / f"{_MODULE}.py").write_text(code, "utf-8")
    file = target / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["auto_map"] = {auto: f"{_MODULE}.LowRank{cls.__name__}" for auto, cls in classes.items()}
    config["auto_map"]["AutoConfig"] = f"{_MODULE}.LowRankConfig"
    config["model_type"] = f"low_rank_{kind.model_type}"  # else the plain class would be taken, at random
    config["architectures"] = [f"LowRank{next(iter(classes.values())).__name__}"]
    config["low_rank"] = dict(pairs)
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
