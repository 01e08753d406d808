"""All tables of the papers within a budget of time: measure every network, choose epochs, train.

Each table gets at least half an epoch.  What is left goes, rung by rung, to the table that then takes the
least time, so that cheap tables are trained in full and expensive ones take about equal times.  All networks
of a table get the same training.  A shortened one has a warm-up and a cosine, and reports its last weights.
Where a study has a control, its epochs are those that dense network and TT-SVD start take together.

The plan is kept as ``plan.json`` in the output folder. Its tables keep their epochs and their precision, so
that the command, given again with the same folder, trains what is missing and nothing twice.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, UsageError, nearest, shortened
from mpoc.io.atomic import write_text
from mpoc.reporting.summary import to_json
from mpoc.reproduce.catalogue import STUDIES, StudyChoice, choose_studies
from mpoc.reproduce.experiment import DENSE_STARTS, Experiment, PaperData, length_of
from mpoc.reproduce.gao2020 import CIFAR
from mpoc.reproduce.image_states import NAME, ImageStates, ImageStatesRequest, measure_images
from mpoc.reproduce.run import Cell, Store, cells_of, measure_rate
from mpoc.reproduce.study import Reproduction, StudyRequest, open_study, run_study
from mpoc.runtime.formatting import rounded
from mpoc.train.loader import ExampleOrder
from mpoc.train.monitor import OnEvent
from mpoc.train.settings import PRECISIONS

SCHEMA = "mpoc.reproduction-plan/1"
TABLES = (*STUDIES, NAME)
_RESNETS = ("20", "20-resunit")
_VARIANTS = {
    "mera": ("fc-1", "fc-2", "fc-2-printed", "mera", "tt"),  # the paper's own
    "resnet": _RESNETS,
    "resnet-narrow": _RESNETS,
    "densenet": ("16-12-12", "convolution"),
}
_RUNGS = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60, 80)  # epochs
_MARGIN = 1.1  # of the estimates
_EVALUATION = 1 / 3  # of a training step's work, for an example that is evaluated
_FILES = {
    "MNIST": ("mnist",),
    "CIFAR-10": ("cifar10",),
    "tiny Shakespeare": ("text/tinyshakespeare.txt", "tinyshakespeare.txt"),
}  # by the experiment's data: within the folder of all data, the first that is there


@dataclass(frozen=True)
class AllTablesRequest:
    """The options of ``mpoc reproduce all``."""

    data: Path  # a folder with mnist/, cifar10/ and text/tinyshakespeare.txt
    output: Path
    budget: float  # seconds
    only: tuple[str, ...] = ()  # tables; (): all
    device: str = "auto"
    seed: int = 0
    precision: str = "fp32"


@dataclass(frozen=True)
class PlannedTable:
    """One table: its networks, what they cost, and how long they are trained."""

    request: StudyRequest
    experiments: tuple[Experiment, ...] = ()  # with the recipe's training; (): trains nothing
    examples: tuple[int, int] = (0, 0)  # of the training split, and of the one that is evaluated
    steps_per_epoch: int = 1
    rates: tuple[float, ...] = ()  # examples per second, by network
    stored: tuple[bool, ...] = ()  # whether its result is there already
    shares: tuple[float, ...] = ()  # of the epochs, by network; (): each takes all
    networks: tuple[str, ...] = ()  # start and name of each
    epochs: float | None = None  # None: the recipe's
    kept: bool = False  # whether the epochs are those of an earlier plan

    @property
    def name(self) -> str:
        """The study's."""
        return self.request.name

    @cached_property
    def recipe(self) -> float:
        """Epochs of the recipe; at most that many where validation ends the training."""
        settings = self.experiments[0].training.settings
        return settings.epochs if settings.steps is None else settings.steps / self.steps_per_epoch

    @cached_property
    def rungs(self) -> tuple[float | None, ...]:
        """The epochs to choose from, the shortest training first."""
        if self.kept or not self.experiments:
            return (self.epochs,)
        return (*(epochs for epochs in _RUNGS if epochs < self.recipe), None)

    def seconds(self, epochs: float | None) -> float:
        """Estimated time of the networks that are not stored yet; an evaluation before, and each epoch."""
        if not self.experiments:
            return 0.0
        epochs = self.recipe if epochs is None else epochs
        networks = zip(self.rates, self.shares or (1.0,) * len(self.rates), self.stored, strict=True)
        return _MARGIN * sum(
            self._work(share * epochs) / rate for rate, share, stored in networks if not stored
        )

    def _work(self, epochs: float) -> float:
        """That of one network, in examples of training."""
        trained, evaluated = self.examples
        return epochs * trained + (1 + math.ceil(epochs)) * evaluated * _EVALUATION

    @property
    def training(self) -> str:
        """The chosen training, and by how much it is shortened, in words."""
        if not self.experiments:
            return "trains nothing"
        chosen = choose_studies(STUDIES[self.name], self.chosen().choice)[0].training
        return f"shortened: {chosen.shortened}" if chosen.shortened else length_of(chosen.settings)

    def chosen(self) -> StudyRequest:
        """The request of the study with the chosen training."""
        if self.epochs is None:
            return self.request
        choice = replace(self.request.choice, epochs=self.epochs, one_cycle=True)
        return replace(self.request, choice=choice, held_out=0.0)


