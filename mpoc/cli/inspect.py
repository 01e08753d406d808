"""``mpoc inspect``: what a checkpoint holds, from names, shapes and dtypes; no torch for safetensors."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoc.cli.console import Output, plain
from mpoc.cli.options import takes
from mpoc.errors import MpocError, command_line
from mpoc.runtime.formatting import human_bytes, times
from mpoc.runtime.options import argument, option

if TYPE_CHECKING:
    from mpoc.compression.selection import Selection
    from mpoc.io.safetensors_header import TensorInfo


@dataclass(frozen=True)
class InspectOptions:
    """The command line of ``mpoc inspect``."""

    path: Path = argument("MODEL", "A checkpoint: safetensors, torch file, or Hugging Face directory.")
    as_json: bool = option("Print every tensor, as JSON.", False, "--json")
    verbose: bool = option("Name every tensor that is not compressible, with the reason.", False)


@dataclass
class CheckpointContents:
    """Names, shapes and dtypes of a checkpoint, as selection reads them."""

    infos: dict[str, TensorInfo]
    tied: dict[str, str]
    config: dict[str, Any] | None
    nbytes: int  # of the weight files
    kinds: dict[str, tuple[str | None, bool]] | None = None
    left: dict[str, str] = field(default_factory=dict)
    architecture: dict[str, str] = field(default_factory=dict)


@takes(InspectOptions)
def inspect(options: InspectOptions) -> None:
    """Show what a checkpoint holds: layers by kind, dtypes, size, and what can be compressed.

    Examples:

    mpoc inspect bert/

    mpoc inspect resnet56.th --json
    """
    from mpoc.compression.selection import select

    contents = _read(options.path)
    refusal = _refusal(options.path, contents)
    selection = select(contents, embeddings=True)
    found = _as_json(options.path, contents, selection, refusal)
    if options.as_json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return
    console = Output()
    _print(console, found, options.verbose)
    if refusal is None and selection.chosen:
        console.next_command(command_line("mpoc", "compress", options.path, "--size", "25%", "--dry-run"))


def _read(path: Path) -> CheckpointContents:
    """Read names, shapes and dtypes: of safetensors from their headers, else with torch.

    Raises:
        UsageError: nothing at ``path``.
        MpocError: no checkpoint, or one that mpoc wrote.
    """
    from mpoc.io.manifest import MANIFEST_FILE
    from mpoc.io.safetensors_header import read_header
    from mpoc.io.weight_files import read_json, stored_tensors, weight_files_of

    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    files = weight_files_of(path)[0] if path.is_dir() else [path]
    if not (path.exists() and all(file.suffix == ".safetensors" for file in files)):
        from mpoc.io.open_checkpoint import open_checkpoint

        opened = open_checkpoint(path)
        return CheckpointContents(opened.infos, opened.tied, opened.config, opened.nbytes_on_disk)
    if (path / MANIFEST_FILE).exists() or "mpoc" in read_header(files[0]).metadata:
        raise MpocError(f"{path}: already compressed by mpoc", command_line("mpoc", "report", path))
    infos = stored_tensors(path) if path.is_dir() else read_header(path).tensors
    return CheckpointContents(infos, {}, config, sum(file.stat().st_size for file in files))


def _refusal(path: Path, contents: CheckpointContents) -> str | None:
    """Why mpoc does not compress the checkpoint at all: it is quantised, or an adapter; else None."""
    from mpoc.io.foreign import refuse_layout, refuse_quantised

    try:
        refuse_quantised(path, contents.config or {})
        refuse_layout(path, contents.infos)
    except MpocError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _as_json(
    path: Path, contents: CheckpointContents, selection: Selection, refusal: str | None
) -> dict[str, Any]:
    config = contents.config or {}
    kinds = {map.name: map.kind for map in selection.chosen}
    tensors = [
        {
            "name": info.name,
            "shape": list(info.shape),
            "dtype": info.dtype,
            "kind": kinds.get(info.name),
            "reason": refusal or selection.left.get(info.name),  # why it is not compressible
        }
        for info in contents.infos.values()
    ]
    return {
        "schema": "mpoc.inspect/1",
        "path": str(path),
        "architecture": next(iter(config.get("architectures") or []), config.get("model_type")),
        "bytes": contents.nbytes,
        "parameters": sum(info.numel for info in contents.infos.values() if "float" in info.dtype),
        "dtypes": dict(Counter(info.dtype for info in contents.infos.values())),
        "tied": contents.tied,
        "head_tied_to_embedding": bool(config.get("tie_word_embeddings")),
        "refused": refusal,
        "kinds_from": selection.source,
        "tensors": tensors,
    }


def _print(console: Output, found: dict[str, Any], verbose: bool) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("kind", "tensors", "numbers", "share", "shapes"):
        table.add_column(title, justify="left" if title in ("kind", "shapes") else "right", overflow="fold")
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for tensor in found["tensors"]:
        by_kind.setdefault(tensor["kind"] or "other", []).append(tensor)
    numbers = {kind: [_numel(tensor) for tensor in own] for kind, own in by_kind.items()}
    total = max(1, sum(map(sum, numbers.values())))
    for kind, own in sorted(by_kind.items(), key=lambda item: (item[0] == "other", -sum(numbers[item[0]]))):
        count = sum(numbers[kind])
        table.add_row(kind, f"{len(own):,}", f"{count:,}", f"{count / total:.1%}", _shapes(own))
    console.result.print(table)
    for line in _lines(found):
        console.result.print(plain(line), soft_wrap=True)
    for tensor in found["tensors"] if verbose else ():
        if tensor["reason"]:
            console.result.print(plain(f"  {tensor['name']}: {tensor['reason']}"), soft_wrap=True)


def _numel(tensor: dict[str, Any]) -> int:
    count = 1
    for side in tensor["shape"]:
        count *= side
    return count


def _shapes(tensors: list[dict[str, Any]]) -> str:
    """The most frequent shapes, with how often."""
    counts = Counter(times(tensor["shape"]) or "scalar" for tensor in tensors).most_common()
    named = [f"{shape} ({count})" if count > 1 else shape for shape, count in counts[:3]]
    return ", ".join(named) + (", …" if len(counts) > 3 else "")


def _lines(found: dict[str, Any]) -> list[str]:
    """What stands below the table."""
    dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in found["dtypes"].items())
    of = f"{found['architecture']}: " if found["architecture"] else ""
    lines = [f"{of}{found['parameters']:,} parameters, {human_bytes(found['bytes'])}; dtypes {dtypes}"]
    lines += [f"{name}: tied to {first}" for name, first in found["tied"].items()]
    if found["head_tied_to_embedding"]:
        lines.append("the output head is tied to the embedding")
    if found["refused"]:
        return [*lines, f"not compressible: {found['refused']}"]
    chosen = sum(_numel(tensor) for tensor in found["tensors"] if tensor["kind"])
    count = sum(1 for tensor in found["tensors"] if tensor["kind"])
    lines.append(
        f"compressible: {count} tensors with {chosen:,} numbers (embeddings with --size or --embeddings)"
    )
    reasons = Counter(tensor["reason"] for tensor in found["tensors"] if tensor["reason"])
    if reasons:
        lines.append(
            "unchanged: " + "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        )
    return [*lines, f"layer kinds read from {found['kinds_from']}"]
