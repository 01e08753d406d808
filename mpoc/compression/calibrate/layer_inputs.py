"""Observe the inputs of layers through hooks, as the rows that each weight is multiplied by.

Linear layers take rows along the last axis; padding tokens are left out where the axes in front of it are
those of the attention mask.  A convolution's row is its patch, taps outermost: entry tap · C_in + channel,
taps row-major over the kernel, as :func:`mpoc.tensor_networks.forms.layout.to_matrix` orders a kernel.  An
embedding's rows are one-hot, so they are counted.

Hooks are removed, and the network is left as it was, whatever happens during a pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpoc.compression.calibrate.taps import calling_taps, tap_of
from mpoc.errors import MpocError
from mpoc.models.introspection import same_tensor
from mpoc.runtime.device import derived_seed

_EXPERTS = "_experts_implementation"  # of transformers' configurations
_AT_ONCE = 1 << 22  # numbers of patches that are copied at a time


@contextmanager
def hooked() -> Iterator[list[RemovableHandle]]:
    """A list for handles of hooks, which are removed at the end."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """During a pass, no parameter requires a gradient, and no keys and values are cached.

    Experts run one by one, and taps (:mod:`mpoc.compression.calibrate.taps`) are called.
    """
    modules = (module for module in network.modules() if not isinstance(module, nn.ParameterList))
    assert not any(module.training for module in modules), "calibration is in evaluation mode"
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    config: Any = getattr(network, "config", None)
    cached = getattr(config, "use_cache", None)
    configs = {id(c): c for m in network.modules() if hasattr(c := getattr(m, "config", None), _EXPERTS)}
    ways = {key: getattr(one, _EXPERTS) for key, one in configs.items()}
    try:
        for one in configs.values():
            setattr(one, _EXPERTS, "eager")
        for parameter in trained:
            parameter.requires_grad_(False)
        if cached:
            config.use_cache = False
        with calling_taps(network):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        if cached:
            config.use_cache = cached
        for key, way in ways.items():
            setattr(configs[key], _EXPERTS, way)


def first_argument(args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """The first argument of a call, by position or by name; None where there is none."""
    return next((value for value in (*args, *named.values())), None)


def device_of(network: nn.Module) -> torch.device:
    """The device of the network's first parameter."""
    return next(network.parameters()).device


@dataclass(frozen=True)
class Sample:
    """A random part of a convolution's positions, a function of shapes and seed."""

    positions: int  # an example, on average
    seed: int


@dataclass(frozen=True)
class Positions:
    """Which positions of convolutions are used."""

    most: int | None = None  # an example, on average; None: all
    seed: int = 0

    def of(self, batch: int) -> Sample | None:
        """The sample in batch number ``batch``, the same in every pass."""
        return None if self.most is None else Sample(self.most, derived_seed(self.seed, "positions", batch))


ALL = Positions()


class Inputs(ABC):
    """How the rows that a weight multiplies are taken from a module's input."""

    features: int  # N_x, of one group

    @property
    def have_one_moment(self) -> bool:
        """Whether rows are vectors (N_x,) that all outputs multiply."""
        return False

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Layers of equal keys take the same rows from the same input."""

    @abstractmethod
    def count(self, given: Tensor, mask: Tensor | None) -> int:
        """The number of rows in an input."""

    @abstractmethod
    def blocks(self, given: Tensor, mask: Tensor | None, sample: Sample | None) -> Iterator[Tensor]:
        """Rows (n, N_x), or (groups, n, N_x), in blocks of bounded memory."""

    @abstractmethod
    def outputs(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """The layer's output, or a gradient there, as rows (rows, N_y)."""


