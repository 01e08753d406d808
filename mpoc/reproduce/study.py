"""Run a whole study, seed by seed: train each network or take it from the store, and collect the results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mpoc.errors import UsageError, nearest
from mpoc.reproduce.catalogue import StudyChoice, choose_studies, find_study
from mpoc.reproduce.experiment import Experiment, Published, Study
from mpoc.reproduce.hallam2017 import baseline_counts, counts
from mpoc.reproduce.networks import STARTS, check_structures
from mpoc.reproduce.paper_data import QUICK_STEPS, PaperData, open_paper_data, shortened_data
from mpoc.reproduce.run import DENSE, Cell, Key, Result, Store, Weights, dense_sizes, run_cell
from mpoc.runtime.distributed import num_processes
from mpoc.runtime.formatting import rounded
from mpoc.train.monitor import OnEvent

SCHEMA = "mpoc.reproduction/1"


@dataclass(frozen=True)
class StudyRequest:
    """The options of ``mpoc reproduce``."""

    name: str
    data: Path
    output: Path
    choice: StudyChoice = field(default_factory=StudyChoice)
    starts: tuple[str, ...] = STARTS
    runs: int = 1
    seed: int = 0
    quick: bool = False
    format: str | None = None
    held_out: float = 0.0
    device: str = "auto"


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
        if self.start == DENSE:
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
        "training": row.experiment.training.words(),
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
    study = find_study(request.name)
    _check(request)
    experiments, material = _open(request, study)
    say(material.data.announce())
    for note in material.data.notes:
        say(f"note: {note}")
    seeds = tuple(range(request.seed, request.seed + request.runs))
    cells = [cell for seed in seeds for cell in _cells(experiments, request.starts, seed)]
    if not cells:
        raise UsageError(
            f"--starts {','.join(request.starts)}: no selected variant has such a start", "--starts random"
        )
    origins = [origin.identity(material) for cell in cells if (origin := cell.origin()) is not None]
    runner = _Runner(material, Store(request.output), request.device, origins, say, on_event)
    results: dict[Key, Result] = {}
    for number, cell in enumerate(cells, 1):
        results[cell.key] = runner.result(cell, f"[{number}/{len(cells)}]")
    rows = (
        Row(cell.experiment, cell.start, cell.bond, tuple(results[replace(cell, seed=s).key] for s in seeds))
        for cell in _cells(experiments, request.starts, request.seed)
    )
    return Reproduction(study, material, tuple(rows), seeds, request.quick)


def _check(request: StudyRequest) -> None:
    for start in request.starts:
        if start not in STARTS:
            raise UsageError(f"--starts {start}: unknown{nearest(start, STARTS)}", ",".join(STARTS))
    if request.runs < 1:
        raise UsageError(f"--runs {request.runs}: must be at least 1")
    if not 0 <= request.held_out < 1:
        raise UsageError(f"--hold-out {request.held_out:g}: must be at least 0 and below 1")
    if num_processes() > 1:
        raise UsageError(
            "reproduce runs in one process", "start several commands, each with its own --seed and -o"
        )


def _open(request: StudyRequest, study: Study) -> tuple[list[Experiment], PaperData]:
    """The experiments, with structures checked, and their data; both are small for ``--quick``."""
    experiments = choose_studies(study, request.choice)
    for experiment in experiments:
        check_structures(experiment)
    if not request.held_out and any(experiment.training.settings.patience for experiment in experiments):
        raise UsageError("--hold-out 0: these trainings end by their validation split", "--hold-out 0.1")
    network = experiments[0].network
    material = open_paper_data(request.data, network, request.format, request.held_out, request.seed)
    if not request.quick:
        return experiments, material
    small = shortened_data(material, study.quick_batch, request.seed)
    return [_quick(experiment, study) for experiment in experiments], small


def _quick(experiment: Experiment, study: Study) -> Experiment:
    settings = replace(
        experiment.training.settings, steps=QUICK_STEPS, batch=study.quick_batch, eval_every=None
    )
    return replace(experiment, training=replace(experiment.training, settings=settings))


def _cells(experiments: list[Experiment], starts: tuple[str, ...], seed: int) -> Iterator[Cell]:
    """The networks of one seed in the order of the table, each dense network once."""
    dense: set[str] = set()
    for experiment in experiments:
        if experiment.with_dense and experiment.network not in dense:
            yield Cell(experiment, DENSE, 0, seed)
            dense.add(experiment.network)
        for bond in experiment.bonds or (0,):
            for start in (start for start in starts if start in experiment.starts):
                yield Cell(experiment, start, bond, seed)


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
            kept = cell.start == DENSE or identity in self.origins
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
