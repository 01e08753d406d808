"""Forms beside each other at equal numbers of parameters, on layers of two pretrained networks.

    python tests/benchmarks/forms_at_equal_size.py --minilm DIR --data DATA [--texts 384] [--images 512]

Layers of all-MiniLM-L6-v2 (``DIR``) on ``text/docstrings-calibration.jsonl``, and of ResNet-56
(``checkpoints/resnet56-4bfd9763.th``) on CIFAR-10's training images.  In each cell: the relative error of
the weight, fitted by itself; behind the stroke the error of the layer's outputs as the network's output feels
it, on examples that the fit does not see, fitted as ``mpoc compress --calibrate`` compares forms.
Every form has the largest bond that keeps it within ρ.  ``--speed`` instead times vectors through chains and
trees over more and more sites.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarking import markdown_table, require_file
from torch import Tensor, nn

from mpoc.compression.calibrate.calibration_data import CalibrationRequest, open_calibration
from mpoc.compression.calibrate.candidates import largest_within
from mpoc.compression.calibrate.objective import Objective, one_matrix
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.run_context import RunContext
from mpoc.nn import adopt
from mpoc.tensor_networks.factors import wide_factors
from mpoc.tensor_networks.fit.decompose import decompose
from mpoc.tensor_networks.fit.weighted import Problem, matrix_of
from mpoc.tensor_networks.fit.whitening import weighted_svd
from mpoc.tensor_networks.structure import Structure, lead_outputs_inputs, low_rank_structure, make_structure

RATIOS = {"linear": (0.5, 0.1), "conv2d": (0.5, 0.1), "embedding": (0.1, 0.02)}
STRETCHES = {"linear": 3, "conv2d": 3, "embedding": 1}  # of the descent: as forms are compared
BLOCK = "encoder.layer.{}."
MINILM = {
    f"{BLOCK.format(0)}attention.self.query.weight": "linear",
    f"{BLOCK.format(2)}intermediate.dense.weight": "linear",
    f"{BLOCK.format(2)}output.dense.weight": "linear",
    "embeddings.word_embeddings.weight": "embedding",
}
RESNET = {f"layer{stage}.4.conv1.weight": "conv2d" for stage in (1, 2, 3)}

NETWORKS = ("mpo", "tree")

Make = Callable[[str, tuple[int, ...]], Structure]


def _wide(kind: str, shape: tuple[int, ...]) -> Structure:
    _, outputs, inputs = lead_outputs_inputs(kind, shape, False)
    return make_structure(kind, shape, factors=wide_factors(outputs, inputs))


COLUMNS: dict[str, Make] = {
    "svd": low_rank_structure,
    "mpo, two wide sites": _wide,
    "svd+mpo": lambda kind, shape: _wide(kind, shape).as_form("svd+mpo"),
    "mpo": make_structure,
    "tree": lambda kind, shape: make_structure(kind, shape, form="tree"),
    "mera": lambda kind, shape: make_structure(kind, shape, form="mera"),
}


def cell(weight: Tensor, structure: Structure, ratio: float, objective: Objective) -> str:
    """Both errors at the largest bond within ρ."""
    storage = largest_within(structure, int(ratio * structure.num_original))
    if storage is None:
        return ""
    matrix = one_matrix(weight, structure.kind, structure.transposed)
    if structure.one_matrix:
        factors = weighted_svd(objective.metric(matrix, objective.usual_gamma)).factors(storage.bond)
        found = factors[0] @ factors[1]
    else:
        problem = Problem(objective.metric(matrix, objective.mpo_gamma), structure)
        stretches = STRETCHES[structure.kind]
        found = matrix_of(problem.fit(storage.truncation, max_stretches=stretches).form)
    alone = decompose(weight, structure, storage.truncation).relative_error
    return f"{alone:.3f} / {objective.output_weighted_error.relative(matrix, found):.3f}"


def rows(statistics: CalibrationStatistics, kinds: dict[str, str]) -> Iterator[list[str]]:
    """Of every layer at every ρ."""
    weights = dict(statistics.network.named_parameters())
    for layer, kind in kinds.items():
        weight, objective = weights[statistics.places[layer]].detach(), statistics.dense_objective(layer)
        size = "×".join(map(str, weight.shape))
        for ratio in RATIOS[kind]:
            cells = [
                cell(weight, make(kind, tuple(weight.shape)), ratio, objective) for make in COLUMNS.values()
            ]
            yield [f"{layer.removesuffix('.weight')}, {size}", f"{ratio:g}", *cells]
            print("…", *cells, flush=True)


def speed() -> Iterator[list[str]]:
    """Milliseconds of 8 vectors through N × N at bond 4, sites of 4 × 4; then exponents from 1,024 on."""
    sizes, networks = [4**sites for sites in range(3, 8)], (None, *NETWORKS)
    times: dict[str | None, list[float]] = {network: [] for network in networks}
    for size in sizes:
        for network in networks:
            layer = nn.Linear(size, size, bias=False).eval()
            if network is not None:
                factors = ((4,) * round(math.log(size, 4)),) * 2
                structure = make_structure("linear", (size, size), factors=factors, form=network)
                shapes = structure.core_shapes(structure.bonds(4))
                adopt(layer, "weight", [torch.randn(shape) for shape in shapes], structure)
            times[network].append(_seconds(layer, torch.randn(8, size)))
        yield [f"{size:,}", *(f"{1e3 * times[network][-1]:.3f}" for network in networks)]
    large = [k for k, size in enumerate(sizes) if size >= 1024]
    logs = torch.tensor([math.log(sizes[k]) for k in large])
    for_fit = torch.stack([logs, torch.ones(len(large))], 1)
    slopes = []
    for network in networks:
        measured = torch.tensor([[math.log(times[network][k])] for k in large])
        slopes.append(f"{float(torch.linalg.lstsq(for_fit, measured).solution[0]):.2f}")
    yield ["exponent", *slopes]


@torch.no_grad()
def _seconds(layer: nn.Module, x: Tensor, calls: int = 5) -> float:
    """The least of several, after a warm-up."""
    layer(x)
    least = math.inf
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(calls):
            layer(x)
        least = min(least, (time.perf_counter() - start) / calls)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--texts", type=int, default=384)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    if arguments.speed:
        print(markdown_table(["N", "dense, ms", "mpo, ms", "tree, ms"], list(speed())))
        return
    if arguments.minilm is None or arguments.data is None:
        parser.error("--minilm and --data, or --speed")
    data, cpu = arguments.data, torch.device("cpu")
    texts = require_file(data / "text" / "docstrings-calibration.jsonl", "texts")
    resnet = require_file(data / "checkpoints" / "resnet56-4bfd9763.th", "ResNet-56")
    for source, arch, examples, count, kinds in (
        (resnet, "resnet:depth=56", data / "cifar10", arguments.images, RESNET),
        (arguments.minilm, None, texts, arguments.texts, MINILM),
    ):
        request = CalibrationRequest(examples, count)
        data = open_calibration(source, arch, request)
        statistics = CalibrationStatistics(data, request, list(kinds), RunContext(cpu))
        print(markdown_table(["layer", "ρ", *COLUMNS], list(rows(statistics, kinds))), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
