"""One process against several on a large checkpoint, and both against what the machine could do.

    python tests/benchmarks/processes.py --gigabytes 6 [--bond 64] [--processes 2] [--scratch DIR]

``make_checkpoint.py`` writes a llama's bfloat16 shards; ``mpoc compress`` runs on them as one process of one
thread, as one with as many threads as there will be processes, and under torchrun with several processes of
one thread, whose memory (RssAnon of each) is read every 20 ms.  Before each run the kernel is told to forget
the shards.  The outputs with one thread a process must be the same byte for byte.

Stages are told from what mpoc prints: until the first layer's fit begins, until the last one is fitted, and
until the end.  So is how far the time left, as told, was from what was left to the last layer: the worst line
after a tenth of that time and before the last tenth.

The floor is the longer of two: all bytes read once and written once at the disk's speed (1 GB, flushed, and
read after the kernel was told to forget it), and a range finder of four products of each matrix with D
columns at the speed of such products (float32, one thread for each process).  Linux only.
"""

import argparse
import filecmp
import os
import re
import subprocess
import sys
import tempfile
import threading
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

    name: str
    processes: int
    threads: int  # of each
    lines: list[tuple[float, str]]  # what it printed, and when
    seconds: float
    peaks: list[int]  # bytes, of each process

    @property
    def fitted(self) -> list[tuple[float, str]]:
        """When each layer was."""
        return [(at, line) for at, line in self.lines if re.match(r"\[\d+/\d+\] ", line)]

    @property
    def stages(self) -> tuple[float, float, float]:
        """Seconds of start and plan, of the fits, and of writing the output."""
        (first, line), (last, _) = self.fitted[0], self.fitted[-1]
        begun = first - float(re.findall(r"([\d.]+) s\b", line)[-1])
        return begun, last - begun, self.seconds - last

    @property
    def worst_told(self) -> float:
        """Of the time left: |told − real| / real, at most."""
        begun, fits, _ = self.stages
        found = [0.0]
        for at, line in self.fitted:
            left = begun + fits - at
            told = re.search(r"\(([\d:]+) left\)", line)
            if told and left > fits / 10 and left < fits * 9 / 10:
                found.append(abs(seconds_of(told[1]) - left) / left)
        return max(found)


def seconds_of(clock: str) -> float:
    """``1:02:05`` → 3725."""
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return total


def descendants(pid: int) -> list[int]:
    """Process numbers below ``pid``, and itself."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(one for child in children for one in descendants(int(child)))]


def forget(folder: Path) -> None:
    """Its files are read from disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compress(model: Path, output: Path, bond: int, processes: int, threads: int) -> Run:
    """Run mpoc; a failure ends the benchmark with what it said."""
    arguments = ["compress", str(model), "-o", str(output), "--bond", str(bond), "--device", "cpu"]
    command = mpoc_command(*arguments)
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(processes), "-m", "mpoc", *arguments]
    forget(model)
    peaks: dict[int, int] = {}
    lines: list[tuple[float, str]] = []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )

    def listen() -> None:
        assert process.stderr is not None
        lines.extend((time.perf_counter() - start, line) for line in process.stderr)

    listener = threading.Thread(target=listen)
    listener.start()
    while process.poll() is None:
        for pid in descendants(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), memory_status(pid).get("RssAnon", 0))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    listener.join()
    if process.returncode:
        raise SystemExit("".join(line for _, line in lines))
    name = f"{processes} × {threads} thread{'s' if threads > 1 else ''}"
    return Run(name, processes, threads, lines, seconds, sorted(peaks.values())[-processes:])


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


def table(runs: Sequence[Run], nbytes: int, written: int, floors: tuple[float, float]) -> str:
    """A row a run; the floor of products is shared by processes and threads."""
    rows = []
    for run in runs:
        start, fits, end = run.stages
        floor = max(floors[0], floors[1] / (run.processes * run.threads))
        rows.append(
            [
                run.name,
                f"{run.seconds:.1f}",
                f"{start:.1f}",
                f"{fits:.1f}",
                f"{nbytes / fits / 1e9:.3f}",
                f"{end:.1f}",
                f"{written / end / 1e9:.3f}",
                f"{runs[0].seconds / run.seconds:.2f}",
                " ".join(f"{peak / MB:.0f}" for peak in run.peaks),
                f"{run.seconds / floor:.1f}",
                f"{100 * run.worst_told:.0f} %",
            ]
        )
    header = "processes,s,start s,read and fit s,GB/s,write s,GB/s,speed-up,peak MB of each,times the floor"
    return markdown_table([*header.split(","), "time left, off by"], rows)


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
        nbytes, count = size(model), arguments.processes
        written, read = disk_speed(folder)
        speed = product_speed(arguments.bond)
        kinds = ((1, 1), (1, count), (count, 1))
        runs = [compress(model, folder / f"out-{k}", arguments.bond, *kind) for k, kind in enumerate(kinds)]
        if not same_files(folder / "out-0", folder / "out-2"):
            raise SystemExit("error: the outputs differ")
        output = size(folder / "out-0")
        floors = nbytes / read + output / written, PRODUCTS * nbytes * arguments.bond / speed
        disk = f"the disk reads {read / 1e9:.2f} GB/s and writes {written / 1e9:.2f}"
        products = f"products with {arguments.bond} columns: {speed / 1e9:.0f} Gflop/s a thread"
        print(f"{nbytes / 1e9:.2f} GB, the output {output / 1e9:.2f} GB; {disk}; {products};")
        print(f"floors: {floors[0]:.1f} s of bytes, {floors[1]:.1f} s of products by one thread\n")
        print(table(runs, nbytes, output, floors))


if __name__ == "__main__":
    main()
