"""Map names in a checkpoint to names in a transformers network, by the renamings of transformers itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mpoc.nn.adopt import unstack

# The conversions of expert weights that can be undone: one matrix an expert, or several below each other.
_STACKING = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


class Names:
    """Maps tensor names between a checkpoint, a network, and a directory that the network is saved to.

    Args:
        model: the network, as transformers made it.
        conversions: the renamings and converters that transformers applies while it loads ``model``.
    """

    def __init__(self, model: PreTrainedModel, conversions: list[Any]) -> None:
        self.state: dict[str, Tensor] = model.state_dict()
        self._prefix: str = model.base_model_prefix
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The name in the network and the source pattern of the converter that applies, or None."""
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
        if target not in self.state and name in self.state:
            return name, None
        return target, pattern

    def in_model(self, name: str) -> str:
        """The name in the network."""
        return self._renamed(name)[0]

    def converter(self, name: str) -> WeightConverter | None:
        """The converter that applies to the tensor while it is loaded, or None."""
        target, pattern = self._renamed(name)
        if target not in self.state:
            return None
        return next((entry for entry in self._converters if pattern in entry.source_patterns), None)

    def saved(self, name: str) -> str:
        """The name in a directory that the network is saved to, with the prefix if the network has it."""
        renamed, _ = rename_source_key(name, self._renamings, self._converters)
        target, prefix = self.in_model(name), f"{self._prefix}."
        if target == prefix + renamed:
            return prefix + name
        return name.removeprefix(prefix) if renamed == prefix + target else name


def places(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Stored name → name in a loaded network, for the tensors that loading renames but does not convert."""
    mapping = Names(model, getattr(model, "_weight_conversions", None) or [])
    return {name: mapping.in_model(name) for name in names if mapping.converter(name) is None}


def unstack_experts(model: PreTrainedModel, converter: WeightConverter) -> list[str] | None:
    """Replace the weights that a converter stacks while loading by one linear layer for each stored matrix.

    Returns:
        The paths of the changed modules; None where the converter does anything else.
    """
    head, _, weight = converter.target_patterns[0].rpartition(".")
    single = re.compile(rf"{re.escape(head)}\.\*\.(\w+)\.weight")
    matches = [single.fullmatch(pattern) for pattern in converter.source_patterns]
    sources = tuple(match[1] for match in matches if match)
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    if len(sources) < len(matches) or steps not in _STACKING:
        return None
    paths = []
    for path, module in list(model.named_modules()):
        if f".{path}".endswith(f".{head.lstrip('.')}") and weight in module._parameters:
            unstack(module, weight, sources)
            paths.append(path)
    return paths


def hold_as_stored(model: PreTrainedModel, names: Iterable[str]) -> None:
    """In a loaded network, hold experts matrix by matrix where the stored tensors ``names`` are such."""
    conversions = getattr(model, "_weight_conversions", None) or []
    mapping = Names(model, conversions)
    found = {id(one): one for name in names if (one := mapping.converter(name)) is not None}
    undone = {key for key, converter in found.items() if unstack_experts(model, converter) is not None}
    if undone:
        vars(model)["_weight_conversions"] = [entry for entry in conversions if id(entry) not in undone]
