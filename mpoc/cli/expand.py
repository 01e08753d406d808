"""``mpoc expand``: write dense weights back from a compressed file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpoc.cli.console import Output
from mpoc.cli.options import takes
from mpoc.runtime.formatting import counted, human_bytes, parse_size
from mpoc.runtime.options import argument, option

if TYPE_CHECKING:
    from mpoc.io.manifest import LayerRecord


@dataclass(frozen=True)
class ExpandOptions:
    """The command line of ``mpoc expand``."""

    path: Path = argument("OUT", "A compressed file or directory.")
    output: Path | None = option(
        "Write here.", None, "--output -o", metavar="DENSE", shown="OUT.dense.safetensors or OUT-dense/"
    )
    force: bool = option("Replace an existing output.", False)
    max_shard_size: int = option(
        "Limit each weight file of a directory.", 5 * 10**9, metavar="SIZE", parse=parse_size, shown="5GB"
    )
    project: bool = option("Write the nearest kernel of a convolution compressed as one map.", False)
    quiet: bool = option("Print errors only.", False)


@takes(ExpandOptions)
def expand(options: ExpandOptions) -> None:
    """Write dense weights under their original names, shapes and dtypes, so that anything can load them.

    Example: mpoc expand resnet56.mpo.safetensors -o resnet56.safetensors
    """
    from mpoc.compression.expand import default_dense_output, expand_checkpoint
    from mpoc.io.weight_files import output_bytes

    def say_projected(layer: LayerRecord, error: float) -> None:
        console.say(f"{layer.layer}: nearest kernel, {error:.4g} of the map's norm away")

    console = Output(options.quiet)
    target = options.output or default_dense_output(options.path)
    projected = say_projected if options.project else None
    manifest = expand_checkpoint(options.path, target, options.force, options.max_shard_size, projected)
    size = human_bytes(output_bytes(target))
    console.say(f"wrote {target}: {counted(len(manifest.changed), 'layer')} dense again, {size}")
    console.next_command(f"{_loader(target)} in Python")


def _loader(target: Path) -> str:
    """The call that loads a dense output: of the library that its config.json names, or of safetensors."""
    from mpoc.io.weight_files import read_json, weight_files_of

    if not target.is_dir():
        return f"safetensors.torch.load_file({str(target)!r})"
    config = read_json(target / "config.json") if (target / "config.json").is_file() else {}
    if "_class_name" in config:
        return f"diffusers.{config['_class_name']}.from_pretrained({str(target)!r})"
    if "model_type" in config:
        return f"AutoModel.from_pretrained({str(target)!r})"
    return f"safetensors.torch.load_file({str(weight_files_of(target)[0][0])!r})"
