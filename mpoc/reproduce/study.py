"""Run a whole study, seed by seed: train each network or take it from the store, and collect the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mpoc.errors import UsageError, nearest
from mpoc.reproduce.catalogue import StudyChoice, choose_studies, find_study
from mpoc.reproduce.experiment import (
    CONTROL,
    DENSE,
    DENSE_STARTS,
    FROM_DENSE,
    QUICK_STEPS,
    RANDOM,
    RESCALED,
    STARTS,
    TTSVD,
    Experiment,
    PaperData,
    Published,
    Study,
    open_paper_data,
    shortened_data,
)
from mpoc.reproduce.hallam2017 import baseline_counts, counts
from mpoc.reproduce.networks import check_structures
from mpoc.reproduce.run import Cell, Key, Result, Store, Weights, cells_of, dense_sizes, run_cell
from mpoc.runtime.distributed import num_processes
from mpoc.runtime.formatting import rounded
from mpoc.train.monitor import OnEvent

SCHEMA = "mpoc.reproduction/1"
_STARTED = "TT-SVD starts from the trained dense network of the same seed; random cores do not"
_EVERY = "every network"
_DIVIDED = "dense network (two thirds) and each start from it (the last third) together, each other network"
_RESCALED = "rescaled: the cores of TT-SVD, scaled to the norms of the dense weights before training"
_NAMES = {DENSE: "dense", CONTROL: "dense, control"}
_NAMES |= {TTSVD: "MPO, TT-SVD", RESCALED: "MPO, TT-SVD rescaled", RANDOM: "MPO, random"}


@dataclass(frozen=True)
class StudyRequest:
    """The options of ``mpoc reproduce``."""

    name: str
    data: Path
    output: Path
    choice: StudyChoice = field(default_factory=StudyChoice)
    starts: tuple[str, ...] | None = None  # None: the study's
    runs: int = 1
    seed: int = 0
    quick: bool = False
    format: str | None = None
    held_out: float = 0.0
    device: str = "auto"

    @property
    def chosen_starts(self) -> tuple[str, ...]:
        """The starts of networks with cores."""
        return find_study(self.name).starts if self.starts is None else self.starts


@dataclass(frozen=True)
class Row:
    """One line of the table: a network with all its runs."""

    experiment: Experiment
    start: str
    bond: int
    results: tuple[Result, ...]  # one per run

    @property
    def original(self) -> int:
        """N_ori of the replaced layers."""
        return dense_sizes(self.experiment)[1]

    @property
    def parameters(self) -> int:
        """Parameters of the whole network; the mean over runs whose bonds were chosen from spectra."""
        return round(statistics.fmean(result.parameters for result in self.results))

    @property
    def replaced(self) -> int:
        """Parameters of the replaced layers: N_mpo, or N_ori for a dense network."""
        whole, original = dense_sizes(self.experiment)
        return original - whole + self.parameters

    @property
    def rho(self) -> float:
        """ρ of Eq. (9)."""
        return self.replaced / self.original if self.original else 1.0

    @property
    def published(self) -> Published | None:
        """The paper's result, the same for every start, as the paper knows one only."""
        if self.start in DENSE_STARTS:
            return self.experiment.dense
        return self.experiment.published.get(self.bond, self.experiment.published.get(0))

    def mean(self, name: str) -> tuple[float, float | None]:
        """ā and σ (Eqs. 10 and 11) of a field of the results; σ is None for one run."""
        values = [float(getattr(result, name)) for result in self.results]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Reproduction:
    """The results of a study."""

    study: Study
    material: PaperData
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    quick: bool

    @property
    def shortened(self) -> str:
        """``20 epochs in place of the paper's 500 epochs``; "" where the training is as long."""
        return self.rows[0].experiment.training.shortened

    def as_dict(self) -> dict[str, Any]:
        """The JSON report, documented in the guide (file-format-and-json)."""
        return {
            "schema": SCHEMA,
            "experiment": self.study.name,
            "source": self.study.source,
            "data": self.material.data.announce(),
            "measured": self.material.measured,
            "reported": self.material.reported(),
            "quick": self.quick,
            "seeds": list(self.seeds),
            "rows": [_row_dict(self.study, row) for row in self.rows],
        }


def _row_dict(study: Study, row: Row) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "network": row.experiment.label,
        "start": row.start,
        "bond": row.bond or None,
        "structures": [layer.notation(row.bond) for layer in row.experiment.layers],
        "training": row.experiment.training.of(row.start).words(),
        "shortened": row.experiment.training.of(row.start).shortened or None,
        "discard": row.experiment.discard or None,
        "parameters": row.parameters,
        "parameters_replaced_before": row.original,
        "parameters_replaced_after": row.replaced,
        "rho": rounded(row.rho),
    }
    for name in ("start", "final", "best", "seconds"):
        mean, sigma = row.mean(name)
        key = "accuracy_before_training" if name == "start" else name
        entry[key] = {"mean": rounded(mean), "sigma": None if sigma is None else rounded(sigma)}
    if study.baseline:
        own = counts(study, row.experiment.network, row.parameters)
        entry["as_counted_there"] = {**asdict(own), "compression": list(own.of(baseline_counts(study)))}
    entry["published"] = asdict(row.published) if row.published else None
    entry["runs"] = [asdict(result) for result in row.results]
    return entry


