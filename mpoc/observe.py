"""Run one sample through a network to see at which input size each convolution works."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpoc.errors import UsageError
from mpoc.geometry import Geometry
from mpoc.nn.conv_map import geometry_of


def observe_geometries(
    model: nn.Module, names: list[str], input_shape: tuple[int, ...] | None
) -> dict[str, Geometry]:
    """The geometry of each convolution while the network sees one input of zeros, in evaluation mode.

    Args:
        model: is left as it was.
        names: of the kernels, e.g. ``["conv5_1.weight"]``.
        input_shape: of the input, batch axis included, e.g. (1, 3, 32, 32).

    Raises:
        UsageError: no input shape, the network does not take it, or a convolution is not reached, is
            reached with inputs of several sizes, or cannot be taken as one map.
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
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(input_shape, dtype=first.dtype, device=first.device))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"input_shape {tuple(input_shape)}: {type(model).__name__} fails: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _geometry(name: str, module: nn.Module, sizes: set[tuple[int, ...]]) -> Geometry:
    layer = name.removesuffix(".weight")
    hint = f"leave it alone: exclude=[{layer!r}]"
    if not sizes:
        raise UsageError(f"layer {layer}: the network did not reach it, so its input size is unknown", hint)
    if len(sizes) > 1:
        raise UsageError(f"layer {layer}: sees inputs of several sizes, {sorted(sizes)}: no one map", hint)
    try:
        return geometry_of(module, *sizes)
    except UsageError as error:
        raise UsageError(f"layer {layer}: {error}", hint) from error
