"""A study from data to rows: what is trained, kept, used again, and put beside the paper's numbers."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpoc.errors import MpocError, UsageError
from mpoc.reproduce import study as module
from mpoc.reproduce.catalogue import STUDIES, Shapes, StudyChoice, choose_studies, find_study
from mpoc.reproduce.experiment import CONTROL, DENSE
from mpoc.reproduce.run import Cell, run_cell
from mpoc.reproduce.study import Reproduction, StudyRequest, notes_of, run_study, table_of
from mpoc.runtime.signals import Interrupted
from tests.reproduce.images import write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


def request(digits: Path, output: Path, **more: object) -> StudyRequest:
    asked = StudyRequest("fc2", digits, output, StudyChoice(bonds=(2, 16), epochs=3), device="cpu")
    return replace(asked, **more)  # type: ignore[arg-type]


def run(asked: StudyRequest) -> tuple[Reproduction, list[str]]:
    said: list[str] = []
    return run_study(asked, said.append), said


@pytest.mark.slow
def test_rows_list_our_numbers_and_the_papers(digits: Path, tmp_path: Path) -> None:
    done, _ = run(request(digits, tmp_path / "out", runs=2))
    assert [(row.start, row.bond) for row in done.rows] == [
        (DENSE, 0), ("ttsvd", 2), ("random", 2), ("ttsvd", 16), ("random", 16),
    ]  # fmt: skip
    dense, small, large = done.rows[0], done.rows[1], done.rows[3]
    assert (dense.replaced, small.replaced, large.replaced) == (203_264, 1_024, 15_584)
    assert (dense.rho, small.rho) == (1, 1_024 / 203_264)
    finals = [result.final for result in dense.results]
    assert dense.mean("final") == (statistics.fmean(finals), statistics.stdev(finals))
    assert min(finals) > 90
    assert dense.published is not None and dense.published.accuracy == 98.35
    assert str(large.published) == "98.35 (Fig. 2)"
    for row in done.rows:
        for result in row.results:
            assert [point["epoch"] for point in result.curve] == [0, 1, 2, 3]
            assert result.final == result.curve[-1]["accuracy"]
            assert result.best == max(point["accuracy"] for point in result.curve)


@pytest.mark.slow
def test_starts_differ_only_in_initialisation(digits: Path, tmp_path: Path) -> None:
    """From TT-SVD a network begins near where dense training ended; random cores know nothing."""
    done, _ = run(request(digits, tmp_path / "out", choice=StudyChoice(bonds=(64,), epochs=3)))
    dense, fitted, drawn = done.rows
    # D = 64 is full for the first layer, so that TT-SVD truncates the second layer alone.
    assert fitted.results[0].start > 30 > drawn.results[0].start
    assert fitted.results[0].parameters < drawn.results[0].parameters  # the nominal D above the unfoldings
    assert dense.results[0].start < 50


@pytest.mark.slow
def test_resumes_an_interrupted_study(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(digits, tmp_path / "out")
    trained: list[str] = []

    def stops(cell: Cell, *arguments: object) -> object:
        if len(trained) == 3:
            raise Interrupted(2, 1, False)
        trained.append(cell.name)
        return run_cell(cell, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "run_cell", stops)
    with pytest.raises(Interrupted):
        run(asked)
    assert trained == ["fc2-dense-seed0", "fc2-ttsvd-D2-seed0", "fc2-random-D2-seed0"]
    names = {file.name.rpartition("-")[0] for file in (tmp_path / "out").iterdir()}
    assert names == set(trained)
    monkeypatch.setattr(module, "run_cell", run_cell)
    done, said = run(asked)
    assert [line.endswith(", stored") for line in said[1:]] == [True] * 3 + [False] * 2
    whole, _ = run(replace(asked, output=tmp_path / "undisturbed"))
    for ours, theirs in zip(done.rows, whole.rows, strict=True):
        assert ours.results[0].curve == theirs.results[0].curve


@pytest.mark.slow
def test_settings_are_part_of_the_key(digits: Path, tmp_path: Path) -> None:
    asked = request(digits, tmp_path / "out", choice=StudyChoice(bonds=(2,), epochs=1), starts=("random",))
    run(asked)
    for other in (
        replace(asked, seed=1),
        replace(asked, choice=replace(asked.choice, epochs=2)),
        replace(asked, choice=replace(asked.choice, l2=False)),
        replace(asked, data=write_digits(tmp_path / "fewer", train=250)),
        replace(asked, held_out=0.2),
    ):
        assert not any(line.endswith("stored") for line in run(other)[1])
    again = run(replace(asked, runs=1))[1]
    assert sum(line.endswith("stored") for line in again) == 2


@pytest.mark.slow
def test_factorings_share_the_dense_network(digits: Path, tmp_path: Path) -> None:
    shape: Shapes = {"fc1": ((16, 16), (28, 28))}
    shapes = (("fc1=28x28:16x16", shape),)
    choice = StudyChoice(bonds=(2,), epochs=1, shapes=shapes)
    done, _ = run(request(digits, tmp_path / "out", choice=choice, starts=("random",)))
    assert [(row.start, row.replaced) for row in done.rows] == [
        (DENSE, 203_264), ("random", 1_024), ("random", 736 + 2 * 2 * 28 * 16),
    ]  # fmt: skip
    assert done.rows[2].published is None


@pytest.mark.slow
def test_validation_split_selects_the_weights(digits: Path, tmp_path: Path) -> None:
    asked = request(digits, tmp_path / "out", held_out=0.2, choice=StudyChoice(bonds=(2,), epochs=3))
    done, said = run(asked)
    assert "validation 60" in said[0] and "best on validation" in done.material.reported()
    for row in done.rows:
        curve = row.results[0].curve
        chosen = max(range(len(curve)), key=lambda k: (curve[k]["validation"], -k))
        assert row.results[0].final == curve[chosen]["accuracy"]


def test_control_divides_the_epochs(digits: Path, tmp_path: Path) -> None:
    """Dense and TT-SVD together take as many steps as random cores, and as the control, which is dense."""
    choice = StudyChoice(bonds=(2,), epochs=3, control=True)
    asked = request(digits, tmp_path / "out", choice=choice, starts=("ttsvd", "rescaled", "random"))
    done, _ = run(asked)
    assert [row.start for row in done.rows] == [DENSE, CONTROL, "ttsvd", "rescaled", "random"]
    dense, control, fitted, rescaled, drawn = (row.results[0] for row in done.rows)
    assert dense.steps + fitted.steps == control.steps == drawn.steps == 3 * fitted.steps
    assert rescaled.steps == fitted.steps and rescaled.curve != fitted.curve
    assert dense.curve[0] == control.curve[0] and control.parameters == dense.parameters
    assert [row.rho for row in done.rows[:2]] == [1, 1] and done.rows[1].published == done.rows[0].published
    alone, said = run(replace(asked, choice=StudyChoice(bonds=(2,), epochs=2), starts=()))
    assert said[-1].endswith("stored") and alone.rows[0].results[0].curve == dense.curve
    notes = notes_of(done)
    assert any(note.startswith("dense network (two thirds) and each start from it") for note in notes)
    assert any(note.startswith("rescaled: the cores of TT-SVD") for note in notes)
    lengths = [row["shortened"].split(" in place")[0] for row in done.as_dict()["rows"]]
    assert lengths == ["2 epochs", "3 epochs", "1 epoch", "1 epoch", "3 epochs"]
    assert "dense, control" in str(table_of(done)) and "MPO, TT-SVD rescaled" in str(table_of(done))
    _, said = run(replace(asked, choice=StudyChoice(bonds=(2,), epochs=1), starts=("ttsvd",)))
    assert not any(line.endswith("stored") for line in said)  # not the TT-SVD of a network of two epochs


def test_names_a_damaged_result(digits: Path, tmp_path: Path) -> None:
    asked = request(digits, tmp_path / "out", choice=StudyChoice(bonds=(2,), epochs=1), starts=())
    run(asked)
    (file,) = (tmp_path / "out").glob("*.json")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(MpocError, match=f"{file.name}: damaged") as error:
        run(asked)
    assert f"remove {file}" in (error.value.hint or "")


@pytest.mark.slow
def test_retrains_the_dense_network_without_weights(digits: Path, tmp_path: Path) -> None:
    asked = request(digits, tmp_path / "out", choice=StudyChoice(bonds=(2,), epochs=1), starts=("ttsvd",))
    before, _ = run(asked)
    for file in (tmp_path / "out").iterdir():
        if "ttsvd" in file.name or file.suffix == ".safetensors":
            file.unlink()
    after, _ = run(asked)
    assert before.rows[1].results[0].curve == after.rows[1].results[0].curve


@pytest.mark.slow
def test_json_lists_all_rows(digits: Path, tmp_path: Path) -> None:
    done, _ = run(request(digits, tmp_path / "out", choice=StudyChoice(bonds=(2,), epochs=1)))
    report = json.loads(json.dumps(done.as_dict()))
    assert report["schema"] == "mpoc.reproduction/1"
    assert report["rows"][1]["structures"] == [
        "fc1 M(4,7,7,4→4,4,4,4)(2)", "fc2 M(4,4,4,4→1,1,10,1)(4)",
    ]  # fmt: skip
    assert report["rows"][1]["rho"] == pytest.approx(1_024 / 203_264, rel=1e-5)
    assert report["rows"][0]["final"]["sigma"] is None


def test_rejects_data_of_another_shape(tmp_path: Path) -> None:
    x = np.zeros((20, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "small.npz", allow_pickle=False, x=x, y=np.arange(20) % 10)
    with pytest.raises(UsageError, match="fc2 takes images of 1×28×28, not npz"):
        run(StudyRequest("fc2", tmp_path / "small.npz", tmp_path / "out"))
    with pytest.raises(UsageError, match="picogpt takes text"):
        run(StudyRequest("picogpt", tmp_path / "small.npz", tmp_path / "out"))


@pytest.mark.slow
def test_evaluates_text_on_its_end(tmp_path: Path) -> None:
    characters = "".join(map(chr, range(48, 113)))  # 65, as tiny Shakespeare has
    (tmp_path / "text.txt").write_text(characters * 200)
    asked = StudyRequest(
        "picogpt", tmp_path / "text.txt", tmp_path / "out", StudyChoice(bonds=(4,)), ("random",), quick=True,
        device="cpu",
    )  # fmt: skip
    done, said = run(asked)
    assert any(line.startswith("note: ") and "0.1 of train held out, its end" in line for line in said)
    assert done.material.measured == "validation"
    assert [row.results[0].parameters for row in done.rows] == [808_448, 42_336]
    with pytest.raises(UsageError, match="no test split") as error:
        run(replace(asked, held_out=0.1))
    assert error.value.hint == "omit --hold-out"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"starts": ("ttsdv",)}, "did you mean 'ttsvd'"),
        ({"runs": 0}, "--runs 0"),
        ({"held_out": 1.0}, "--hold-out 1"),
        ({"choice": StudyChoice(control=True), "starts": ("random",)}, "--control: --starts random has none"),
        ({"choice": StudyChoice(variants=("fc3",))}, "no variant 'fc3'"),
        ({"choice": StudyChoice(bonds=(0,))}, "--bonds 0"),
        ({"choice": StudyChoice(shapes=(("fc9=4:4", {"fc9": ((4,), (4,))}),))}, "fc9 is not replaced"),
    ],
)
def test_rejects_bad_requests(digits: Path, tmp_path: Path, more: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(request(digits, tmp_path / "out", **more))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'lenet5'"):
        find_study("lenet")


@pytest.mark.parametrize(("steps", "parts"), [(9, (6, 3)), (10, (7, 3)), (2, (1, 1))])
def test_control_divides_steps(steps: int, parts: tuple[int, int]) -> None:
    choice = StudyChoice(steps=steps, control=True)
    training = choose_studies(STUDIES["fc2"], choice)[0].training
    assert tuple(training.of(start).settings.steps for start in (DENSE, "ttsvd")) == parts
    assert training.of("rescaled") == training.of("ttsvd")
    assert training.of("random") == training.of(CONTROL) == training


def test_control_divides_no_training_of_the_paper() -> None:
    with pytest.raises(UsageError, match="--control divides a training, and --paper"):
        choose_studies(STUDIES["vgg16"], StudyChoice(paper=True, control=True))
    whole = choose_studies(STUDIES["picogpt"], StudyChoice(control=True))[0].training
    assert whole.of(DENSE).shortened == "1,333 steps for dense network and TT-SVD together"


@pytest.mark.parametrize("name", ["mera", "harada"])
def test_control_is_of_starts_from_dense_networks(name: str) -> None:
    with pytest.raises(UsageError, match=r"--control: .* has no start from a dense network"):
        choose_studies(STUDIES[name], StudyChoice(control=True, variants=tuple(STUDIES[name].variants)))


def test_replaces_bonds_of_layers_together() -> None:
    found = choose_studies(STUDIES["lenet5"], StudyChoice(bonds=(8, 2)))[0]
    assert found.bonds == (2, 8) and {layer.bond for layer in found.layers} == {None}


def test_uses_the_training_of_the_paper() -> None:
    with pytest.raises(UsageError, match="--paper: the source of raster order gives no training"):
        choose_studies(STUDIES["harada"], StudyChoice(paper=True))
    for found in (study for study in STUDIES.values() if study.name != "harada"):
        ours = choose_studies(found, StudyChoice(paper=True))[0].training
        assert ours.note.startswith("the paper's own")
        ours.settings.check()
    vgg = choose_studies(STUDIES["vgg16"], StudyChoice(paper=True))[0].training.words()
    assert vgg.startswith("325 epochs, batch 100, sgd momentum 0.9 (Nesterov), lr 0.1 ×0.3162 every 50 epoch")
