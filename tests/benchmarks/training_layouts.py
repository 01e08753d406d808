"""Images a CPU second of the papers' trainings: kernels in both memory layouts, fp32 and bf16.

    OMP_NUM_THREADS=1 python tests/benchmarks/training_layouts.py

One network of each table of ``mpoc reproduce`` that has convolutions, on random images; forward, backward and
step of Adam.  The best of three steps after a first one counts, in CPU seconds, which other work disturbs
least.
"""

import time

import torch
from torch import nn
from torch.nn import functional as F

from mpoc.models import zoo
from mpoc.reproduce.catalogue import STUDIES
from mpoc.reproduce.networks import replace_layers

# Name in the table, study, variant, D of random cores (None: dense), batch
NETWORKS = (
    ("LeNet-5", "lenet5", "lenet5", None, 100),
    ("FC-1", "mera", "fc-1", None, 50),
    ("FC-2", "mera", "fc-2", None, 50),
    ("MERA-2", "mera", "mera", 2, 50),
    ("MERA-3", "mera", "mera", 3, 50),
    ("TT-7", "mera", "tt", 7, 50),
    ("VGG-16", "vgg16", "vgg16", None, 100),
    ("VGG-16, MPO", "vgg16", "vgg16", 4, 100),
    ("ResNet-20, k = 4", "resnet", "20", None, 100),
    ("DenseNet-40, k = 12", "densenet", "16-12-12", None, 100),
)
WAYS = (("fp32", False, False), ("fp32, channels last", True, False), ("bf16, channels last", True, True))
STEPS = 4


def images_per_second(
    study: str, variant: str, bond: int | None, batch: int, last: bool, bf16: bool
) -> float:
    """The speed of one network."""
    experiment = STUDIES[study].variants[variant]
    torch.manual_seed(0)
    network = zoo.make(experiment.network).train()
    if bond:
        replace_layers(network, experiment.layers, bond, "random", 0)
    for module in network.modules():
        if last and type(module) is nn.Conv2d:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters())
    shape = (1, 28, 28) if experiment.data == "MNIST" else (3, 32, 32)
    x, y = torch.randn(batch, *shape), torch.arange(batch) % 10
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
    return batch / min(seconds[1:])


def main() -> None:
    """Print the table."""
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)\n")
    print(f"| network | {' | '.join(name for name, *_ in WAYS)} |\n| --- |{' --: |' * len(WAYS)}")
    for name, study, variant, bond, batch in NETWORKS:
        rates = [images_per_second(study, variant, bond, batch, last, bf16) for _, last, bf16 in WAYS]
        print(f"| {name} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |", flush=True)


if __name__ == "__main__":
    main()