def plan_tables(request: AllTablesRequest, say: Callable[[str], None]) -> list[PlannedTable]:
    """Measure the networks of all tables, choose epochs, and keep the plan in the output folder.

    Args:
        request: the options.
        say: called with messages.

    Raises:
        UsageError: an unknown table, missing data, or a budget that is too short; names the smallest one.
        MpocError: the data or the kept plan are damaged.
    """
    begin = time.monotonic()
    names = request.only or TABLES
    for name in names:
        if name not in TABLES:
            raise UsageError(f"--only {name}: no such table{nearest(name, TABLES)}", ", ".join(TABLES))
    requests = [_request(request, name) for name in TABLES if name in names]
    kept = _read_plan(request.output)
    tables = [_measured(each, kept.get(each.name), say) for each in requests]
    chosen = choose_epochs(tables, request.budget, time.monotonic() - begin)
    plan = kept | {table.name: _entry(table) for table in chosen}
    request.output.mkdir(parents=True, exist_ok=True)
    write_text(_plan_file(request.output), json.dumps({"schema": SCHEMA, "tables": plan}, indent=1) + "\n")
    return chosen


def choose_epochs(tables: Sequence[PlannedTable], budget: float, spent: float = 0.0) -> list[PlannedTable]:
    """Choose the epochs of every table.

    Args:
        tables: measured.
        budget: seconds for all, with those that are ``spent`` on measuring.

    Raises:
        UsageError: the budget is too short for the shortest trainings.
    """
    rung = [0] * len(tables)
    cost = [[table.seconds(epochs) for epochs in table.rungs] for table in tables]
    left = budget - spent - sum(costs[0] for costs in cost)
    if left < 0:
        least = budget_text(budget - left, round_up=True)
        raise UsageError(
            f"--budget {budget_text(budget)}: too short for {', '.join(table.name for table in tables)}, "
            f"which take at least {least} here",
            f"--budget {least}, or fewer tables with --only",
        )
    while True:
        affordable = [
            (costs[at + 1], k)
            for k, (costs, at) in enumerate(zip(cost, rung, strict=True))
            if at + 1 < len(costs) and costs[at + 1] - costs[at] <= left
        ]
        if not affordable:
            break
        raised, k = min(affordable)
        rung[k], left = rung[k] + 1, left - (raised - cost[k][rung[k]])
    return [replace(table, epochs=table.rungs[at]) for table, at in zip(tables, rung, strict=True)]


def run_tables(
    request: AllTablesRequest, tables: Sequence[PlannedTable], say: Callable[[str], None], on_event: OnEvent
) -> Iterator[Reproduction | ImageStates]:
    """Train what is missing, one table after another, and write each one's report.

    Raises:
        MpocError, UsageError, Interrupted, OSError: as :func:`mpoc.reproduce.study.run_study`.
    """
    for table in tables:
        say(f"{table.name}: {table.training}")
        result: Reproduction | ImageStates
        if table.experiments:
            result = run_study(table.chosen(), say, on_event)
        else:
            result = measure_images(ImageStatesRequest(table.request.data, seed=request.seed), say)
        table.request.output.mkdir(parents=True, exist_ok=True)
        write_text(table.request.output / "report.json", to_json(result.as_dict()) + "\n")
        yield result


