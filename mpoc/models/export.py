"""Export the compressed network as a program for other runtimes: ONNX, or ``.pt2`` of torch.export.

The program is traced once and keeps the cores: the file is about as small as the compressed one, and the
runtime contracts the cores in every call. The first axis of every input is the batch and stays free; all
other sizes are those of the example.
ONNX keeps codes too (:mod:`mpoc.models.onnx_codes`).
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError
from mpoc.io.atomic import refuse_existing, staged
from mpoc.io.manifest import MANIFEST_FILE
from mpoc.io.manifest_reader import read_manifest
from mpoc.models.architecture import example_input, is_transformers_directory
from mpoc.models.loading import open_network
from mpoc.models.onnx_codes import OnnxCodes, codes_by_content, store_codes

_FOLDED = 256  # numbers: shapes and scalars are computed in advance, products of cores are not
_LARGEST_ONNX = 2**31 - 2**20  # bytes: one protobuf message
_OPSET = 21  # has DequantizeLinear of 4 bits in groups
_SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}


@dataclass(frozen=True)
class InputSpec:
    """One input of the network: ``--input-shape 1x3x32x32``, or ``1x128:int64``."""

    shape: tuple[int, ...]  # the batch in front
    dtype: torch.dtype | None = None  # None: the network's own

    def __str__(self) -> str:
        return "×".join(["batch", *map(str, self.shape[1:])])


def parse_input_spec(text: str) -> InputSpec:
    """Parse the text of ``--input-shape``.

    Raises:
        UsageError: it has another form.
    """
    match = re.fullmatch(r"([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+))?", text.strip())
    dtype = getattr(torch, match[2], None) if match and match[2] else None
    if not match or (match[2] and not isinstance(dtype, torch.dtype)):
        raise UsageError(f"--input-shape {text!r}: not a shape with its batch, as 1x3x32x32 or 1x128:int64")
    return InputSpec(tuple(map(int, match[1].split("x"))), dtype)


def export_network(
    source: Path,
    files: dict[str, Path],
    inputs: list[InputSpec],
    arch: str | None = None,
    force: bool = False,
) -> list[InputSpec]:
    """Write the network stored at ``source`` as a program.

    Args:
        source: a compressed file or directory.
        files: format (``"onnx"`` or ``"pt2"``) → file to write.
        inputs: what the network takes, in order; empty: what a network of the zoo takes.
        arch: the dense network, as ``--arch`` names it; None: the one that the file or directory names.
        force: replace existing files.

    Returns:
        The inputs of the program with their dtypes; a language model also takes an attention mask.

    Raises:
        UsageError: no file or no inputs are given, a file exists, or the network does not take the inputs.
        MpocError: a package is missing, the file does not fit the network, or it cannot be traced.
    """
    if not files:
        raise UsageError("nothing to write", "--onnx FILE, --pt2 FILE, or --hf DIR")
    manifest = read_manifest(source)
    inputs = inputs or _of_the_zoo(example_input(source, manifest, arch))
    _check_request(source, files, inputs, force)
    network = open_network(source, arch)
    if arch is None and is_transformers_directory(source, manifest):
        network, inputs = _of_tensors(network, inputs)
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    inputs = [InputSpec(spec.shape, spec.dtype or own) for spec in inputs]
    program = trace_program(network, inputs)
    for kind, path in files.items():
        with staged(path) as target:
            if kind == "pt2":
                _write_pt2(program, target)
            else:
                _write_onnx(program, codes_by_content(source, manifest), target)
    return inputs


def _of_the_zoo(example: Tensor | None) -> list[InputSpec]:
    """The input of a network of the zoo: images in the network's own dtype, or token ids."""
    if example is None:
        return []
    return [InputSpec(tuple(example.shape), None if example.is_floating_point() else example.dtype)]


