"""The report of a compressed file as text, JSON and CSV. It needs the header alone, and no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.weight_files import output_bytes
from mpoc.reporting.remarks import headline, likeness_text, remarks
from mpoc.runtime.formatting import counted, human_bytes, times

SCHEMA = "mpoc.report/1"

_SHOWN_ROWS = 24  # of a report's repr

_COLUMNS = (
    "layer",
    "kind",
    "form",
    "shape",
    "output_factors",
    "input_factors",
    "bonds",
    "low_rank",
    "num_original",
    "num_stored",
    "rho",
    "relative_error",
    "output_error",
    "held_out_error",
    "stored_dtype",
    "stored_as",
    "nbytes",
    "bits_per_weight",
    "reason",
)


@dataclass(frozen=True, repr=False)
class Report:
    """The report of a compression: one record for each selected layer, and the totals.

    ``repr(report)`` is a short table of layers, bonds, ρ and errors; :meth:`to_dict` is the JSON report of
    ``mpoc report --json``.
    """

    manifest: Manifest  # what the file records: source, options, layers, ties
    nbytes: int  # of the output on disk, or as it would be written
    seconds: Mapping[str, float] | None = None  # name of the weight → time of its fit, where it was just made

    @property
    def layers(self) -> tuple[LayerRecord, ...]:
        """The selected layers in the source's order, those left dense included."""
        return self.manifest.layers

    @property
    def replaced(self) -> list[LayerRecord]:
        """The layers stored in a compressed form."""
        return self.manifest.replaced

    @property
    def rho(self) -> float:
        """Σ N_mpo / Σ N_ori over the replaced layers (Eq. 9 of Gao et al. 2020); 1 where there are none."""
        return self.manifest.rho

    @property
    def rho_selected(self) -> float:
        """The same ratio over all selected layers, those left dense included."""
        return self.manifest.rho_selected

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network as stored."""
        return self.manifest.num_parameters

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; its schema is ``mpoc.reporting.schemas.schema("report")``."""
        return report_dict(self.manifest, self.nbytes, self.seconds)

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return to_json(self.to_dict())

    def __repr__(self) -> str:
        title = f"Report: {self._title()}"
        rows = [("layer", "form", "bonds", "ρ", _error_title(self.manifest))]
        rows += map(_short_row, self.layers[:_SHOWN_ROWS])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        more = len(self.layers) - _SHOWN_ROWS
        return "\n".join([title, *lines, *([f"… and {more} more layers"] if more > 0 else [])])

    def _title(self) -> str:
        if not self.replaced and self.manifest.changed:
            return reached_line(self.manifest, self.nbytes)
        title = (
            f"ρ = {self.rho:.4f} over {len(self.replaced)} of {len(self.layers)} selected layers, "
            f"{self.manifest.source.num_parameters:,} → {self.num_parameters:,} parameters, "
            f"{human_bytes(self.nbytes)}"
        )
        coded = any(layer.storage for layer in self.layers)
        return title + (f", {self.manifest.bits_per_weight:.2f} bits a weight" if coded else "")


def _error_title(manifest: Manifest) -> str:
    return "output error" if manifest.calibration else "error"


def _short_row(layer: LayerRecord) -> tuple[str, str, str, str, str]:
    """Cells of the table in a report's repr; the reason stands in the place of a dense layer's error."""
    errors = (layer.held_out_error, layer.output_error, layer.relative_error)
    known = next((f"{error:.4f}" for error in errors if error is not None), "")
    error = known if layer.is_changed else layer.reason
    return layer.layer, layer.form, layer.bonds_text(), f"{layer.rho:.4f}", error


def read_report(path: str | PathLike[str]) -> Report:
    """Read the report of a compressed file or directory from its header, without torch.

        >>> report = mpoc.read_report("digits-cnn.mpo.safetensors")
        >>> report
        Report: ρ = 0.0541 over 3 of 4 selected layers, 71,754 → 4,194 parameters, 20.6 kB
        layer  form   bonds    ρ       error
        conv1  dense           1.0000  would not shrink at bond 8: 144 → 200 (--allow-growth)
        conv2  mpo    8 8 8 4  0.2135  0.7752
        fc1    mpo    8 8 8    0.0352  0.9286
        fc2    mpo    8        0.4500  0.6246

    Args:
        path: a file or directory that mpoc wrote.

    Raises:
        UsageError: nothing is at ``path``.
        MpocError: it was not compressed by mpoc, has a later format, or is damaged.
    """
    source = Path(path)
    return Report(read_manifest(source), output_bytes(source))


