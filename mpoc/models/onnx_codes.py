"""Codes in an ONNX file: of 4, 8 or 16 bits in groups (opset 21) in place of floats.

The program is made of floats, and its constants are recognised by their numbers, whatever they are called and
however the optimizer turned them. Codes of 2 and 3 bits take 4, those of 5 and 6 take 8. Coded matrices take
8, or 16 for larger codes, the row's step as scale and those of the columns as a factor, so that every number
stays what it is.

A linear layer's matrix in groups of 16 to 128 is written with its inputs first and its groups along them, and
multiplied by ``MatMul``. onnxruntime then multiplies with the codes as they are (``MatMulNBits``), and rounds
the inputs to 8 bits for it; a session that sets ``session.disable_quant_qdq`` decodes them once, when it is
made, and computes with exact numbers. Of a table only rows that are looked up are decoded. Everything else is
decoded by plain arithmetic, which every session does once: it would run ``DequantizeLinear`` in every call.
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
# Groups that onnxruntime multiplies with; a coded matrix takes the first that fits
_BLOCKS = (128, 64, 32, 16)
_GROUPED = "grouped_"  # in names of initializers


@dataclass(frozen=True)
class OnnxCodes:
    """The codes of a tensor in groups, and how their matrix (rows, columns) becomes the tensor."""

    codes: NDArray[np.uint8 | np.uint16]  # (rows, columns), below 16 for 4 bits
    scale: NDArray[Any]  # (rows, groups)
    zero_point: NDArray[np.uint8 | np.uint16]  # (rows, groups)
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
    """Codes with the scales of groups; None of codes that 16 bits do not hold."""
    if isinstance(quantized, GridTensor):
        zeros = quantized.lowest()[:, :: quantized.codes.shape[1] // quantized.scale.shape[1]].neg()
        return OnnxCodes(quantized.codes.numpy(), quantized.scale.numpy(), zeros.byte().numpy(), None)
    codes = quantized.codes.numpy().astype(np.int64)
    zero = next((zero for zero in (8, 128, 1 << 15) if codes.min() >= -zero and codes.max() < zero), None)
    if zero is None:
        return None
    group = next((size for size in _BLOCKS if codes.shape[1] % size == 0), codes.shape[1])
    steps = HALF_OCTAVES[quantized.row_exponents.long()] * quantized.scale
    scale = steps[:, None].expand(-1, codes.shape[1] // group).numpy()
    columns = HALF_OCTAVES[quantized.column_exponents.long()].numpy()
    width = np.uint8 if zero <= 128 else np.uint16
    return OnnxCodes((codes + zero).astype(width), scale, np.full_like(scale, zero, dtype=width), columns)


def _digest(tensor: Tensor) -> bytes:
    numbers = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(numbers.view(torch.uint8).numpy().tobytes()).digest()


def store_codes(graph: Any, codes: dict[bytes, OnnxCodes], kernels: bool) -> None:
    """Replace initializers of float32 whose numbers are those of codes by nodes that make them of codes.

    Args:
        graph: of onnx_ir.
        codes: by the digest of their numbers.
        kernels: replace those of convolutions only, before the optimizer multiplies batch norms into them.
    """
    for name, value in list(graph.initializers.items()):
        if kernels and not any(node.op_type.startswith("Conv") for node, _ in value.uses()):
            continue
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
        is_linear = operation == ("MatMul", 1, True) or (
            operation == ("Gemm", 1, False) and _is_set(node, "transB") and not _is_set(node, "transA")
        )
        if is_linear and self.codes.group in _BLOCKS and self.codes.codes.dtype == np.uint8:
            self._multiply(node)
        elif operation == ("Gather", 0, False) and not _is_set(node, "axis"):
            made = self._times_columns(self._decoded(node.inputs[1]))
            node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
            self.graph.remove(node, safe=True)
        else:
            made = self._in_shape(self._times_columns(self._decoded()))
            made.shape, made.type = self.value.shape, self.value.type
            node.replace_input_with(at, made)

    def _multiply(self, node: Any) -> None:
        """Multiply with codes; a Gemm becomes MatMul and Sum, since onnxruntime has none for codes.

        It would make a Gemm again of MatMul and Add.
        """
        x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        inputs = [self._times_columns(x), self._by_input()]
        if bias is not None:
            inputs = [self.op("MatMul", inputs), bias]
        node.op_type = "MatMul" if bias is None else "Sum"
        node.attributes.clear()
        for k, value in enumerate(inputs):
            node.replace_input_with(k, value)
        node.resize_inputs(2)

    def _by_input(self) -> Any:
        """The matrix of numbers with its columns, the inputs, first."""
        codes = self.codes
        arrays = {"codes": self._narrow(codes.codes), "scale": codes.scale}
        arrays["zero_point"] = self._narrow(codes.zero_point)
        arrays = {f"{part}_by_input": array.T for part, array in arrays.items()}
        stored, scale, zero_point = (self._initializer(*item) for item in arrays.items())
        grouped = {"axis": 0, "block_size": codes.group}
        return self.op("DequantizeLinear", [stored, self._cast(scale), zero_point], grouped)

    def _narrow(self, codes: NDArray[Any]) -> NDArray[Any]:
        """Codes in the width of this tensor, 4 bits where they hold all."""
        import ml_dtypes

        most = max(self.codes.codes.max(), self.codes.zero_point.max())
        return codes if most > 15 else codes.astype(ml_dtypes.uint4)

    def _decoded(self, indices: Any = None) -> Any:
        """The numbers of some rows, whose codes take 8 bits or more; None: of all, (rows, columns).

        onnxruntime 1.32 fails at a product of two ``DequantizeLinear``.
        """
        codes, name = self.codes, _GROUPED if indices is None else "table_"
        groups = *codes.scale.shape, 1
        arrays = {
            "codes": codes.codes.reshape(*groups[:2], -1),
            "zero_point": codes.zero_point.reshape(groups),
        }
        if indices is None:
            arrays = {part: self._narrow(array) for part, array in arrays.items()}
        arrays["scale"] = codes.scale.reshape(groups)
        read = [self._initializer(name + part, array) for part, array in arrays.items()]
        if indices is not None:
            read = [self.op("Gather", [array, indices]) for array in read]
        number, zero_point, scale = map(self._cast, read)
        grouped = self.op("Mul", [self.op("Sub", [number, zero_point]), scale])
        shape = np.array([0] * (1 if indices is None else len(indices.shape)) + [-1])
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


def may_fold(node: Any) -> bool | None:
    """Whether the optimizer may compute a node in advance: False where it decodes; None: its own rules."""
    first = node.inputs[0] if node.op_type == "Cast" else None
    return False if first is not None and _GROUPED in (first.name or "") else None


def _is_set(node: Any, attribute: str) -> bool:
    found = node.attributes.get(attribute)
    return found is not None and found.as_int() != 0
