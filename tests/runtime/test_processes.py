from __future__ import annotations

import subprocess
import sys

import pytest

from mpoc.runtime.distributed import exit_process
from tests.support.process import environment


@pytest.mark.parametrize("status", [0, 3])
def test_exit_flushes_output_and_skips_finalisation(status: int) -> None:
    code = (
        "import atexit, sys; from mpoc.runtime.distributed import exit_process, note_gloo_used;"
        "note_gloo_used();"
        f"atexit.register(print, 'late'); print('said'); sys.stderr.write('too'); exit_process({status})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "said\n", "too")


def test_exits_normally_without_gloo() -> None:
    with pytest.raises(SystemExit) as ended:
        exit_process(3)
    assert ended.value.code == 3