PLAN_COLUMNS = ("table", "networks", "examples/s", "training", "estimated")


def plan_rows(plan: Sequence[PlannedTable]) -> list[list[str]]:
    """The plan as a table: one line a study, and the sum."""
    rows = []
    for table in plan:
        networks = rates = seconds = ""
        if table.experiments:
            stored = f", {sum(table.stored)} stored" if any(table.stored) else ""
            networks = f"{len(table.rates)}{stored}"
            ends = (f"{rate:,.0f}" for rate in (min(table.rates), max(table.rates)))
            rates = " to ".join(dict.fromkeys(ends))
            seconds = budget_text(table.seconds(table.epochs), round_up=True)
        rows.append([table.name, networks, rates, table.training, seconds])
    total = sum(table.seconds(table.epochs) for table in plan)
    return [*rows, ["all", "", "", "", budget_text(total, round_up=True)]]


def parse_budget(text: str) -> float:
    """``"8h"``, ``"1h30m"``, ``"90m"`` or ``"45s"`` → seconds.

    Raises:
        UsageError: not a time.
    """
    match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", text)
    hours, minutes, seconds = (int(part or 0) for part in (match.groups() if match else (0, 0, 0)))
    if not hours + minutes + seconds:
        raise UsageError(f"{shortened(text)} is not a time", "write it as 8h, 1h30m or 90m")
    return 3600.0 * hours + 60 * minutes + seconds


def budget_text(seconds: float, round_up: bool = False) -> str:
    """``1h30m``, ``12m`` or, below two minutes, ``45s``."""
    whole = math.ceil(seconds) if round_up else round(seconds)
    if whole < 120:
        return f"{whole}s"
    minutes = math.ceil(seconds / 60) if round_up else round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{rest}m" if rest or not hours else "")


def _request(request: AllTablesRequest, name: str) -> StudyRequest:
    """The request of one table with its recipe's training.

    Raises:
        UsageError: its data are missing.
    """
    wanted = CIFAR if name == NAME else next(iter(STUDIES[name].variants.values())).data
    found = [request.data / file for file in _FILES[wanted] if (request.data / file).exists()]
    found += sorted(request.data.glob(f"{_FILES[wanted][0]}.*"))
    if not found:
        path = request.data / _FILES[wanted][0]
        raise UsageError(f"{path}: no such data, {wanted} of {name}", "--only names the tables to make")
    return StudyRequest(
        name, found[0], request.output / name,
        StudyChoice(
            _VARIANTS.get(name, ()), precision=request.precision,
            control=name != NAME and STUDIES[name].control,
        ),
        held_out=0.0 if name == NAME else STUDIES[name].held_out, device=request.device, seed=request.seed,
    )  # fmt: skip


def _measured(request: StudyRequest, kept: dict[str, Any] | None, say: Callable[[str], None]) -> PlannedTable:
    """The table with the speed of its networks, measured where no earlier plan knows it."""
    if request.name == NAME:
        return PlannedTable(request)
    if kept is not None and not _is_part_of(kept, request):
        say(f"{request.name}: planned again, the kept plan is of other networks")
        kept = None
    if kept is not None:
        request = replace(request, choice=replace(request.choice, precision=kept["precision"]))
    _, experiments, material = open_study(request)
    cells = list(cells_of(experiments, request.chosen_starts, request.seed))
    train = material.data.splits["train"]
    table = PlannedTable(
        request,
        tuple(experiments),
        (len(train), len(material.data.splits[material.measured])),
        ExampleOrder(train, experiments[0].training.settings.batch).steps_per_epoch,
        stored=(False,) * len(cells),
        shares=tuple(_share(cell) for cell in cells),
        networks=tuple(map(_network_name, cells)),
    )
    known: list[tuple[str, float]] = []  # networks with their rates, in the order of the table
    if kept is not None:
        known = list(zip(kept.get("networks", table.networks), kept["rates"], strict=True))
        table = replace(table, epochs=kept["epochs"], kept=True)
        table = replace(table, stored=tuple(_stored(table)))
    return replace(table, rates=tuple(_rates(cells, known, material, request, say)))


