"""Any options together: exit status 0, 1 or 2, one message where it is not 0, and never a traceback."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.cli.app import app
from mpoc.cli.compress import compress
from mpoc.cli.expand import expand
from mpoc.cli.finetune import finetune
from mpoc.cli.report import report
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.support.examples import COMMANDS

NET = """
from torch import nn
def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
"""
FUNCTIONS = {"compress": compress, "expand": expand, "finetune": finetune, "report": report}
PATHS = [
    "m.pt",
    "c.safetensors",
    "data.npz",
    "net.py",
    "recipe.toml",
    "nowhere",
    ".",
    "folder",
    "",
    "a\nb",
    "é",
]
TEXTS = [
    "",
    " ",
    "0",
    "2",
    "auto",
    "mpo",
    "svd",
    "map",
    "8x8",
    "0=4x3:4x4",
    "re:[",
    "*",
    "2",
    "20kB",
    "x" * 5000,
]
TEXTS += [
    "float16",
    "cpu",
    "sgd",
    "adamw",
    "cosine",
    "classification",
    "\x1b[2J",
    "[bold]",
    "--bond",
    "1e400",
    "¼",
]
NUMBERS = ["-1", "0", "1", "2", "0.5", "0.9", "nan", "inf", "1e308", "-0.0", "x", "9" * 5000]
LARGE = ["7", "1000000000000", "9223372036854775807", "-9223372036854775809", "9" * 30]
# What a training may do most of; and where code is looked for.
SMALL = {
    "epochs": ["0", "1", "-1"],
    "steps": ["0", "1", "2"],
    "batch": ["0", "1", "7"],
    "runs": ["0", "1", "2"],
}
SMALL |= {
    "arch": ["net.py:mlp", "net.py:nothing", "nowhere.py:mlp", "fc2", "lenet5:x", "resnet:depth=21", ""]
}
SMALL |= {"teacher_arch": ["net.py:mlp"], "output": ["out.safetensors", "out", ".", "m.pt", "no/where"]}
SMALL |= {"accumulate": ["0", "1", "2"], "calibration_samples": ["0", "1", "8"], "plot": ["p.png", "p.x"]}
SMALL |= {"moments": ["moments"], "log": ["log.jsonl"], "device": ["cpu", "auto", "abacus"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    state = {"0.weight": torch.randn(16, 12), "0.bias": torch.zeros(16)}
    state |= {"2.weight": torch.randn(4, 16), "2.bias": torch.zeros(4)}
    torch.save(state, folder / "m.pt")
    (folder / "net.py").write_text(NET)
    (folder / "recipe.toml").write_text("bond = 2\n")
    (folder / "folder").mkdir()
    generator = np.random.default_rng(0)
    inputs, labels = generator.normal(size=(20, 12)).astype("f4"), generator.integers(0, 4, 20)
    np.savez(folder / "data.npz", inputs=inputs, labels=labels)
    recipe = make_recipe(None, {"bond": 2, "allow_growth": True})
    compress_checkpoint(folder / "m.pt", folder / "c.safetensors", recipe, arch=f"{folder / 'net.py'}:mlp")
    return folder


@st.composite
def command_lines(draw: st.DrawFn, name: str) -> list[str]:
    """Some options of a command, most with values of their type."""
    params = COMMANDS[name].params
    options = [param for param in params if param.opts[0].startswith("--") and param.name != "help"]
    words = [name, draw(st.sampled_from(["c.safetensors", "m.pt", *PATHS]))]
    for param in draw(st.lists(st.sampled_from(options), max_size=4, unique_by=lambda param: param.name)):
        words.append(draw(st.sampled_from([*param.opts, *param.secondary_opts])))
        if not param.is_flag:
            words.append(draw(st.sampled_from(values_for(param, name))))
    return words


def values_for(param: Any, command: str) -> list[str]:
    if param.name in SMALL:
        return SMALL[param.name]
    hint = str(get_type_hints(FUNCTIONS[command])[param.name])
    if "int" in hint or "float" in hint:
        return NUMBERS + (LARGE if command in ("compress", "expand") else [])
    if "Path" in hint:
        return PATHS
    return TEXTS + NUMBERS


def end_of(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            app(words)
        except SystemExit as stop:
            assert stop.code is None or isinstance(stop.code, int)
            return stop.code or 0, stderr.getvalue()
    return 0, stderr.getvalue()


def check(words: list[str], folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("m.pt", "c.safetensors", "data.npz", "net.py")}
    status, said = end_of(words, folder)
    assert status in (0, 1, 2), said
    if status:
        assert "rror" in said and "Traceback" not in said
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob("*.partial*")) + list(folder.glob(".*.partial*"))


GOALS = [["--bond", "2"], ["--ratio", "0.9"], ["--max-error", "0.5"], ["--size", "20kB"], []]


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(words=command_lines("compress"), goal=st.sampled_from(GOALS), dry=st.booleans())
def test_random_compress_options_exit_cleanly(
    folder: Path, words: list[str], goal: list[str], dry: bool
) -> None:
    more = ["--dry-run"] if dry else ["--force"]
    check([*words, *goal, *more], folder)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(words=st.sampled_from(["report", "expand"]).flatmap(command_lines))
def test_random_report_and_expand_options_exit_cleanly(folder: Path, words: list[str]) -> None:
    check([*words, *(["--force"] if words[0] == "expand" else [])], folder)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(words=command_lines("finetune"))
def test_random_finetune_options_exit_cleanly(folder: Path, words: list[str]) -> None:
    more = ["--force", "--arch", "net.py:mlp"]
    more += [] if "--data" in words else ["--data", "data.npz"]
    more += [] if "--steps" in words or "--epochs" in words else ["--steps", "1"]
    check([*words, *more], folder)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--lr", "1e30", "--optimizer", "sgd"], 1, "the loss is nan at step 2"),
        (
            ["--lr", "1e30", "--optimizer", "adamw", "--weight-decay", "1e30", "--steps", "1"],
            1,
            "is not finite after the training",
        ),
        (["--l2", "1e308"], 2, "--l2 1e+308: must be finite and at least 0"),
        (["--batch", "9" * 400], 2, "--batch 999"),
        (["--image-size", "9" * 5000], 2, "--image-size: '999"),
        (["--checkpoint-every", "9" * 5000], 2, "--checkpoint-every: '999"),
    ],
)
def test_reports_overflowing_option_values(folder: Path, options: list[str], status: int, said: str) -> None:
    words = ["finetune", "c.safetensors", "--force", "--arch", "net.py:mlp", "--data", "data.npz"]
    done = end_of([*words, "--steps", "3", "--device", "cpu", *options], folder)
    assert done[0] == status and said in done[1], done
