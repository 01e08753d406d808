"""``mpoc guide``, and that every command and Python example of README and guide works."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mpoc.cli.guide import TOPICS, guide, read_page, summary
from mpoc.train.settings import Settings
from tests.support.examples import COMMANDS, PAGES, ROOT, blocks
from tests.support.process import Here, run_python

GUIDE = ROOT / "mpoc" / "guide"


def name_of(page: Path) -> str:
    return page.stem


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which ``mpoc demo`` was run, with a short training."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("mpoc.cli.demo.SETTINGS", Settings(epochs=1.0, lr=0.01))
        assert Here(folder)("demo").returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_of_a_page_work(page: Path, demo: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, in a folder that holds what the demo wrote."""
    monkeypatch.setattr("mpoc.cli.demo.SETTINGS", Settings(epochs=1.0, lr=0.01))
    examples = [block for block in blocks(page) if not block.needs_data]
    if not any(command == ["demo"] for block in examples for command in block.commands):
        shutil.copytree(demo / "mpoc-demo", here.folder / "mpoc-demo")
    for block in examples:
        if block.language == "toml":
            (here.folder / "recipe.toml").write_text(block.text)
        if block.language == "python":
            exec(compile(block.text, f"{page.name}: {block.text}", "exec"), {"__name__": "example"})
        for command in block.commands:
            result = here(*command)
            assert result.returncode == 0, f"{page.name}: mpoc {' '.join(command)}\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path) -> None:
    """Also those that need data: the options exist and take such values."""
    for block in blocks(page):
        for name, *arguments in block.commands:
            assert name in COMMANDS
            COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles}


def test_topics_are_the_pages() -> None:
    assert sorted(TOPICS) == sorted(path.stem for path in GUIDE.iterdir())


@pytest.mark.parametrize("topic", TOPICS)
def test_a_page_has_a_title_and_a_summary(topic: str) -> None:
    page = read_page(topic)
    assert page.startswith("# ")
    assert 20 < len(summary(page)) <= 120
    lines = "".join(re.findall(r"```\w+\n(.*?)```", page, re.DOTALL)).splitlines()
    assert [line for line in lines if len(line) > 96] == []  # they would wrap in a terminal


def test_the_readme_is_short() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 250
    assert len(readme.encode()) <= 16_000
    first_screen = readme[: readme.index("\n## ")]
    for command in ("pip install '.[train]' && mpoc demo", "pip install -e '.[test]' && pytest"):
        assert command in first_screen
    for topic in TOPICS:
        assert f"mpoc/guide/{topic}.md" in readme


def test_lists_the_topics(here: Here) -> None:
    lines = here("guide").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(TOPICS)
    assert "How far to compress" in lines[1]


@pytest.mark.parametrize("topic", TOPICS)
def test_a_pipe_gets_the_page_itself(here: Here, topic: str) -> None:
    assert here("guide", topic).stdout == (GUIDE / f"{topic}.md").read_text("utf-8")


@pytest.mark.parametrize("topic", TOPICS)
def test_a_terminal_gets_the_page_rendered(
    topic: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    guide(topic=topic)
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert read_page(topic).splitlines()[0].removeprefix("# ") in text
    assert "](" not in text
    assert "needs data" not in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(("typed", "meant"), [("calibraton", "calibration"), ("papers", "the-papers")])
def test_suggests_a_near_miss(here: Here, typed: str, meant: str) -> None:
    result = here("guide", typed)
    assert result.returncode == 2
    assert f"did you mean {meant!r}?" in result.stderr


def test_starts_without_torch() -> None:
    code = f"import sys; sys.argv = ['mpoc', 'guide', {TOPICS[0]!r}]; from mpoc.cli.app import app"
    run_python("-c", f"{code}\ntry: app()\nexcept SystemExit: assert 'torch' not in sys.modules")
