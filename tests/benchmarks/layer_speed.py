"""MPOLinear beside nn.Linear and tensorly-torch: milliseconds and peak memory, in one process.

    pip install tensorly tensorly-torch
    python tests/benchmarks/layer_speed.py [--device cuda --dtype bfloat16] [--step | --embedding | --packed]

A 4096x4096 layer in 2, 3 and 4 sites at bond 4 and 32, batches of 1, 32 and 512. tensorly-torch gets the
same cores in both its implementations (``factorized`` contracts, ``reconstructed`` rebuilds the weight) and
must give the same outputs. Every round calls each method once or more, one after the other, and the median
over the rounds is printed, so that other work on the machine hits all of them alike.

- default: forward under ``torch.inference_mode``; ``mpoc, dense`` is MPOLinear that holds its dense weight;
- ``--step``: forward and backward of a training step, gradients of input and parameters; and the peak of
  what torch allocates during it, by torch's profiler (tensors of the layer and its input not counted);
- ``--embedding``: a lookup of 128 rows in a 30522x384 MPOEmbedding beside rebuilding the table;
- ``--packed``: a 4096x4096 layer in few bits, dense and svd, loaded with ``weights="packed"``, beside
  nn.Linear and torch's own kernels: seconds to load, megabytes held and beyond that at most during a forward
  pass, and milliseconds of it, each the least of several repeats.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarking import markdown_table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mpoc
from mpoc.nn import adopt, use_weights
from mpoc.tensor_networks.structure import Structure, make_structure

SIDE = 4096
FACTORS = {2: (64, 64), 3: (16, 16, 16), 4: (8, 8, 8, 8)}
BONDS = (4, 32)
BATCHES = (1, 32, 512)
STORAGES: dict[str, dict[str, Any]] = {
    "grid, 4 bits": {"bits": 4},
    "grid, 8 bits": {"bits": 8},
    "coded, 4 bits": {"bits": 4, "storage": "coded"},
}
Method = Callable[[Tensor], Tensor]


def random_cores(structure: Structure, bond: int) -> list[Tensor]:
    """Cores with every inner bond at ``bond``, scaled so that outputs are of order one."""
    sites = list(zip(structure.output_factors, structure.input_factors, strict=True))
    bonds = [1, *[bond] * (len(sites) - 1), 1]
    return [
        torch.randn(a, j, i, b) / (a * i) ** 0.5
        for (j, i), a, b in zip(sites, bonds[:-1], bonds[1:], strict=True)
    ]


def ours(cores: list[Tensor], structure: Structure) -> nn.Module:
    holder = nn.Sequential(nn.Linear(structure.inputs, structure.outputs))
    adopt(holder[0], "weight", [nn.Parameter(core.clone()) for core in cores], structure)
    return holder[0]


def tensorly_torch(cores: list[Tensor], structure: Structure, implementation: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tltorch

    weight = tltorch.BlockTT(
        [nn.Parameter(core.clone()) for core in cores],
        tensorized_shape=(structure.output_factors, structure.input_factors),
        rank=(*(core.shape[0] for core in cores), 1),
    )
    layer: nn.Module = tltorch.FactorizedLinear(
        structure.input_factors,
        structure.output_factors,
        factorization=weight,
        implementation=implementation,
    )
    return layer


def layers(sites: int, bond: int, dense: bool) -> dict[str, nn.Module]:
    """The methods for one structure, with the same weight and bias."""
    structure = make_structure("linear", (SIDE, SIDE), factors=(FACTORS[sites], FACTORS[sites]))
    cores = random_cores(structure, bond)
    found = {"nn.Linear": nn.Linear(SIDE, SIDE), "mpoc": ours(cores, structure)}
    if dense:
        found["mpoc, dense"] = ours(cores, structure)
    for implementation in ("factorized", "reconstructed"):
        found[f"tensorly-torch {implementation}"] = tensorly_torch(cores, structure, implementation)
    for layer in found.values():
        with torch.no_grad():
            layer.get_parameter("bias").copy_(found["nn.Linear"].get_parameter("bias"))
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_each(
    calls: Mapping[str, Callable[[], object]], budget: float, device: torch.device
) -> dict[str, float]:
    """Median seconds of each call over rounds that interleave them, for about ``budget`` seconds in all."""
    repeats = {}
    for name, call in calls.items():  # warm-up, and how often to call within a round
        call()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        repeats[name] = max(1, int(2e-3 / (time.perf_counter() - start)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(taken[next(iter(calls))]) < 5:
        for name, call in calls.items():
            call()  # what the one before left in the caches is not this one's fault
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            synchronize(device)
            taken[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_allocated(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch holds at most during a call beyond what it held before, by its profiler."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with (
        warnings.catch_warnings(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        warnings.simplefilter("ignore")
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [
            event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"
        ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def step_of(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward; gradients are made anew each time, as after ``zero_grad``."""

    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        layer(x).sum().backward()

    return step


