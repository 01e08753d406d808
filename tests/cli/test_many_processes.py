"""torchrun, and going on after a kill: the same bytes as one process that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.compression.calibrate.blocks import Case
from tests.support.checkpoints import contents, save_directory
from tests.support.process import Mpoc, environment

LAYERS = 10


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    sides = [(256 + 32 * (k % 3), 256) for k in range(LAYERS)]
    state = {f"layers.{k}.weight": torch.randn(side, generator=generator) for k, side in enumerate(sides)}
    return save_directory(tmp_path / "m", state, config={"model_type": "test"})


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "mpoc", *map(str, arguments)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_two_processes_write_the_bytes_of_one(run: Mpoc, model: Path) -> None:
    options = ["--bond", 8, "--max-shard-size", "30kB", "--device", "cpu"]
    alone = run("compress", model, *options, "-o", "one")
    assert alone.returncode == 0, alone.stderr
    done = torchrun(run.folder, "compress", model, *options, "-o", "two", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == LAYERS  # said once
    assert done.stderr.count("wrote two") == 1
    assert contents(run.folder / "two") == contents(run.folder / "one")
    assert sorted(path.name for path in run.folder.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("convolutions", ["--ratio", 0.5, "--form", "mpo"]),
        ("blocks", ["--ratio", 0.5, "--refine", "--moments", "m"]),
        ("blocks", ["--bond", 2, "--resume"]),
    ],
)
def test_two_processes_calibrate_like_one(
    run: Mpoc, tmp_path: Path, network: str, options: list[object]
) -> None:
    case = Case(tmp_path, network)
    words = ["compress", tmp_path / "m.pt", "--arch", case.arch, "--device", "cpu", *options]
    words += ["--calibrate", tmp_path / "data.npz", "--calibration-samples", 40]
    alone = run(*words, "-o", "one.safetensors")
    assert alone.returncode == 0, alone.stderr
    (run.folder / "m").unlink(missing_ok=True)
    done = torchrun(run.folder, *words, "-o", "two.safetensors")
    assert done.returncode == 0, done.stderr
    one, two = (run.folder / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert done.stderr.count("wrote two.safetensors") == 1


def test_error_while_two_processes_calibrate_is_reported_once(run: Mpoc, tmp_path: Path) -> None:
    case = Case(tmp_path, "blocks")
    state = case.network.state_dict()
    state["1.down.weight"][3, 4] = float("inf")
    torch.save(state, tmp_path / "m.pt")
    words = ["compress", tmp_path / "m.pt", "--arch", case.arch, "--ratio", 0.5, "--device", "cpu"]
    done = torchrun(run.folder, *words, "--calibrate", tmp_path / "data.npz")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "are not finite on these data" in done.stderr
    assert list(run.folder.iterdir()) == []


def test_error_in_one_process_ends_both(run: Mpoc, model: Path) -> None:
    state = {f"layers.{k}.weight": torch.randn(64, 64) for k in range(4)}
    state["layers.3.weight"][0, 0] = float("nan")
    bad = save_directory(model.parent / "bad", state, config={"model_type": "test"})
    done = torchrun(run.folder, "compress", bad, "--bond", 2, "--device", "cpu")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "tensor 'layers.3.weight' holds NaN" in done.stderr
    assert list(run.folder.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_resume_after_a_kill_gives_the_same_bytes(run: Mpoc, model: Path, signum: signal.Signals) -> None:
    options = ["--max-error", 0.9, "--device", "cpu"]
    assert run("compress", model, *options, "-o", "whole").returncode == 0
    process = run.start("compress", model, *options, "-o", "out", "--resume")
    assert process.stderr is not None
    assert any("[3/10]" in line for line in process.stderr)  # read up to there
    process.send_signal(signum)
    _, err = process.communicate(timeout=100)
    assert process.returncode in (-signal.SIGKILL, 130)
    if signum == signal.SIGINT:
        assert (
            "error: interrupted\nnote: out is not written\nnote: finished layers are in out.partial;" in err
        )
    assert not (run.folder / "out").exists()
    again = run("compress", model, *options, "-o", "out", "--resume")
    assert again.returncode == 0, again.stderr
    assert "[1/10]" not in again.stderr  # what was finished is not done again
    assert contents(run.folder / "out") == contents(run.folder / "whole")
    assert sorted(path.name for path in run.folder.iterdir()) == ["out", "whole"]


def test_resume_ignores_layers_of_another_goal(run: Mpoc, model: Path) -> None:
    process = run.start("compress", model, "--bond", 8, "-o", "out", "--resume", "--device", "cpu")
    assert process.stderr is not None
    for _ in range(6):
        process.stderr.readline()
    process.kill()
    process.communicate(timeout=100)
    options = ["--bond", 5, "--device", "cpu"]
    assert run("compress", model, *options, "-o", "out", "--resume", "--force").returncode == 0
    assert run("compress", model, *options, "-o", "whole").returncode == 0
    assert contents(run.folder / "out") == contents(run.folder / "whole")
