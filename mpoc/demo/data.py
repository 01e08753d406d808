"""The digits of the demo, as tensors and as a data file, and the accuracy of a network on them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mpoc.io.atomic import staged

DIGITS_FILE = "digits.npz"
WHITE = 16


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (train images, train labels, test images, test labels).

    Images are float32 in [0, 1] with shape (n, 1, 8, 8); labels are int64 with shape (n,).
    """
    path = resources.files(__package__).joinpath(DIGITS_FILE)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"]).float().unsqueeze(1) / WHITE
        labels = torch.from_numpy(arrays["labels"]).long()
        test = torch.from_numpy(arrays["test"])
    return images[~test], labels[~test], images[test], labels[test]


def write_digits(path: Path) -> None:
    """Write an .npz with a training and a test split, for ``mpoc finetune --data``.

    Sixteenths are exact in float16.
    """
    x, y, x_test, y_test = load_digits()
    splits = {"x_train": x.half(), "y_train": y, "x_test": x_test.half(), "y_test": y_test}
    with staged(path) as target:
        arrays = {name: part.numpy() for name, part in splits.items()}
        np.savez_compressed(target, allow_pickle=False, **arrays)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of images (n, 1, 8, 8) whose largest logit is at labels (n,)."""
    was_training = network.training
    network.eval()
    with torch.no_grad():
        predicted = network(images).argmax(dim=1)
    network.train(was_training)
    correct = int((predicted == labels).sum())
    return 100.0 * correct / len(labels)
