"""Entanglement entropy of a fully connected layer, in four states, and over data sets.

    python tests/benchmarks/entanglement.py --data DATA --plot entropy.svg

DATA holds ``mnist/`` and ``cifar10/``. Every entropy is compared with the SVD of its bipartition. The second
table has the middle cut of networks of one shape, trained in one way on MNIST and on grey CIFAR-10 images of
28×28, and what is left of its entropy at bond D after ``mpoc compress`` and an epoch of ``mpoc finetune``.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from benchmarking import markdown_table, run_mpoc
from fully_connected import mnist, train
from torch import Tensor

from mpoc.compression.entanglement import entanglement_of
from mpoc.data.open import open_data
from mpoc.tensor_networks.fit.spectra import Cut, cuts_of_weight
from mpoc.tensor_networks.forms.layout import interleave
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import make_structure

STRUCTURE = make_structure("linear", (256, 784), factors=((4, 4, 4, 4), (4, 7, 7, 4)))
SHAPE = "fc1=4x7x7x4:4x4x4x4"
BONDS = (4, 8, 16)


def weights(data: Path, folder: Path) -> dict[str, Tensor]:
    """The first layer of FC2's shape in every state, each of the same norm as the untrained one."""
    torch.manual_seed(0)
    cores = [torch.randn(shape) for shape in STRUCTURE.core_shapes(STRUCTURE.bonds(8))]
    untrained = mnist().get_parameter("fc1.weight").detach()
    found = {
        "random": torch.randn(256, 784),
        "MPO of bond 8": MPO(cores, STRUCTURE).to_weight(),
        "rank 8": torch.randn(256, 8) @ torch.randn(8, 784),
        "untrained": untrained,
        "trained": train("mnist", data / "mnist", folder, 0.0).get_parameter("fc1.weight").detach(),
        "trained, weight decay": train("mnist", data / "mnist", folder, 1.0)
        .get_parameter("fc1.weight")
        .detach(),
    }
    return {name: weight * (untrained.norm() / weight.norm()) for name, weight in found.items()}


def differs_from_svd(weight: Tensor, cuts: list[Cut]) -> float:
    """The largest difference of an entropy from the one of torch's SVD of the bipartition."""
    tensor, worst = interleave(weight.double(), STRUCTURE), 0.0
    for cut in cuts:
        left = math.prod(STRUCTURE.site_sizes[: cut.site])
        p = torch.linalg.svdvals(tensor.reshape(left, -1)).square()
        p /= p.sum()
        worst = max(worst, abs(float(-torch.special.xlogy(p, p).sum()) - cut.entropy))
    return worst


def draw(found: dict[str, list[Cut]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, cuts in found.items():
        axes.plot([cut.site for cut in cuts], [cut.entropy for cut in cuts], "o-", label=name)
    largest = next(iter(found.values()))
    axes.plot(
        [c.site for c in largest], [c.largest_entropy for c in largest], ":", color="0.5", label="largest"
    )
    axes.set(xlabel="cut behind site k", ylabel="entanglement entropy S (nats)", ylim=(0, None))
    axes.set_xticks([cut.site for cut in largest])
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(picture)


def states(data: Path, folder: Path, picture: Path | None) -> None:
    found, worst = {}, 0.0
    for name, weight in weights(data, folder).items():
        found[name] = cuts_of_weight(weight, STRUCTURE, 0.99)
        worst = max(worst, differs_from_svd(weight, found[name]))
    rows = [
        [name, *(f"{cut.entropy:.3f}" for cut in cuts), " ".join(str(cut.effective_bond) for cut in cuts)]
        for name, cuts in found.items()
    ]
    largest = next(iter(found.values()))
    rows.append(
        [
            "largest",
            *(f"{c.largest_entropy:.3f}" for c in largest),
            " ".join(str(c.full_bond) for c in largest),
        ]
    )
    print(markdown_table(["first layer, 784 → 256", "S_1", "S_2", "S_3", "D for 99 %"], rows))
    print(f"\nlargest difference from a direct SVD: {worst:.1e}\n")
    if picture is not None:
        draw(found, picture)


def grey(data: Path, output: Path) -> None:
    """CIFAR-10 as grey images of 28×28, the middle of each."""
    arrays: dict[str, np.ndarray] = {}
    for split, examples in open_data(data).splits.items():
        batch = examples.batch(range(len(examples)))
        images = batch["x"][:, :, 2:30, 2:30].float().mean(1).round().to(torch.uint8)
        arrays |= {f"x_{split}": images.numpy(), f"y_{split}": batch["y"].numpy()}
    np.savez(output, **arrays)  # type: ignore[arg-type]


def over_bonds(data: Path, folder: Path) -> None:
    grey(data / "cifar10", folder / "grey.npz")
    arch = f"{Path(train.__code__.co_filename).resolve()}:mnist"
    rows = []
    for name, path in (("MNIST", data / "mnist"), ("CIFAR-10, grey", folder / "grey.npz")):
        network = train("mnist", path, folder, 1.0)
        dense = cuts_of_weight(network.get_parameter("fc1.weight").detach(), STRUCTURE, 0.99)[1]
        row = []
        for bond in BONDS:
            small, tuned = folder / "small.safetensors", folder / "tuned.safetensors"
            options = (
                "--layers",
                "fc1",
                "--shape",
                SHAPE,
                "--bond",
                str(bond),
                "-o",
                small,
                "--force",
                "--quiet",
            )
            run_mpoc("compress", folder / "mnist.safetensors", *options)
            training = ("--epochs", "1", "--optimizer", "adamw", "--lr", "0.002", "--weight-decay", "1")
            device = ("--device", "cpu", "-o", tuned, "--force", "--quiet")
            run_mpoc("finetune", small, "--arch", arch, "--data", path, *training, *device)
            (profile,) = entanglement_of(tuned, {"layers": ("fc1",)}).profiles
            assert profile.stored is not None
            row.append(f"{profile.stored[1].entropy:.3f}")
            print(name, bond, row[-1], flush=True)
        rows.append([name, *row, f"{dense.entropy:.3f}", str(dense.effective_bond)])
    rows.append(["ln D", *(f"{math.log(bond):.3f}" for bond in BONDS), "", ""])
    print(markdown_table(["S_2 of", *(f"D = {bond}" for bond in BONDS), "dense", "D for 99 %"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", choices=("states", "bonds"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.only != "bonds":
            states(arguments.data, Path(scratch), arguments.plot)
        if arguments.only != "states":
            over_bonds(arguments.data, Path(scratch))


if __name__ == "__main__":
    main()
