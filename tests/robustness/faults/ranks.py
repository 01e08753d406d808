"""One of two processes of a torchrun dies, or is asked to stop; both are real processes here, not forks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.robustness.faults.child import Ended
from tests.robustness.faults.judge import Before, Finding
from tests.support.checkpoints import save_directory
from tests.support.process import environment

_LONGEST = 120  # seconds


def strike_a_rank(signum: signal.Signals, rank: int, late: bool) -> tuple[Ended, list[Finding]]:
    """``mpoc compress`` by two processes, of which one gets a signal, at the first or at the fifth layer."""
    with TemporaryDirectory(prefix="mpoc-faults-") as holder:
        folder = Path(holder)
        state = {f"layers.{k}.weight": torch.randn(512, 512) for k in range(12)}
        save_directory(folder / "m", state, config={"model_type": "test"})
        before = Before.of(folder, "out", {})
        ended = _torchrun(folder, signum, rank, 5 if late else 1)
        return ended, [*_judge(before, folder, ended, signum)]


def _torchrun(folder: Path, signum: signal.Signals, rank: int, layers: int) -> Ended:
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mpoc",
    ]
    words = ["compress", "m", "--max-error", "0.9", "--device", "cpu", "-o", "out"]
    with subprocess.Popen(
        [*program, *words], cwd=folder, env=environment(), stdout=-1, stderr=-1, text=True
    ) as process:
        assert process.stderr is not None
        said: list[str] = []
        while len([line for line in said if line.startswith("[")]) < layers:
            line = process.stderr.readline()
            assert line, "".join(said)
            said.append(line)
        os.kill(_workers(process.pid)[rank], signum)
        struck = time.monotonic()
        try:
            out, err = process.communicate(timeout=_LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        hung = time.monotonic() - struck > _LONGEST
    return Ended(process.returncode, out, "".join(said) + err, hung, struck="layer", begun=True)


def _workers(parent: int) -> list[int]:
    """By rank."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
        if rank:
            found[int(rank[1])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def _judge(before: Before, folder: Path, ended: Ended, signum: signal.Signals) -> Iterator[Finding]:
    """torchrun has words of its own; of ours there is at most one message, and none of a crash."""
    if ended.hung:
        yield Finding("hang", f"{_LONGEST} s after the signal it had not ended")
    ours = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if ended.status == 0 or len(ours) > 1 or _crashed(ended.err):
        yield Finding("words", f"status {ended.status}, {len(ours)} messages\n{ended.err}")
    killed = signum == signal.SIGKILL
    yield from before.judge_files(folder, ended, lambda name: killed and name.endswith(".partial"))


def _crashed(err: str) -> bool:
    """Whether mpoc's own frames are in a traceback."""
    return "mpoc/" in err and "Traceback" in err
