"""``mpoc report --html``, ``--plot`` and ``--compare``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.reporting.files import compressed, one_layer
from tests.support.process import Here, Mpoc


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_layer(tmp_path_factory.mktemp("file"))


def test_html_writes_only_the_page(run: Mpoc, path: Path) -> None:
    done = run("report", path, "--html", "r.html")
    assert (done.returncode, done.stderr) == (0, "wrote r.html\n")
    assert [file.name for file in run.folder.iterdir()] == ["r.html"]
    text = (run.folder / "r.html").read_text("utf-8")
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")


@pytest.mark.slow
def test_html_does_not_change_the_table(path: Path, here: Here) -> None:
    for option in ([], ["--json"], ["--csv"], ["--verbose"]):
        table = here("report", path, *option)
        drawn = here("report", path, *option, "--html", f"r{''.join(option)}.html")
        assert (drawn.returncode, drawn.stdout) == (0, table.stdout)
        assert table.stderr == "" and len(table.stdout) > 100


def test_html_to_stdout_is_the_same_page(run: Mpoc, path: Path) -> None:
    assert run("report", path, "--html", "r.html", "--compare", path).returncode == 0
    done = run("report", path, "--html", "-", "--compare", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (run.folder / "r.html").read_text("utf-8")
    assert [file.name for file in run.folder.iterdir()] == ["r.html"]


def test_existing_page_requires_force(path: Path, here: Here) -> None:
    (here.folder / "r.html").write_text("mine")
    refused = here("report", path, "--html", "r.html")
    assert refused.returncode == 2 and "error: r.html: exists already" in refused.stderr
    assert (here.folder / "r.html").read_text() == "mine"
    assert here("report", path, "--html", "r.html", "--force").returncode == 0
    assert (here.folder / "r.html").read_text("utf-8") != "mine"


def test_compares_several_files(path: Path, here: Here, tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(32, 32)}
    others = [compressed(tmp_path / name, state, bond=2) for name in ("a", "b")]
    assert here("report", path, "--compare", *others, "--html", "r.html").returncode == 0
    apart = ("--compare", others[0], "--compare", others[1])
    assert here("report", path, *apart, "--html", "s.html").returncode == 0
    text = (here.folder / "r.html").read_text("utf-8")
    assert "3 files compared" in text
    assert text == (here.folder / "s.html").read_text("utf-8")


@pytest.mark.slow
def test_plot_writes_figures(path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    done = here("report", path, "--plot", "figures")
    assert done.returncode == 0, done.stderr
    assert "wrote 6 figures into figures" in done.stderr
    assert (here.folder / "figures" / "layers.svg").is_file()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = here("report", path, "--plot", "others")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "error: --plot needs matplotlib\nhint: pip install 'mpoc[plot]'" in missing.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["{path}", "{path}"], 2, "a report shows one file"),
        (["{path}", "--compare", "{path}"], 2, "requires a page or figures"),
        (["{path}", "--force"], 2, "requires a page or figures"),
        (["{path}", "--html", "-", "--csv"], 2, "--csv and --html - exclude each other"),
        (["{path}", "--plot", "-"], 2, "--plot -: figures need a directory"),
        (["{path}", "--html", "no/r.html"], 1, "there is no directory"),
        (["{path}", "--html", "{path}", "--force"], 2, "would write over or into the input"),
        (["{path}", "--html", "r.html", "--compare", "none"], 2, "none: no such file or directory"),
        (["{cut}", "--html", "r.html"], 1, "truncated"),
    ],
)
def test_reports_errors_in_one_line(
    path: Path, here: Here, tmp_path: Path, arguments: list[str], status: int, said: str
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-40])
    done = here("report", *(one.format(path=path, cut=cut) for one in arguments))
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr and done.stderr.count("error:") == 1
    assert list(here.folder.iterdir()) == []
