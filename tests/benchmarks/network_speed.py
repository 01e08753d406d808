"""Latency of compressed networks with weights="auto" beside the dense ones, on a CPU.

    python tests/benchmarks/network_speed.py [--minilm DIR] [--networks NAME …] [--batches 1 32 512] [--cores]

Networks are compressed by their weights alone, since latency does not depend on the fit. The dense network
gets the weights that the cores make: on other numbers pooling takes up to a tenth more or less. One thread;
calls alternate in random order, and the median of the thread's CPU times is taken, so that other work on the
machine disturbs little; a copy of the dense network shows how much. ``--cores`` adds weights="cores".
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarking import markdown_table
from torch import Tensor, nn

import mpoc
from mpoc.models.zoo import make
from mpoc.nn import use_weights
from mpoc.nn.adopt import compressed_weights
from mpoc.nn.weight import build_weight


def audio() -> nn.Module:
    """A detector of speech on frames of 64 mel bands: 1-D convolutions, pooling, two linear layers."""
    convolutions: list[nn.Module] = []
    for inputs, outputs in ((64, 128), (128, 128), (128, 128)):
        convolutions += [nn.Conv1d(inputs, outputs, 5, padding=2), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(
        *convolutions, nn.AdaptiveAvgPool1d(8), nn.Flatten(), nn.Linear(1024, 128), nn.Linear(128, 2)
    )


def perceptron() -> nn.Module:
    """Linear layers of the widths that networks of the papers have."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def minilm(folder: Path) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


def images(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.rand(batch, *shape)


def tokens(vocabulary: int, length: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(vocabulary, (batch, length))


def cases(
    folder: Path | None,
) -> dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], dict[str, Any]]]:
    """Network, inputs and goal of each row, by name."""
    found: dict[str, tuple[Any, Any, dict[str, Any]]] = {}
    for depth in (20, 32):
        found[f"resnet{depth} ρ 0.5"] = (
            lambda d=depth: make(f"resnet{d}"),
            images(3, 32, 32),
            {"ratio": 0.5},
        )
    found["lenet5 ρ 0.5"] = (lambda: make("lenet5"), images(1, 28, 28), {"ratio": 0.5})
    found["audio ρ 0.5"] = (audio, images(64, 100), {"ratio": 0.5})
    for form, bond in (("mpo", 2), ("mpo", 16), ("svd", 16), ("tree", 16), ("mera", 4)):
        found[f"perceptron {form} {bond}"] = (perceptron, images(784), {"bond": bond, "form": form})
    found["picogpt ρ 0.5"] = (lambda: make("picogpt"), tokens(65, 64), {"ratio": 0.5})
    if folder is not None:
        for ratio in (0.5, 0.25):
            goal = {"ratio": ratio, "form": "svd", "layers": "encoder.*"}
            found[f"minilm svd ρ {ratio}"] = (partial(minilm, folder), tokens(30000, 32), goal)
    return found


def seconds_each(calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Median seconds of each, called in turns, whose order is drawn anew each time."""
    drawn = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    first = time.perf_counter()
    for call in calls.values():
        call()
    together = 5 if time.perf_counter() - first < 0.2 else 1
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(taken[next(iter(calls))]) < 4:
        for name, call in drawn.sample([*calls.items()], len(calls)):
            call()  # what the other left in the caches is not this one's fault
            for _ in range(together):
                start = time.thread_time()
                call()
                taken[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def megabytes(network: nn.Module) -> float:
    """Parameters, and the dense weights that layers hold."""
    held = [
        value
        for module in network.modules()
        for name, value in vars(module).items()
        if name.endswith("_held")
    ]
    return sum(tensor.nbytes for tensor in (*network.parameters(), *held)) / 1e6


def rows(arguments: argparse.Namespace) -> list[list[str]]:
    table = []
    for name, (make_network, inputs, goal) in cases(arguments.minilm).items():
        if arguments.networks and not any(name.startswith(each) for each in arguments.networks):
            continue
        torch.manual_seed(0)
        dense = make_network().eval()
        networks = {"dense": dense, "auto": copy.deepcopy(dense)}
        mpoc.compress(networks["auto"], **goal)
        with torch.no_grad():
            for weight, structure, cores in compressed_weights(networks["auto"]):
                dense.get_parameter(weight).copy_(build_weight(cores, structure))
        networks["dense again"] = copy.deepcopy(dense)
        if arguments.cores:
            networks["cores"] = copy.deepcopy(networks["auto"])
        for weights in ("auto", "cores") if arguments.cores else ("auto",):
            use_weights(networks[weights], weights)
        for batch in arguments.batches:
            x = inputs(batch)
            calls = {kind: partial(network, x) for kind, network in networks.items()}
            with torch.inference_mode():
                taken = seconds_each(calls, arguments.seconds)
            line = [name, str(batch), *(f"{1e3 * value:.3g}" for value in taken.values())]
            line += [f"{taken[kind] / taken['dense']:.3f}" for kind in ("auto", "dense again")]
            line += [f"{megabytes(networks['dense']):.2f}", f"{megabytes(networks['auto']):.2f}"]
            table.append(line)
            print(" | ".join(line), flush=True) if arguments.progress else None
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minilm", type=Path, help="a directory of all-MiniLM-L6-v2")
    parser.add_argument("--networks", nargs="+", help="rows whose names begin so")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring for each row")
    parser.add_argument("--cores", action="store_true", help='measure weights="cores" too')
    parser.add_argument("--progress", action="store_true", help="print each row as soon as it is measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cores = ["cores ms"] if arguments.cores else []
    times = ["dense ms", "auto ms", "dense again ms", *cores, "auto / dense", "again / dense"]
    header = ["network", "batch", *times, "dense MB", "auto MB"]
    print(markdown_table(header, rows(arguments)))


if __name__ == "__main__":
    main()