def run_study(request: StudyRequest, say: Callable[[str], None], on_event: OnEvent = None) -> Reproduction:
    """Train the networks of a study that are not stored yet, and collect all results.

    Args:
        request: the options.
        say: called with messages.
        on_event: called while a network trains.

    Raises:
        UsageError: a name is unknown, or data or factors do not fit.
        MpocError: the data or a stored result are damaged, the loss is not finite, or a package is missing.
        Interrupted: Ctrl-C or SIGTERM; finished networks are stored.
        OSError: reading or writing failed.
    """
    study, experiments, material = open_study(request)
    say(material.data.announce())
    for note in material.data.notes:
        say(f"note: {note}")
    seeds = tuple(range(request.seed, request.seed + request.runs))
    _check_starts(experiments, request.chosen_starts, say)
    cells = [cell for seed in seeds for cell in cells_of(experiments, request.chosen_starts, seed)]
    origins = [origin.identity(material) for cell in cells if (origin := cell.origin()) is not None]
    runner = _Runner(material, Store(request.output), request.device, origins, say, on_event)
    results: dict[Key, Result] = {}
    for number, cell in enumerate(cells, 1):
        results[cell.key] = runner.result(cell, f"[{number}/{len(cells)}]")
    rows = (
        Row(cell.experiment, cell.start, cell.bond, tuple(results[replace(cell, seed=s).key] for s in seeds))
        for cell in cells_of(experiments, request.chosen_starts, request.seed)
    )
    return Reproduction(study, material, tuple(rows), seeds, request.quick)


def _check(request: StudyRequest) -> None:
    starts = request.chosen_starts
    for start in starts:
        if start not in STARTS:
            raise UsageError(f"--starts {start}: unknown{nearest(start, STARTS)}", ",".join(STARTS))
    if request.runs < 1:
        raise UsageError(f"--runs {request.runs}: must be at least 1")
    if request.choice.control and not set(FROM_DENSE) & set(starts):
        raise UsageError(
            f"--control: --starts {','.join(starts) or '()'} has none from the dense network",
            "omit one of them",
        )
    if not 0 <= request.held_out < 1:
        raise UsageError(f"--hold-out {request.held_out:g}: must be at least 0 and below 1")
    if num_processes() > 1:
        raise UsageError(
            "reproduce runs in one process", "start several commands, each with its own --seed and -o"
        )


def _check_starts(experiments: list[Experiment], starts: tuple[str, ...], say: Callable[[str], None]) -> None:
    """Say which variants have none of the starts, so that no networks with cores are made of them.

    Raises:
        UsageError: no variant has one.
    """
    with_cores = [experiment for experiment in experiments if experiment.layers]
    lacking = [experiment for experiment in with_cores if not set(experiment.starts) & set(starts)]
    asked = ",".join(starts)
    has_dense = any(experiment.with_dense for experiment in experiments)
    if lacking and lacking == with_cores and (starts or not has_dense):
        own = ",".join(lacking[0].starts)
        raise UsageError(f"--starts {asked or '()'}: no selected variant has such a start", f"--starts {own}")
    if starts and lacking:
        say(f"note: no start {asked}: {', '.join(experiment.label for experiment in lacking)}")


def open_study(request: StudyRequest) -> tuple[Study, list[Experiment], PaperData]:
    """The study, its experiments with structures checked, and their data; small for ``--quick``.

    Raises:
        UsageError, MpocError: as :func:`run_study`.
    """
    study = find_study(request.name)
    _check(request)
    experiments = choose_studies(study, request.choice)
    for experiment in experiments:
        check_structures(experiment)
    if not request.held_out and any(experiment.training.settings.patience for experiment in experiments):
        raise UsageError("--hold-out 0: these trainings end by their validation split", "--hold-out 0.1")
    network = experiments[0].network
    material = open_paper_data(request.data, network, request.format, request.held_out, request.seed)
    if not request.quick:
        return study, experiments, material
    small = shortened_data(material, study.quick_batch, request.seed)
    return study, [_quick(experiment, study) for experiment in experiments], small


def _quick(experiment: Experiment, study: Study) -> Experiment:
    settings = replace(
        experiment.training.settings, steps=QUICK_STEPS, batch=study.quick_batch, eval_every=None
    )
    training = replace(experiment.training, settings=settings, shortened=f"{QUICK_STEPS} steps")
    return replace(experiment, training=training)


