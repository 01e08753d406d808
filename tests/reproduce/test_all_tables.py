"""All tables within a budget: the choice of epochs, what is trained, kept and shown, and the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpoc.errors import MpocError, UsageError
from mpoc.reproduce import all_tables
from mpoc.reproduce.all_tables import (
    AllTablesRequest,
    PlannedTable,
    budget_text,
    choose_epochs,
    parse_budget,
    plan_tables,
)
from mpoc.reproduce.catalogue import STUDIES, StudyChoice, choose_studies
from mpoc.reproduce.run import Store, cells_of, run_cell
from mpoc.reproduce.study import StudyRequest, open_study
from tests.reproduce.images import write_digits

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def table(name: str, *rates: float, examples: int = 1000) -> PlannedTable:
    """Networks of these examples a second, on 1,000 examples that are also evaluated."""
    experiments = tuple(choose_studies(STUDIES[name], StudyChoice()))
    request = StudyRequest(name, Path("data"), Path("out"))
    stored = (False,) * len(rates)
    return PlannedTable(request, experiments, (examples, 0), examples // 32, rates, stored)


def total(tables: list[PlannedTable]) -> float:
    return sum(each.seconds(each.epochs) for each in tables)


def test_estimates_training_and_evaluations() -> None:
    shown = replace(table("vgg16", 10.0, 20.0), examples=(600, 300))
    work = 2 * 600 + 3 * 300 / 3  # an evaluation counts a third; one before and one after each epoch
    assert shown.seconds(2) == pytest.approx(1.1 * (work / 10 + work / 20))
    assert replace(shown, stored=(True, False)).seconds(2) == pytest.approx(1.1 * work / 20)


def test_estimates_a_training_with_a_control() -> None:
    """Each network takes its share of the epochs, and an evaluation for each that it begins."""
    shown = replace(table("vgg16", 10.0, 10.0, 10.0), examples=(600, 300), shares=(2 / 3, 1 / 3, 1.0))
    work = (2 * 600 + 3 * 100) + (1 * 600 + 2 * 100) + (3 * 600 + 4 * 100)
    assert shown.seconds(3) == pytest.approx(1.1 * work / 10)


@pytest.mark.parametrize("budget", [200, 1_000, 5_000, 9_000, 10**6])
def test_uses_the_budget_for_cheap_tables_first(budget: float) -> None:
    tables = [table("fc2", 1000.0), table("vgg16", 10.0), table("resnet", 20.0)]
    chosen = choose_epochs(tables, budget)
    assert total(chosen) <= budget
    cheap, slow, faster = (each.recipe if each.epochs is None else each.epochs for each in chosen)
    assert cheap == 20 and slow <= faster <= 60
    dearer = [
        each.seconds(each.rungs[each.rungs.index(each.epochs) + 1]) - each.seconds(each.epochs)
        for each in chosen
        if each.epochs is not None
    ]
    assert min(dearer, default=budget) > budget - total(chosen)
    assert (budget == 10**6) == all(each.epochs is None for each in chosen)


def test_slow_tables_get_their_share() -> None:
    """Though one more epoch of another costs less."""
    slow, fast = choose_epochs([table("resnet", 10.0), table("vgg16", 40.0)], 300)
    assert (slow.epochs, fast.epochs) == (1, 6)


def test_smallest_budget_is_named_and_suffices() -> None:
    tables = [table("vgg16", 10.0), table("resnet", 20.0)]
    with pytest.raises(UsageError, match="--budget 60s: too short for vgg16, resnet") as error:
        choose_epochs(tables, 60, spent=7.5)
    least = parse_budget((error.value.hint or "").split()[1].rstrip(","))
    assert [each.epochs for each in choose_epochs(tables, least, spent=7.5)] == [0.5, 0.5]
    with pytest.raises(UsageError):
        choose_epochs(tables, least - 61, spent=7.5)


def test_kept_plan_is_not_changed() -> None:
    kept = replace(table("vgg16", 10.0), epochs=2, kept=True)
    assert [each.epochs for each in choose_epochs([kept, table("fc2", 1000.0)], 10**6)] == [2, None]


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28_800), ("1h30m", 5_400), ("90m", 5_400), ("45s", 45), ("1h1s", 3_601)]
)
def test_parses_a_budget(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds
    assert parse_budget(budget_text(seconds, round_up=True)) >= seconds


@pytest.mark.parametrize("text", ["", "8", "h", "0h", "8 h", "1.5h", "30m1h", "-1h"])
def test_rejects_a_malformed_budget(text: str) -> None:
    with pytest.raises(UsageError, match="is not a time"):
        parse_budget(text)


def test_epochs_asked_for_as_a_number_find_those_of_a_plan() -> None:
    by_hand, planned, half = (
        json.dumps(choose_studies(STUDIES["mera"], StudyChoice(epochs=epochs))[0].training.settings.epochs)
        for epochs in (1.0, 1, 0.5)
    )
    assert by_hand == planned == "1" and half == "0.5"


def test_shorter_trainings_are_called_so() -> None:
    def shortened(name: str, **choice: object) -> str:
        return choose_studies(STUDIES[name], StudyChoice(**choice))[0].training.shortened  # type: ignore[arg-type]

    assert shortened("fc2") == "20 epochs in place of the paper's 500 epochs"
    assert shortened("mera", epochs=1) == "1 epoch in place of the paper's early stopping"
    assert shortened("mera", steps=9) == "9 steps in place of the paper's early stopping"
    assert shortened("mera") == ""
    assert shortened("harada", epochs=2) == "2 epochs in place of the recipe's 5 epochs"
    assert shortened("picogpt") == shortened("harada") == ""
    assert shortened("picogpt", epochs=0.5) == "0.5 epochs in place of the paper's 2,000 steps"
    assert all(shortened(name, paper=True) == "" for name in STUDIES if name != "harada")
    words = choose_studies(STUDIES["mera"], StudyChoice(epochs=3, one_cycle=True))[0].training.words()
    assert words.startswith(
        "shortened to 3 epochs in place of the paper's early stopping, batch 50, adam, lr 0.001 cosine"
    )
    assert "warm-up 0.1" in words and "stopped" not in words


def asked(tmp_path: Path, **more: object) -> AllTablesRequest:
    write_digits(tmp_path / "data" / "mnist")
    request = AllTablesRequest(tmp_path / "data", tmp_path / "out", 600, ("lenet5",), device="cpu")
    return replace(request, **more)  # type: ignore[arg-type]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (("lenet",), "--only lenet: no such table; did you mean 'lenet5'"),
        (("mera",), "cifar10: no such data, CIFAR-10 of mera"),
        (("mps-images",), "cifar10: no such data, CIFAR-10 of mps-images"),
        ((), "cifar10: no such data"),
    ],
)
def test_rejects_unknown_tables_and_missing_data(digits: Path, only: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_tables(asked(digits, only=only), lambda _: None)
    assert not (digits / "out").exists()


PLAN = '{"tables": {"lenet5": {"epochs": %s, "precision": "fp32", "rates": [1], "networks": %s}}}'


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", PLAN % (-1, '["a"]'), PLAN % (1, "null"), PLAN % (1, 5), PLAN % (1, [])]
)
def test_names_a_damaged_plan(digits: Path, text: str) -> None:
    (digits / "out").mkdir()
    (digits / "out" / "plan.json").write_text(text)
    with pytest.raises(MpocError, match=r"plan\.json: not a plan of mpoc reproduce all"):
        plan_tables(asked(digits), lambda _: None)


@pytest.mark.parametrize(("key", "change"), [("rates", list.pop), ("networks", list.reverse)])
def test_plan_of_other_networks_is_made_again(
    digits: Path, key: str, change: Callable[[list[Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is said, since it takes time that was not asked for."""
    monkeypatch.setattr(all_tables, "measure_rate", lambda *_: 1000.0)
    kept = plan_tables(asked(digits), lambda _: None)[0]
    path = digits / "out" / "plan.json"
    plan = json.loads(path.read_text("utf-8"))
    assert plan["tables"]["lenet5"]["networks"] == list(kept.networks)
    change(plan["tables"]["lenet5"][key])
    path.write_text(json.dumps(plan))
    said: list[str] = []
    assert not plan_tables(asked(digits), said.append)[0].kept
    assert "lenet5: planned again, the kept plan is of other networks" in said