@dataclass(frozen=True)
class LinearInputs(Inputs):
    """Inputs (…, N_x) of a linear layer."""

    features: int

    @property
    def have_one_moment(self) -> bool:
        """All outputs multiply a row."""
        return True

    @property
    def key(self) -> Hashable:
        """All linear layers take the same rows."""
        return "linear"

    def count(self, given: Tensor, mask: Tensor | None) -> int:
        """The number of tokens without padding, or of all rows along the last axis."""
        return len(_real_rows(given, mask))

    def blocks(self, given: Tensor, mask: Tensor | None, sample: Sample | None) -> Iterator[Tensor]:
        """All rows (n, N_x) at once; ``sample`` is for convolutions only."""
        yield _real_rows(given, mask)

    def outputs(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """Rows of the output, without padding."""
        return _real_rows(values, mask)


@dataclass(frozen=True)
class EmbeddingInputs(Inputs):
    """Indices (…) of an embedding."""

    features: int  # number of rows of the table

    @property
    def key(self) -> Hashable:
        """Embeddings of one size take the same rows."""
        return "embedding", self.features

    def count(self, given: Tensor, mask: Tensor | None) -> int:
        """The number of indices without padding."""
        return len(_real_rows(given[..., None], mask))

    def blocks(self, given: Tensor, mask: Tensor | None, sample: Sample | None) -> Iterator[Tensor]:
        """No blocks: one-hot rows are counted (:meth:`counts`)."""
        return iter(())

    def counts(self, given: Tensor, mask: Tensor | None) -> Tensor:
        """How often each index occurs (features,)."""
        return torch.bincount(_real_rows(given[..., None], mask).flatten(), minlength=self.features)

    def outputs(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """One row for each index without padding."""
        return _real_rows(values, mask)


@dataclass(frozen=True)
class ConvInputs(Inputs):
    """Inputs (n, C_in, …) of a convolution."""

    features: int  # taps · C_in / groups
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]  # as torch.nn.functional.pad takes it
    padding_mode: str  # likewise

    @property
    def have_one_moment(self) -> bool:
        """Whether there are no groups."""
        return self.groups == 1

    @classmethod
    def of(cls, module: Any) -> ConvInputs:
        """The geometry of a convolution."""
        taps = int(torch.tensor(module.kernel_size).prod())
        padding = tuple(module._reversed_padding_repeated_twice)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return cls(
            taps * module.in_channels // module.groups, module.groups, tuple(module.kernel_size),
            tuple(module.stride), tuple(module.dilation), padding, mode,
        )  # fmt: skip

    @property
    def key(self) -> Hashable:
        """Convolutions of one geometry take the same rows."""
        return self

    def count(self, given: Tensor, mask: Tensor | None) -> int:
        """The number of output positions in all examples."""
        return self._patches(given).shape[: 1 + len(self.kernel)].numel()

    def blocks(self, given: Tensor, mask: Tensor | None, sample: Sample | None) -> Iterator[Tensor]:
        """Patches (n, taps · C_in), or (groups, n, taps · C_in / groups) where there are groups."""
        patches = self._patches(given)
        axes = len(self.kernel)
        places = patches.shape[: 1 + axes]
        if sample is not None and sample.positions < places[1:].numel():
            generator = torch.Generator().manual_seed(sample.seed)
            wanted = sample.positions * places[0]
            chosen = torch.randperm(places.numel(), generator=generator)[:wanted].sort().values
            for part in chosen.split(self._at_once()):
                index = torch.unravel_index(part.to(given.device), tuple(places))
                yield self._rows(patches[index], 1)
            return
        for part in patches.split(max(1, self._at_once() // places[1:].numel())):
            yield self._rows(part, 1 + axes)

    def outputs(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """Rows (n · positions, C_out)."""
        batched = values if values.dim() == 2 + len(self.kernel) else values[None]
        return batched.movedim(1, -1).flatten(0, -2)

    def _at_once(self) -> int:
        return max(1, _AT_ONCE // (self.features * self.groups))

    def _patches(self, given: Tensor) -> Tensor:
        """A view (n, positions…, taps…, C_in) of the padded input, channel last."""
        batched = given if given.dim() == 2 + len(self.kernel) else given[None]
        if any(self.padding):
            batched = F.pad(batched, self.padding, mode=self.padding_mode)
        view = batched.movedim(1, -1).contiguous()
        axes = len(self.kernel)
        for axis in range(axes):
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            view = view.unfold(1 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
        return view.movedim(1 + axes, -1)

    def _rows(self, patches: Tensor, places: int) -> Tensor:
        """(places…, taps…, C_in) → (n, taps · C_in), or with groups in front."""
        count = patches.shape[:places].numel()
        if self.groups == 1:
            return patches.reshape(count, self.features)
        apart = patches.reshape(count, -1, self.groups, patches.shape[-1] // self.groups)
        return apart.permute(2, 0, 1, 3).reshape(self.groups, count, self.features)


@dataclass(frozen=True)
class TransposedInputs(Inputs):
    """Inputs (n, C_in, …) of a transposed convolution, whose kernel as a matrix is (C_in, taps · C_out).

    The matrix takes a position to the patch of outputs around it.
    """

    features: int  # C_in
    patches: ConvInputs  # of the outputs

    @classmethod
    def of(cls, module: Any) -> TransposedInputs:
        """The geometry of a transposed convolution without groups."""
        taps = int(torch.tensor(module.kernel_size).prod())
        padding = tuple(side for p in reversed(module.padding) for side in (p, p))
        patches = ConvInputs(
            taps * module.out_channels, 1, tuple(module.kernel_size), tuple(module.stride),
            tuple(module.dilation), padding, "constant",
        )  # fmt: skip
        return cls(module.in_channels, patches)

    @property
    def key(self) -> Hashable:
        """All take the same rows."""
        return "transposed"

    def count(self, given: Tensor, mask: Tensor | None) -> int:
        """The number of positions in all examples."""
        return len(self._rows(given))

    def blocks(self, given: Tensor, mask: Tensor | None, sample: Sample | None) -> Iterator[Tensor]:
        """Positions (n, C_in), all at once."""
        yield self._rows(given)

    def outputs(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """The patch of outputs around each position (rows, taps · C_out)."""
        return torch.cat(list(self.patches.blocks(values, mask, None)))

    def _rows(self, given: Tensor) -> Tensor:
        batched = given if given.dim() == 2 + len(self.patches.kernel) else given[None]
        return batched.movedim(1, -1).flatten(0, -2)


def _is_masked(values: Tensor, mask: Tensor | None) -> bool:
    """Whether values belong to the mask's tokens: (n, T, …, width), or (n·T, width)."""
    if mask is None or mask.dim() != 2:
        return False
    flat = values.dim() == 2 and mask.shape[1] > 1 and len(values) == mask.numel()
    return flat or (values.dim() > 2 and values.shape[:2] == mask.shape)


def _real_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """(…, width) → (rows, width), without padding."""
    width = values.shape[-1]
    if mask is None or not _is_masked(values, mask):
        return values.reshape(-1, width)
    kept = mask.bool() if values.dim() > 2 else mask.bool().flatten()
    return values[kept].reshape(-1, width)


@dataclass(frozen=True)
class ObservedLayer:
    """A weight, the modules that multiply by it, and how its rows are taken."""

    name: str
    modules: tuple[str, ...]
    inputs: Inputs


def find_layer(network: nn.Module, name: str) -> ObservedLayer | str:
    """Find how the inputs of a weight are observed, or why they cannot be.

    Args:
        network: dense.
        name: of the weight as the network names it, e.g. ``"encoder.layer.0.output.dense.weight"``.

    Raises:
        MpocError: the network has no such weight.
    """
    known = same_tensor(network)
    if name not in known:
        raise MpocError(f"the network {type(network).__name__} has no weight {name!r}")
    modules: dict[int, tuple[str, Inputs]] = {}
    for alias in sorted(known[name], key=lambda other: (other != name, other)):
        path, _, own = alias.rpartition(".")
        module = network.get_submodule(path)
        tap = tap_of(module, own)
        inputs = _inputs(module) if own == "weight" else None
        if tap is not None:
            path, inputs = f"{path}.{tap}".lstrip("."), LinearInputs(module.get_parameter(own).shape[1])
        if inputs is None:
            return f"its inputs cannot be seen from outside a {type(module).__name__}"
        modules.setdefault(id(network.get_submodule(path)), (path, inputs))
    places = list(modules.values())
    if len({type(inputs) for _, inputs in places}) > 1:
        return f"tied: {' and '.join(path for path, _ in places)} use it in different ways"
    return ObservedLayer(name, tuple(path for path, _ in places), places[0][1])


def unseen_weights(network: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the weights (N_y, N_x) that no module of their own multiplies by."""
    owners = {name: network.get_submodule(name.rpartition(".")[0]) for name in names}
    return [
        name
        for name, module in owners.items()
        if network.get_parameter(name).dim() == 2
        and ((not name.endswith(".weight") and name != "weight") or _inputs(module) is None)
    ]


def _inputs(module: nn.Module) -> Inputs | None:
    if isinstance(module, nn.Linear):
        return LinearInputs(module.in_features)
    if type(module).__name__ == "Conv1D":  # of transformers: weight (N_x, N_y)
        return LinearInputs(module.get_parameter("weight").shape[0])
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvInputs.of(module)
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    if transposed and module.groups == 1:
        return TransposedInputs.of(module)
    if isinstance(module, nn.Embedding):
        return EmbeddingInputs(module.num_embeddings)
    return None


def total_rows(layer: ObservedLayer, output: Tensor, mask: Tensor | None) -> int:
    """The number of rows in a layer's output."""
    return len(layer.inputs.outputs(output.detach(), mask))


def as_rows(layer: ObservedLayer, gradient: Tensor, mask: Tensor | None) -> Tensor:
    """A gradient at the layer's output as rows (rows, N_y), float32 or float64."""
    rows = layer.inputs.outputs(gradient, mask)
    return rows if rows.dtype == torch.float64 else rows.float()
