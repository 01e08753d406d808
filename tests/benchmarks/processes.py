"""One process against several on a large checkpoint, and both against what the machine could do.

    python tests/benchmarks/processes.py --gigabytes 6 [--bond 64] [--processes 2] [--scratch DIR]

``make_checkpoint.py`` writes bfloat16 shards of 4096×11008 matrices; ``mpoc compress`` runs on them as one
process of one thread, then under torchrun with several such processes, whose memory (RssAnon of each) is read
every 20 ms.  The outputs must be the same byte for byte.

The floor is the longer of two: all bytes read once and written once at the disk's speed (1 GB, flushed, and
read after the kernel was told to forget it), and a range finder of four products of each matrix with D
columns at the speed of such products (float32, one thread for each process).  Linux only.
"""

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarking import markdown_table, mpoc_command
from throughput import INTERVAL, MB, make_checkpoint, memory_status

ROWS, COLUMNS = 4096, 11008
PRODUCTS = 4
PROBE = 10**9  # bytes


@dataclass(frozen=True)
class Run:
    """What one compression took."""

    processes: int
    seconds: float
    peaks: list[int]  # bytes, of each process


def descendants(pid: int) -> list[int]:
    """Process numbers below ``pid``, and itself."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(one for child in children for one in descendants(int(child)))]


def compress(model: Path, output: Path, bond: int, processes: int) -> Run:
    """Run mpoc; a failure ends the benchmark with what it said."""
    arguments = ["compress", str(model), "-o", str(output), "--bond", str(bond), "--device", "cpu"]
    command = mpoc_command(*arguments)
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(processes), "-m", "mpoc", *arguments]
    peaks: dict[int, int] = {}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None:
            for pid in descendants(process.pid):
                anonymous = memory_status(pid).get("RssAnon", 0)
                peaks[pid] = max(peaks.get(pid, 0), anonymous)
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read())
    return Run(processes, seconds, sorted(peaks.values())[-processes:])


def disk_speed(folder: Path) -> tuple[float, float]:
    """Bytes a second written and flushed, and read from disk."""
    data = os.urandom(PROBE // 10)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(10):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = PROBE / (time.perf_counter() - start)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(1 << 22):
            pass
        return written, PROBE / (time.perf_counter() - start)


def product_speed(bond: int) -> float:
    """Operations a second of a matrix times ``bond`` columns, on one thread."""
    torch.set_num_threads(1)
    matrix, columns = torch.randn(ROWS, COLUMNS), torch.randn(COLUMNS, bond)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ columns
        times.append(time.perf_counter() - start)
    return 2 * ROWS * COLUMNS * bond / min(times)


def same_files(one: Path, other: Path) -> bool:
    """Whether two directories hold the same files with the same bytes."""
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def size(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def table(runs: Sequence[Run], nbytes: int, floors: tuple[float, float]) -> str:
    """A row a run; the floor of products is shared by the processes."""
    rows = []
    for run in runs:
        floor = max(floors[0], floors[1] / run.processes)
        peaks = " ".join(f"{peak / MB:.0f}" for peak in run.peaks)
        speed = f"{nbytes / run.seconds / 1e9:.3f}"
        faster = f"{runs[0].seconds / run.seconds:.2f}"
        rows.append(
            [
                str(run.processes),
                f"{run.seconds:.1f}",
                speed,
                faster,
                peaks,
                f"{floor:.1f}",
                f"{run.seconds / floor:.1f}",
            ]
        )
    header = ["processes", "s", "GB/s", "speed-up", "peak MB of each", "floor s", "times the floor"]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--bond", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="where to write (default: the system's tmp)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="mpoc-") as scratch:
        folder, model = Path(scratch), Path(scratch) / "model"
        make_checkpoint(model, arguments.gigabytes)
        nbytes = size(model)
        written, read = disk_speed(folder)
        speed = product_speed(arguments.bond)
        counts = (1, arguments.processes)
        runs = [compress(model, folder / f"out-{k}", arguments.bond, k) for k in counts]
        if not same_files(folder / "out-1", folder / f"out-{arguments.processes}"):
            raise SystemExit("error: the outputs differ")
        moved = nbytes / read + size(folder / "out-1") / written
        operations = PRODUCTS * 2 * (nbytes / 2) * arguments.bond
        print(f"{nbytes / 1e9:.2f} GB; disk reads {read / 1e9:.2f} and writes {written / 1e9:.2f} GB/s;")
        print(f"products with {arguments.bond} columns: {speed / 1e9:.0f} Gflop/s on one thread\n")
        print(table(runs, nbytes, (moved, operations / speed)))


if __name__ == "__main__":
    main()
