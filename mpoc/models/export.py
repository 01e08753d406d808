"""Export the compressed network as a program for other runtimes: ONNX, or ``.pt2`` of torch.export.

The program is traced once and keeps the cores: the file is about as small as the compressed one, and the
runtime contracts the cores in every call. The first axis of every input is the batch and stays free. So do
axes whose size is given with a plus, as 1x128+, and the length of transformers' language models where their
code allows it; all other sizes are those of the example.
ONNX keeps codes too (:mod:`mpoc.models.onnx_codes`). Weights that one ONNX file cannot hold, above 2 GB, go
to a file beside it, FILE.data.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError
from mpoc.io.atomic import put_in_place, refuse_existing, staged
from mpoc.io.manifest import MANIFEST_FILE
from mpoc.io.manifest_reader import read_manifest
from mpoc.models.architecture import example_input, is_transformers_directory
from mpoc.models.loading import open_network
from mpoc.models.onnx_codes import OnnxCodes, codes_by_content, may_fold, store_codes

_FOLDED = 256  # numbers: shapes and scalars are computed in advance, products of cores are not
_LARGEST_ONNX = 2**31 - 2**20  # bytes: one protobuf message; more goes to a file beside it
_OPSET = 21  # has DequantizeLinear of 4 bits in groups
_FREE = "any"
_SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}


@dataclass(frozen=True)
class InputSpec:
    """One input of the network: ``--input-shape 1x3x32x32``, or ``1x128+:int64``."""

    shape: tuple[int, ...]  # the batch in front
    dtype: torch.dtype | None = None  # None: the network's own
    free: tuple[int, ...] = ()  # axes besides the batch that have any size, as 128+ says

    def __str__(self) -> str:
        sizes = (_FREE if axis in self.free else str(size) for axis, size in enumerate(self.shape))
        return "×".join(["batch", *list(sizes)[1:]])


@dataclass(frozen=True)
class ExportedNetwork:
    """What :func:`export_network` wrote."""

    inputs: list[InputSpec]  # with dtypes and free axes; a language model also takes an attention mask
    files: list[Path]


def parse_input_spec(text: str) -> InputSpec:
    """Parse the text of ``--input-shape``.

    Raises:
        UsageError: it has another form.
    """
    match = re.fullmatch(r"([1-9]\d*(?:x[1-9]\d*\+?)*)(?::(\w+))?", text.strip())
    dtype = getattr(torch, match[2], None) if match and match[2] else None
    if not match or (match[2] and not isinstance(dtype, torch.dtype)):
        raise UsageError(f"--input-shape {text!r}: not a shape with its batch, as 1x3x32x32 or 1x128+:int64")
    sizes = match[1].split("x")
    free = tuple(axis for axis, size in enumerate(sizes) if size.endswith("+"))
    return InputSpec(tuple(int(size.removesuffix("+")) for size in sizes), dtype, free)


def export_network(
    source: Path,
    files: dict[str, Path],
    inputs: list[InputSpec],
    arch: str | None = None,
    force: bool = False,
) -> ExportedNetwork:
    """Write the network stored at ``source`` as a program.

    Args:
        source: a compressed file or directory.
        files: format (``"onnx"`` or ``"pt2"``) → file to write.
        inputs: what the network takes, in order; empty: what a network of the zoo takes.
        arch: the dense network, as ``--arch`` names it; None: the one that the file or directory names.
        force: replace existing files.

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
    inputs = [replace(spec, dtype=spec.dtype or own) for spec in inputs]
    program = trace_program(network, inputs)
    free = [tuple(axis for axis in axes if axis) for axes in _free_axes(program)]
    inputs = [replace(spec, free=axes) for spec, axes in zip(inputs, free, strict=True)]
    written = []
    for kind, path in files.items():
        with staged(path) as target:
            if kind == "pt2":
                _write_pt2(program, target)
            else:
                _write_onnx(program, codes_by_content(source, manifest), target)
                written += _place_data(target, path, source, force)
            written.append(path)
    return ExportedNetwork(inputs, written)


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
    """The network as a program whose batch size and free axes are free; tokens only where they can be.

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
    lengths = torch.export.Dim.AUTO if isinstance(network, _OfTokens) else torch.export.Dim.DYNAMIC
    batch = torch.export.Dim.DYNAMIC if any(spec.free for spec in inputs) else torch.export.Dim("batch")
    shapes = tuple({0: batch, **dict.fromkeys(spec.free, lengths)} for spec in inputs)
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


def _free_axes(program: torch.export.ExportedProgram) -> list[dict[int, str]]:
    """The free axes of each input of a program: axis → the symbol of its size."""
    given = set(program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in given]
    return [{k: str(n) for k, n in enumerate(shape) if isinstance(n, torch.SymInt)} for shape in shapes]


def _axis_names(program: torch.export.ExportedProgram) -> list[dict[int, str]]:
    """Names for the free axes of each input; an axis whose size has a name already gets none."""
    known: set[str] = set()
    names = []
    for axes in _free_axes(program):
        new = {axis: symbol for axis, symbol in axes.items() if symbol not in known}
        known.update(new.values())
        names.append({axis: f"size_{axis}" if axis else "batch" for axis in new})
    return names


def _example(spec: InputSpec) -> Tensor:
    """An input to trace with; a free size of 1 would be taken for a constant, two equal ones for one."""
    shape = [max(3, size) if axis in spec.free else size for axis, size in enumerate(spec.shape)]
    shape[0] = next(size for size in count(max(2, spec.shape[0])) if size not in shape[1:])
    if spec.dtype is not None and spec.dtype.is_floating_point:
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(spec.dtype)
    return torch.ones(shape, dtype=spec.dtype)


def _write_pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    with _quiet_torch():
        torch.export.save(program, path)


def _write_onnx(program: torch.export.ExportedProgram, codes: dict[bytes, OnnxCodes], path: Path) -> None:
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    outputs = len(program.graph_signature.user_outputs)
    names = ["output"] if outputs == 1 else [f"output_{k}" for k in range(outputs)]
    with _quiet_torch():
        try:
            made = torch.onnx.export(
                program,
                output_names=names,
                dynamic_shapes=tuple(_axis_names(program)),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=_OPSET if codes else None,
            )
        except RuntimeError as error:
            raise MpocError(f"{path.name}: torch.onnx cannot write this network: {error}", "--pt2") from error
        assert made is not None
        store_codes(made.model.graph, codes, kernels=True)
        optimizer.optimize_ir(
            made.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED, should_fold=may_fold
        )
        store_codes(made.model.graph, codes, kernels=False)
        ClearMetadataAndDocStringPass()(made.model)
        tensors = [value.const_value for value in made.model.graph.initializers.values()]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        data = _data_file(path).name if size > _LARGEST_ONNX else None
        onnx_ir.save(made.model, path, external_data=data)


def _data_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _place_data(target: Path, path: Path, source: Path, force: bool) -> list[Path]:
    """Put the file of weights that was written beside ``target``, if there is one, beside ``path``."""
    new, place = _data_file(target), _data_file(path)
    if not new.exists():
        return []
    refuse_existing(place, source / MANIFEST_FILE if source.is_dir() else source, force)
    put_in_place(new, place)
    return [place]


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
    tokens = InputSpec(inputs[0].shape, inputs[0].dtype or torch.int64, free=(1,))
    return _OfTokens(network), [tokens, tokens]
