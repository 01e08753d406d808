"""Shells complete commands and options, through the scripts that ``--show-completion`` prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.examples import COMMANDS
from tests.support.marks import slow_except
from tests.support.process import environment

SHELLS = ("bash", "zsh", "fish")
# typer finds the shell by the process above; this lets it be named.
NAMED = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder, with ``mpoc`` in its bin/."""
    command = tmp_path / "bin" / "mpoc"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom mpoc.cli.app import main\nmain()\n")
    command.chmod(0o755)
    return tmp_path


def said(home: Path, *words: str, **more: str) -> str:
    """Standard output of a command that runs with ``home``."""
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    own = {"HOME": str(home), "PATH": path}
    done = subprocess.run(
        words, env=environment() | own | more, capture_output=True, encoding="utf-8", timeout=300
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_show_completion_prints_the_script(home: Path, shell: str) -> None:
    script = said(home, "mpoc", "--show-completion", shell, **NAMED)
    assert f"_MPOC_COMPLETE=complete_{shell}" in script
    first = {"bash": "complete -o default -F _mpoc_completion mpoc", "zsh": "#compdef mpoc"}
    assert first.get(shell, "complete --command mpoc") in script


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_install_completion_writes_the_script(home: Path, shell: str) -> None:
    assert f"{shell} completion installed in" in said(home, "mpoc", "--install-completion", shell, **NAMED)
    written = [file for file in home.rglob("*") if file.is_file() and file.parent.name != "bin"]
    assert any("_MPOC_COMPLETE" in file.read_text() for file in written)


@pytest.mark.slow
@pytest.mark.parametrize("shell", slow_except(SHELLS, "bash"))
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mpoc re", {name for name in COMMANDS if name and name.startswith("re")}),
        ("mpoc report --c", {"--csv"}),
    ],
)
def test_completes_commands_and_options(home: Path, shell: str, line: str, expected: set[str]) -> None:
    values = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_ARGS": line}
    values |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_MPOC_COMPLETE": f"complete_{shell}"}
    found = said(home, "mpoc", **values)
    assert len(expected) > 0
    assert {word for word in expected if word in found} == expected
    assert "finetune" not in found
    assert "--verbose" not in found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_script_completes_commands(home: Path) -> None:
    script = said(home, "bash", "-c", "mpoc --show-completion; true")
    (home / "script.sh").write_text(script)
    ask = "source script.sh; COMP_WORDS=(mpoc doc); COMP_CWORD=1; _mpoc_completion mpoc; echo ${COMPREPLY[@]}"
    assert said(home, "bash", "-c", f"cd '{home}'; {ask}").split() == ["doctor"]
