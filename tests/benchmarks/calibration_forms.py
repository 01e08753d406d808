"""Single layers of all-MiniLM-L6-v2 in several forms of equal size: why calibration offers the forms it does.

    python tests/benchmarks/calibration_forms.py --minilm DIR --data DATA [--texts 1024]

Every form is fitted to what the layer does on ``text/docstrings-train.jsonl``, by mpoc's own fits: two
factors in closed form (``svd``), chains of several factorings, and the sum of two factors and a chain, fitted
one after the other or together.  The error is relative to that of a zero weight, of the layer's outputs on
``text/docstrings-test.jsonl``, which no fit sees, weighed by the gradients behind the layer there.  Then
query, key and value with one input factor for all three beside factors of their own that share their numbers
by gain; and the table of word pieces, with a tenth of the weight spread over all rows.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from benchmarking import markdown_table, require_file
from torch import Tensor

from mpoc.compression.calibrate.calibration_data import CalibrationRequest, open_calibration
from mpoc.compression.calibrate.candidates import largest_within
from mpoc.compression.calibrate.objective import (
    EmbeddingObjective,
    LayerObjective,
    Objective,
    one_matrix,
)
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.run_context import RunContext
from mpoc.tensor_networks.factors import wide_factors
from mpoc.tensor_networks.fit.metric import ErrorNorm, Metric
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.fit.weighted import Problem, matrix_of
from mpoc.tensor_networks.fit.whitening import weighted_svd
from mpoc.tensor_networks.structure import Structure, make_structure

SINGLE = ["encoder.layer.0.attention.self.query.weight", "encoder.layer.4.intermediate.dense.weight"]
ATTENTION = [
    [f"encoder.layer.{k}.attention.self.{part}.weight" for part in ("query", "key", "value")] for k in (0, 4)
]
TABLE = "embeddings.word_embeddings.weight"
GAMMA = 0.1
STRETCHES = {"linear": 6, "embedding": 2}


class Layer:
    """A weight with what is known of it, on the texts of the fit and on others.

    Args:
        weight: W.
        kind: of the layer.
        seen: evidence of the fit.
        unseen: of other texts.
    """

    def __init__(self, weight: Tensor, kind: str, seen: Objective, unseen: Objective) -> None:
        self.kind, self.shape = kind, tuple(weight.shape)
        self.matrix = one_matrix(weight.detach(), kind, False)
        assert isinstance(seen, LayerObjective | EmbeddingObjective)
        assert isinstance(unseen, LayerObjective | EmbeddingObjective) and unseen.outputs is not None
        self.metric = seen.together().metric(self.matrix, GAMMA)
        others = replace(seen.together(), held_out=unseen.together().moments, outputs=unseen.outputs)
        self.norm = others.output_weighted_error

    def error(self, found: Tensor) -> str:
        """Of Ŵ in the place of W."""
        return f"{self.norm.relative(self.matrix, found):.3f}"

    def svd(self, parameters: int) -> str:
        """Two factors."""
        return self.error(low_rank(self.metric, parameters // sum(self.shape)))

    def chain(self, structure: Structure, parameters: int) -> str:
        """A chain; "" where none is so small."""
        storage = largest_within(structure, parameters)
        if storage is None:
            return ""
        return self.error(fitted(self.metric, structure, storage.bond))

    def sums(self, structure: Structure, parameters: int) -> list[str]:
        """The chain of a sum, then two factors for what it leaves; and both together."""
        both = structure.as_form("svd+mpo")
        storage = largest_within(both, parameters)
        assert storage is not None
        first = fitted(self.metric, structure, storage.bond)
        rest = replace(self.metric, target=self.metric.target - first)
        together = fitted(self.metric, both, storage.bond, storage.rank)
        return [self.error(first + low_rank(rest, storage.rank)), self.error(together)]

    def structure(self, factors: tuple[tuple[int, ...], tuple[int, ...]] | None) -> Structure:
        """Of these output and input factors; None: the default's."""
        return make_structure(self.kind, self.shape, factors=factors)


def low_rank(metric: Metric, rank: int) -> Tensor:
    found = weighted_svd(metric)
    return found.left[:, :rank] @ found.right[:rank]


def fitted(metric: Metric, structure: Structure, bond: int, rank: int = 0) -> Tensor:
    fit = Problem(metric, structure).fit(Truncation(bond, rank=rank), max_stretches=STRETCHES[structure.kind])
    return matrix_of(fit.form)


