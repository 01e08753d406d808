"""Measure how the time of mpoc grows with the number of tensors in a file.

    python tests/benchmarks/many_tensors.py [COUNT ...]

Each file holds COUNT vectors of 8 entries and one 64×64 weight. ``mpoc compress`` (from .safetensors, from
.pt and from ten shards), ``mpoc report``, ``mpoc expand`` and ``mpoc.load`` run as processes of
their own. The CPU seconds of each are printed beyond those of a file with ten vectors, which are start-up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmarking import markdown_table, mpoc_command
from safetensors.torch import save_file

LOAD = """if True:
    import sys, torch, mpoc
    from torch import nn
    net = nn.Module()
    net.fc = nn.Linear(64, 64, bias=False)
    net.m = nn.ParameterList(nn.Parameter(torch.zeros(8)) for _ in range(int(sys.argv[2])))
    mpoc.load(sys.argv[1], net)
"""


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of one process; ends the benchmark if it fails."""
    before = os.times()
    result = subprocess.run(command, capture_output=True, text=True)
    after = os.times()
    if result.returncode != 0:
        raise SystemExit(f"error: `{' '.join(command)}` exited with {result.returncode}\n{result.stderr}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def times(folder: Path, count: int) -> dict[str, float]:
    """CPU seconds of each command on a file with ``count`` vectors."""
    torch.manual_seed(0)
    state = {f"m.{k}": torch.randn(8) for k in range(count)} | {"fc.weight": torch.randn(64, 64)}
    single, pickled, shards = folder / "m.safetensors", folder / "m.pt", folder / "shards"
    save_file(state, single)
    torch.save(state, pickled)
    shards.mkdir()
    weight_map = {name: f"model-{1 + k % 10:05d}-of-00010.safetensors" for k, name in enumerate(state)}
    for file in dict.fromkeys(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    output = folder / "o.safetensors"
    bond = ("--bond", "4", "-o")
    return {
        "compress": cpu_seconds(mpoc_command("compress", single, *bond, output)),
        "compress .pt": cpu_seconds(mpoc_command("compress", pickled, *bond, folder / "p.safetensors")),
        "compress, 10 shards": cpu_seconds(mpoc_command("compress", shards, *bond, folder / "d")),
        "report": cpu_seconds(mpoc_command("report", output)),
        "expand": cpu_seconds(mpoc_command("expand", output, "-o", folder / "e.safetensors")),
        "mpoc.load": cpu_seconds([sys.executable, "-c", LOAD, str(output), str(count)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("counts", type=int, nargs="*", default=[1000, 4000, 20000])
    counts = [10, *parser.parse_args().counts]
    measured = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            measured.append(times(Path(folder), count))
    rows = [
        [
            name,
            f"{measured[0][name]:.1f}",
            *(f"{more[name] - measured[0][name]:.1f}" for more in measured[1:]),
        ]
        for name in measured[0]
    ]
    print(markdown_table(["CPU seconds", "start-up", *(f"{count:,} tensors" for count in counts[1:])], rows))


if __name__ == "__main__":
    main()