def test_plan_of_some_of_the_networks_keeps_its_epochs(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that gains a network trains that one alone, as long as the others."""
    monkeypatch.setattr(all_tables, "measure_rate", lambda *_: 1000.0)
    plan_tables(asked(digits), lambda _: None)
    path = digits / "out" / "plan.json"
    plan = json.loads(path.read_text("utf-8"))
    old = plan["tables"]["lenet5"]
    old |= {"epochs": 1.5, "precision": "bf16"}
    names = old["networks"]
    for kept, rates, measured in ((names[::2], (7, 5, 5), 0), (names[1:], (1000, 7, 5), 1)):
        old |= {"rates": [7, 5], "networks": kept}
        path.write_text(json.dumps(plan))
        said: list[str] = []
        (table,) = plan_tables(asked(digits), said.append)
        assert table.kept and table.epochs == 1.5 and list(table.networks) == names
        assert table.request.choice.precision == "bf16"
        assert table.rates == rates
        assert len(said) == measured and all(line.startswith("lenet5: lenet5-dense trains") for line in said)


def test_committed_results_are_of_todays_tables(tmp_path: Path) -> None:
    """Else the command that shows them would train again."""
    (tmp_path / "cifar10").mkdir()
    for name, kept in json.loads((RESULTS / "plan.json").read_text("utf-8"))["tables"].items():
        request = AllTablesRequest(tmp_path, RESULTS, 1.0, precision=kept["precision"])
        chosen = PlannedTable(all_tables._request(request, name), epochs=kept["epochs"]).chosen()
        cells = list(
            cells_of(choose_studies(STUDIES[name], chosen.choice), chosen.chosen_starts, chosen.seed)
        )
        files = [path for path in (RESULTS / name).glob("*.json") if path.name != "report.json"]
        data = json.loads(files[0].read_text("utf-8"))["identity"]["data"]
        material: Any = SimpleNamespace(identity=data)
        found = [Store(RESULTS / name).find(cell.name, cell.identity(material)) for cell in cells]
        assert len(cells) == len(kept["rates"])
        assert sum(result is not None for result in found) == len(files) > 0


def test_kernels_are_trained_channels_last(digits: Path) -> None:
    request = StudyRequest("lenet5", asked(digits).data / "mnist", digits / "out", StudyChoice(steps=1))
    _, experiments, material = open_study(request)
    cell = next(cells_of(experiments, ("ttsvd",), 0))
    _, weights = run_cell(cell, material, "cpu", None)
    assert weights["conv2.weight"].is_contiguous(memory_format=torch.channels_last)
