"""Linear layers as integer codes in the format of compressed-tensors ("pack-quantized").

transformers decodes it with the package of that name. Codes of 2 and 3 bits take 4 there, those of 5 and 6
take 8, with the same values. transformers takes one width and group for a whole network: the one on which
most numbers can be written. Weights and factors on others become floats.

Coded matrices have no grid. Each is rounded to one, whose ranges and scales are fitted to its numbers, and
the relative error that this adds is returned. So are factors on a grid that are padded with zeros.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest import DENSE, CodedPart, LayerRecord
from mpoc.io.open_checkpoint import CompressedCheckpoint
from mpoc.io.safetensors_writer import Entry
from mpoc.quantize.codes import GridTensor, QuantizedTensor
from mpoc.quantize.grid_rounding import round_grid
from mpoc.quantize.storage import GROUPS, Coded, Grid, default_grid

# What becomes of coded layers: codes of so many bits, the default first, or floats, then of all layers.
CODED_AS = ("8", "4", DENSE)


@dataclass(frozen=True)
class WrittenCodes:
    """The layers that are written as codes."""

    grid: Grid | None  # of all; None where there are none
    modules: list[str]  # linear layers of the new directory that are codes
    layers: list[str]  # of the source, wholly or, of pairs, a factor
    errors: dict[str, float]  # module → relative error that its rounding added
    nbytes: int  # of the codes
    source_bytes: int  # of the same matrices in the compressed directory, as their layers' bytes share out


@dataclass(frozen=True)
class Matrix:
    """A matrix that may be written as codes."""

    layer: LayerRecord
    module: str  # of the new directory
    part: CodedPart
    shape: tuple[int, int]  # as it is written, of factors with padding

    @property
    def is_padded(self) -> bool:
        """Whether zeros are added to what is stored."""
        return self.shape != self.part.sides

    @property
    def source_bytes(self) -> float:
        """The bytes of its layer by its share of the numbers."""
        share = math.prod(self.part.sides) / sum(math.prod(part.sides) for part in self.layer.coded_parts)
        return share * self.layer.stored_bytes


def matrices_of(layers: list[LayerRecord], pairs: Mapping[str, int]) -> list[Matrix]:
    """The matrices of layers that are stored in few bits: weights, and factors of pairs (layer → rank)."""
    found = []
    for layer in layers:
        rank = pairs.get(layer.layer)
        if rank is not None and layer.coded_parts:
            b, a = layer.coded_parts
            found.append(Matrix(layer, f"{layer.layer}.0", a, (rank, a.sides[1])))
            found.append(Matrix(layer, f"{layer.layer}.1", b, (b.sides[0], rank)))
        elif layer.form == DENSE and layer.coded_parts:
            (part,) = layer.coded_parts
            found.append(Matrix(layer, layer.layer, part, part.sides))
    return found


def pack_matrices(
    stored: CompressedCheckpoint, matrices: list[Matrix], coded: str | None
) -> tuple[WrittenCodes, dict[str, list[Entry]]]:
    """Make the codes of all matrices that can be written on one grid.

    Errors are ‖V − W‖ / ‖W‖ in the Frobenius norm, W the numbers that are stored.

    Args:
        stored: the compressed directory.
        matrices: of linear layers.
        coded: one of ``CODED_AS`` for coded matrices; None: the first, if there are any. "dense" leaves
            those on a grid to be floats too.

    Returns:
        What is written, and the tensors of each matrix, by the name of its weight.

    Raises:
        UsageError: ``coded`` is something else, or bits where nothing is coded.
        MpocError: codes are damaged, or numbers are too large for the grid.
    """
    grid, chosen = _choose_grid(matrices, coded)
    entries, errors = {}, {}
    for matrix in chosen:
        assert grid is not None
        packed, error = _on_grid(stored, matrix, grid)
        weight = f"{matrix.module}.weight"
        entries[weight] = [Entry.of(*item) for item in packed.tensors(weight).items()]
        if error is not None:
            errors[matrix.module] = error
    nbytes = sum(entry.info.nbytes for own in entries.values() for entry in own)
    layers = list(dict.fromkeys(matrix.layer.layer for matrix in chosen))
    source_bytes = round(sum(matrix.source_bytes for matrix in chosen))
    modules = [matrix.module for matrix in chosen]
    return WrittenCodes(grid, modules, layers, errors, nbytes, source_bytes), entries


def _choose_grid(matrices: list[Matrix], coded: str | None) -> tuple[Grid | None, list[Matrix]]:
    """The grid on which most numbers can be written, and the matrices that can."""
    if coded is not None and coded not in CODED_AS:
        raise UsageError(f"--coded must be one of {', '.join(CODED_AS)}, got {coded!r}")
    if coded == DENSE:
        return None, []
    streams = [matrix for matrix in matrices if isinstance(matrix.part.storage, Coded)]
    if coded is not None and not streams:
        raise UsageError("--coded applies to linear layers that are stored coded, and there are none")
    bits = int(coded or CODED_AS[0])
    own = {_stored_grid(matrix) for matrix in matrices if isinstance(matrix.part.storage, Grid)}
    own |= {default_grid(bits, matrix.shape[1]) for matrix in streams}
    own |= {replace(grid, group=group) for grid in own for group in GROUPS if grid.group is not None}

    def fits(matrix: Matrix, grid: Grid) -> bool:
        columns = matrix.shape[1]
        if grid.group is not None and columns % grid.group:
            return False
        if isinstance(matrix.part.storage, Grid):
            return _stored_grid(matrix) == grid
        by_row = default_grid(grid.bits, columns).group is None  # coarser, so only where no group divides
        return grid.bits == bits and by_row == (grid.group is None)

    def numbers(grid: Grid) -> tuple[int, int]:
        fitting = (matrix for matrix in matrices if fits(matrix, grid))
        return sum(math.prod(matrix.shape) for matrix in fitting), grid.group or 0

    best = max(own, key=numbers, default=None)
    return best, [] if best is None else [matrix for matrix in matrices if fits(matrix, best)]


def _stored_grid(matrix: Matrix) -> Grid:
    """The grid that holds the codes of a matrix, in 4 or 8 bits."""
    storage = matrix.part.storage
    assert isinstance(storage, Grid)
    return replace(storage, bits=4 if storage.bits <= 4 else 8)


def _on_grid(stored: CompressedCheckpoint, matrix: Matrix, grid: Grid) -> tuple[GridTensor, float | None]:
    """Codes on the grid, with scales in the dtype of the weight; error of the rounding, None without one."""
    codes: QuantizedTensor = stored.codes(matrix.part.name)
    dtype = getattr(torch, matrix.layer.stored_dtype)
    if isinstance(codes, GridTensor) and not matrix.is_padded:
        return replace(codes, spec=grid, scale=codes.scale.to(dtype)), None
    rows, columns = (new - old for new, old in zip(matrix.shape, matrix.part.sides, strict=True))
    wanted = nn.functional.pad(codes.values(), (0, columns, 0, rows))
    try:
        rounded = round_grid(wanted, None, grid)
    except MpocError as error:
        hint = "--coded dense writes floats"
        raise MpocError(f"{stored.path}: tensor {matrix.part.name}: {error}", hint) from error
    found = replace(rounded, spec=grid, scale=rounded.scale.to(dtype))
    return found, float((found.values() - wanted).norm() / wanted.norm().clamp(min=1e-30))


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
