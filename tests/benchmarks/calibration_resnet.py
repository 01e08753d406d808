"""ResNet-56 and ResNet-20 compressed without training: what calibration keeps of their accuracy on CIFAR-10.

    python tests/benchmarks/calibration_resnet.py --data DATA [--depths 56 20] [--ratios 0.75 0.5 0.35 0.25]

DATA holds ``checkpoints/resnet*.th`` and ``cifar10/``. The convolutions of the blocks and the head
(``--layers``) at equal ρ, by plain TT-SVD (``mpoc compress``), plain SVD (``--form svd``), SVD of each
kernel (C_out, C_in k²) whitened by the patches it is given in the dense network (SVD-LLM, in
``calibration.py``, with torch alone) and ``mpoc compress --calibrate``. Calibrated on 1,024 images of the
training split; measured on the 10,000 test images, which no method sees. The dense network is run on the
calibration images once for all rows; seconds are without that pass, which has a line of its own.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch
from benchmarking import markdown_table, require_file
from calibration import METHODS, Compressor, second_moments
from resnet56_roundtrip import Images, read_checkpoint, read_cifar
from torch import nn

from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.models.zoo.cifar import resnet

SAMPLES = 1024


@torch.inference_mode()
def accuracy(network: nn.Module, test: Images) -> float:
    """Per cent of the images."""
    parts = zip(test.images.split(250), test.labels.split(250), strict=True)
    return 100 * sum(int((network(x).argmax(1) == y).sum()) for x, y in parts) / len(test.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--depths", type=int, nargs="+", default=[56, 20])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5, 0.35, 0.25])
    parser.add_argument("--layers", nargs="+", default=["layer*", "linear"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    arguments = parser.parse_args()
    cifar = arguments.data / "cifar10"
    test = read_cifar(require_file(cifar / "test.parquet", "test images"))
    seen = read_cifar(require_file(cifar / "train.parquet", "training images"), SAMPLES)
    rows = []

    def add(depth: int, method: str, rho: float, network: nn.Module, seconds: float) -> None:
        figures = [f"{rho:.4f}", f"{accuracy(network, test):.2f}", f"{seconds:.0f}"]
        rows.append([f"ResNet-{depth}", method, *figures])
        print(rows[-1], flush=True)

    for depth in arguments.depths:
        found = sorted((arguments.data / "checkpoints").glob(f"resnet{depth}-*.th"))
        if not found:
            raise SystemExit(f"error: no ResNet-{depth} in {arguments.data / 'checkpoints'}")
        dense = resnet(depth)
        dense.load_state_dict(read_checkpoint(found[0]), strict=True)
        add(depth, "dense", 1.0, dense.eval(), 0.0)
        moments = second_moments(dense, seen.images.split(64))
        request = CalibrationRequest(cifar, SAMPLES, refine=True)
        compressor = Compressor(found[0], f"resnet:depth={depth}", arguments.layers, request, moments)
        for ratio, method in itertools.product(arguments.ratios, arguments.methods):
            start = time.perf_counter()
            network, rho = compressor.compressed(method, ratio, dense)
            add(depth, method, rho, network, time.perf_counter() - start)
    print(markdown_table(["network", "method", "ρ", "accuracy %", "seconds"], rows))


if __name__ == "__main__":
    main()
