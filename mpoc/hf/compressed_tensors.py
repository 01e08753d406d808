"""Linear layers as integer codes in the format of compressed-tensors ("pack-quantized").

transformers decodes it with the package of that name. Codes of 2 and 3 bits take 4 there, those of 5 and 6
take 8, with the same values. transformers takes one width and group for a whole network: the most frequent
one, and layers on others become dense.

Coded layers have no grid. Each is rounded to one, whose ranges and scales are fitted to its numbers, and the
relative error that this adds is returned.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest import DENSE, LayerRecord
from mpoc.io.open_checkpoint import CompressedCheckpoint
from mpoc.io.safetensors_writer import Entry
from mpoc.quantize.codes import CodedTensor, GridTensor, QuantizedTensor
from mpoc.quantize.grid_rounding import round_grid
from mpoc.quantize.storage import Coded, Grid, default_grid

# What becomes of coded layers: codes of so many bits, the default first, or dense weights.
CODED_AS = ("8", "4", DENSE)


@dataclass(frozen=True)
class WrittenCodes:
    """The layers that are written as codes."""

    grid: Grid | None  # of all; None where there are none
    layers: list[str]
    errors: dict[str, float]  # coded layer → relative error that its rounding added
    nbytes: int
    source_bytes: int  # of the same layers in the compressed directory


def pack_layers(
    stored: CompressedCheckpoint, layers: list[LayerRecord], coded: str | None
) -> tuple[WrittenCodes, dict[str, list[Entry]]]:
    """Make the codes of all layers that can be written on one grid.

    Errors are ‖V − W‖ / ‖W‖ in the Frobenius norm, W the numbers of the coded layer.

    Args:
        stored: the compressed directory.
        layers: linear layers.
        coded: one of ``CODED_AS`` for coded layers; None: the first, if there are any.

    Returns:
        What is written, and the tensors of each layer, by the name of its weight.

    Raises:
        UsageError: ``coded`` is something else, or given where no layer is coded.
        MpocError: codes are damaged, or numbers are too large for the grid.
    """
    grid, chosen = _choose_grid(layers, coded)
    entries, errors = {}, {}
    for layer in chosen:
        assert grid is not None
        codes = stored.codes(layer.name)
        packed = _on_grid(stored, layer, codes, grid)
        entries[layer.name] = [Entry.of(*item) for item in packed.tensors(layer.name).items()]
        if isinstance(codes, CodedTensor):
            wanted = codes.values()
            errors[layer.layer] = float((packed.values() - wanted).norm() / wanted.norm().clamp(min=1e-30))
    nbytes = sum(entry.info.nbytes for own in entries.values() for entry in own)
    names = [layer.layer for layer in chosen]
    source_bytes = sum(layer.stored_bytes for layer in chosen)
    return WrittenCodes(grid, names, errors, nbytes, source_bytes), entries


def _choose_grid(layers: list[LayerRecord], coded: str | None) -> tuple[Grid | None, list[LayerRecord]]:
    """The most frequent grid, and the layers on it; coded ones too where its group divides their columns."""
    if coded is not None and coded not in CODED_AS:
        raise UsageError(f"--coded must be one of {', '.join(CODED_AS)}, got {coded!r}")
    streams = [layer for layer in layers if _is(layer, Coded)]
    if coded is not None and not streams:
        raise UsageError("--coded applies to dense linear layers that are stored coded, and there are none")
    bits = 0 if coded == DENSE else int(coded or CODED_AS[0])
    streams = streams if bits else []
    grids = [(layer, _stored_grid(layer)) for layer in layers if _is(layer, Grid)]
    wanted = [default_grid(bits, layer.coded_parts[0].sides[1]) for layer in streams]
    most = Counter([*(grid for _, grid in grids), *wanted]).most_common(1)
    if not most:
        return None, []
    grid = most[0][0]
    chosen = [layer for layer, own in grids if own == grid]
    return grid, chosen + [layer for layer in streams if grid.bits == bits and _divides(grid, layer)]


def _is(layer: LayerRecord, storage: type[Grid | Coded]) -> bool:
    """Whether the weight of a dense layer is stored so."""
    return layer.form == DENSE and any(isinstance(part.storage, storage) for part in layer.coded_parts)


def _stored_grid(layer: LayerRecord) -> Grid:
    """The grid that holds the codes of a layer, in 4 or 8 bits."""
    storage = layer.coded_parts[0].storage
    assert isinstance(storage, Grid)
    return replace(storage, bits=4 if storage.bits <= 4 else 8)


def _divides(grid: Grid, layer: LayerRecord) -> bool:
    return grid.group is None or layer.coded_parts[0].sides[1] % grid.group == 0


def _on_grid(
    stored: CompressedCheckpoint, layer: LayerRecord, codes: QuantizedTensor, grid: Grid
) -> GridTensor:
    """The codes of a layer on the grid, rounded where it is coded, with scales in the dtype of the weight."""
    if isinstance(codes, CodedTensor):
        try:
            codes = round_grid(codes.values(), None, grid)
        except MpocError as error:
            hint = "--coded dense writes floats"
            raise MpocError(f"{stored.path}: tensor {layer.name}: {error}", hint) from error
    return replace(codes, spec=grid, scale=codes.scale.to(getattr(torch, layer.stored_dtype)))


def write_quantization(target: Path, grid: Grid, layers: list[str]) -> None:
    """Write what compressed-tensors reads of config.json; transformers decodes the codes as it loads them."""
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": "channel"}
    weights |= {} if grid.group is None else {"strategy": "group", "group_size": grid.group}
    file = target / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": True,
        "config_groups": {"group_0": {"targets": [_target(layer) for layer in layers], "weights": weights}},
    }
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _target(layer: str) -> str:
    """An expression for a layer's name in the network and in its body alone."""
    first, _, rest = layer.partition(".")
    return rf"re:^(.*\.)?({re.escape(first)}\.)?{re.escape(rest)}$" if rest else layer