def report_dict(
    manifest: Manifest, nbytes: int, seconds: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The report as plain data; the schema is in the guide, file-format-and-json.

    Args:
        manifest: manifest of the compressed file, or of a plan.
        nbytes: bytes of the output on disk.
        seconds: time of the fit of each layer, right after a compression.
    """
    layers = [_layer_dict(layer, seconds) for layer in manifest.layers]
    return {
        "schema": SCHEMA,
        "headline": headline(manifest),
        "source": asdict(manifest.source),
        "options": manifest.options,
        "tool": manifest.tool,
        "kinds_from": manifest.kinds_from,
        "architecture": manifest.architecture,
        "training": manifest.training,
        "calibration": manifest.calibration,
        "measured": manifest.measured,
        "totals": {
            "rho": manifest.rho,
            "rho_selected": manifest.rho_selected if manifest.is_complete else None,
            "layers_replaced": len(manifest.replaced),
            "layers_selected": len(manifest.layers) if manifest.is_complete else None,
            "parameters_replaced_before": sum(layer.num_original for layer in manifest.replaced),
            "parameters_replaced_after": sum(layer.num_stored for layer in manifest.replaced),
            "parameters_before": manifest.source.num_parameters,
            "parameters_after": manifest.num_parameters,
            "bytes_before": manifest.source.nbytes,
            "bytes_after": nbytes,
            "bytes_selected_before": manifest.selected_bytes[0],
            "bytes_selected_after": manifest.selected_bytes[1],
            "bits_per_weight": manifest.bits_per_weight,
        },
        "layers": layers,
        "left_alone": manifest.left_alone,
        "vectors_left_alone": manifest.vectors,
        "tied": manifest.tied,
    }


def _layer_dict(layer: LayerRecord, seconds: Mapping[str, float] | None) -> dict[str, Any]:
    row = {**asdict(layer), "layer": layer.layer, "rho": layer.rho, "nbytes": layer.stored_bytes}
    row |= {"stored_as": layer.storage_text, "bits_per_weight": layer.bits_per_weight}
    if seconds is not None:
        row["seconds"] = round(seconds.get(layer.name, 0.0), 4)
    return row


def to_json(report: dict[str, Any]) -> str:
    """The report as JSON text."""
    return json.dumps(report, indent=2, ensure_ascii=False)


def to_csv(manifest: Manifest) -> str:
    """One line per selected layer; factors and bonds joined by ×."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for layer in manifest.layers:
        row = _layer_dict(layer, None)
        writer.writerow([_cell(row[column]) for column in _COLUMNS])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return times(value) if isinstance(value, tuple | list) else value


def summary(manifest: Manifest, nbytes: int, predicted: bool) -> list[str]:
    """The totals in plain sentences."""
    replaced, source = manifest.replaced, manifest.source
    weights = [_weights_line(manifest)] if manifest.layers else []
    on_disk = "predicted at most" if predicted else "on disk"
    if not replaced and manifest.changed:
        return [f"{on_disk} {_size_and_bits(manifest, nbytes)}", *weights, *remarks(manifest)]
    before = sum(layer.num_original for layer in replaced)
    after = sum(layer.num_stored for layer in replaced)
    rho = f"ρ = {manifest.rho:.4f} over {counted(len(replaced), 'replaced layer')} ({before:,} → {after:,})"
    if manifest.is_complete:
        rho += f"; {manifest.rho_selected:.4f} over the {len(manifest.layers)} selected"
    whole = f"whole model {source.num_parameters:,} → {manifest.num_parameters:,} parameters"
    if source.num_parameters:
        whole += f" ({manifest.num_parameters / source.num_parameters:.1%})"
    return [rho, f"{whole}; {on_disk} {_size_text(manifest, nbytes)}", *weights, *remarks(manifest)]


def reached_line(manifest: Manifest, nbytes: int) -> str:
    """What rounding reached: bytes, their share of the source's, bits a weight, and likeness where known."""
    likeness = likeness_text(manifest.calibration.get("likeness", {}).get("this", {}))
    return _size_and_bits(manifest, nbytes) + (f"; held out: {likeness}" if likeness else "")


def _size_and_bits(manifest: Manifest, nbytes: int) -> str:
    return f"{_size_text(manifest, nbytes)}, {manifest.bits_per_weight:.2f} bits a weight"


def _size_text(manifest: Manifest, nbytes: int) -> str:
    """``91.6 MB → 70.2 MB (76.6%)``, as far as the size of the source is known."""
    was, size = manifest.source.nbytes, human_bytes(nbytes)
    return f"{human_bytes(was)} → {size} ({nbytes / was:.1%})" if was else size


def _weights_line(manifest: Manifest) -> str:
    """The bytes of the selected weights, as a share and as bits a weight."""
    before, after = manifest.selected_bytes
    return (
        f"weights of {counted(len(manifest.layers), 'selected layer')} {human_bytes(before)} → "
        f"{human_bytes(after)} ({after / before:.1%}), {manifest.bits_per_weight:.2f} bits a weight"
    )
