"""Inspect a network: kinds of its weights, tied names, differences from a file, sizes of convolution inputs.

The sizes come from a run on one sample.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError
from mpoc.io.keyed_store import Scratch
from mpoc.nn.conv_map import geometry_of
from mpoc.tensor_networks.geometry import Geometry

_Model = TypeVar("_Model", bound=nn.Module)
# Why a tensor of a checkpoint is left unchanged whose network is known.
UNUSED = "not used by the network"


def kinds_of(model: nn.Module) -> dict[str, tuple[str | None, bool]]:
    """Name of each tensor → (kind, transposed) as its module tells; None: it is no linear map."""
    kinds: dict[str, tuple[str | None, bool]] = dict.fromkeys(tensors_of(model), (None, False))
    return kinds | dict(_kinds(model))


def _kinds(model: nn.Module) -> Iterator[tuple[str, tuple[str, bool]]]:
    for place, module in model.named_modules(remove_duplicate=False):
        prefix = f"{place}." if place else ""
        for name, parameter in module.named_parameters(recurse=False):
            kind = _kind(module, name, parameter)
            if kind is not None:
                yield prefix + name, (kind, _is_transposed(module, kind))


def _is_transposed(module: nn.Module, kind: str) -> bool:
    """Whether a module stores its weight as (inputs, outputs); transformers' experts say so themselves."""
    if kind == "experts":
        return bool(getattr(module, "is_transposed", False))
    return type(module).__name__ == "Conv1D"


def _kind(module: nn.Module, name: str, parameter: Tensor) -> str | None:
    if name == "weight" and _is_embedding(module, parameter):
        return "embedding"
    if name == "weight" and isinstance(module, nn.modules.conv._ConvNd):
        return f"conv{parameter.dim() - 2}d"
    if parameter.dim() == 3 and "expert" in type(module).__name__.lower() and "bias" not in name:
        return "experts"
    if "norm" in type(module).__name__.lower() and not isinstance(module, nn.Linear):
        return None  # it scales elementwise, whatever its shape
    if parameter.dim() == 2 and ("weight" in name) and not name.startswith("bias"):
        return "linear"
    return None


def _is_embedding(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a module looks rows up: torch's embeddings, and classes of that name, as I-BERT's."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    named = "embedding" in type(module).__name__.lower()
    return named and parameter.dim() == 2 and not isinstance(module, nn.Linear)


def same_tensor(model: nn.Module) -> dict[str, set[str]]:
    """For each name, all names of the same parameter or buffer."""
    places: dict[int, set[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        places.setdefault(id(tensor), set()).add(name)
    return {name: names for names in places.values() for name in names}


def copy_sharing_parameters(model: _Model) -> _Model:
    """A copy with buffers of its own; its parameters share the model's memory until :func:`set_tensors`."""
    shared = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, dict[int, Any](shared))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those that no state dict has too; a tied one once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give parameters and buffers other memory, as they are on their devices and in their dtypes.

    On an error, as of a device without room for them, none is changed.

    Args:
        model: whose tensors are set; what shares memory with them is left as it is.
        tensors: by name in the model.

    Returns:
        What they held before, to set again.
    """
    state = state_of(model)
    new = {name: tensor.detach().to(state[name]).contiguous() for name, tensor in tensors.items()}
    before = {name: state[name].data for name in new}
    for name, tensor in new.items():
        change: Any = state[name].set_  # counts as a change, as setting ``.data`` does not
        change(tensor)
    return before


def compute_in_float32(model: nn.Module, scratch: Scratch | None = None) -> bool:
    """Make half-precision tensors float32; parameters in files, mapped into memory, if there is a scratch.

    Returns:
        Whether there were such parameters.
    """
    halves = [p for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    files = scratch or Scratch()
    for parameter in halves:
        parameter.data = files.mapped(parameter.data.float())
    if halves:
        model.float()
    return bool(halves)


def unsaved_buffers(model: nn.Module) -> set[str]:
    """Buffers that the network makes itself. Older checkpoints hold some, such as BERT's ``position_ids``."""
    return {name for name, _ in model.named_buffers()} - model.state_dict().keys()


def tensors_of(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """The tensors of the network's state dict; with ``keep_vars`` the parameters themselves."""
    state = model.state_dict(keep_vars=keep_vars)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def differing_names(model: nn.Module, offered: Collection[str]) -> tuple[list[str], list[str]]:
    """The names only in the model and the names only in ``offered``; any alias of a tied name counts."""
    state, known = tensors_of(model), same_tensor(model)
    # Batch norms saved before torch 0.4.1 do not count their batches; torch accepts that too.
    expected = [name for name in state if not name.endswith("num_batches_tracked")]
    missing = [n for n in expected if n not in offered and known.get(n, set()).isdisjoint(offered)]
    ignored = unsaved_buffers(model)
    return missing, [name for name in offered if name not in state and name not in ignored]


def forbid_save_pretrained(model: nn.Module) -> None:
    """Make ``save_pretrained`` raise on a network that was given cores in memory, and on its submodels.

    transformers would write no description of the cores, and the directory would load with random weights.
    """
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            vars(module)["save_pretrained"] = _refuse_to_save


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise MpocError(
        "save_pretrained cannot save a network that mpoc.load or mpoc.compress gave cores",
        "run mpoc compress on a saved directory, import mpoc.hf, and load the output with from_pretrained",
    )


def trace_geometries(
    model: nn.Module, names: list[str], input_shape: tuple[int, ...] | None
) -> dict[str, Geometry]:
    """Trace the geometry of each convolution with one input of zeros, in eval mode.

    Args:
        model: the network; it is not changed.
        names: the kernels' names, e.g. ``["conv5_1.weight"]``.
        input_shape: shape of the input, batch axis included, e.g. (1, 3, 32, 32).

    Raises:
        UsageError: there is no input shape, the network fails on it, or a convolution is not reached, is
            reached with inputs of several sizes, or cannot be represented as one map.
    """
    if input_shape is None:
        raise UsageError('conv="map" needs the shape of one input, as input_shape=(1, 3, 32, 32)')
    seen: dict[nn.Module, set[tuple[int, ...]]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        axes = module.get_parameter("weight").dim() - 2
        seen.setdefault(module, set()).add(tuple([*inputs, *named.values()][0].shape[-axes:]))

    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules.values()]
    try:
        _run(model, input_shape)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _geometry(name, module, seen.get(module, set())) for name, module in modules.items()}


def _run(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    first: Tensor = next(model.parameters())
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(input_shape, dtype=first.dtype, device=first.device))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"input_shape {tuple(input_shape)}: {type(model).__name__} fails: {error}"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the network in eval mode, and then restore each module's mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _geometry(name: str, module: nn.Module, sizes: set[tuple[int, ...]]) -> Geometry:
    layer = name.removesuffix(".weight")
    hint = f"leave it alone: exclude=[{layer!r}]"
    if not sizes:
        raise UsageError(f"layer {layer}: the network did not reach it, so its input size is unknown", hint)
    if len(sizes) > 1:
        raise UsageError(
            f"layer {layer}: gets inputs of several sizes, {sorted(sizes)}, so it is not one map", hint
        )
    try:
        return geometry_of(module, *sizes)
    except UsageError as error:
        raise UsageError(f"layer {layer}: {error}", hint) from error
