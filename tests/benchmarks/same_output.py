"""Whether two states of the code write the same: files, manifests, JSON reports and HTML pages.

    python tests/benchmarks/same_output.py collect DIR --data DATA --minilm MODEL   # in either checkout
    python tests/benchmarks/same_output.py compare BEFORE AFTER [--wording]

``collect`` compresses the demo's network, ResNet-20 and all-MiniLM-L6-v2 in many ways with the mpoc of the
current checkout, on two threads, and keeps what each command writes and prints. ``compare`` names every
file that differs; JSON is compared without seconds. With ``--wording`` the tensors must still agree to the
byte, but the manifest's and the report's ``tool``, ``reason``, ``left_alone``, notes and, with them, the
size of the file may differ, and HTML is not compared: what a change of the wording alone may change.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarking import require_file

import mpoc
from mpoc.demo.data import write_digits

WORDING = frozenset({"tool", "reason", "left_alone", "notes", "version", "bytes_after"})
CALIBRATED = ("--ratio", "0.5", "--calibration-samples")
RESNET = ("--arch", "resnet:depth=20")


def cases(data: Path, minilm: Path) -> dict[str, tuple[Path, list[str]]]:
    """The checkpoint and the options of ``mpoc compress`` by the name of the case."""
    resnet = require_file(data / "checkpoints/resnet20-12fca82f.th", "ResNet-20")
    images, texts = str(data / "cifar10"), str(data / "text/docstrings-calibration.jsonl")
    demo = Path(mpoc.__file__).parent / "demo/digits-cnn.safetensors"
    arch = ["--arch", "mpoc.demo.network:DigitsNet"]
    return {
        "demo": (demo, ["--bond", "8"]),
        "demo-error": (demo, ["--max-error", "0.6"]),
        "demo-calibrated": (demo, [*arch, *CALIBRATED, "128", "--calibrate", "digits.npz"]),
        "resnet20": (resnet, ["--bond", "8"]),
        "resnet20-calibrated": (resnet, [*RESNET, *CALIBRATED, "32", "--calibrate", images]),
        "resnet20-map": (resnet, [*RESNET, "--bond", "4", "--conv", "map", "--layers", "layer3*"]),
        "resnet20-mera": (resnet, ["--bond", "4", "--form", "mera", "--layers", "layer3.[01]*"]),
        "resnet20-tree": (resnet, ["--bond", "8", "--form", "tree"]),
        "resnet20-svd": (resnet, ["--ratio", "0.3", "--form", "svd"]),
        "minilm": (minilm, ["--ratio", "0.5"]),
        "minilm-calibrated": (minilm, [*CALIBRATED, "32", "--form", "svd", "--calibrate", texts]),
    }


def run(folder: Path, name: str, *arguments: str | Path) -> None:
    """Run mpoc in ``folder`` and keep what it prints; SystemExit with its messages where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "COLUMNS": "100"}
    command = [sys.executable, "-m", "mpoc", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stderr}")
    (folder / name).write_text(done.stdout, encoding="utf-8")


def collect(root: Path, data: Path, minilm: Path, only: list[str]) -> None:
    """Run every case into a folder of its own."""
    for name, (model, options) in cases(data, minilm).items():
        folder = root / name
        if (only and name not in only) or folder.exists():
            continue
        folder.mkdir(parents=True)
        write_digits(folder / "digits.npz")
        output = "out" if model.is_dir() else "out.safetensors"
        started = time.perf_counter()
        run(folder, "compress.json", "compress", model, "-o", output, *options, "--json")
        run(folder, "report.json", "report", output, "--json")
        run(folder, "report.html", "report", output, "--html", "-")
        run(folder, "report.txt", "report", output, "--verbose")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def without(value: Any, names: frozenset[str]) -> Any:
    """JSON data with the fields of these names, and every field of seconds, left out at any depth."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in names and "seconds" not in key}
        return {key: without(item, names) for key, item in kept.items()}
    return [without(item, names) for item in value] if isinstance(value, list) else value


def digest(path: Path, wording: bool) -> str:
    """What must stay the same of one file; "" where nothing must."""
    names = WORDING if wording else frozenset()
    if path.suffix == ".json":
        return json.dumps(without(json.loads(path.read_bytes()), names), sort_keys=True)
    if wording and path.suffix in (".html", ".md", ".txt"):
        return ""
    if wording and path.suffix == ".safetensors":
        return tensors_and_manifest(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors_and_manifest(path: Path) -> str:
    """The tensors' bytes and places, and the header's metadata without its wording."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        rest = hashlib.sha256(file.read()).hexdigest()
    metadata = header.pop("__metadata__", {})
    found = {key: without(json.loads(text), WORDING) for key, text in metadata.items() if text[:1] == "{"}
    return json.dumps([header, rest, found], sort_keys=True)


def compare(before: Path, after: Path, wording: bool) -> int:
    """Print every difference; the number of them."""
    files = [{p.relative_to(root) for p in root.rglob("*") if p.is_file()} for root in (before, after)]
    different = [f"only on one side: {path}" for path in sorted(files[0] ^ files[1])]
    for path in sorted(files[0] & files[1]):
        if digest(before / path, wording) != digest(after / path, wording):
            different.append(f"differs: {path}")
    print(*different, f"{len(files[0] & files[1])} files compared, {len(different)} differences", sep="\n")
    return len(different)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("folder", type=Path)
    collecting.add_argument("--data", type=Path, required=True)
    collecting.add_argument("--minilm", type=Path, required=True)
    collecting.add_argument("--only", nargs="*", default=[], help="names of cases")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--wording", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "compare":
        raise SystemExit(bool(compare(arguments.before, arguments.after, arguments.wording)))
    folders = [arguments.folder.resolve(), arguments.data.resolve(), arguments.minilm.resolve()]
    collect(folders[0], folders[1], folders[2], arguments.only)


if __name__ == "__main__":
    main()
