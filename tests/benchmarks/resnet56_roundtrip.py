"""Compress a trained ResNet-56, expand it again, and count what CIFAR-10 notices.

    python tests/benchmarks/resnet56_roundtrip.py --data DIR

DIR holds ``checkpoints/resnet56-4bfd9763.th`` (pretrained, akamaster/pytorch_resnet_cifar10) and
``cifar10/test.parquet`` (the 10,000 test images, Hugging Face layout). For bond 8, bond 16 and full
bond the script runs ``mpoc compress``, ``mpoc report`` and ``mpoc expand`` as processes of their
own, loads the expanded weights with ``strict=True`` into the network of He et al., and prints rho
(cores over the weights that they replace, counted here from the tensors), top-1 accuracy, and on
how many images the prediction is not that of the original network. There is no calibration and no
fine-tuning. About a minute on two cores; needs pyarrow and pillow.
"""

import argparse
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarking import markdown_table, require_file, run_mpoc
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mpoc.models.zoo.cifar import resnet

CHECKPOINT = Path("checkpoints/resnet56-4bfd9763.th")
IMAGES = Path("cifar10/test.parquet")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
OPTIONS = {
    "bond 8": ["--bond", "8"],
    "bond 16": ["--bond", "16"],
    "full bond": ["--bond", "100000", "--allow-growth"],
}


@dataclass(frozen=True)
class Images:
    """Images of CIFAR-10."""

    images: Tensor  # (N, 3, 32, 32), normalised
    labels: Tensor  # (N,)


def read_cifar(path: Path, count: int | None = None) -> Images:
    """Decode a parquet file of {image: {bytes, path}, label} rows, or the first; the column may be img."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(path).slice(0, count)
    column = "img" if "img" in table.column_names else "image"
    files = [row["bytes"] for row in table[column].to_pylist()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return Images((images - MEAN) / STD, torch.tensor(table["label"].to_pylist()))


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint saved from a data-parallel network, its prefix removed."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


@torch.inference_mode()
def predict(state: dict[str, Tensor], images: Tensor, batch: int = 250) -> Tensor:
    """Classes (N,) that ResNet-56 with these weights gives to images (N, 3, 32, 32)."""
    network = resnet(56)
    network.load_state_dict(state, strict=True)
    network.eval()
    return torch.cat([network(part).argmax(dim=1) for part in images.split(batch)])


def count_rho(compressed: Path, original: dict[str, Tensor]) -> float:
    """Numbers in the cores over numbers in the weights that they replace (Gao et al., Eq. 9)."""
    cores: dict[str, int] = {}
    with safe_open(compressed, framework="pt") as file:
        for name in sorted(file.keys()):
            module, found, _ = name.partition(".cores.")
            if found:
                cores[module] = cores.get(module, 0) + file.get_tensor(name).numel()
    if not cores:
        raise SystemExit(f"error: {compressed.name} holds no cores: nothing was compressed")
    return sum(cores.values()) / sum(original[f"{module}.weight"].numel() for module in cores)


def round_trip(checkpoint: Path, options: list[str], directory: Path) -> tuple[Path, Path]:
    """Compress, report and expand; returns the compressed and the expanded file."""
    compressed, dense = directory / "compressed.safetensors", directory / "dense.safetensors"
    run_mpoc("compress", checkpoint, "-o", compressed, *options)
    run_mpoc("report", compressed)
    run_mpoc("expand", compressed, "-o", dense)
    return compressed, dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    checkpoint = require_file(arguments.data / CHECKPOINT, "ResNet-56 checkpoint")
    test = read_cifar(require_file(arguments.data / IMAGES, "CIFAR-10 test images"))
    original = read_checkpoint(checkpoint)
    reference = predict(original, test.images)

    def row(name: str, rho: float, predicted: Tensor) -> list[str]:
        top1 = (predicted == test.labels).float().mean().item() * 100
        return [name, f"{rho:.4f}", f"{top1:.2f}", str(int((predicted != reference).sum()))]

    rows = [row("original", 1.0, reference)]
    for name, options in OPTIONS.items():
        with tempfile.TemporaryDirectory() as scratch:
            compressed, dense = round_trip(checkpoint, options, Path(scratch))
            predicted = predict(load_file(dense), test.images)
            rows.append(row(name, count_rho(compressed, original), predicted))
    print(markdown_table(["weights", "rho", "top-1 %", "predictions changed"], rows))


if __name__ == "__main__":
    main()
