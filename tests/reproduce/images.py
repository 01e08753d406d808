"""A small set of ten easy classes in MNIST's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data.samples import write_idx


def write_digits(folder: Path, train: int = 300, test: int = 100) -> Path:
    """Images (28, 28) with a bright bar at a height that is their class, and noise."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for stem, count in (("train", train), ("t10k", test)):
        y = [k % 10 for k in range(count)]
        x = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(x, y, strict=True):
            image[4 + 2 * label : 6 + 2 * label] += 150
        write_idx(folder, stem, x, y)
    return folder
