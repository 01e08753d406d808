"""Calibration without data beside real data and weights alone: how much of the gap it closes.

    python tests/benchmarks/self_made_data.py --data DATA --out FOLDER [--networks resnet20 minilm …]
        [--minilm DIR] [--goals "--ratio 0.5" …] [--calibrate none self data] [-- OPTIONS of mpoc compress]

Each row is one goal: ``mpoc compress`` with ``--calibrate none`` (of a ratio ``--form svd``, else codes
rounded to nearest), ``self`` and real data (512 examples of CIFAR-10, of tiny Shakespeare, or all texts of
``docstrings-calibration.jsonl``). ResNets: accuracy on test images. PicoGPT: bits per character
of the last tenth of the text (FOLDER/dense.safetensors, trained here where it is missing). MiniLM: mean
cosine of embeddings to the original's, of the 250 docstrings and of the paragraphs of two other domains
(``text/domains``); ``--ratio`` takes its encoder, ``--size`` the whole network. One thread; seconds of CPU.
"""

from __future__ import annotations

import argparse
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarking import markdown_table, require_file, run_mpoc
from torch import nn

import mpoc

KINDS = ("none", "self", "data")


@dataclass
class Task:
    """A network: its options, its real data, and figures on data that nothing was fitted to."""

    source: Path
    options: list[str]
    data: Path
    build: Callable[[], nn.Module]
    measure: Callable[[nn.Module], dict[str, float]]


def minilm(arguments: argparse.Namespace) -> Task:
    import json

    from calibration_minilm import embed
    from transformers import AutoModel, AutoTokenizer

    folder, tokenizer = arguments.data / "text", AutoTokenizer.from_pretrained(arguments.minilm)
    lines = require_file(folder / "docstrings-test.jsonl", "texts").open("rb")
    texts = {"docstrings": [json.loads(line)["text"] for line in lines]}
    for domain in ("office", "archaeology"):
        text = (folder / f"domains/{domain}.txt").read_text("utf-8")
        texts[domain] = [line for line in text.splitlines() if line.strip()]

    def build() -> nn.Module:
        found: nn.Module = AutoModel.from_pretrained(arguments.minilm).eval()
        return found

    every = {name: sorted(own, key=len) for name, own in texts.items()}
    wanted = {name: embed(build(), tokenizer, own) for name, own in every.items()}

    def measure(network: nn.Module) -> dict[str, float]:
        ours = {name: embed(network, tokenizer, own) for name, own in every.items()}
        return {f"cosine, {name}": float((ours[name] * wanted[name]).sum(1).mean()) for name in every}

    return Task(arguments.minilm, [], folder / "docstrings-calibration.jsonl", build, measure)


def cifar(arguments: argparse.Namespace, depth: int) -> Task:
    from resnet56_roundtrip import read_checkpoint, read_cifar

    from mpoc.models.zoo.cifar import resnet

    folder = arguments.data / "cifar10"
    test = read_cifar(require_file(folder / "test.parquet", "test images"), arguments.images)
    (source,) = (arguments.data / "checkpoints").glob(f"resnet{depth}-*.th")

    def build() -> nn.Module:
        network = resnet(depth)
        network.load_state_dict(read_checkpoint(source))
        return network.eval()

    def measure(network: nn.Module) -> dict[str, float]:
        answers = torch.cat([network(part).argmax(1) for part in test.images.split(250)])
        return {"accuracy %": 100 * float((answers == test.labels).float().mean())}

    return Task(source, ["--arch", f"resnet:depth={depth}"], folder, build, measure)


def picogpt(arguments: argparse.Namespace) -> Task:
    from calibration_picogpt import CONTEXT, HELD_OUT, bits_per_character, blocks, trained
    from safetensors.torch import load_file

    from mpoc.models.zoo.picogpt import PicoGPT

    text = require_file(arguments.data / "text/tinyshakespeare.txt", "text").read_text("utf-8")
    characters, cut = sorted(set(text)), int(len(text) * (1 - HELD_OUT))
    unseen = blocks(text[cut:], characters)
    arch, train = f"picogpt:vocab={len(characters)},context={CONTEXT}", arguments.out / "train.txt"
    train.write_text(text[:cut], "utf-8")
    checkpoint = arguments.out / "dense.safetensors"
    if not checkpoint.is_file():
        trained(train, arguments.out, arch, len(characters))

    def build() -> nn.Module:
        network = PicoGPT(len(characters), CONTEXT)
        network.load_state_dict(load_file(checkpoint))
        return network.eval()

    def measure(network: nn.Module) -> dict[str, float]:
        return {"bits per character": bits_per_character(network, unseen)}

    return Task(checkpoint, ["--arch", arch], train, build, measure)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "resnet20": lambda arguments: cifar(arguments, 20),
    "resnet56": lambda arguments: cifar(arguments, 56),
    "picogpt": picogpt,
    "minilm": minilm,
}


def compressed(task: Task, goal: str, kind: str, arguments: argparse.Namespace) -> tuple[nn.Module, float]:
    """The network as ``mpoc compress`` leaves it, and the CPU seconds of the command."""
    out = arguments.out / "out"
    out = out if task.source.is_dir() else out.with_suffix(".safetensors")
    own = ["--layers", "encoder.*"] if task.source.is_dir() and goal.startswith("--ratio") else []
    own += ["--form", "svd"] if kind == "none" and goal.startswith("--ratio") else []
    own += [] if kind == "none" else arguments.more
    calibrate = str(task.data) if kind == "data" else kind
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_mpoc(
        "compress",
        task.source,
        "-o",
        out,
        *task.options,
        *own,
        *goal.split(),
        "--calibrate",
        calibrate,
        "--force",
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    network: nn.Module = mpoc.load(out, task.build()).eval()
    return network, seconds


def closed(found: dict[str, float]) -> str:
    """The share of the gap between weights alone and real data that ``self`` closes."""
    if set(found) != set(KINDS):
        return ""
    return f"{(found['self'] - found['none']) / (found['data'] - found['none']):.0%}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minilm", type=Path, help="a directory of all-MiniLM-L6-v2")
    parser.add_argument("--goals", nargs="+", default=["--ratio 0.5", "--size 7%"])
    parser.add_argument("--calibrate", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--images", type=int, default=10_000, help="test images of CIFAR-10")
    parser.add_argument("more", nargs="*", help="options of mpoc compress with calibration, after --")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments.out.mkdir(exist_ok=True, parents=True)
    header = ["network", "dense", *KINDS, "gap closed", "CPU s of self, data"]
    print(markdown_table(header, []), flush=True)
    for name in arguments.networks:
        task = TASKS[name](arguments)
        dense = task.measure(task.build())
        for goal in arguments.goals:
            made = {kind: compressed(task, goal, kind, arguments) for kind in arguments.calibrate}
            figures = {kind: task.measure(network) for kind, (network, _) in made.items()}
            taken = ", ".join(f"{made[kind][1]:.0f}" for kind in KINDS[1:] if kind in made)
            for figure, value in dense.items():
                found = {kind: figures[kind][figure] for kind in made}
                cells = [f"{found[kind]:.4f}" if kind in found else "" for kind in KINDS]
                row = [f"{name} {goal}, {figure}", f"{value:.4f}", *cells, closed(found), taken]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
