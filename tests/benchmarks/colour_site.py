"""Where in the chain the colours of an image belong: bonds, numbers and quality for every place.

python tests/benchmarks/colour_site.py DATA/cifar10 [--images 1000]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mpoc.data import open_data
from mpoc.reproduce.image_states import ORDERS, contract_stack, to_sites, tt_svd_stack

BONDS = (4, 6, 8, 12, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    asked = parser.parse_args()
    examples = open_data(asked.data).splits["test"]
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[: asked.images]
    x = examples.batch(chosen)["x"].double() / 255
    print(
        "| order | sites before colour | " + " | ".join(f"D = {bond}: numbers, dB" for bond in BONDS) + " |"
    )
    print("| --- | --: |" + " --: |" * len(BONDS))
    for order in ORDERS:
        sites = to_sites(x, order)
        for place in range(sites.ndim - 1):
            moved = sites.movedim(1, 1 + place)
            print(
                f"| {order} | {place} | " + " | ".join(cell(moved, bond) for bond in BONDS) + " |", flush=True
            )


def cell(tensors: torch.Tensor, bond: int) -> str:
    """Numbers of a state, and the mean peak signal-to-noise."""
    cores = tt_svd_stack(tensors, bond)
    errors = (contract_stack(cores) - tensors).square().flatten(1).mean(1)
    return f"{sum(core[0].numel() for core in cores):,}, {float(-10 * errors.log10().mean()):.2f}"


if __name__ == "__main__":
    main()
