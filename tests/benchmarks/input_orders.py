"""Which order of the inputs needs the smallest bond: accuracy over bond, the first layer compressed alone.

    python tests/benchmarks/input_orders.py --data DATA

DATA holds ``mnist/`` and ``cifar10/``. All orders have the same factors: the same parameters at a bond.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from benchmarking import markdown_table
from fully_connected import accuracy, test_images, train
from torch import Tensor, nn

import mpoc

# Sites of height · width (· channels) for the Morton order; the other orders have the same.
CASES = {
    "mnist": ("morton:28x28", "4x4x49:8x8x4", (4, 8, 12, 16, 24, 32)),
    "cifar10": ("morton:3x32x32", "4x4x16x12:4x4x4x4", (8, 16, 32, 64)),
}


def rows(name: str, network: nn.Module, images: Tensor, labels: Tensor) -> list[list[str]]:
    morton, shape, bonds = CASES[name]
    dense = accuracy(network, images, labels)
    found = [[f"{name}, dense", "", *("" for _ in bonds), f"{dense:.2f}"]]
    for order in ("raster", morton, "learned"):
        errors, scores = [], []
        for bond in bonds:
            model = copy.deepcopy(network)
            report = mpoc.compress(model, bond=bond, layers="fc1", shape=f"fc1={shape}", order=f"fc1={order}")
            errors.append(report.layers[0].relative_error or 0.0)
            scores.append(accuracy(model.eval(), images, labels))
            print(name, order, bond, f"{errors[-1]:.4f} {scores[-1]:.2f} %", flush=True)
        enough = next((str(b) for b, score in zip(bonds, scores, strict=True) if score >= dense - 2), "")
        found.append([f"{name}, {order}", "accuracy %", *(f"{score:.1f}" for score in scores), enough])
        found.append(["", "relative error", *(f"{error:.3f}" for error in errors), ""])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", choices=CASES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in [arguments.only] if arguments.only else CASES:
        with tempfile.TemporaryDirectory() as scratch:
            network = train(name, arguments.data / name, Path(scratch), 1.0)
        images, labels = test_images(arguments.data / name)
        table = rows(name, network, images, labels)
        header = ["network, order", "", *(f"D = {bond}" for bond in CASES[name][2]), "D within 2 points"]
        print(markdown_table(header, table) + "\n")


if __name__ == "__main__":
    main()
