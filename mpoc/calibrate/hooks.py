"""Networks are watched through hooks, which go again whatever happens, and are left as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


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
def at_rest(network: nn.Module) -> Iterator[None]:
    """For the time of a pass no parameter asks for a gradient and transformers keeps no keys and values."""
    modules = (module for module in network.modules() if not isinstance(module, nn.ParameterList))
    assert not any(module.training for module in modules), "calibration is in evaluation mode"
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    config: Any = getattr(network, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        if cached:
            config.use_cache = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        if cached:
            config.use_cache = cached


def first_given(args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """The first argument of a call, by position or by name; None where there is none."""
    return next((value for value in (*args, *named.values())), None)


def device_of(network: nn.Module) -> torch.device:
    """Where its first parameter is."""
    return next(network.parameters()).device