@dataclass(frozen=True)
class _Runner:
    """Gets results from the store, or by training."""

    material: PaperData
    store: Store
    device: str
    origins: list[dict[str, Any]]  # identities of networks that others start from
    say: Callable[[str], None]
    on_event: OnEvent

    def result(self, cell: Cell, place: str) -> Result:
        """The result of a network; its weights are stored if it is dense or one of the ``origins``."""
        identity = cell.identity(self.material)
        result = self.store.find(cell.name, identity)
        stored = result is not None
        if result is None:
            origin = cell.origin()
            start = None if origin is None else self._weights(origin)
            result, weights = run_cell(cell, self.material, self.device, start, self.on_event)
            kept = identity in self.origins or (cell.start == DENSE and bool(cell.experiment.layers))
            self.store.put(cell.name, identity, result, weights if kept else None)
        how = "stored" if stored else f"{result.seconds:.0f} s on {result.device}"
        bond = f" D={cell.bond}" if cell.bond else ""
        network = f"{cell.experiment.label}, {cell.start}{bond}, seed {cell.seed}"
        self.say(f"{place} {network}: {result.final:.2f} % (best {result.best:.2f}), {how}")
        return result

    def _weights(self, cell: Cell) -> Weights:
        """The weights of a network without an origin; it is trained again if they are not stored."""
        identity = cell.identity(self.material)
        weights = self.store.weights(cell.name, identity)
        if weights is None:
            result, weights = run_cell(cell, self.material, self.device, None, self.on_event)
            self.store.put(cell.name, identity, result, weights)
        return weights


def table_of(results: Reproduction) -> tuple[list[str], list[list[str]]]:
    """The titles and rows of a study's table, with the paper's numbers beside ours."""
    word = ", shortened" if results.shortened else ""
    measured = [f"final %{word}", f"best %{word}"]
    if results.study.baseline:
        sizes = ["parameters", "fully connected", "paper", "total", "paper", "compression", "of all"]
        titles = ["network", *sizes, *measured, "paper %", "steps", "ms a step"]
        return titles, [_counted_cells(results, row) for row in results.rows]
    titles = ["network", "weights", "D", "parameters", "replaced layers", "ρ", "before"]
    return [*titles, *measured, "s", "paper %"], [_cells(row) for row in results.rows]


def _counted_cells(results: Reproduction, row: Row) -> list[str]:
    own, paper = counts(results.study, row.experiment.network, row.parameters), row.published
    printed = [f"{number:,}" if number else "" for number in (paper.parameters if paper else (0, 0))]
    parts, whole = own.of(baseline_counts(results.study))
    steps, milliseconds = row.results[0].steps, row.results[0].milliseconds
    return [
        name_of(results, row),
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


def name_of(results: Reproduction, row: Row) -> str:
    """The paper's name of a network of a study with a baseline: ``FC-1``, ``MERA-2``."""
    if row.start not in DENSE_STARTS:
        name, comma, rest = row.experiment.label.partition(",")
        return f"{name}-{row.bond}{comma}{rest}"
    dense = (experiment for experiment in results.study.variants.values() if not experiment.layers)
    return next(experiment.label for experiment in dense if experiment.network == row.experiment.network)


def _cells(row: Row) -> list[str]:
    dense = row.start in DENSE_STARTS
    own = ", ".join(dict.fromkeys(str(layer.bond) for layer in row.experiment.layers if layer.bond))
    bond = "" if dense else str(row.bond or own)
    if row.experiment.discard and not dense:
        bond = ", ".join(" ".join(map(str, bonds)) for bonds in row.results[0].bonds.values())
    return [
        row.experiment.network if dense else row.experiment.label,
        _NAMES[row.start],
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


def notes_of(results: Reproduction) -> list[str]:
    """The structures, the training, and what the numbers of the table are, line by line."""
    experiment = results.rows[0].experiment
    note = f" ({experiment.training.note})" if experiment.training.note else ""
    runs = f"{len(results.seeds)} runs, seeds {results.seeds[0]} to {results.seeds[-1]}"
    lines = [
        *dict.fromkeys(f"{label}: {structure}" for label, structure in _structures(results)),
        *_effective(results),
        f"{_DIVIDED if experiment.training.control else _EVERY}: {experiment.training.words()}{note}; "
        f"{runs if len(results.seeds) > 1 else f'seed {results.seeds[0]}'}",
        results.material.reported(),
        *([_STARTED] if any(row.start in FROM_DENSE for row in results.rows) else []),
        *([_RESCALED] if any(row.start == RESCALED for row in results.rows) else []),
        f"paper: {results.study.source}, on {experiment.data}",
    ]
    return [*lines, *dict.fromkeys(note for row in results.rows for note in row.experiment.notes)]


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
        if row.experiment.discard and row.start not in DENSE_STARTS:
            for layer, entropies in row.results[0].entropies.items():
                numbers = " ".join(f"{math.exp(entropy):.1f}" for entropy in entropies)
                lines.append(f"{row.experiment.label}, {layer}: effective components exp(S) {numbers}")
    return lines


def _joined(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, …, {names[-1]} ({len(names)} layers)"
