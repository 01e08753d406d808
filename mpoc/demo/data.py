"""The digits of the demo, as tensors and as a data file, and how the demo's files were made.

``python -m mpoc.demo.data`` makes digits and network again (it needs scikit-learn).  Every step is seeded;
another PyTorch version or processor may still change the last digits.
"""

from __future__ import annotations

import importlib
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor, nn

from mpoc.demo.network import NETWORK_FILE, DigitsNet, load_network
from mpoc.io.atomic import staged

DIGITS_FILE = "digits.npz"
WHITE = 16

# How the network was trained.
SEED = 0
TEST_SHARE = 0.3
EPOCHS = 100
BATCH = 64
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3


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


def fetch_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return scikit-learn's digits: images (1797, 8, 8) with values 0 to 16, labels (1797,)."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise SystemExit("making the demo needs scikit-learn: pip install scikit-learn") from error
    digits = datasets.load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.uint8)


def choose_test(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return a mask (n,) that marks the same share of every label in labels (n,) for testing."""
    generator = np.random.default_rng(SEED)
    test = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        test[members[: round(TEST_SHARE * len(members))]] = True
    return test


def shift_randomly(images: Tensor) -> Tensor:
    """Shift each of the images (n, 1, 8, 8) by up to one pixel along each axis, filling with 0."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (2, len(images), 1))
    rows = (offsets[0] + torch.arange(8))[:, :, None]
    columns = (offsets[1] + torch.arange(8))[:, None, :]
    index = torch.arange(len(images))[:, None, None]
    return padded[index, 0, rows, columns].unsqueeze(1)


def train(images: Tensor, labels: Tensor) -> DigitsNet:
    """Train a fresh network on images (n, 1, 8, 8) and labels (n,).

    Weight decay, dropout and shifted images make it generalize; the dropout also leaves weights
    that lose little accuracy when they are truncated.
    """
    network = DigitsNet()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.split(torch.randperm(len(images)), BATCH):
            logits = network(shift_randomly(images[batch]))
            loss = nn.functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network


def main() -> None:
    """Write both files next to this script and print the carried network's accuracy."""
    folder = Path(__file__).parent
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    images, labels = fetch_digits()
    arrays = {"images": images, "labels": labels, "test": choose_test(labels)}
    np.savez_compressed(folder / DIGITS_FILE, allow_pickle=False, **arrays)
    train_images, train_labels, test_images, test_labels = load_digits()
    network = train(train_images, train_labels)
    weights = save(network.state_dict(), metadata={"format": "pt"})
    (folder / NETWORK_FILE).write_bytes(weights)
    carried = load_network()
    print(f"train accuracy {accuracy(carried, train_images, train_labels):.2f} %")
    print(f"test accuracy {accuracy(carried, test_images, test_labels):.2f} %")


if __name__ == "__main__":
    main()
