"""``mpoc reproduce`` as a process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpoc.reproduce.run import Cell, run_cell
from mpoc.runtime.signals import Interrupted
from tests.reporting.test_html import assert_whole
from tests.reporting.test_markup import read
from tests.reproduce.images import write_digits
from tests.reproduce.test_hallam2017 import write_images
from tests.support.process import Here, Mpoc


def test_quick_fc2_writes_table_and_figures(run: Mpoc, here: Here) -> None:
    write_digits(run.folder / "digits")
    done = run("reproduce", "fc2", "--data", "digits", "--quick", "--bonds", "2,16", "--plot", "figures")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "smoke run" in lines[0]
    rows = [line.split("  ") for line in lines if "MPO, " in line or line.startswith("fc2 ")]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[1] for row in cells] == ["dense", *["MPO, TT-SVD", "MPO, random"] * 2]
    assert cells[3][2:6] == ["16", "15,584", "15,584", "0.07667"]
    assert cells[0][-1] == "98.35 ± 0.20 (Fig. 2)" and cells[3][-1] == "98.35 (Fig. 2)"
    assert "FC2: fc1 M(4,7,7,4→4,4,4,4)(D); fc2 M(4,4,4,4→1,1,10,1)(4)" in lines
    assert "on MNIST" in done.stdout and "'final' uses the last weights" in done.stdout
    assert "[5/5] FC2, random D=16, seed 0: " in done.stderr
    assert {file.name for file in (run.folder / "figures").iterdir()} == {"fc2.svg", "fc2-curves.svg"}
    again = here("reproduce", "fc2", "--data", "digits", "--quick", "--bonds", "2,16", "--json")
    assert again.returncode == 0 and again.stderr.count(", stored") == 5
    report = json.loads(again.stdout)
    assert report == json.loads((run.folder / "reproduce-fc2" / "report.json").read_text("utf-8"))
    assert report["quick"] and len(report["rows"]) == 5


ALL = ("reproduce", "all", "--data", "data", "--only", "fc2,lenet5")


@pytest.fixture
def data(workdir: Path) -> None:
    (workdir / "data").mkdir()
    write_digits(workdir / "data" / "mnist")


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_all_trains_within_the_budget_and_writes_one_page(run: Mpoc) -> None:
    short = run(*ALL, "--budget", "1s")
    assert short.returncode == 2 and short.stdout == ""
    assert re.search(r"1s: too short for fc2, lenet5, which take at least \d+s here", short.stderr)
    assert not (run.folder / "reproduce-all").exists()
    done = run(*ALL, "--budget", "5m")
    assert done.returncode == 0, done.stderr
    plan = [line.split() for line in done.stdout.splitlines()]
    assert plan[0] == ["table", "networks", "examples/s", "training", "estimated"]
    assert [line[0] for line in plan[2:5]] == ["fc2", "lenet5", "all"]
    assert "shortened: 20 epochs in place of the paper's 500 epochs" in done.stdout
    assert "[9/9] FC2, random D=16, seed 0: " in done.stderr
    page = (run.folder / "reproduce-all" / "index.html").read_text("utf-8")
    assert_whole(page)
    reader = read(page)
    tables = re.findall(r"<table>.*?</table>", page)
    assert len(tables) == 3 and page.count("<svg") == 4
    for table, rows, paper in zip(tables[1:], (9, 3), ("98.35 ± 0.20 (Fig. 2)", "99.17 ± 0.08"), strict=True):
        assert table.count("<tr>") == 1 + rows and paper in table
        assert "final %, shortened" in table and "best %, shortened" in table
    caption = "ours after a shortened training, 20 epochs in place of the paper&#x27;s 500 epochs"
    assert page.count(caption) == 8
    assert "2 of 2 tables finished" in reader.text


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_all_resumes_with_its_plan(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def stops(cell: Cell, *arguments: object) -> object:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(cell.name)
        return run_cell(cell, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("mpoc.reproduce.study.run_cell", stops)
    stopped = here(*ALL, "--budget", "5m")
    assert stopped.returncode == 130 and "fc2      9 " in stopped.stdout
    assert "stopped; finished networks are in reproduce-all" in stopped.stderr
    monkeypatch.setattr("mpoc.reproduce.study.run_cell", run_cell)
    done = here(*ALL, "--budget", "5m")
    assert done.returncode == 0, done.stderr
    assert "examples a second" not in done.stderr and "9, 2 stored" in done.stdout
    assert done.stderr.count(", stored") == 2
    assert here(*ALL, "--budget", "1s").stderr.count(", stored") == 12


@pytest.mark.slow
def test_all_shows_a_table_that_trains_nothing(here: Here) -> None:
    (here.folder / "data").mkdir()
    write_images(here.folder / "data" / "cifar10.npz")
    done = here("reproduce", "all", "--data", "data", "--only", "mps-images", "--budget", "1m", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert "mps-images                           trains nothing" in done.stdout
    page = (here.folder / "out" / "index.html").read_text("utf-8")
    assert_whole(page)
    assert page.count("<svg") == 1 and "20 images of 3×32×32 (test)" in read(page).text
    assert (here.folder / "out" / "mps-images" / "report.json").exists()


@pytest.mark.slow
def test_mps_images_writes_table_and_figures(here: Here) -> None:
    write_digits(here.folder / "digits", 20, 30)
    words = ["reproduce", "mps-images", "--data", "digits", "--bonds", "1,8", "--quick"]
    done = here(*words, "--plot", "figures")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith(("1 ", "8 "))]
    assert [row[:3] for row in rows] == [["1", "20", "0.026"], ["8", "544", "0.694"]]
    assert rows[0][5] == "–" and "Morton order, bonds 1 to 4: " in done.stdout
    assert "30 images of 1×28×28 (test), as sites of 4, coarse to fine" in done.stdout
    assert len(list((here.folder / "figures").iterdir())) == 3
    again = here(*words, "--json", "--quiet")
    assert again.returncode == 0 and again.stderr == ""
    assert again.stdout == (here.folder / "reproduce-mps-images" / "report.json").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fc3",), "no experiment 'fc3'; did you mean 'fc2'?"),
        (("fc2", "--bonds", "2,x"), "--bonds: 'x' is not a whole number"),
        (("fc2", "--depth", "20"), "--depth chooses variants of resnet"),
        (("fc2", "--budget", "8h"), "--budget is an option of mpoc reproduce all"),
        (("all",), "all needs a --budget of time"),
        (("all", "--budget", "8"), "'8' is not a time"),
        (("all", "--budget", "8h", "--epochs", "2"), "--epochs is not an option of mpoc reproduce all"),
        (("mps-imagse",), "did you mean 'mps-images'?"),
        (("mps-images", "--starts", "random"), "--starts is an option of studies that train networks"),
        (("mps-images", "--bonds", "0"), "--bonds: one at least, each at least 1"),
        (("fc2", "--shape", "28x28:16x16"), "names no layer"),
        (("fc2", "--shape", "fc1=28x27:16x16"), "756 inputs and 256 outputs, but the layer has 784 and 256"),
    ],
)
def test_rejects_bad_options(here: Here, words: tuple[str, ...], message: str) -> None:
    write_digits(here.folder / "digits", 30, 10)
    done = here("reproduce", *words, "--data", "digits")
    assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.parametrize("stop", [Interrupted(15, 1, False), KeyboardInterrupt()])
def test_interrupt_prints_how_to_resume(
    here: Here, stop: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: object) -> None:
        raise stop

    monkeypatch.setattr("mpoc.reproduce.study.run_cell", stops)
    monkeypatch.setattr("sys.argv", ["mpoc", "reproduce", "fc2", "--data", "my digits"])
    write_digits(here.folder / "my digits", 30, 10)
    done = here("reproduce", "fc2", "--data", "my digits")
    assert done.returncode == 128 + getattr(stop, "signum", 2)
    assert "stopped; finished networks are in reproduce-fc2" in done.stderr
    assert done.stderr.splitlines()[-1] == "next: mpoc reproduce fc2 --data 'my digits'"
