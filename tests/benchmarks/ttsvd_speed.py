"""TT-SVD beside tensorly, tensorly-torch and torchTT: seconds and error, in one process.

    pip install tensorly tensorly-torch torchTT safetensors packaging
    python tests/benchmarks/ttsvd_speed.py [--threads 1] [--minilm DIR]

Every method gets the same float32 matrix, the same factors and the same cap on the bonds, and is
asked for cores (D_left, J, I, D_right) of the row-major matrix; one contraction, timed for none of
them, rebuilds the matrix to measure the relative Frobenius error. mpoc's time includes what it does
beyond the cores: the balanced gauge, the entropies, and its own measurement of the error. tensorly
is run with its exact and with its randomised SVD, since the fastest peer is the one to compare
with. Its third, symeig_svd, is left out: it forms the Gram matrix of the longer side of an
unfolding, which is 275 GB at (8,8,8,8)^2.

Matrices:

- gaussian: independent entries, so that every unfolding has a flat spectrum (hard to truncate);
- power law: singular values 1/k of the matrix, random orthogonal factors;
- power law, unfolding: singular values 1/k of the *middle unfolding*, where truncation bites (the
  one above is nearly flat there, because interleaving the indices mixes the singular vectors);
- MiniLM: the first intermediate weight of all-MiniLM-L6-v2 (``--minilm``, 1536x384 only).

The peers take minutes at 4096x4096; ``--structures``, ``--kinds`` and ``--methods`` choose less.
"""

import argparse
import gc
import importlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarking import markdown_table, require_file
from torch import Tensor

Factors = tuple[int, ...]
Cores = list[Tensor]  # each (D_left, J, I, D_right)
MINILM_TENSOR = "encoder.layer.0.intermediate.dense.weight"


@dataclass(frozen=True)
class Structure:
    """Output and input factors of a matrix (prod J, prod I)."""

    output_factors: Factors
    input_factors: Factors

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.output_factors), math.prod(self.input_factors)


STRUCTURES = {
    "4096x4096 (8,8,8,8)^2": Structure((8, 8, 8, 8), (8, 8, 8, 8)),
    "4096x4096 (16,16,16)^2": Structure((16, 16, 16), (16, 16, 16)),
    "4096x4096 (64,64)^2": Structure((64, 64), (64, 64)),
    "1536x384 (4,4,4,4,6)(4,4,4,3,2)": Structure((4, 4, 4, 4, 6), (4, 4, 4, 3, 2)),
}


def run_ours(matrix: Tensor, structure: Structure, bond: int) -> Cores:
    from mpoc.tensor_networks.fit.truncation import Truncation
    from mpoc.tensor_networks.fit.tt_svd import tt_svd
    from mpoc.tensor_networks.structure import make_structure

    factors = (structure.output_factors, structure.input_factors)
    fit = tt_svd(matrix, make_structure("linear", structure.shape, factors=factors), Truncation(bond))
    return list(fit.form.cores)


def run_tensorly(matrix: Tensor, structure: Structure, bond: int, svd: str) -> Cores:
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    tensorly.set_backend("pytorch")
    tensor = matrix.reshape(structure.output_factors + structure.input_factors)
    rank = [1, *[bond] * (len(structure.output_factors) - 1), 1]
    return list(tensor_train_matrix(tensor, rank, svd=svd, random_state=0).factors)


def run_tensorly_torch(matrix: Tensor, structure: Structure, bond: int) -> Cores:
    import tltorch

    shape = (structure.output_factors, structure.input_factors)
    operator = tltorch.TensorizedTensor.new(shape, rank=bond, factorization="BlockTT")
    operator.init_from_matrix(matrix)
    return [factor.detach() for factor in operator.factors]


def run_torchtt(matrix: Tensor, structure: Structure, bond: int) -> Cores:
    import torchtt

    tensor = matrix.reshape(structure.output_factors + structure.input_factors)
    sites = list(zip(structure.output_factors, structure.input_factors, strict=True))
    return list(torchtt.TT(tensor, shape=sites, eps=1e-12, rmax=bond).cores)


@dataclass(frozen=True)
class Method:
    """A TT-SVD to time, and the package that must be there for it."""

    package: str
    run: Callable[[Tensor, Structure, int], Cores]


def with_svd(svd: str) -> Method:
    return Method("tensorly", lambda matrix, s, bond: run_tensorly(matrix, s, bond, svd))


METHODS = {
    "mpoc": Method("mpoc", run_ours),
    "tensorly truncated_svd": with_svd("truncated_svd"),
    "tensorly randomized_svd": with_svd("randomized_svd"),
    "tensorly-torch": Method("tltorch", run_tensorly_torch),
    "torchTT": Method("torchtt", run_torchtt),
}


def gaussian(structure: Structure) -> Tensor:
    """Independent normal entries (N_y, N_x)."""
    return torch.randn(structure.shape)


def power_law(rows: int, columns: int) -> Tensor:
    """A matrix (rows, columns) with singular values 1/k and random orthogonal factors."""
    rank = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, rank))
    right, _ = torch.linalg.qr(torch.randn(columns, rank))
    return (left / torch.arange(1, rank + 1)) @ right.T


def power_law_matrix(structure: Structure) -> Tensor:
    """Singular values 1/k of the matrix (N_y, N_x)."""
    return power_law(*structure.shape)


