"""The report of a compressed file as text, JSON and CSV. It needs the header alone, and no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mpoc.io.manifest import MANIFEST_FILE, LayerRecord, Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.weight_files import output_bytes
from mpoc.runtime.formatting import counted, human_bytes, times

SCHEMA = "mpoc.report/1"
# Above this relative error of its weights, a network usually needs fine-tuning.
LARGE_ERROR = 0.1
# The same for outputs after calibration, where later layers compensate a part.
LARGE_OUTPUT_ERROR = 0.3

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
        "source": asdict(manifest.source),
        "options": manifest.options,
        "tool": manifest.tool,
        "kinds_from": manifest.kinds_from,
        "architecture": manifest.architecture,
        "training": manifest.training,
        "calibration": manifest.calibration,
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
        return [f"{on_disk} {reached_line(manifest, nbytes)}", *weights, *remarks(manifest)]
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
    size, bits = _size_text(manifest, nbytes), f"{manifest.bits_per_weight:.2f} bits a weight"
    likeness = likeness_text(manifest.calibration.get("likeness", {}).get("this", {}))
    return f"{size}, {bits}" + (f"; held out: {likeness}" if likeness else "")


def _size_text(manifest: Manifest, nbytes: int) -> str:
    """``91.6 MB → 70.2 MB (76.6%)``, as far as the size of the source is known."""
    was, size = manifest.source.nbytes, human_bytes(nbytes)
    return f"{human_bytes(was)} → {size} ({nbytes / was:.1%})" if was else size


def likeness_text(likeness: Mapping[str, float]) -> str:
    """``{"agreement": 98.1, "kl": 0.0123}`` → ``agreement 98.10 %, KL 0.0123``."""
    shown = {"cosine": "cosine {:.4f}", "agreement": "agreement {:.2f} %", "kl": "KL {:.3g}"}
    return ", ".join(text.format(likeness[name]) for name, text in shown.items() if name in likeness)


def _weights_line(manifest: Manifest) -> str:
    """The bytes of the selected weights, as a share and as bits a weight."""
    before, after = manifest.selected_bytes
    return (
        f"weights of {counted(len(manifest.layers), 'selected layer')} {human_bytes(before)} → "
        f"{human_bytes(after)} ({after / before:.1%}), {manifest.bits_per_weight:.2f} bits a weight"
    )


def remarks(manifest: Manifest) -> list[str]:
    """Remarks beside the totals: missing records, calibration, advice, training."""
    lines: list[str] = []
    if not manifest.is_complete:
        lines.append(
            f"{MANIFEST_FILE} is missing (transformers does not save it): errors, entropies, original size "
            "and layers left dense are unknown"
        )
    ordered = [
        f"{layer.layer} ({layer.order if isinstance(layer.order, str) else 'learned'})"
        for layer in manifest.replaced
        if layer.order
    ]
    if ordered:
        lines.append(f"inputs reordered before factorisation: {', '.join(ordered)}")
    lines += calibration_lines(manifest.calibration)
    lines += same_size_lines(manifest)
    lines += _advice(manifest)
    if "zoo" in manifest.architecture:
        lines.append(f"architecture {manifest.architecture['zoo']} (zoo)")
    elif "factory" in manifest.architecture:
        lines.append(f"architecture {manifest.architecture['factory']} (your code: pass --arch again)")
    return lines + training_lines(manifest.training)


def calibration_lines(calibration: dict[str, Any]) -> list[str]:
    """Lines on the calibration: its data, the budget allocation, the batch norms."""
    if not calibration:
        return []
    data = calibration.get("data", {})
    line = (
        f"calibrated on {calibration.get('samples', 0):,} examples of {data.get('name', '?')} "
        f"({calibration.get('held_out', 0):,} held out), layer by layer in the order of the network"
    )
    shares, allocation = calibration.get("shares", {}), ""
    if any(shares.get("distances", {}).values()):
        divergences = "; ".join(f"{way} {value:.4g}" for way, value in shares["distances"].items())
        allocation = (
            f"budget allocated by {shares.get('chosen', '?')}, for the smallest held-out divergence from the "
            f"dense network before the sequential fit ({divergences})"
        )
    norms = calibration.get("norms")
    lines = [line, allocation] if allocation else [line]
    lines += _likeness_lines(calibration.get("likeness", {}))
    if norms is None:
        return lines
    chosen = "recalibrated" if norms.get("renewed") else "kept"
    kept, recalibrated = (f"{norms.get(key, 0):.4g}" for key in ("before", "after"))
    return [
        *lines,
        f"batch-norm statistics {chosen}, for the smaller held-out divergence from the dense network "
        f"(kept {kept}, recalibrated {recalibrated})",
    ]


def _likeness_lines(likeness: dict[str, dict[str, float]]) -> list[str]:
    """How like held-out outputs are to the dense network's, and what others reach in the same bytes."""
    texts = {way: text for way, found in likeness.items() if (text := likeness_text(found))}
    ours = texts.pop("this", "")
    others = "; ".join(f"{way}: {text}" for way, text in texts.items())
    line = f"held-out outputs beside those of the dense network: {ours}"
    return [line + (f"; in the same bytes {others}" if others else "")] if ours else []


