"""Measure how fast mpoc compresses a large checkpoint and how much memory that takes.

    python tests/benchmarks/throughput.py --gigabytes 2 6 [--limit-mb 1200] [--scratch DIR]

For each size, ``make_checkpoint.py`` writes a sharded bfloat16 checkpoint and ``mpoc compress
--bond 64`` runs on it as a process of its own, whose /proc status is read every 20 ms:

- peak anonymous MB: the largest RssAnon, what the process allocated;
- peak VmRSS MB: the same plus file pages mapped at that moment, which the kernel may drop;
- VmHWM MB: the kernel's own high-water mark of VmRSS, which misses no peak between two readings.

If compression streams, none of them grows with the checkpoint. With ``--limit-mb`` the largest size
runs once more inside a memory cgroup of that limit (v2, else v1; needs permission to make one): the
kernel kills a process that cannot stay below. Linux only. Scratch is removed at the end.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarking import markdown_table, mpoc_command

INTERVAL = 0.02
MB = 10**6
FIELDS = ("RssAnon", "VmRSS", "VmHWM")


@dataclass(frozen=True)
class Run:
    """What one compression took."""

    name: str
    gigabytes: float
    seconds: float
    peaks: dict[str, int]  # bytes, for each of FIELDS
    exit_code: int

    def row(self) -> list[str]:
        time_columns = [f"{self.seconds:.1f}", f"{self.seconds / self.gigabytes:.1f}"]
        memory_columns = [f"{self.peaks[field] / MB:.0f}" for field in FIELDS]
        return [self.name, f"{self.gigabytes:.2f}", *time_columns, *memory_columns]


@dataclass(frozen=True)
class Cgroup:
    """A memory cgroup that a process can join."""

    directory: Path
    version: int

    def join(self) -> None:
        """Move the calling process into the group."""
        (self.directory / "cgroup.procs").write_text(str(os.getpid()))


def memory_status(pid: int) -> dict[str, int]:
    """Bytes of each of FIELDS that /proc gives for this process; empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return {field: int(values[field].split()[0]) * 1024 for field in FIELDS if field in values}


def watch(command: list[str], log: Path, cgroup: Cgroup | None) -> tuple[int, float, dict[str, int]]:
    """Run a command to its end: exit code, seconds, and the peak of each of FIELDS in bytes."""
    peaks = dict.fromkeys(FIELDS, 0)
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=cgroup.join if cgroup else None,
        )
        while process.poll() is None:
            for field, value in memory_status(process.pid).items():
                peaks[field] = max(peaks[field], value)
            time.sleep(INTERVAL)
    return process.returncode, time.perf_counter() - start, peaks


def mounts() -> dict[int, Path]:
    """Where the unified (2) and the memory (1) cgroup hierarchies are mounted."""
    found: dict[int, Path] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found[2] = Path(point)
        elif kind == "cgroup" and "memory" in options.split(","):
            found[1] = Path(point)
    return found


def make_cgroup(limit: int) -> Cgroup | None:
    """A new cgroup with this memory limit in bytes and no swap, or None after saying why not."""
    files = {  # the limit first: v1 refuses a memory+swap limit below it
        2: {"memory.max": limit, "memory.swap.max": 0},
        1: {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit},
    }
    refusals = []
    for version, mount in sorted(mounts().items(), reverse=True):
        directory = mount / f"mpoc-benchmark-{os.getpid()}"
        limits = files[version]
        made = False
        try:
            directory.mkdir()
            made = True
            if not (directory / next(iter(limits))).exists():
                raise OSError("no memory controller")
            for name, value in limits.items():
                if (directory / name).exists():  # the swap files are there only with swap support
                    (directory / name).write_text(str(value))
            return Cgroup(directory, version)
        except OSError as error:
            refusals.append(f"v{version} at {mount}: {error}")
            if made:
                directory.rmdir()
    reasons = "; ".join(refusals) or "no cgroup hierarchy is mounted"
    print(f"no memory cgroup, so no run under a limit ({reasons})", file=sys.stderr)
    return None


@contextmanager
def memory_limit(limit: int) -> Iterator[Cgroup | None]:
    """A memory cgroup for as long as the block lasts, or None where none can be made."""
    cgroup = make_cgroup(limit)
    try:
        yield cgroup
    finally:
        if cgroup:
            cgroup.directory.rmdir()


def compress(name: str, model: Path, bond: int, cgroup: Cgroup | None = None) -> Run:
    """Compress a checkpoint directory beside itself and measure; says so if that fails."""
    log = model.parent / "compress.log"
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    command = mpoc_command("compress", model, "-o", model.parent / "out", "--bond", str(bond))
    code, seconds, peaks = watch([*command, "--force"], log, cgroup)
    if code != 0:
        tail = "\n".join(log.read_text().splitlines()[-10:])
        print(f"{name}: mpoc exited with {code}\n{tail}", file=sys.stderr)
    return Run(name, size / 1e9, seconds, peaks, code)


def make_checkpoint(model: Path, gigabytes: float) -> None:
    """Write a synthetic checkpoint of about this size."""
    script = Path(__file__).with_name("make_checkpoint.py")
    command = [sys.executable, str(script), str(model), "--gigabytes", str(gigabytes)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2.0, 6.0])
    parser.add_argument("--bond", type=int, default=64)
    parser.add_argument("--limit-mb", type=int, help="run the largest once more under this limit")
    parser.add_argument("--scratch", type=Path, help="where to write (default: the system's tmp)")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("error: this benchmark reads /proc, which only Linux has")
    mpoc_command()  # ends here, before any large file is written, where mpoc is not installed

    runs: list[Run] = []
    for gigabytes in sorted(arguments.gigabytes):
        with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="mpoc-") as scratch:
            model = Path(scratch) / "model"
            make_checkpoint(model, gigabytes)
            runs.append(compress(f"{gigabytes:g} GB", model, arguments.bond))
            if arguments.limit_mb and gigabytes == max(arguments.gigabytes):
                with memory_limit(arguments.limit_mb * MB) as cgroup:
                    if cgroup:
                        name = f"{gigabytes:g} GB, cgroup v{cgroup.version} {arguments.limit_mb} MB"
                        runs.append(compress(name, model, arguments.bond, cgroup))

    header = ["checkpoint", "GB", "s", "s/GB", "peak anonymous MB", "peak VmRSS MB", "VmHWM MB"]
    rows = [[*run.row(), "done" if run.exit_code == 0 else str(run.exit_code)] for run in runs]
    print(markdown_table([*header, "exit"], rows))
    if any(run.exit_code != 0 for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
