"""Print results as tables, on a terminal or in a pipe.

A row of a report is a layer, a row of a search is a trial, a row of sizes is a size, and a row of a
reproduction is a network with the paper's numbers beside ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from mpoc.cli.console import Output, plain
from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.reporting.remarks import calibration_lines, headline, likeness_text, score_text, scores_line
from mpoc.reporting.summary import summary
from mpoc.runtime.formatting import human_bytes, times
from mpoc.tensor_networks.topology import CHAIN

if TYPE_CHECKING:
    from mpoc.cli.compress import CompressResult
    from mpoc.compression.search import Bisection, Trial
    from mpoc.compression.size_table import SizeRow, SizeTable
    from mpoc.reproduce.study import Reproduction
    from mpoc.train.evaluate_file import FileEvaluation

_WIDEST = "outputs J / inputs I"
# Below this width of a terminal the factors, and the seconds, are left out.
_NARROW = 120
_MEASURES = {"cosine": ("cosine", "{:.4f}"), "agreement": ("agreement %", "{:.2f}"), "kl": ("KL", "{:.3g}")}


def print_report(
    console: Console,
    manifest: Manifest,
    nbytes: int,
    seconds: dict[str, float] | None = None,
    predicted: bool = False,
    verbose: bool = False,
) -> None:
    """What the network keeps, the per-layer ρ table, the totals, and what was left unchanged.

    Args:
        console: console that writes to stdout.
        manifest: manifest of a compressed file or of a plan.
        nbytes: bytes of the output.
        seconds: seconds of each layer's fit, where it was just made.
        predicted: a plan, nothing is written.
        verbose: name every tensor left unchanged.
    """
    narrow = console.width < _NARROW
    if said := headline(manifest):
        console.print(plain(said), soft_wrap=True)
    console.print(_table(manifest, seconds, narrow))
    for layer in manifest.layers:
        if narrow and layer.reason:
            console.print(plain(f"{layer.layer}: {layer.reason}"), soft_wrap=True)
    for line in summary(manifest, nbytes, predicted):
        console.print(plain(line), soft_wrap=True)
    _print_unchanged(console, manifest, verbose)


def _table(manifest: Manifest, seconds: dict[str, float] | None, narrow: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("layer", "shape", "outputs J / inputs I", "bonds D"):
        if title != _WIDEST or not narrow:
            table.add_column(title, overflow="fold")
    table.add_column("parameters", justify="right", overflow="fold")
    table.add_column("ρ", justify="right", no_wrap=True)
    table.add_column("stored as", overflow="fold")
    table.add_column("bits", justify="right", no_wrap=True)
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
        table.add_row(*row, style=None if layer.is_changed else "dim")
    return table


def _row(layer: LayerRecord) -> list[str]:
    shape = times(layer.shape) + (" ᵀ" if layer.transposed else "")
    stored = [plain(layer.storage_text), f"{layer.bits_per_weight:.2f}", _relative_error(layer)]
    if layer.form == "dense":
        return [
            plain(layer.layer),
            shape,
            plain(layer.reason),
            "dense",
            f"{layer.num_original:,}",
            "1",
            *stored,
        ]
    factors = f"{times(layer.output_factors)} / {times(layer.input_factors)}"
    if any(layer.padding):
        factors += " padded by " + " and ".join(map(str, layer.padding))
    return [
        plain(layer.layer),
        shape,
        factors,
        ("" if layer.structure.topology is CHAIN else f"{layer.form} ") + layer.bonds_text(),
        f"{layer.num_original:,} → {layer.num_stored:,}",
        f"{layer.rho:.4f}",
        *stored,
    ]


def _relative_error(layer: LayerRecord) -> str:
    if not layer.is_changed:
        return "0"
    if layer.relative_error is None:
        return ""
    return f"{layer.relative_error:.1e}" if 0 < layer.relative_error < 1e-4 else f"{layer.relative_error:.4f}"


def _output_error(layer: LayerRecord) -> str:
    """The output error on the inputs of the fit / on held-out ones."""
    errors = [error for error in (layer.output_error, layer.held_out_error) if error is not None]
    return " / ".join(f"{error:.4f}" for error in errors)


def _print_unchanged(console: Console, manifest: Manifest, verbose: bool) -> None:
    counts = Counter(manifest.left_alone.values())
    parts = [f"{count} {reason}" for reason, count in counts.most_common()]
    if manifest.vectors:
        parts.append(f"{manifest.vectors} vectors and scalars (biases, norms)")
    if parts:
        console.print(plain(f"unchanged: {'; '.join(parts)}"), soft_wrap=True)
    console.print(plain(f"layer kinds read from {manifest.kinds_from}"), soft_wrap=True)
    if verbose:
        for name, reason in manifest.left_alone.items():
            console.print(plain(f"  {name}: {reason}"), soft_wrap=True)
        for name, first in manifest.tied.items():
            console.print(plain(f"  {name}: tied to {first}, stored once"), soft_wrap=True)


def trials_table(search: Bisection, before: FileEvaluation, nbytes: int | None) -> Table:
    """The trials of a search by size, the dense network (``nbytes`` on disk) last."""
    metric = before.metric
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("on disk", f"--{search.goal}", metric, "drop"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for trial in sorted(search.trials, key=lambda trial: trial.nbytes):
        is_chosen = trial is search.chosen
        verdict = "chosen" if is_chosen else "" if search.keeps(trial) else "loses too much"
        table.add_row(
            human_bytes(trial.nbytes),
            trial.option.partition(" ")[2],
            score_text(metric, trial.scores[metric]),
            f"{trial.drop:.4g}",
            verdict,
            style="bold" if is_chosen else None,
        )
    size = "" if nbytes is None else human_bytes(nbytes)
    table.add_row(size, "", score_text(metric, before.scores[metric]), "", "dense", style="dim")
    return table


def print_compression(result: CompressResult, console: Output) -> None:
    """The trials, the table, the totals, and the scores."""
    compression = result.compression
    if result.search is not None and result.before is not None:
        nbytes = compression.manifest.source.nbytes
        console.result.print(plain(goal_line(result.before, result.search.max_drop)), soft_wrap=True)
        console.result.print(trials_table(result.search, result.before, nbytes))
        console.result.print()
    seconds = compression.seconds or None
    print_report(
        console.result,
        compression.manifest,
        compression.nbytes,
        seconds,
        not compression.written,
        console.verbose,
    )
    for title, measured in (("before", result.before), ("after", result.after)):
        if measured is not None:
            examples = f"{measured.split}, {measured.examples:,} examples"
            console.result.print(f"{title}: {scores_line(measured.scores)} ({examples})", soft_wrap=True)


def goal_line(before: FileEvaluation, max_drop: float | None) -> str:
    """The metric of a search, its data, its value of the dense network and how far it may fall or rise."""
    similarity = "" if before.reference is None else " with the original (no labels or no head: similarity)"
    value = scores_line({before.metric: before.scores[before.metric]})
    change = "fall" if before.higher_is_better else "rise"
    data = f"{before.data} ({before.split}, {before.examples:,} examples)"
    return f"{value}{similarity} on {data}; it may {change} by {max_drop:g}"


def trial_line(trial: Trial, kept: bool) -> str:
    """A trial of a search as one line of progress."""
    result = f"{human_bytes(trial.nbytes)}, {scores_line(dict(trial.scores))}"
    return f"{trial.option}: {result}; drop {trial.drop:.4g}, {'kept' if kept else 'too much'}"


def size_line(row: SizeRow) -> str:
    """A row of a table of sizes as one line of progress."""
    kept = likeness_text(row.likeness.get("this", {}))
    if row.relative_error is not None:
        kept = f"relative error of the weights {row.relative_error:.4f}"
    return f"{row.option}: {human_bytes(row.nbytes)}, {row.bits_per_weight:.2f} bits a weight, {kept}"


def print_sizes(console: Console, sizes: SizeTable, command: Callable[[SizeRow], str]) -> None:
    """The rows of a table of sizes, what their figures are, and the commands that write them.

    Args:
        console: console that writes to stdout.
        sizes: the table.
        command: that writes the size of a row.
    """
    from mpoc.compression.size_table import WAYS

    ways = [way for way in WAYS if any(way in row.likeness for row in sizes.rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    ours = sizes.rows[0].likeness.get("this", {})
    measures = ", ".join(title for name, (title, _) in _MEASURES.items() if name in ours)
    kept = [f"{WAYS[way]}\n{measures}" for way in ways] or ["rel. error"]
    for title in ("share", "weights", "bits a weight", *kept):
        table.add_column(title, justify="right", no_wrap=True)
    for row in sizes.rows:
        texts = [_measured(row.likeness.get(way, {})) or "–" for way in ways]
        if row.relative_error is not None:
            texts = [f"{row.relative_error:.4f}"]
        share = f"{row.nbytes / sizes.nbytes:.1%}"
        table.add_row(share, human_bytes(row.nbytes), f"{row.bits_per_weight:.2f}", *texts)
    console.print(table)
    for line in (*_size_remarks(sizes), *map(command, sizes.rows)):
        console.print(plain(line), soft_wrap=True)


def _measured(likeness: Mapping[str, float]) -> str:
    """The figures alone."""
    return ", ".join(text.format(likeness[name]) for name, (_, text) in _MEASURES.items() if name in likeness)


def _size_remarks(sizes: SizeTable) -> list[str]:
    """What the figures are, and how to get those that are not known."""
    lines = [f"{sizes.source} has {human_bytes(sizes.nbytes)} of weights; nothing was written"]
    if sizes.calibration:
        [used] = calibration_lines(sizes.calibration)
        return [*lines, f"{used}, at --effort {sizes.effort}; with this effort each command writes its row:"]
    arch = "" if sizes.knows_network else " and --arch NETWORK"
    return [
        *lines,
        f"--calibrate DATA{arch} would tell how like its outputs stay, and keep more; "
        "each command writes its row:",
    ]


def print_reproduction(console: Console, results: Reproduction) -> None:
    """The table, the structures, and what the numbers are."""
    from mpoc.reproduce.study import notes_of, table_of

    if results.quick:
        console.print("--quick: a smoke run; its accuracies are not results", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    titles, rows = table_of(results)
    for title in titles:
        is_text = title in ("network", "weights", "paper %")
        table.add_column(title, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    console.print(table)
    for line in notes_of(results):
        console.print(plain(line), soft_wrap=True)
