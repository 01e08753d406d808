"""Print results as tables, on a terminal or in a pipe.

A row of a report is a layer, a row of a search is a trial, a row of sizes is a size, and a row of a
reproduction is a network with the paper's numbers beside ours.
"""

from __future__ import annotations

import math
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
    from mpoc.reproduce.study import Reproduction, Row
    from mpoc.train.evaluate_file import FileEvaluation

_WIDEST = "outputs J / inputs I"
# Below this width of a terminal the factors, and the seconds, are left out.
_NARROW = 120
_MEASURES = {"cosine": ("cosine", "{:.4f}"), "agreement": ("agreement %", "{:.2f}"), "kl": ("KL", "{:.3g}")}

_COLUMNS = (
    "parameters", "fully connected", "paper", "total", "paper", "compression", "of all", "final %", "best %",
    "paper %", "steps", "ms a step",
)  # fmt: skip

_STARTED = "TT-SVD starts from the trained dense network of the same seed; random cores start from nothing"
_STARTS = {"dense": "dense", "ttsvd": "MPO, TT-SVD", "random": "MPO, random"}


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


def compression_table(results: Reproduction) -> Table:
    """One line per network, with the paper's numbers beside ours."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("network", overflow="fold")
    for title in _COLUMNS:
        table.add_column(title, justify="right")
    for row in results.rows:
        table.add_row(*map(plain, _cells(results, row)))
    return table


def _cells(results: Reproduction, row: Row) -> list[str]:
    from mpoc.reproduce.hallam2017 import baseline_counts, counts

    own, paper = counts(results.study, row.experiment.network, row.parameters), row.published
    printed = [f"{number:,}" if number else "" for number in (paper.parameters if paper else (0, 0))]
    parts, whole = own.of(baseline_counts(results.study))
    steps, milliseconds = row.results[0].steps, row.results[0].milliseconds
    return [
        _label(results, row),
        f"{row.parameters:,}",
        f"{own.fully_connected:,}",
        printed[0],
        f"{own.total:,}",
        printed[1],
        f"{parts:,.0f}",
        f"{whole:.2f}",
        f"{row.mean('final')[0]:.2f}",
        f"{row.mean('best')[0]:.2f}",
        "" if paper is None or paper.accuracy is None else f"{paper.accuracy:.2f}",
        f"{steps:,}",
        "" if milliseconds is None else f"{milliseconds:.0f}",
    ]


def _label(results: Reproduction, row: Row) -> str:
    """The paper's name of the network: ``FC-1``, ``MERA-2``."""
    if row.start != "dense":
        name, comma, rest = row.experiment.label.partition(",")
        return f"{name}-{row.bond}{comma}{rest}"
    dense = (experiment for experiment in results.study.variants.values() if not experiment.layers)
    return next(experiment.label for experiment in dense if experiment.network == row.experiment.network)


def print_reproduction(console: Console, results: Reproduction) -> None:
    """The table, the structures, and what the numbers are."""
    experiment = results.rows[0].experiment
    if results.quick:
        console.print("--quick: a smoke run; its accuracies are not results", soft_wrap=True)
    console.print(compression_table(results) if results.study.baseline else _reproduction_rows(results))
    for label, structure in dict.fromkeys(_structures(results)):
        console.print(plain(f"{label}: {structure}"), soft_wrap=True)
    for line in _effective(results):
        console.print(plain(line), soft_wrap=True)
    note = f" ({experiment.training.note})" if experiment.training.note else ""
    runs = f"{len(results.seeds)} runs, seeds {results.seeds[0]} to {results.seeds[-1]}"
    lines = [
        f"every network: {experiment.training.words()}{note}; "
        f"{runs if len(results.seeds) > 1 else f'seed {results.seeds[0]}'}",
        results.material.reported(),
        *([_STARTED] if any(row.start == "ttsvd" for row in results.rows) else []),
        f"paper: {results.study.source}, on {experiment.data}",
    ]
    lines += dict.fromkeys(note for row in results.rows for note in row.experiment.notes)
    for line in lines:
        console.print(plain(line), soft_wrap=True)


def _structures(results: Reproduction) -> list[tuple[str, str]]:
    """Each experiment's label and its layers' structures; layers of one structure share a line."""
    structures: list[tuple[str, str]] = []
    for row in results.rows:
        names: dict[str, list[str]] = {}
        for layer in row.experiment.layers:
            name, _, structure = layer.notation().partition(" ")
            names.setdefault(structure, []).append(name)
        shown = "; ".join(f"{_joined(layers)} {structure}" for structure, layers in names.items())
        if shown:
            structures.append((row.experiment.label, shown))
    return structures


def _effective(results: Reproduction) -> list[str]:
    """exp(S) at each bond, where bonds were chosen automatically; of the first run."""
    lines = []
    for row in results.rows:
        if row.experiment.discard and row.start != "dense":
            for layer, entropies in row.results[0].entropies.items():
                numbers = " ".join(f"{math.exp(entropy):.1f}" for entropy in entropies)
                lines.append(f"{row.experiment.label}, {layer}: effective components exp(S) {numbers}")
    return lines


def _joined(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, …, {names[-1]} ({len(names)} layers)"


def _reproduction_rows(results: Reproduction) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("network", overflow="fold")
    table.add_column("weights", no_wrap=True)
    for title in ("D", "parameters", "replaced layers", "ρ", "before", "final %", "best %", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("paper %", overflow="fold")
    for row in results.rows:
        table.add_row(*map(plain, _reproduction_cells(row)))
    return table


def _reproduction_cells(row: Row) -> list[str]:
    dense = row.start == "dense"
    own = ", ".join(dict.fromkeys(str(layer.bond) for layer in row.experiment.layers if layer.bond))
    bond = "" if dense else str(row.bond or own)
    if row.experiment.discard and not dense:
        bond = ", ".join(" ".join(map(str, bonds)) for bonds in row.results[0].bonds.values())
    return [
        row.experiment.network if dense else row.experiment.label,
        _STARTS[row.start],
        bond,
        f"{row.parameters:,}",
        f"{row.replaced:,}",
        "1" if dense else f"{row.rho:.4g}",
        f"{row.mean('start')[0]:.2f}",
        _with_sigma(row, "final"),
        _with_sigma(row, "best"),
        f"{row.mean('seconds')[0]:.0f}",
        str(row.published or ""),
    ]


def _with_sigma(row: Row, name: str) -> str:
    mean, sigma = row.mean(name)
    return f"{mean:.2f}" if sigma is None else f"{mean:.2f} ± {sigma:.2f}"
