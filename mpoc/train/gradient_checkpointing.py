"""Gradient checkpointing: activations are computed again in the backward pass, not kept (Chen et al. 2016).

Kept are the inputs of blocks: the modules of a ModuleList; of a Sequential of n about √n runs of modules;
where a network has neither, its children. The price is a second forward pass.  Dropout draws the same again.
What a module counts in its buffers (batch norm's running statistics) it counts once: recomputing works on
copies.  Networks of transformers do it their own way, which knows of their caches.
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
    """Let ``network`` recompute activations wherever it is trained.

    Returns:
        What makes it as it was.

    Raises:
        UsageError: it has no parts whose activations could be recomputed.
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
    """Every ModuleList, and Sequential that runs as such, of two trained modules or more, none in another."""
    plain = type(module).forward is nn.Sequential.forward
    if (isinstance(module, nn.ModuleList) or plain) and len(_trained(module)) > 1:
        return [module]
    return [found for child in module.children() for found in _outermost_lists(child)]


def _trained(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if any(p.requires_grad for p in child.parameters())]


def _has_running_statistics(network: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in network.modules())


def _recomputed(forward: Callable[..., Any], modules: list[nn.Module]) -> Callable[..., Any]:
    """``forward``, which calls ``modules``, with its activations recomputed."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _copied_buffers(modules)

    def run(*values: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*values, **named)
        return checkpoint(forward, *values, use_reentrant=False, context_fn=contexts, **named)

    return run


def _in_runs(chain: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The forward of a Sequential, one run of modules after another."""

    def forward(x: Tensor) -> Tensor:
        modules = list(chain)  # now: FSDP puts its own in their place
        longest = math.ceil(len(modules) / math.ceil(math.sqrt(len(modules))))
        for start in range(0, len(modules), longest):
            part = modules[start : start + longest]
            x = _recomputed(nn.Sequential(*part).forward, part)(x)
        return x

    return forward


@contextmanager
def _copied_buffers(modules: list[nn.Module]) -> Iterator[None]:
    """Whatever is written to the buffers in this context is forgotten after it."""
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
