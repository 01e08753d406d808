"""Steps a second of mpoc's training loop beside a hand-written plain PyTorch one.

    python tests/benchmarks/training_speed.py DATA          (DATA holds mnist/, as IDX files)

FC2 on MNIST, batch 100, SGD with L2, one epoch each in turn, five times; the best of each counts.  The plain
loop shuffles, indexes one tensor in memory, normalises and steps: what a user would write.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mpoc.data import ImageOptions, open_data, prepare_images
from mpoc.models import zoo
from mpoc.train.engine import make_accelerator
from mpoc.train.loader import BatchLoader
from mpoc.train.loop import train
from mpoc.train.settings import Settings
from mpoc.train.tasks import Classification

BATCH, LR, L2, ROUNDS = 100, 0.1, 1e-4, 5
MEAN, STD = 0.1307, 0.3081
IMAGES = ImageOptions((MEAN,), (STD,))


def plain(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Seconds of an epoch over x (n, 1, 28, 28) uint8, y (n,)."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, weight_decay=L2)
    network.train()
    start = time.perf_counter()
    for chosen in torch.randperm(len(x)).split(BATCH):
        images = x[chosen].float().div_(255).sub_(MEAN).div_(STD)
        loss = nn.functional.cross_entropy(network(images), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def ours(network: nn.Module, loader: BatchLoader) -> float:
    """Seconds of an epoch."""
    settings = Settings(
        epochs=1, batch=BATCH, optimizer="sgd", lr=LR, momentum=0.0, l2=L2, schedule="constant"
    )
    accelerator = make_accelerator("cpu")
    outcome = train(network, Classification(10), loader, settings, accelerator=accelerator)
    return len(loader) / outcome.rate


def main() -> None:
    """Print both times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data = open_data(parser.parse_args().data / "mnist")
    examples = data.splits["train"]
    whole = examples.batch(torch.arange(len(examples)))
    loader = BatchLoader(
        examples, lambda batch, generator: {**batch, "x": prepare_images(batch["x"], IMAGES, generator)}
    )
    times: dict[str, list[float]] = {"plain": [], "mpoc": []}
    for _ in range(ROUNDS):
        times["plain"].append(plain(zoo.make("fc2"), whole["x"], whole["y"]))
        times["mpoc"].append(ours(zoo.make("fc2"), loader))
    steps = len(examples) / BATCH
    best = {name: min(values) / steps for name, values in times.items()}
    for name, seconds in best.items():
        print(f"{name:5}  {1e6 * seconds:7.1f} µs a step  {BATCH / seconds:9,.0f} images a second")
    print(f"plain over mpoc, images a second: {best['mpoc'] / best['plain']:.3f}")


if __name__ == "__main__":
    main()