def single_layers(layers: dict[str, Layer]) -> Iterable[list[str]]:
    """Rows of the forms of one layer."""
    for name in SINGLE:
        layer = layers[name]
        outputs, inputs = layer.shape
        wide = layer.structure(wide_factors(outputs, inputs))
        others = [
            layer.structure(((outputs // 2, 2), (2, inputs // 2))),
            layer.structure(((outputs // 16, 16), (16, inputs // 16))),
            layer.structure(None),
        ]
        for ratio in (0.5, 0.1):
            size = int(ratio * outputs * inputs)
            figures = [layer.svd(size), layer.chain(wide, size), *layer.sums(wide, size)]
            figures += [layer.chain(other, size) if ratio == 0.1 else "" for other in others]
            yield [f"{name.removesuffix('.weight')}, {outputs}×{inputs}", f"{ratio:g}", *figures]


def attention(layers: dict[str, Layer]) -> Iterable[list[str]]:
    """Rows of one input factor for query, key and value, and of three."""
    for names in ATTENTION:
        parts = [layers[name] for name in names]
        outputs = torch.block_diag(*(_outputs(part.metric) for part in parts))
        matrix = torch.cat([part.matrix for part in parts])
        joint = Metric(matrix, parts[0].metric.inputs, outputs)
        felt = torch.block_diag(*(_outputs(part.norm) for part in parts))
        norm = replace(parts[0].norm, outputs=felt)
        own = [weighted_svd(part.metric) for part in parts]
        gains = sorted(((float(v), k) for k, svd in enumerate(own) for v in svd.values), reverse=True)
        for ratio in (0.5, 0.1):
            size = int(ratio * matrix.numel())
            shared = low_rank(joint, size // sum(matrix.shape))
            taken = gains[: size // sum(parts[0].shape)]
            ranks = [sum(1 for _, k in taken if k == j) for j in range(3)]
            three = torch.cat([svd.left[:, :r] @ svd.right[:r] for svd, r in zip(own, ranks, strict=True)])
            figures = [f"{norm.relative(matrix, found):.3f}" for found in (shared, three)]
            yield [names[0].rpartition(".self")[0], f"{ratio:g}", *figures]


def _outputs(of: Metric | ErrorNorm) -> Tensor:
    assert of.outputs is not None
    return of.outputs


def word_pieces(layers: dict[str, Layer]) -> Iterable[list[str]]:
    """Rows of the table of word pieces."""
    table = layers[TABLE]
    structures = [table.structure(wide_factors(*table.shape)), table.structure(None)]
    for ratio in (0.1, 0.05, 0.02):
        size = int(ratio * table.matrix.numel())
        yield [f"{ratio:g}", table.svd(size), *(table.chain(one, size) for one in structures)]


def studied(minilm: Path, file: Path, texts: int, names: list[str]) -> CalibrationStatistics:
    """The dense network on at most so many texts."""
    request = CalibrationRequest(require_file(file, "texts"), texts)
    data = open_calibration(minilm, None, request)
    return CalibrationStatistics(data, request, names, RunContext(torch.device("cpu")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=1024)
    arguments = parser.parse_args()
    names = list(dict.fromkeys([*SINGLE, *ATTENTION[0], *ATTENTION[1], TABLE]))
    text = arguments.data / "text"
    seen = studied(arguments.minilm, text / "docstrings-train.jsonl", arguments.texts, names)
    unseen = studied(arguments.minilm, text / "docstrings-test.jsonl", 10**6, names)
    weights = dict(seen.network.named_parameters())
    layers = {
        name: Layer(
            weights[seen.places[name]],
            "embedding" if name == TABLE else "linear",
            seen.dense_objective(name),
            unseen.dense_objective(name),
        )
        for name in names
    }
    tables: list[tuple[list[str], Callable[[dict[str, Layer]], Iterable[list[str]]]]] = [
        (
            ["layer", "ρ", "svd", "wide", "sum, in turn", "sum, together", "mirrored", "balanced", "default"],
            single_layers,
        ),
        (["layer", "ρ", "one input factor", "three"], attention),
        (["ρ", "svd", "wide", "default"], word_pieces),
    ]
    for header, rows in tables:
        print(markdown_table(header, list(rows(layers))), flush=True)
        print()


if __name__ == "__main__":
    main()
