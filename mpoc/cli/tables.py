"""Reports and plans as tables on a terminal or in a pipe."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table

from mpoc.cli.console import escape
from mpoc.manifest import LayerRecord, Manifest
from mpoc.report import summary, times

_WIDEST = "outputs J / inputs I"
# Below this width of a terminal the factors, and the seconds, are left out.
_NARROW = 120
_PER_CENT = ("accuracy", "agreement")


def print_report(
    console: Console,
    manifest: Manifest,
    nbytes: int,
    seconds: dict[str, float] | None = None,
    predicted: bool = False,
    verbose: bool = False,
) -> None:
    """The per-layer ρ table, the totals, and what was left alone.

    Args:
        console: of stdout.
        manifest: of a compressed file or of a plan.
        nbytes: of the output.
        seconds: of each layer's fit, where it was just made.
        predicted: a plan, nothing is written.
        verbose: name every tensor left alone.
    """
    narrow = console.width < _NARROW
    console.print(_table(manifest, seconds, narrow))
    for layer in manifest.layers:
        if narrow and layer.form == "dense":
            console.print(escape(f"{layer.layer}: {layer.reason}"), soft_wrap=True)
    for line in summary(manifest, nbytes, predicted):
        console.print(escape(line), soft_wrap=True)
    _print_left_alone(console, manifest, verbose)


def _table(manifest: Manifest, seconds: dict[str, float] | None, narrow: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("layer", "shape", "outputs J / inputs I", "bonds D"):
        if title != _WIDEST or not narrow:
            table.add_column(title, overflow="fold")
    table.add_column("parameters", justify="right", overflow="fold")
    table.add_column("ρ", justify="right", no_wrap=True)
    table.add_column("rel. error", justify="right", no_wrap=True)
    calibrated = any(layer.output_error is not None for layer in manifest.layers)
    if calibrated:
        table.add_column("output error", justify="right", no_wrap=True)
    if seconds is not None and not narrow:
        table.add_column("s", justify="right", no_wrap=True)
    for layer in manifest.layers:
        row = _row(layer)
        if calibrated:
            row.append(_output_error(layer))
        if narrow:
            del row[2]
        elif seconds is not None:
            row.append(f"{seconds.get(layer.name, 0):.2f}")
        table.add_row(*row, style="dim" if layer.form == "dense" else None)
    return table


def _row(layer: LayerRecord) -> list[str]:
    shape = times(layer.shape) + (" ᵀ" if layer.transposed else "")
    if layer.form == "dense":
        return [
            escape(layer.layer),
            shape,
            escape(layer.reason),
            "dense",
            f"{layer.num_original:,}",
            "1",
            "0",
        ]
    factors = f"{times(layer.output_factors)} / {times(layer.input_factors)}"
    if any(layer.padding):
        factors += " padded by " + " and ".join(map(str, layer.padding))
    error = "" if layer.relative_error is None else f"{layer.relative_error:.4f}"
    if layer.relative_error is not None and 0 < layer.relative_error < 1e-4:
        error = f"{layer.relative_error:.1e}"
    return [
        escape(layer.layer),
        shape,
        factors,
        (f"{layer.form} " if layer.form in ("tree", "mera") else "") + layer.bonds_text(),
        f"{layer.num_original:,} → {layer.num_stored:,}",
        f"{layer.rho:.4f}",
        error,
    ]


def _output_error(layer: LayerRecord) -> str:
    """On the inputs of the fit / on held-out ones."""
    found = [error for error in (layer.output_error, layer.held_out_error) if error is not None]
    return " / ".join(f"{error:.4f}" for error in found)


def _print_left_alone(console: Console, manifest: Manifest, verbose: bool) -> None:
    counts = Counter(manifest.left_alone.values())
    parts = [f"{count} {reason}" for reason, count in counts.most_common()]
    if manifest.vectors:
        parts.append(f"{manifest.vectors} vectors and scalars (bias, norm and the like)")
    if parts:
        console.print(escape(f"left alone: {'; '.join(parts)}"), soft_wrap=True)
    console.print(escape(f"kinds of layers told from {manifest.kinds_from}"), soft_wrap=True)
    if verbose:
        for name, reason in manifest.left_alone.items():
            console.print(escape(f"  {name}: {reason}"), soft_wrap=True)
        for name, first in manifest.tied.items():
            console.print(escape(f"  {name}: tied to {first}, stored once"), soft_wrap=True)


def scores_line(scores: dict[str, float]) -> str:
    """``{"loss": 0.5, "accuracy": 98.1}`` → ``loss 0.5000, accuracy 98.10 %``."""
    shown = {name: value for name, value in scores.items() if name not in ("step", "epoch", "train_loss")}
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.2f} %' if name in _PER_CENT else f'{value:.4g}'}"
        for name, value in shown.items()
    )
