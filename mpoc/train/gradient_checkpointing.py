"""Gradient checkpointing: activations are recomputed in the backward pass, not stored (Chen et al. 2016).

Stored are the inputs of blocks: of the modules of a ModuleList, of about √n runs of modules of a Sequential
of n, or of the children of a network that has neither.  The price is a second forward pass.  Dropout draws
the same again.  Buffers that a module updates (running statistics of batch norm) are updated once:
recomputing works on copies.  Networks of transformers use their own implementation, which knows of their
caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpoc.errors import UsageError

Undo = Callable[[], None]


def enable_gradient_checkpointing(network: nn.Module) -> Undo:
    """Let ``network`` recompute activations in the backward pass.

    Returns:
        A function that disables it again.

    Raises:
        UsageError: the network is a single layer.
    """
    if getattr(network, "supports_gradient_checkpointing", False) and not _has_running_statistics(network):
        own: Any = network
        own.activation_checkpointing_enable()
        undo_own: Undo = own.activation_checkpointing_disable
        return undo_own
    lists = _outermost_lists(network)
    chains = [module for module in lists if isinstance(module, nn.Sequential)]
    blocks = [block for module in lists if module not in chains for block in _trained(module)]
    if not lists:
        blocks = _trained(network)
    if not chains and not blocks:
        raise UsageError(f"--gradient-checkpointing: {type(network).__name__} is one layer, not several")
    for chain in chains:
        chain.forward = _in_runs(chain)  # type: ignore[method-assign]
    for block in blocks:
        block.forward = _recomputed(block.forward, [block])

    def undo() -> None:
        for module in (*chains, *blocks):
            module.__dict__.pop("forward", None)

    return undo


def _outermost_lists(module: nn.Module) -> list[nn.Module]:
    """Every outermost ModuleList or plain Sequential of at least two trained modules."""
    plain = type(module).forward is nn.Sequential.forward
    if (isinstance(module, nn.ModuleList) or plain) and len(_trained(module)) > 1:
        return [module]
    return [inner for child in module.children() for inner in _outermost_lists(child)]


def _trained(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if any(p.requires_grad for p in child.parameters())]


def _has_running_statistics(network: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in network.modules())


def _recomputed(forward: Callable[..., Any], modules: list[nn.Module]) -> Callable[..., Any]:
    """Wrap ``forward``, which calls ``modules``, so that its activations are recomputed."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _copied_buffers(modules)

    def run(*values: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*values, **named)
        return checkpoint(forward, *values, use_reentrant=False, context_fn=contexts, **named)

    return run


def _in_runs(chain: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The forward of a Sequential, recomputed in runs of modules."""

    def forward(x: Tensor) -> Tensor:
        modules = list(chain)  # read at every call, since FSDP replaces them
        longest = math.ceil(len(modules) / math.ceil(math.sqrt(len(modules))))
        for start in range(0, len(modules), longest):
            part = modules[start : start + longest]
            x = _recomputed(nn.Sequential(*part).forward, part)(x)
        return x

    return forward


@contextmanager
def _copied_buffers(modules: list[nn.Module]) -> Iterator[None]:
    """Discard what this context writes to the buffers."""
    owners = [owner for module in modules for owner in module.modules() if owner._buffers]
    kept = [dict(owner._buffers) for owner in owners]
    for owner in owners:
        for name, value in owner._buffers.items():
            owner._buffers[name] = None if value is None else value.clone()
    try:
        yield
    finally:
        for owner, buffers in zip(owners, kept, strict=True):
            owner._buffers.update(buffers)