def forward_of(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.inference_mode():
            layer(x)

    return forward


def prepare(found: dict[str, nn.Module], device: torch.device, dtype: torch.dtype, step: bool) -> None:
    for name, layer in found.items():
        layer.to(device, dtype).train(step)
        if name == "mpoc, dense":
            use_weights(layer.eval(), "dense")


def check_equal(found: dict[str, nn.Module], x: Tensor, dtype: torch.dtype) -> None:
    """All methods but the dense one give the same outputs."""
    with torch.no_grad():
        expected = found["mpoc"](x).float()
        for name, layer in found.items():
            if name == "nn.Linear":
                continue
            error = ((layer(x).float() - expected).norm() / expected.norm()).item()
            if error > (1e-4 if dtype == torch.float32 else 3e-2):
                raise SystemExit(f"error: {name} differs by {error}")


def rows(arguments: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    header: list[str] = []
    table: list[list[str]] = []
    for bond in arguments.bonds:
        for sites in arguments.sites:
            found = layers(sites, bond, not arguments.step)
            prepare(found, device, dtype, arguments.step)
            for batch in arguments.batches:
                x = torch.randn(batch, SIDE, device=device, dtype=dtype, requires_grad=arguments.step)
                check_equal(found, x, dtype)
                make = step_of if arguments.step else forward_of
                calls = {name: make(layer, x) for name, layer in found.items()}
                taken = seconds_each(calls, arguments.seconds, device)
                peaks = {}
                for name, call in calls.items() if arguments.step else ():
                    for tensor in (x, *found[name].parameters()):
                        tensor.grad = None  # freeing it in the step would hide as much of the peak
                    peaks[name] = peak_allocated(call, device)
                best = min(value for name, value in taken.items() if name.startswith("tensorly"))
                row = [f"D={bond} n={sites}", str(batch)]
                row += [f"{value * 1e3:.3f}" for value in taken.values()]
                row += [f"{taken['nn.Linear'] / taken['mpoc']:.1f}", f"{best / taken['mpoc']:.1f}"]
                header = ["layer", "batch", *taken, "dense / ours", "tensorly-torch best / ours"]
                if arguments.step:
                    row += [f"{peaks[name] / 1e6:.2f}" for name in peaks if name != "nn.Linear"]
                    header += [f"MB {name}" for name in peaks if name != "nn.Linear"]
                else:
                    row.append(f"{taken['mpoc, dense'] / taken['nn.Linear']:.2f}")
                    header.append("mpoc, dense / dense")
                table.append(row)
                print(" | ".join(row), flush=True) if arguments.progress else None
    return header, table


def embedding_rows(arguments: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """A lookup of 128 rows through the cores, and by building the table first."""
    from mpoc.tensor_networks.forms.mpo import MPO

    device = torch.device(arguments.device)
    table = []
    for bond in (4, 32, 64):
        structure = make_structure("embedding", (30522, 384))
        cores = [core.to(device) for core in random_cores(structure, bond)]
        layer = nn.Sequential(nn.Embedding(30522, 384, device=device))
        adopt(layer[0], "weight", [nn.Parameter(core) for core in cores], structure)
        ids = torch.randint(30522, (128,), device=device)

        def rebuild(
            cores: list[Tensor] = cores, ids: Tensor = ids, structure: Structure = structure
        ) -> Tensor:
            return nn.functional.embedding(ids, MPO(cores, structure).to_weight())

        calls = {"lookup": forward_of(layer, ids), "rebuild": forward_of_function(rebuild)}
        taken = seconds_each(calls, arguments.seconds, device)
        peak = peak_allocated(calls["lookup"], device)
        factors = (
            "x".join(map(str, structure.output_factors)) + " / " + "x".join(map(str, structure.input_factors))
        )
        table.append(
            [
                f"D={bond} {factors}",
                f"{taken['lookup'] * 1e3:.3f}",
                f"{taken['rebuild'] * 1e3:.1f}",
                f"{taken['rebuild'] / taken['lookup']:.0f}",
                f"{peak / 1e6:.2f}",
                f"{sum(core.numel() for core in cores) * 4 / 1e6:.2f}",
            ]
        )
    return [
        "30522x384",
        "lookup ms",
        "rebuild ms",
        "rebuild / lookup",
        "peak MB of a lookup",
        "cores MB",
    ], table


def forward_of_function(function: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            function()

    return call


def least(call: Callable[[], object], repeats: int = 7) -> float:
    """Least seconds of a call; fewer repeats of a slow one."""
    taken: list[float] = []
    while len(taken) < repeats and sum(taken) < 5:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


class TorchKernel(nn.Module):
    """The product of torch's int8 (scale by row) or int4 (groups of 64) kernel, for random codes."""

    codes: Tensor
    scales: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        codes = torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8)
        if bits == 4:
            codes = torch._convert_weight_to_int4pack_for_cpu(codes.remainder(16).int(), 1)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.rand(SIDE) if bits == 8 else torch.rand(SIDE // 64, SIDE, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 8:
            return torch._weight_int8pack_mm(x, self.codes, self.scales)
        return torch._weight_int4pack_mm_for_cpu(x, self.codes, 64, self.scales)


def packed_layers(folder: Path, dtype: torch.dtype) -> dict[str, tuple[Callable[[], nn.Module], bool]]:
    """How each layer is made or loaded, and whether from a file of mpoc."""
    dense = nn.Sequential(nn.Linear(SIDE, SIDE, dtype=dtype)).eval()
    kernels = {f"torch's int{bits} kernel": TorchKernel(bits).to(dtype) for bits in (8, 4)}
    found: dict[str, tuple[Callable[[], nn.Module], bool]] = {
        "nn.Linear": (lambda: dense, False),
        **{name: (partial(kernels.__getitem__, name), False) for name in kernels},
    }
    goals: dict[str, dict[str, Any]] = {"dense": {}, "svd, rank 512": {"bond": 512, "form": "svd"}}
    for form, goal in goals.items():
        for name, stored in STORAGES.items():
            network = copy.deepcopy(dense)
            mpoc.compress(network, **goal, **stored)
            path = folder / f"{form} {name}.safetensors"
            mpoc.save(network, path)
            found[f"mpoc, {form}, {name}"] = (partial(loaded, path, dtype), True)
    return found


def loaded(path: Path, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(SIDE, SIDE, dtype=dtype))
    return mpoc.load(path, network.to_empty(device="cpu"), weights="packed")


def packed_rows(arguments: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device, dtype = torch.device("cpu"), getattr(torch, arguments.dtype)
    table = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, (make, is_file) in packed_layers(Path(folder), dtype).items():
            seconds = least(make, 3)
            layer = make()
            held = {id(tensor): tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers())}
            x = {batch: torch.randn(batch, SIDE, dtype=dtype) for batch in arguments.batches}
            taken = [least(partial(layer, x[batch])) for batch in arguments.batches if batch < 512]
            if taken[-1] < 1 or min(arguments.batches) >= 512:
                taken += [least(partial(layer, x[batch])) for batch in arguments.batches if batch >= 512]
            peak = peak_allocated(partial(layer, x[min(x)]), device)
            row = [name, f"{seconds:.2f}" if is_file else "", f"{sum(held.values()) / 1e6:.1f}"]
            times = [f"{value * 1e3:.1f}" for value in taken]
            table.append([*row, f"{peak / 1e6:.1f}", *times, *[""] * (len(x) - len(times))])
            print(" | ".join(table[-1]), flush=True) if arguments.progress else None
    batches = [f"ms, batch {batch}" for batch in arguments.batches]
    return ["layer", "load s", "MB held", "MB beyond, batch 1", *batches], table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--step", action="store_true", help="forward and backward, and peak memory")
    parser.add_argument("--embedding", action="store_true", help="the embedding's table instead")
    parser.add_argument("--packed", action="store_true", help="a layer in few bits instead")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring for each row")
    parser.add_argument("--sites", type=int, nargs="+", default=list(FACTORS))
    parser.add_argument("--bonds", type=int, nargs="+", default=list(BONDS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--progress", action="store_true", help="print each row as soon as it is measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    measured = embedding_rows if arguments.embedding else packed_rows if arguments.packed else rows
    header, table = measured(arguments)
    print(markdown_table(header, table))


if __name__ == "__main__":
    main()
