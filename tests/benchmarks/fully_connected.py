"""Networks of two fully connected layers for MNIST and CIFAR-10, trained by ``mpoc finetune``."""

from pathlib import Path

import torch
from benchmarking import run_mpoc
from safetensors.torch import load_file
from torch import Tensor, nn

from mpoc.data.open import open_data


class TwoLayers(nn.Module):
    """Images (n, C, H, W) from 0 to 1 → logits (n, 10), through 256 hidden units; as FC2, no biases."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, 256, bias=False)
        self.fc2 = nn.Linear(256, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """y = W₂ relu(W₁ x)."""
        y: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return y


def mnist() -> nn.Module:
    """784 inputs."""
    torch.manual_seed(0)
    return TwoLayers(784)


def cifar10() -> nn.Module:
    """3,072 inputs."""
    torch.manual_seed(0)
    return TwoLayers(3072)


NETWORKS = {"mnist": mnist, "cifar10": cifar10}


def train(name: str, data: Path, folder: Path, weight_decay: float) -> nn.Module:
    """The network of that name after a short training; also as ``NAME.safetensors`` in ``folder``."""
    network = NETWORKS[name]()
    start, done = folder / f"{name}.pt", folder / f"{name}.safetensors"
    torch.save(network.state_dict(), start)
    arch = f"{Path(__file__).resolve()}:{name}"
    options = (
        "--optimizer",
        "adamw",
        "--lr",
        "0.002",
        "--weight-decay",
        str(weight_decay),
        "--device",
        "cpu",
    )
    run_mpoc(
        "finetune", start, "--arch", arch, "--data", data, "--epochs", "6", *options, "-o", done, "--force"
    )
    network.load_state_dict(load_file(done))
    return network.eval()


def test_images(data: Path) -> tuple[Tensor, Tensor]:
    """All images of the test split, from 0 to 1, and their labels."""
    examples = open_data(data).splits["test"]
    batch = examples.batch(range(len(examples)))
    return batch["x"].float() / 255, batch["y"]


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent."""
    return float((network(images).argmax(1) == labels).float().mean()) * 100
