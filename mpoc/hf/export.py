"""Write a compressed directory so that plain transformers loads it, without mpoc.

Linear layers of two factors (``svd``) become pairs of ``nn.Linear``: fewer numbers and operations in anything
that runs linear layers. Everything else becomes a dense weight. Where there is a pair, a small
modelling file comes with the directory and ``auto_map`` names it, so that it is loaded with
``trust_remote_code=True``; else the directory needs no code.

Linear layers on a grid stay codes, in the format of compressed-tensors ("pack-quantized"), which
transformers decodes with the package of that name: codes of 2 and 3 bits take 4 there, those of 5 and 6
take 8. transformers takes one width and group for a whole network: the most frequent one, and others
become dense.

A layer is a pair, or stays codes, only where the network has an ``nn.Linear`` of its stored name, with or
without the prefix that transformers puts before the names of a body. T5's ``wo`` is never a pair, since its
``weight`` is read, nor is the head of a language model, which vLLM replaces by a layer of its own.

With pairs, config.json gets a model type of its own: without the code, transformers refuses the directory
instead of continuing with random weights.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, initialization
from transformers.models.auto import modeling_auto

from mpoc.errors import MpocError, UsageError, command_line
from mpoc.io import hub_directory
from mpoc.io.atomic import refuse_existing, staged
from mpoc.io.manifest import DENSE, LayerRecord, Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import CompressedCheckpoint, check_cores, open_compressed
from mpoc.io.safetensors_header import TensorInfo
from mpoc.io.safetensors_writer import Entry, plan_shards
from mpoc.quantize.codes import SCALE, GridTensor
from mpoc.quantize.storage import Grid
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import working_dtype

_MODULE = "modeling_low_rank"
_SHARD = 5 * 10**9  # bytes
_CODE = '''"""{classes}: networks of transformers whose linear layers are pairs, as config.low_rank says.

Written by `mpoc export --hf`. A layer of rank r computes x → (x Aᵀ) Bᵀ + b, A (r, inputs), B (outputs, r).
"""

from torch import nn
from transformers import {bases}, {config}


class LowRankConfig({config}):
    model_type = "low_rank_{kind}"


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

    pairs: dict[str, int]  # layer → rank
    grids: dict[str, Grid]  # layer → how its codes are stored
    dense: list[str]  # layers that were cores or codes, and are dense now


def export_directory(source: Path, output: Path, force: bool = False) -> ExportedDirectory:
    """Write a compressed directory of transformers for use without mpoc.

    Args:
        source: the compressed directory.
        output: the directory to write.
        force: replace an existing one.

    Raises:
        UsageError: the source is a file or names no network, or the output exists.
        MpocError: the source is damaged, holds a convolution as one map, or its class is not known.
    """
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
    classes = _classes(source)
    linear, pairs = _linear_layers(manifest, next(iter(classes.values())), source)
    grids = _grids(linear)
    entries = list(_entries(stored, manifest, pairs, grids))
    with staged(output) as target:
        target.mkdir()
        hub_directory.copy_other_files(stored.path, target, stored.weight_files)
        hub_directory.write_shards(target, plan_shards(entries, _SHARD, stored.stem), stored)
        hub_directory.unmark(target)
        if pairs:
            _write_code(target, classes, pairs)
        if grids:
            _write_quantization(target, grids)
    dense = [layer.layer for layer in manifest.changed if layer.layer not in pairs | grids]
    return ExportedDirectory(pairs, grids, dense)


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


def _grids(layers: list[LayerRecord]) -> dict[str, Grid]:
    """The layers whose codes go out, with their grid, which is one for all."""
    found = {layer.layer: grid for layer in layers if (grid := _stored_grid(layer)) is not None}
    most = Counter(found.values()).most_common(1)
    return {layer: grid for layer, grid in found.items() if grid == most[0][0]}


def _stored_grid(layer: LayerRecord) -> Grid | None:
    """The grid that holds the codes of a dense layer, in 4 or 8 bits; None where there are none."""
    storage = layer.coded_parts[0].storage if layer.form == DENSE and layer.coded_parts else None
    return replace(storage, bits=4 if storage.bits <= 4 else 8) if isinstance(storage, Grid) else None


def _entries(
    stored: CompressedCheckpoint, manifest: Manifest, pairs: Mapping[str, int], grids: Mapping[str, Grid]
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
                yield from _pair(stored, layer)
                continue
            info = TensorInfo(layer.name, layer.dtype, layer.shape)
            entry = Entry(info, lambda layer=layer: _dense(stored, layer))  # type: ignore[misc]
        elif name in cores:
            continue
        elif name.removesuffix(".weight") in grids:
            yield from _codes(stored, name, grids[name.removesuffix(".weight")])
            continue
        else:
            info = TensorInfo(biases.get(name, name), info.dtype, info.shape)
            entry = Entry(info, lambda name=name: stored.read(name))  # type: ignore[misc]
        dense[entry.info.name] = entry
        yield entry
    for alias, first in manifest.tied.items():
        info = TensorInfo(alias, dense[first].info.dtype, dense[first].info.shape)
        yield Entry(info, dense[first].read)


def _pair(stored: CompressedCheckpoint, layer: LayerRecord) -> Iterator[Entry]:
    """The two weights of a layer: A (rank, inputs), then B (outputs, rank)."""
    rank, dtype = layer.all_bonds[1], getattr(torch, layer.dtype)

    def b() -> Tensor:
        return stored.read(layer.core_names[0]).reshape(layer.shape[0], rank).to(dtype)

    def a() -> Tensor:
        return stored.read(layer.core_names[1]).reshape(rank, layer.shape[1]).to(dtype)

    yield Entry(TensorInfo(f"{layer.layer}.0.weight", layer.dtype, (rank, layer.shape[1])), a)
    yield Entry(TensorInfo(f"{layer.layer}.1.weight", layer.dtype, (layer.shape[0], rank)), b)


def _codes(stored: CompressedCheckpoint, name: str, grid: Grid) -> Iterator[Entry]:
    codes = stored.codes(name)
    assert isinstance(codes, GridTensor)
    tensors = replace(codes, spec=grid).tensors(name)
    scale = name + SCALE
    tensors[scale] = tensors[scale].to(getattr(torch, stored.infos[name].dtype))
    return (Entry.of(*item) for item in tensors.items())


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


def _write_quantization(target: Path, grids: Mapping[str, Grid]) -> None:
    """Write what compressed-tensors reads of config.json; transformers decodes the codes as it loads them."""
    grid = next(iter(grids.values()))
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": "channel"}
    weights |= {} if grid.group is None else {"strategy": "group", "group_size": grid.group}
    file = target / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": True,
        "config_groups": {"group_0": {"targets": [_target(layer) for layer in grids], "weights": weights}},
    }
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _target(layer: str) -> str:
    """An expression for a layer's name in the network and in its body alone."""
    first, _, rest = layer.partition(".")
    return rf"re:^(.*\.)?({re.escape(first)}\.)?{re.escape(rest)}$" if rest else layer