def _rates(
    cells: Sequence[Cell],
    known: list[tuple[str, float]],
    material: PaperData,
    request: StudyRequest,
    say: Callable[[str], None],
) -> Iterator[float]:
    """The speed of each network: the known one, that of a network like it, or a measured one."""
    kinds = [_kind(cell) for cell in cells]
    own = _aligned(cells, known)
    rates = {kind: rate for kind, rate in zip(kinds, own, strict=True) if rate is not None}
    for cell, kind, rate in zip(cells, kinds, own, strict=True):
        if kind not in rates:
            rates[kind] = measure_rate(cell, material, request.device)
            say(f"{request.name}: {cell.name.rpartition('-')[0]} trains {rates[kind]:,.0f} examples a second")
        yield rates[kind] if rate is None else rate


def _kind(cell: Cell) -> tuple[Any, ...]:
    """What makes the speed of a network's training."""
    if cell.start in DENSE_STARTS:
        return (cell.experiment.network,)
    return cell.experiment.network, cell.experiment.layers, cell.bond


def _aligned(cells: Sequence[Cell], known: Sequence[tuple[str, float]]) -> list[float | None]:
    """The known rate of each network, in the order of the table; names may occur twice."""
    waiting = deque(known)
    return [
        waiting.popleft()[1] if waiting and waiting[0][0] == _network_name(cell) else None for cell in cells
    ]


def _network_name(cell: Cell) -> str:
    """A network of a plan: start and name."""
    return f"{cell.start}, {cell.name}"


def _share(cell: Cell) -> float:
    """Of the epochs of its table, those of one network."""
    settings, whole = cell.settings, cell.experiment.training.settings
    return settings.epochs / whole.epochs if whole.steps is None else (settings.steps or 0) / whole.steps


def _is_part_of(kept: dict[str, Any], request: StudyRequest) -> bool:
    """Whether a kept entry is of all or some networks of a table; the first entries did not name theirs."""
    experiments = choose_studies(STUDIES[request.name], request.choice)
    networks = [_network_name(cell) for cell in cells_of(experiments, request.chosen_starts, request.seed)]
    known, following = kept.get("networks", networks), iter(networks)
    return len(kept["rates"]) == len(known) and all(name in following for name in known)


def _stored(table: PlannedTable) -> Iterator[bool]:
    """Whether the result of each network is in the output folder, in the order of the table."""
    request = table.chosen()
    _, experiments, material = open_study(request)
    store = Store(request.output)
    for cell in cells_of(experiments, request.chosen_starts, request.seed):
        yield store.find(cell.name, cell.identity(material)) is not None


def _entry(table: PlannedTable) -> dict[str, Any]:
    precision = table.request.choice.precision
    rates = list(map(rounded, table.rates))
    networks = {"networks": list(table.networks)} if table.networks else {}
    return {"epochs": table.epochs, "precision": precision, "rates": rates, **networks}


def _plan_file(output: Path) -> Path:
    return output / "plan.json"


def _read_plan(output: Path) -> dict[str, dict[str, Any]]:
    """Epochs, precision and rates of the tables that have been planned for this folder, by name.

    Raises:
        MpocError: the file is not a plan.
    """
    path = _plan_file(output)
    if not path.exists():
        return {}
    try:
        tables = json.loads(path.read_text("utf-8"))["tables"]
        for table in tables.values():
            numbers = [*table["rates"], 1 if table["epochs"] is None else table["epochs"]]
            names = table.get("networks", ["unnamed"])  # as in the first plans
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(table)
            if table["precision"] not in PRECISIONS or not all(number > 0 for number in numbers):
                raise ValueError(table)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MpocError(
            f"{path}: not a plan of mpoc reproduce all", f"remove {path}, or name another -o"
        ) from error
    return dict(tables)
