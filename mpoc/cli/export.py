"""``mpoc export``: write the compressed network as a program for other runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpoc.cli.console import Output
from mpoc.cli.options import takes
from mpoc.errors import MpocError, UsageError
from mpoc.runtime.formatting import counted, human_bytes
from mpoc.runtime.options import argument, option
from mpoc.train.settings import architecture_option


@dataclass(frozen=True)
class ExportOptions:
    """The command line of ``mpoc export``."""

    path: Path = argument("OUT", "A compressed file or directory.")
    onnx: Path | None = option("Write ONNX, for onnxruntime and others.", None, metavar="FILE")
    pt2: Path | None = option("Write a program for torch.export.load.", None, metavar="FILE")
    hf: Path | None = option("Write a directory for transformers without mpoc.", None, metavar="DIR")
    coded: str | None = option(
        "With --hf, write coded layers in 8 or 4 bits, or floats.", None, metavar="8|4|dense", shown="8"
    )
    multiple: int | None = option(
        "With --hf, pad ranks of pairs with zeros to a multiple.", None, metavar="16|32|64|128"
    )
    arch: str | None = architecture_option(panel=None)
    input_shape: tuple[str, ...] = option(
        "Give an input's shape with its batch, as 1x3x32x32 or 1x128+:int64. Repeatable.",
        (), metavar="SHAPE[:DTYPE]", repeated=True,
    )  # fmt: skip
    force: bool = option("Replace existing files.", False)
    quiet: bool = option("Print errors only.", False)


@takes(ExportOptions)
def export(options: ExportOptions) -> None:
    """Write the compressed network as a program that runs without mpoc; the batch size stays free.

    --hf writes pairs of linear layers for svd, packed integers where weights are stored in few bits, and
    dense weights for the rest.

    --arch file.py:function runs that code; the zoo and Hugging Face directories need none.

    Examples:

    mpoc export resnet56.mpo.safetensors --arch resnet.py:resnet56 --input-shape 1x3x32x32 --onnx net.onnx

    mpoc export resnet56.mpo.safetensors --arch resnet.py:resnet56 --input-shape 1x3x32x32 --pt2 net.pt2

    mpoc export bert-mpo/ --hf bert-transformers/
    """
    from mpoc.io.weight_files import output_bytes
    from mpoc.models.export import export_network, parse_input_spec

    files = {kind: file for kind, file in (("onnx", options.onnx), ("pt2", options.pt2)) if file is not None}
    shapes = [parse_input_spec(text) for text in options.input_shape]
    console = Output(options.quiet)
    if not files and options.hf is not None and (options.arch or shapes):
        raise UsageError("--arch and --input-shape apply to --onnx and --pt2, not to --hf")
    if options.hf is None and (options.coded or options.multiple is not None):
        raise UsageError("--coded and --multiple apply to --hf")
    if options.hf is not None:
        _export_directory(console, options, options.hf)
        if not files:
            return
    made = export_network(options.path, files, shapes, options.arch, options.force)
    taken = ", ".join(f"{spec} {str(spec.dtype).removeprefix('torch.')}" for spec in made.inputs)
    for file in made.files:
        inputs = f", inputs {taken}" if file in files.values() else ""
        console.say(f"wrote {file}: {human_bytes(output_bytes(file))}{inputs}")


def _export_directory(console: Output, options: ExportOptions, target: Path) -> None:
    """Write the directory, and say what its layers became."""
    try:
        from mpoc.hf.export import export_directory
    except ImportError as error:  # transformers is missing, or too old
        raise MpocError(f"--hf: {error}", "pip install 'mpoc[hf]'") from error
    from mpoc.io.weight_files import output_bytes

    found = export_directory(options.path, target, options.force, options.coded, options.multiple)
    codes = found.codes
    pairs = f"{counted(len(found.pairs), 'layer')} as pairs of linear layers"
    pairs += "" if options.multiple is None else f" ({human_bytes(found.padding_bytes)} of them zeros)"
    packed = f"{len(codes.layers)} with codes of compressed-tensors"
    sizes = f" ({human_bytes(codes.nbytes)}, {human_bytes(codes.source_bytes)} before)"
    packed += sizes if codes.layers else ""
    dense = f"{len(found.dense)} dense" + (f" ({human_bytes(found.dense_bytes)})" if found.dense else "")
    console.say(f"wrote {target}: {human_bytes(output_bytes(target))}; {pairs}, {packed}, {dense}")
    if codes.errors:
        assert codes.grid is not None
        worst = max(codes.errors, key=lambda layer: codes.errors[layer])
        mean = sum(codes.errors.values()) / len(codes.errors)
        console.say(
            f"{counted(len(codes.errors), 'coded layer')} rounded to {codes.grid.bits} bits: relative error "
            f"{mean:.2g} on average, {codes.errors[worst]:.2g} at most ({worst})"
        )
    if codes.layers:
        console.say("to load codes: pip install compressed-tensors")
    code = ", trust_remote_code=True" if found.pairs else ""
    console.next_command(f"AutoModel.from_pretrained({str(target)!r}{code}) in Python")