def same_size_lines(manifest: Manifest) -> list[str]:
    """The errors of other methods at the same size."""
    rounded = [layer.same_size for layer in manifest.changed if layer.same_size and layer.storage]
    floats = [layer.same_size for layer in manifest.changed if layer.same_size and not layer.storage]
    lines = _compared(rounded, "in the same bytes") if rounded else []
    return lines + (_compared(floats, "other methods storing as many numbers") if floats else [])


def _compared(errors: Sequence[Mapping[str, float]], title: str) -> list[str]:
    others = [name for name in errors[0] if name != "this" and all(name in of_layer for of_layer in errors)]
    means = {name: sum(of_layer[name] for of_layer in errors) / len(errors) for name in ("this", *others)}
    compared = ", ".join(f"{name} {means[name]:.4f}" for name in others)
    return [
        f"output-weighted held-out error, mean over {counted(len(errors), 'layer')}: {means['this']:.4f}"
        + (f"; {title}: {compared}" if compared else "")
    ]


def training_lines(training: dict[str, Any]) -> list[str]:
    """One line per run of ``mpoc finetune``, the first run first."""
    if not training:
        return []
    if "steps" not in training:
        return [f"before compression {line}" for line in training_lines(training.get("earlier", {}))]
    data, metric = training.get("data", {}), training.get("metric", "loss")
    parts = [f"{training.get('steps', 0):,} steps of {training.get('task', 'training')}"]
    if training.get("split") and training.get("final"):
        start, final = (training.get(key, {}).get(metric) for key in ("start", "final"))
        change = f"{start:.4g} → {final:.4g}" if start is not None else f"{final:.4g}"
        parts.append(f"{metric} {change} on {training['split']}")
    if metric in training.get("test", {}):
        parts.append(f"{training['test'][metric]:.4g} on test")
    if "sigma" in training:
        parts.append(f"{training['mean']:.4g} ± {training['sigma']:.2g} over {len(training['runs'])} runs")
    line = f"fine-tuned on {data.get('name', '?')}: {', '.join(parts)}"
    return [*training_lines(training.get("earlier", {})), line]


def _advice(manifest: Manifest) -> list[str]:
    """A warning where errors are large."""
    if manifest.calibration:
        return _calibrated_advice(manifest)
    errors = [layer.relative_error for layer in manifest.changed if layer.relative_error is not None]
    large = [error for error in errors if error > LARGE_ERROR]
    if not large:
        return []
    have = f"layers {'has' if len(large) == 1 else 'have'} a relative error above {LARGE_ERROR:.0%}"
    worst = f"(worst {max(large):.0%})"
    if not manifest.replaced:
        return [
            f"{len(large)} of {len(errors)} rounded {have} {worst}: measure the network before use "
            f"(mpoc eval). {_wider_option(manifest)}, or --calibrate DATA, keeps more of it."
        ]
    kind = "replaced" if len(manifest.replaced) == len(manifest.changed) else "changed"
    return [
        f"{len(large)} of {len(errors)} {kind} {have} {worst}: the network usually needs fine-tuning; "
        f"measure its accuracy before use. {_more_accurate_option(manifest)} gives smaller errors. "
        "With --calibrate DATA the same size keeps more."
    ]


def _wider_option(manifest: Manifest) -> str:
    """What spends more bytes, to begin a sentence."""
    if "size" in manifest.options:
        return "A larger --size"
    return "A larger --ratio" if manifest.replaced else "More --bits"


def _more_accurate_option(manifest: Manifest) -> str:
    if "discard" in manifest.options:
        return "A smaller --discard"
    if not all(layer.structure.info.can_truncate for layer in manifest.replaced):
        return "A larger --bond or --ratio, or another --form,"
    return "A larger --bond or --ratio, or --max-error 0.1,"


def _calibrated_advice(manifest: Manifest) -> list[str]:
    """A warning about outputs; after calibration the error of a weight may be large where no inputs are."""
    errors = [layer.held_out_error for layer in manifest.changed if layer.held_out_error is not None]
    large = [error for error in errors if error > LARGE_OUTPUT_ERROR]
    if not large:
        return []
    return [
        f"{len(large)} of {len(errors)} fitted layers have a held-out error above "
        f"{LARGE_OUTPUT_ERROR:.0%} (worst {max(large):.0%}): evaluate the network before use (mpoc eval). "
        f"{_wider_option(manifest)}, more --calibration-samples or mpoc finetune reduces it."
    ]
