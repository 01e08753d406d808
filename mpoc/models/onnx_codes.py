"""Codes in an ONNX file: ``DequantizeLinear`` of 4 or 8 bits in groups (opset 21) in place of floats.

The program is made of floats, and its constants are recognised by their numbers, whatever they are called and
however the optimizer turned them. Codes of 2 and 3 bits take 4, those of 5 and 6 take 8; coded matrices take
the row's step as scale and those of the columns as a factor, so that every number stays what it is.

A linear layer's matrix is written with its inputs first and its groups along them. onnxruntime then
multiplies with the codes as they are, in blocks of at least 16, and rounds the inputs to 8 bits for it. Of a
table only rows that are looked up are decoded; everything else is decoded in every run. A session that sets
``session.disable_quant_qdq`` decodes all once, when it is made, and computes with the exact numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.io.manifest import Manifest
from mpoc.io.open_checkpoint import open_compressed
from mpoc.quantize.codes import HALF_OCTAVES, GridTensor, QuantizedTensor

_SMALL = 256  # numbers: constants up to here stay floats
_BLOCKS = (128, 64, 32, 16)  # of the columns of a coded matrix, whose rows have one step


@dataclass(frozen=True)
class OnnxCodes:
    """The codes of a tensor in groups, and how their matrix (rows, columns) becomes the tensor."""

    codes: NDArray[np.uint8]  # (rows, columns), below 16 for 4 bits
    scale: NDArray[Any]  # (rows, groups)
    zero_point: NDArray[np.uint8]  # (rows, groups)
    column_steps: NDArray[np.float32] | None  # (columns,) of a coded matrix
    transposed: bool = False  # the tensor, flat, is the transposed matrix
    channels: int = 0  # of a kernel (outputs, channels, taps), whose matrix is (outputs, taps, channels)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]


def codes_by_content(source: Path, manifest: Manifest) -> dict[bytes, OnnxCodes]:
    """What is stored as codes, by the digest of its numbers, in either order that a program may hold them."""
    stored = open_compressed(source, manifest)
    found: dict[bytes, OnnxCodes] = {}
    for part in (part for layer in manifest.changed for part in layer.coded_parts):
        quantized, tensor = stored.codes(part.name), stored.read(part.name)
        codes = _in_groups(quantized)
        if codes is None:
            continue
        matrix = quantized.values().to(tensor.dtype)
        found[_digest(matrix)] = codes
        found[_digest(matrix.T)] = replace(codes, transposed=True)
        if tensor.ndim > 2 and len(tensor) == len(matrix):
            found.setdefault(_digest(tensor), replace(codes, channels=tensor.shape[1]))
    return found


def _in_groups(quantized: QuantizedTensor) -> OnnxCodes | None:
    """Codes with the scales of groups; None of codes that 8 bits do not hold."""
    if isinstance(quantized, GridTensor):
        zeros = quantized.lowest()[:, :: quantized.codes.shape[1] // quantized.scale.shape[1]].neg()
        return OnnxCodes(quantized.codes.numpy(), quantized.scale.numpy(), zeros.byte().numpy(), None)
    codes = quantized.codes
    if codes.dtype != torch.int8:
        return None
    low, high = int(codes.min()), int(codes.max())
    zero = 8 if low >= -8 and high < 8 else 128
    group = next((size for size in _BLOCKS if codes.shape[1] % size == 0), codes.shape[1])
    steps = HALF_OCTAVES[quantized.row_exponents.long()] * quantized.scale
    scale = steps[:, None].expand(-1, codes.shape[1] // group)
    shifted = (codes.short() + zero).byte()
    columns = HALF_OCTAVES[quantized.column_exponents.long()]
    zeros = torch.full_like(scale, zero, dtype=torch.uint8)
    return OnnxCodes(shifted.numpy(), scale.numpy(), zeros.numpy(), columns.numpy())


def _digest(tensor: Tensor) -> bytes:
    numbers = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(numbers.view(torch.uint8).numpy().tobytes()).digest()


def store_codes(graph: Any, codes: dict[bytes, OnnxCodes]) -> None:
    """Replace initializers of float32 whose numbers are those of codes by nodes that make them of codes."""
    for name, value in list(graph.initializers.items()):
        numbers = value.const_value.numpy()
        is_large = numbers.size > _SMALL and numbers.dtype == np.float32  # others would need casts all round
        known = codes.get(hashlib.sha256(numbers.tobytes()).digest()) if is_large else None
        if known is not None:
            writer = _Writer(graph, value, known)
            for node, at in list(value.uses()):
                writer.replace(node, at)
            del graph.initializers[name]
    graph.sort()


class _Writer:
    """Nodes that make an initializer of its codes.

    Args:
        graph: of onnx_ir; it gets the nodes.
        value: the initializer.
        codes: its codes.
    """

    def __init__(self, graph: Any, value: Any, codes: OnnxCodes) -> None:
        from onnx_ir.tape import Tape

        self.graph, self.value, self.codes = graph, value, codes
        self.op = Tape(graph).op

    def replace(self, node: Any, at: int) -> None:
        """Compute input ``at`` of a node from codes."""
        operation = node.op_type, at, self.codes.transposed
        if operation == ("MatMul", 1, True) or (operation == ("Gemm", 1, False) and _is_set(node, "transB")):
            node.attributes.pop("transB", None)
            if self.codes.column_steps is not None:
                node.replace_input_with(0, self._times_columns(node.inputs[0]))
            made = self._numbers(by_input=True)
        elif operation == ("Gather", 0, False) and not _is_set(node, "axis"):
            made = self._times_columns(self._rows(node.inputs[1]))
            node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
            self.graph.remove(node, safe=True)
            return
        else:
            made = self._in_shape(self._times_columns(self._numbers(by_input=False)))
        node.replace_input_with(at, made)

    def _numbers(self, by_input: bool) -> Any:
        """The matrix of numbers, (rows, columns) or with the inputs, its columns, first."""
        import ml_dtypes

        codes = self.codes
        most = max(codes.codes.max(), codes.zero_point.max())
        width = np.dtype(np.uint8 if most > 15 else ml_dtypes.uint4)
        arrays = {"codes": codes.codes.astype(width), "scale": codes.scale}
        arrays["zero_point"] = codes.zero_point.astype(width)
        if by_input:
            arrays = {f"{part}_by_input": array.T for part, array in arrays.items()}
        stored, scale, zero_point = (self._initializer(*item) for item in arrays.items())
        grouped = {"axis": int(not by_input), "block_size": codes.group}
        return self.op("DequantizeLinear", [stored, self._cast(scale), zero_point], grouped)

    def _rows(self, indices: Any) -> Any:
        """The numbers of some rows; onnxruntime 1.32 fails at a product of two DequantizeLinear."""
        codes = self.codes
        groups = *codes.scale.shape, 1
        arrays = {"grouped_codes": codes.codes.reshape(*groups[:2], -1)}
        arrays["grouped_zero_point"] = codes.zero_point.reshape(groups)
        arrays["grouped_scale"] = codes.scale.reshape(groups)
        gathered = [self.op("Gather", [self._initializer(*item), indices]) for item in arrays.items()]
        number, zero_point, scale = map(self._cast, gathered)
        grouped = self.op("Mul", [self.op("Sub", [number, zero_point]), scale])
        shape = np.array([0] * len(indices.shape) + [-1])
        return self.op("Reshape", [grouped, self._initializer(f"{len(shape)}_axes", shape)])

    def _cast(self, value: Any) -> Any:
        return self.op("Cast", [value], {"to": 1})  # float32

    def _initializer(self, ending: str, array: NDArray[Any]) -> Any:
        import onnx_ir as ir

        name = f"{self.value.name}_{ending}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _times_columns(self, value: Any) -> Any:
        steps = self.codes.column_steps
        return value if steps is None else self.op("Mul", [value, self._initializer("column_steps", steps)])

    def _in_shape(self, matrix: Any) -> Any:
        """The matrix of numbers as the initializer was."""
        channels = self.codes.channels
        if channels:
            taps = np.array([len(self.codes.codes), -1, channels])
            matrix = self.op("Reshape", [matrix, self._initializer("taps", taps)])
        if channels or self.codes.transposed:
            matrix = self.op("Transpose", [matrix], {"perm": [0, 2, 1] if channels else [1, 0]})
        shape = np.array(self.value.shape.numpy())
        return self.op("Reshape", [matrix, self._initializer("shape", shape)])


def _is_set(node: Any, attribute: str) -> bool:
    found = node.attributes.get(attribute)
    return found is not None and found.as_int() != 0