def power_law_unfolding(structure: Structure) -> Tensor:
    """Singular values 1/k of the middle unfolding of the interleaved tensor, as (N_y, N_x)."""
    outputs, inputs = structure.output_factors, structure.input_factors
    sites = [j * i for j, i in zip(outputs, inputs, strict=True)]
    n = len(sites)
    unfolding = power_law(math.prod(sites[: n // 2]), math.prod(sites[n // 2 :]))
    interleaved = [size for pair in zip(outputs, inputs, strict=True) for size in pair]
    order = [*range(0, 2 * n, 2), *range(1, 2 * n, 2)]
    return unfolding.reshape(interleaved).permute(order).reshape(structure.shape).contiguous()


KINDS = {
    "gaussian": gaussian,
    "power law": power_law_matrix,
    "power law, unfolding": power_law_unfolding,
}


def read_minilm(directory: Path) -> Tensor:
    """The weight (1536, 384) of MiniLM's first intermediate layer."""
    from safetensors import safe_open

    path = require_file(directory / "model.safetensors", "MiniLM weights")
    with safe_open(path, framework="pt") as file:
        names = [name for name in sorted(file.keys()) if name.endswith(MINILM_TENSOR)]
        if not names:
            raise SystemExit(f"error: {path} holds no tensor named {MINILM_TENSOR}")
        return file.get_tensor(names[0]).float()


def always(matrix: Tensor) -> Callable[[Structure], Tensor]:
    """A maker of this one matrix, whatever the structure."""

    def make(structure: Structure) -> Tensor:
        return matrix

    return make


def to_matrix(cores: Cores) -> Tensor:
    """Contract cores (D_left, J, I, D_right) to the matrix (N_y, N_x), row-major."""
    result = cores[0][0]  # (J, I, D)
    for core in cores[1:]:
        result = torch.einsum("yxa,ajib->yjxib", result, core)
        rows, outputs, columns, inputs, bond = result.shape
        result = result.reshape(rows * outputs, columns * inputs, bond)
    return result[..., 0]


def relative_error(matrix: Tensor, cores: Cores) -> float:
    """Frobenius norm of the difference over that of the matrix, summed in float64."""
    difference = to_matrix(cores).sub_(matrix)
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (difference, matrix)]
    return (norms[0] / norms[1]).item()


@dataclass(frozen=True)
class Measurement:
    """One method on one matrix."""

    seconds: float
    error: float


def measure(method: Method, matrix: Tensor, s: Structure, bond: int, repeat: int) -> Measurement:
    """Best wall-clock seconds of `repeat` runs, and the error of the last one."""
    best = math.inf
    for _ in range(repeat):
        gc.collect()
        start = time.perf_counter()
        cores = method.run(matrix, s, bond)
        best = min(best, time.perf_counter() - start)
    largest = max(core.shape[-1] for core in cores)
    if largest > bond:
        raise SystemExit(f"error: a bond of {largest} is above the cap of {bond}: not comparable")
    return Measurement(best, relative_error(matrix, cores))


def rows_of(title: Sequence[str], results: dict[str, Measurement]) -> list[list[str]]:
    """A table row for each method; ours is also set against the fastest peer."""
    ours = results.get("mpoc")
    peers = {name: result for name, result in results.items() if name != "mpoc"}
    fastest = min(peers, key=lambda name: peers[name].seconds, default=None)
    rows = []
    for name, result in results.items():
        compared = peers.get(fastest if name == "mpoc" and fastest else name)
        time_ratio = f"{ours.seconds / compared.seconds:.3f}" if ours and compared else ""
        error_ratio = f"{ours.error / compared.error:.4f}" if ours and compared else ""
        label = f"{name} (ratios: to {fastest})" if name == "mpoc" and fastest else name
        numbers = [f"{result.seconds:.3f}", f"{result.error:.6f}", time_ratio, error_ratio]
        rows.append([*title, label, *numbers])
    return rows


def warm_up(methods: Sequence[str]) -> None:
    """Import each package and run each method once on a small matrix, outside the clock."""
    small = Structure((4, 4), (4, 4))
    for name in methods:
        package = METHODS[name].package
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"error: {name} needs the package {package}: {error}\n"
                f"hint: install it, or leave {name} out with --methods"
            ) from error
        METHODS[name].run(torch.randn(16, 16), small, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bond", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each peer (default 1)")
    parser.add_argument("--repeat-ours", type=int, default=3, help="runs of mpoc (default 3)")
    parser.add_argument("--minilm", type=Path, metavar="DIR", help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES), default=[*STRUCTURES])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=[*KINDS])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=[*METHODS])
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=r"(?s).*C\+\+ implementation not available")
    minilm = read_minilm(arguments.minilm) if arguments.minilm else None
    warm_up(arguments.methods)

    rows = []
    for name in arguments.structures:
        structure = STRUCTURES[name]
        makers: dict[str, Callable[[Structure], Tensor]] = {k: KINDS[k] for k in arguments.kinds}
        if minilm is not None and structure.shape == tuple(minilm.shape):
            makers["MiniLM"] = always(minilm)
        for kind, make in makers.items():
            torch.manual_seed(0)
            matrix = make(structure)
            results = {}
            for method in arguments.methods:
                repeat = arguments.repeat_ours if method == "mpoc" else arguments.repeat
                results[method] = measure(METHODS[method], matrix, structure, arguments.bond, repeat)
            rows += rows_of([name, kind], results)
    header = ["structure", "matrix", "method", "s", "relative error", "ours / its s"]
    print(f"bond {arguments.bond}, float32, {arguments.threads} thread(s), torch {torch.__version__}")
    print(markdown_table([*header, "ours / its error"], rows))


if __name__ == "__main__":
    main()
