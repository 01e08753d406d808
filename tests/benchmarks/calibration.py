"""What the benchmarks of calibration share: networks as ``mpoc compress`` and as whitened SVD leave them."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mpoc
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.recipe import Recipe
from mpoc.compression.run_context import RunContext
from mpoc.compression.source import open_source
from mpoc.compression.write import make_job, write_compressed
from mpoc.runtime.device import choose_device

WHITENED = "whitened SVD"
METHODS: dict[str, tuple[str | None, bool, bool]] = {  # form, calibrates, refines
    "mpoc, weights alone": (None, False, False),
    "mpoc, weights alone --form svd": ("svd", False, False),
    WHITENED: (None, False, False),
    "mpoc --calibrate": (None, True, False),
    "mpoc --calibrate --form svd": ("svd", True, False),
    "mpoc --calibrate --refine": (None, True, True),
}


class Compressor:
    """One network compressed by every method; it is run on the calibration data once for all budgets.

    Args:
        checkpoint: dense.
        arch: its network.
        layers: patterns of those that are compressed.
        request: on what to calibrate.
        moments: of its layers, as :func:`second_moments` has them.
    """

    def __init__(
        self, checkpoint: Path, arch: str, layers: list[str], request: CalibrationRequest,
        moments: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self._checkpoint, self._arch, self._layers = checkpoint, arch, tuple(layers)
        self._request, self._moments = request, moments
        self._context = RunContext(choose_device("cpu"))
        self._statistics: CalibrationStatistics | None = None

    def compressed(self, method: str, ratio: float, dense: nn.Module) -> tuple[nn.Module, float]:
        """The network in evaluation mode, and its ρ over all selected layers."""
        if method == WHITENED:
            return whitened(dense, self._moments, self._layers, ratio), ratio
        form, calibrates, refines = METHODS[method]
        recipe = Recipe(ratio=ratio, form=form, layers=self._layers)
        opened = open_source(self._checkpoint, recipe, self._arch, calibrates)
        if calibrates and self._statistics is None:
            start = time.perf_counter()
            self._statistics = opened.statistics(self._request, self._context)
            print(f"calibration pass: {time.perf_counter() - start:.0f} s", flush=True)
        if self._statistics is not None:
            self._statistics.refines = refines
        statistics = self._statistics if calibrates else None
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "compressed.safetensors"
            job = make_job(opened, opened.recipe, opened.plan(opened.recipe), self._context, statistics)
            done = write_compressed(job, out)
            return mpoc.load(out).eval(), done.manifest.rho_selected


def _rows(module: nn.Module, given: Tensor) -> Tensor:
    """What is multiplied by the weight as a matrix: (rows, inputs)."""
    if isinstance(module, nn.Conv2d):
        size, padding, stride = module.kernel_size, module.padding, module.stride
        assert not isinstance(padding, str)
        return nn.functional.unfold(given, size, padding=padding, stride=stride).transpose(1, 2).flatten(0, 1)
    return given.flatten(0, -2)


@torch.no_grad()
def second_moments(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Σ x xᵀ (inputs, inputs) of every linear layer and convolution, float64."""
    sums: dict[str, Any] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = _rows(module, args[0])
            sums[name] = sums.get(name, 0) + (rows.T @ rows).double()

        return add

    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_pre_hook(hook(name)) for name, m in layers]
    for batch in batches:
        network(batch)
    for handle in handles:
        handle.remove()
    return sums


@torch.no_grad()
def whitened(
    network: nn.Module, moments: dict[str, Tensor], layers: Iterable[str], ratio: float
) -> nn.Module:
    """Every chosen layer by SVD of W S, S Sᵀ the moment of its inputs in the dense network (SVD-LLM)."""
    network = copy.deepcopy(network)
    for name, moment in moments.items():
        if not any(fnmatch(name, pattern) for pattern in layers):
            continue
        weight: Any = network.get_submodule(name).weight
        matrix = weight.double().flatten(1)
        identity = torch.eye(len(moment), dtype=torch.float64)
        root = torch.linalg.cholesky(moment / moment.diagonal().mean() + 1e-6 * identity)
        left, values, right = torch.linalg.svd(matrix @ root, full_matrices=False)
        rank = int(ratio * matrix.numel() / sum(matrix.shape))
        low = (left[:, :rank] * values[:rank]) @ right[:rank]
        weight.copy_(torch.linalg.solve_triangular(root, low, upper=False, left=False).view(weight.shape))
    return network
