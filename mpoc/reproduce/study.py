"""A whole study, seed by seed: every network trained or taken from the store, and the numbers of all."""

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
from mpoc.reproduce.run import DENSE, Cell, Key, Result, Store, dense_sizes, run_cell
from mpoc.runtime.distributed import num_processes
from mpoc.runtime.formatting import rounded
from mpoc.train.monitor import TrainingEvent

SCHEMA = "mpoc.reproduction/1"


@dataclass(frozen=True)
class StudyRequest:
    """What is asked for."""

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
    """One line of the table: a network over all its runs."""

    experiment: Experiment
    start: str
    bond: int
    results: tuple[Result, ...]  # one a run

    @property
    def original(self) -> int:
        """N_ori of the replaced layers."""
        return dense_sizes(self.experiment)[1]

    @property
    def parameters(self) -> int:
        """Of the whole network; the mean over the runs where bonds chosen from spectra differ."""
        return round(statistics.fmean(result.parameters for result in self.results))

    @property
    def replaced(self) -> int:
        """What they have here: N_mpo, or N_ori where dense."""
        whole, original = dense_sizes(self.experiment)
        return original - whole + self.parameters

    @property
    def rho(self) -> float:
        """ρ of Eq. (9)."""
        return self.replaced / self.original if self.original else 1.0

    @property
    def published(self) -> Published | None:
        """What the paper has for it: one number for every start, as it knows one only."""
        if self.start == DENSE:
            return self.experiment.dense
        return self.experiment.published.get(self.bond, self.experiment.published.get(0))

    def mean(self, name: str) -> tuple[float, float | None]:
        """ā and σ of Eqs. (10) and (11) of a result's number; no σ of one run."""
        values = [float(getattr(result, name)) for result in self.results]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Reproduction:
    """What was found."""

    study: Study
    material: PaperData
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    quick: bool

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; the guide documents it (file-format-and-json)."""
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
    found: dict[str, Any] = {
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
        found[key] = {"mean": rounded(mean), "sigma": None if sigma is None else rounded(sigma)}
    if study.baseline:
        own = counts(study, row.experiment.network, row.parameters)
        found["as_counted_there"] = {**asdict(own), "compression": list(own.of(baseline_counts(study)))}
    found["published"] = asdict(row.published) if row.published else None
    found["runs"] = [asdict(result) for result in row.results]
    return found


def run_study(
    request: StudyRequest, say: Callable[[str], None], told: Callable[[TrainingEvent], None] | None = None
) -> Reproduction:
    """Train what is missing of a study, and put its numbers together.

    Args:
        request: what.
        say: gets messages.
        told: called while a network trains.

    Raises:
        UsageError: something unknown, or data or factors that do not fit.
        MpocError: bad data, a damaged result, no finite loss, a package is missing.
        Interrupted: Ctrl-C or SIGTERM; finished networks are stored.
        OSError: of reading or writing.
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
            f"--starts {','.join(request.starts)}: none of these variants is done from that", "random"
        )
    store = Store(request.output)
    origins = [origin.identity(material) for cell in cells if (origin := cell.origin()) is not None]
    found: dict[Key, Result] = {}
    for number, cell in enumerate(cells, 1):
        found[cell.key] = _result(
            cell, material, store, request.device, told, say, origins, f"[{number}/{len(cells)}]"
        )
    rows = (
        Row(
            cell.experiment,
            cell.start,
            cell.bond,
            tuple(found[replace(cell, seed=seed).key] for seed in seeds),
        )
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
        raise UsageError("reproduce runs in one process", "several commands, each with its --seed and -o")


def _open(request: StudyRequest, study: Study) -> tuple[list[Experiment], PaperData]:
    """The experiments, whose structures fit, and their data; both made small where it must be quick."""
    experiments = choose_studies(study, request.choice)
    for experiment in experiments:
        check_structures(experiment)
    if not request.held_out and any(one.training.settings.patience for one in experiments):
        raise UsageError("--hold-out 0: a validation split ends these trainings", "--hold-out 0.1")
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
    """In the order of the table, each dense network once."""
    dense: set[str] = set()
    for experiment in experiments:
        if experiment.with_dense and experiment.network not in dense:
            yield Cell(experiment, DENSE, 0, seed)
            dense.add(experiment.network)
        for bond in experiment.bonds or (0,):
            for start in (start for start in starts if start in experiment.starts):
                yield Cell(experiment, start, bond, seed)


def _result(
    cell: Cell,
    material: PaperData,
    store: Store,
    device: str,
    told: Callable[[TrainingEvent], None] | None,
    say: Callable[[str], None],
    origins: list[dict[str, Any]],
    place: str,
) -> Result:
    """From the store, or trained and stored; with its weights if it is dense or one of the ``origins``."""
    identity = cell.identity(material)
    result = store.find(cell.name, identity)
    stored = result is not None
    if result is None:
        origin = cell.origin()
        start = None if origin is None else _weights(origin, material, store, device, told)
        result, weights = run_cell(cell, material, device, start, told)
        kept = cell.start == DENSE or identity in origins
        store.put(cell.name, identity, result, weights if kept else None)
    how = "stored" if stored else f"{result.seconds:.0f} s on {result.device}"
    which = f"{cell.experiment.label}, {cell.start}{f' D={cell.bond}' if cell.bond else ''}, seed {cell.seed}"
    say(f"{place} {which}: {result.final:.2f} % (best {result.best:.2f}), {how}")
    return result


def _weights(
    cell: Cell, material: PaperData, store: Store, device: str, told: Callable[[TrainingEvent], None] | None
) -> dict[str, Any]:
    """Of a trained network that has no origin; trained again where they are not in the store."""
    identity = cell.identity(material)
    weights = store.weights(cell.name, identity)
    if weights is None:
        result, weights = run_cell(cell, material, device, None, told)
        store.put(cell.name, identity, result, weights)
    return weights