def _check_request(source: Path, files: dict[str, Path], inputs: list[InputSpec], force: bool) -> None:
    """Check everything that can be checked before code of the user runs."""
    if not inputs:
        raise UsageError("the shape of the input is needed", "--input-shape 1x3x32x32; repeat it for more")
    if len({spec.shape[0] for spec in inputs}) > 1:
        raise UsageError("inputs of different batch sizes: their first axis is the batch")
    for kind, path in files.items():
        if path.suffix != _SUFFIXES[kind]:
            raise UsageError(f"{path}: the name of a program for --{kind} ends in {_SUFFIXES[kind]}")
        # A file, so that an existing file may be replaced where the source is a directory.
        refuse_existing(path, source / MANIFEST_FILE if source.is_dir() else source, force)
    missing = [name for name in ("onnx", "onnxscript") if "onnx" in files and find_spec(name) is None]
    if missing:
        raise MpocError(f"--onnx needs {' and '.join(missing)}", "pip install 'mpoc[onnx]'")


def trace_program(network: nn.Module, inputs: list[InputSpec]) -> torch.export.ExportedProgram:
    """The network as a program whose batch size is free.

    Raises:
        UsageError: the network does not take such inputs.
        MpocError: it cannot be traced.
    """
    example = tuple(_example(spec) for spec in inputs)
    what = f"{type(network).__name__} with inputs {', '.join(map(str, inputs))}"
    try:
        with torch.no_grad():
            network(*example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UsageError(f"{what} fails: {error}", "--input-shape: one for each input, in order") from error
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in example)
    try:
        with _quiet_torch():
            program = torch.export.export(network, example, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n\nThe error above")[0]
        raise MpocError(f"{what} cannot be traced by torch.export: {reason}") from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # with the paths of whoever exports
    return program


def _example(spec: InputSpec) -> Tensor:
    """An input to trace with; a batch of 1 would be taken for a constant."""
    shape = (max(2, spec.shape[0]), *spec.shape[1:])
    if spec.dtype is not None and spec.dtype.is_floating_point:
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(spec.dtype)
    return torch.ones(shape, dtype=spec.dtype)


def _write_pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    with _quiet_torch():
        torch.export.save(program, path)


def _write_onnx(program: torch.export.ExportedProgram, codes: dict[bytes, OnnxCodes], path: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    rest = len(program.graph_signature.user_inputs) - 1
    count = len(program.graph_signature.user_outputs)
    names = ["output"] if count == 1 else [f"output_{k}" for k in range(count)]
    with _quiet_torch():
        try:
            made = torch.onnx.export(
                program,
                output_names=names,
                dynamic_shapes=({0: "batch"}, *[None] * rest),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=_OPSET if codes else None,
            )
        except RuntimeError as error:
            raise MpocError(f"{path.name}: torch.onnx cannot write this network: {error}", "--pt2") from error
        assert made is not None
        optimizer.optimize(made.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
        store_codes(made.model.graph, codes)
        ClearMetadataAndDocStringPass()(made.model)
        tensors = [value.const_value for value in made.model.graph.initializers.values()]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        if size > _LARGEST_ONNX:
            raise MpocError(f"{path.name}: {size:,} bytes are more than one ONNX file holds", "--pt2")
        made.save(path, external_data=False)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Suppress what torch's exporters log and warn about torch's own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
            yield
    finally:
        logger.setLevel(level)


class _OfTokens(nn.Module):
    """A language model of transformers as a function of tensors: its first output, nothing cached."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, or the last hidden states of a network without a head."""
        first: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask)[0]
        return first


class _OfOneInput(nn.Module):
    """Any other network of transformers as a function of one tensor, e.g. pixels: its first output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Tensor:
        """Logits, or the last hidden states of a network without a head."""
        first: Tensor = self.network(input)[0]
        return first


def _of_tensors(network: Any, inputs: list[InputSpec]) -> tuple[nn.Module, list[InputSpec]]:
    """A network of transformers as a function of tensors, and its inputs."""
    main: str = network.main_input_name
    if len(inputs) > 1:
        raise UsageError(f"one --input-shape, that of {main}, is enough: an attention mask has the same")
    if main != "input_ids":
        return _OfOneInput(network), inputs
    if hasattr(network.config, "use_cache"):
        network.config.use_cache = False
    tokens = InputSpec(inputs[0].shape, inputs[0].dtype or torch.int64)
    return _OfTokens(network), [tokens, tokens]
