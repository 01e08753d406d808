"""Where transformers puts the tensors of a checkpoint: its own renamings and conversions tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class Names:
    """Of one network."""

    def __init__(self, model: PreTrainedModel, conversions: list[Any]) -> None:
        self.state: dict[str, Tensor] = model.state_dict()
        self._prefix: str = model.base_model_prefix
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The name in the network, with or without the base model's prefix, and a conversion's pattern."""
        found = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
        if found[0] not in self.state and name in self.state:
            return name, None
        return found

    def in_model(self, name: str) -> str:
        """The name in the network."""
        return self._renamed(name)[0]

    def converter(self, name: str) -> WeightConverter | None:
        """What would convert the weight while it is loaded."""
        target, pattern = self._renamed(name)
        if target not in self.state:
            return None
        return next((entry for entry in self._converters if pattern in entry.source_patterns), None)

    def saved(self, name: str) -> str:
        """The name in a directory that the network is saved to: the prefix is there if the network has it."""
        renamed, _ = rename_source_key(name, self._renamings, self._converters)
        target, prefix = self.in_model(name), f"{self._prefix}."
        if target == prefix + renamed:
            return prefix + name
        return name.removeprefix(prefix) if renamed == prefix + target else name


def places(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Stored tensor → its name in a loaded network; without those that loading converts, not only renames."""
    found = Names(model, getattr(model, "_weight_conversions", None) or [])
    return {name: found.in_model(name) for name in names if found.converter(name) is None}
