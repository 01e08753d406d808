"""PicoGPT, trained on tiny Shakespeare, compressed without training: bits per character over ρ.

    python tests/benchmarks/calibration_picogpt.py --text FILE [--checkpoint FILE] [--ratios 0.75 0.5 ...]

The linear layers and the head by plain TT-SVD (``mpoc compress``), plain SVD (``--form svd``), SVD whitened
by each layer's inputs in the dense network (SVD-LLM, in ``calibration.py``, with torch alone) and ``mpoc
compress --calibrate``. Trained and calibrated (512 blocks of 256 characters) on the first 90 % of the text;
measured on the rest, block by block, which no method sees. The dense network is trained here with ``mpoc
finetune``, as ``mpoc reproduce picogpt`` trains it, unless ``--checkpoint`` is one already. It is run on
the calibration text once for all rows; seconds are without that pass, which has a line of its own.
"""

import argparse
import itertools
import math
import tempfile
import time
from pathlib import Path

import torch
from benchmarking import markdown_table, require_file, run_mpoc
from calibration import METHODS, Compressor, second_moments
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.models.zoo.picogpt import PicoGPT

CONTEXT, SAMPLES, HELD_OUT = 256, 512, 0.1
TRAINING = (
    "--steps 2000 --batch 32 --optimizer adamw --lr 2e-3 --weight-decay 0.01 --warmup 0.05 --clip 1"
    " --hold-out 0"
)


def blocks(text: str, characters: list[str]) -> Tensor:
    """(n, 256): numbers of the characters, whole blocks alone."""
    number = {character: k for k, character in enumerate(characters)}
    numbers = torch.tensor([number[character] for character in text])
    return numbers[: len(numbers) // CONTEXT * CONTEXT].view(-1, CONTEXT)


@torch.inference_mode()
def bits_per_character(network: nn.Module, unseen: Tensor) -> float:
    """Mean over all characters of a block but its first."""
    total = 0.0
    for part in unseen.split(32):
        logits, targets = network(part)[:, :-1].flatten(0, 1), part[:, 1:].flatten()
        total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / unseen[:, 1:].numel() / math.log(2)


def trained(train: Path, folder: Path, arch: str, vocab: int) -> Path:
    """A dense checkpoint; seed 0."""
    torch.manual_seed(0)
    start, out = folder / "start.safetensors", folder / "dense.safetensors"
    save_file(PicoGPT(vocab, CONTEXT).state_dict(), start)
    run_mpoc("finetune", start, "--arch", arch, "--data", train, "-o", out, *TRAINING.split())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="dense, of the same text: none is trained")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    arguments = parser.parse_args()
    with require_file(arguments.text, "text").open(encoding="utf-8", newline="") as file:
        text = file.read()
    characters, cut = sorted(set(text)), int(len(text) * (1 - HELD_OUT))
    unseen = blocks(text[cut:], characters)
    arch = f"picogpt:vocab={len(characters)},context={CONTEXT}"
    rows = []

    def add(method: str, rho: float, network: nn.Module, seconds: float) -> None:
        rows.append([method, f"{rho:.4f}", f"{bits_per_character(network, unseen):.3f}", f"{seconds:.0f}"])
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        train = Path(scratch) / "train.txt"
        train.write_text(text[:cut], encoding="utf-8", newline="")
        checkpoint = arguments.checkpoint or trained(train, Path(scratch), arch, len(characters))
        dense = PicoGPT(len(characters), CONTEXT)
        dense.load_state_dict(load_file(checkpoint), strict=True)
        add("dense", 1.0, dense.eval(), 0.0)
        seen = blocks(text[:cut], characters)
        drawn = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:SAMPLES]
        moments = second_moments(dense, seen[drawn].split(8))
        request = CalibrationRequest(train, SAMPLES, refine=True)
        compressor = Compressor(checkpoint, arch, ["layers*", "head"], request, moments)
        for ratio, method in itertools.product(arguments.ratios, arguments.methods):
            start = time.perf_counter()
            network, rho = compressor.compressed(method, ratio, dense)
            add(method, rho, network, time.perf_counter() - start)
    print(markdown_table(["method", "ρ", "bits per character", "seconds"], rows))


if __name__ == "__main__":
    main()
