"""Map names in a checkpoint to names in a transformers network, by the renamings of transformers itself.

:func:`fitting_class` finds the class of transformers that the tensors of a checkpoint fill completely: a
parameter without a tensor would keep its random initial value.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto

from mpoc.errors import MpocError
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

    def renamed(self, name: str) -> str:
        """The name that converters see, before any of them applies."""
        return rename_source_key(name, self._renamings, [])[0]

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
    sources = _stacked_sources(converter)
    if sources is None:
        return None
    paths = []
    for path, module in list(model.named_modules()):
        if f".{path}".endswith(f".{head.lstrip('.')}") and weight in module._parameters:
            unstack(module, weight, sources)
            paths.append(path)
    return paths


def _stacked_sources(converter: WeightConverter) -> tuple[str, ...] | None:
    """The matrices of an expert that a converter stacks; None where it does anything else."""
    head = converter.target_patterns[0].rpartition(".")[0]
    single = re.compile(rf"{re.escape(head)}\.\*\.(\w+)\.weight")
    matches = [single.fullmatch(pattern) for pattern in converter.source_patterns]
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    sources = tuple(match[1] for match in matches if match)
    return sources if len(sources) == len(matches) and steps in _STACKING else None


def hold_as_stored(model: PreTrainedModel, names: Iterable[str]) -> None:
    """In a loaded network, hold experts matrix by matrix where the stored tensors ``names`` are such."""
    conversions = getattr(model, "_weight_conversions", None) or []
    mapping = Names(model, conversions)
    found = {id(one): one for name in names if (one := mapping.converter(name)) is not None}
    undone = {key for key, converter in found.items() if unstack_experts(model, converter) is not None}
    if undone:
        vars(model)["_weight_conversions"] = [entry for entry in conversions if id(entry) not in undone]


@dataclass
class Filling:
    """How the tensors of a checkpoint fill a class of transformers."""

    model: PreTrainedModel  # on the meta device
    shapes: Mapping[str, tuple[int, ...]]  # of the stored tensors, by name

    def __post_init__(self) -> None:
        self.names = Names(self.model, get_model_conversion_mapping(self.model))
        self.targets = {name: self.names.in_model(name) for name in self.shapes}

    @cached_property
    def groups(self) -> dict[str, frozenset[str]]:
        """Each name in the network → all names of its tensor, declared ties included."""
        groups: dict[str, set[str]] = {}
        ties = self.model.all_tied_weights_keys
        first: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            source = first.setdefault(id(tensor), name)
            groups.setdefault(ties.get(name, ties.get(source, source)), set()).add(name)
        return {name: frozenset(group) for group in groups.values() for name in group}

    @cached_property
    def _absent(self) -> list[str]:
        """Tensors of the network that are neither stored nor tied to one that is."""
        stored = {place for name in self.targets for place in self._filled(name)}
        state = self.names.state
        return [
            n for n in state if stored.isdisjoint(self.groups[n]) and not n.endswith("num_batches_tracked")
        ]

    @cached_property
    def computed(self) -> set[str]:
        """Those that the class computes, as positions: transformers neither stores nor trains them."""
        patterns = self.model._keys_to_ignore_on_load_missing or ()
        trained = {name for name, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {n for n in self._absent if n not in trained and any(re.search(one, n) for one in patterns)}

    @property
    def missing(self) -> list[str]:
        """Tensors of the network that would keep a random value."""
        return [name for name in self._absent if name not in self.computed]

    def _filled(self, name: str) -> list[str]:
        """The tensors of the network that a stored one fills: several where loading splits it."""
        target, converter = self.targets[name], self.names.converter(name)
        patterns = converter.target_patterns if converter is not None else []
        own = next((pattern for pattern in patterns if pattern in target), "")
        return [target.replace(own, pattern) for pattern in patterns] if own else [target]

    @cached_property
    def unused(self) -> list[str]:
        """Stored tensors that the network does not have; buffers that it computes itself do not count."""
        own = {name for name, _ in self.model.named_buffers()}
        return [
            n for n, target in self.targets.items() if target not in self.names.state and target not in own
        ]

    @cached_property
    def problem(self) -> str:
        """Why the tensors cannot fill the network; "" where they do."""
        cls = type(self.model).__name__
        if self.missing:
            more = f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else ""
            return f"{cls} needs tensors that are not stored: {', '.join(self.missing[:3])}{more}"
        for name, target in self.targets.items():
            value = self.names.state.get(target)
            if value is None or self.names.converter(name) is not None:
                continue
            if tuple(value.shape) != tuple(self.shapes[name]):
                return f"tensor {name!r} is {tuple(self.shapes[name])}, {tuple(value.shape)} in a {cls}"
        return ""

    def is_kept(self, name: str) -> bool:
        """Whether cores can stand for a stored weight: it is loaded as it is, or stacked with others."""
        converter = self.names.converter(name)
        return converter is None or _stacked_sources(converter) is not None


def fitting_class(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> Filling:
    """The class that the tensors fill: the one that ``config`` names, or that which uses most of them.

    Raises:
        MpocError: no class can be filled.
    """
    architectures = config.architectures or []
    named = [getattr(transformers, name, None) for name in architectures]
    classes = [cls for cls in named if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]
    if named and not classes:
        raise MpocError(
            f"config.json names {architectures[0]}, which is no network of transformers",
            "make the network yourself: mpoc.load(DIRECTORY, model), or --arch file.py:factory",
        )
    fits = [_fit(cls, config, shapes) for cls in classes]
    for fit in fits:
        if not fit.problem:
            return fit
    others = [fit for fit in _fits_of_type(config, shapes) if not fit.problem]
    if not others:
        raise MpocError(fits[0].problem if fits else f"no class of {config.model_type} fits the tensors")
    return min(others, key=lambda fit: len(fit.unused))


def _fit(
    cls: type[PreTrainedModel], config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Filling:
    with torch.device("meta"), initialization.no_init_weights():
        return Filling(cls(copy.deepcopy(config)), shapes)


def _fits_of_type(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Filling]:
    """Every class that transformers has for this type of model, the body alone first."""
    auto = vars(modeling_auto)
    tables = [name for name in auto if re.fullmatch(r"MODEL_(FOR_\w+_)?MAPPING_NAMES", name)]
    if not getattr(config, "is_decoder", False):  # of an encoder's heads that have the same tensors
        tables.sort(key=lambda table: table == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    known = (auto[table].get(config.model_type) for table in tables)
    names = [name for entry in known if entry for name in ([entry] if isinstance(entry, str) else entry)]
    for name in dict.fromkeys(names):
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            try:
                yield _fit(cls, config, shapes)
            except (ValueError, TypeError, AttributeError, ImportError):
                continue  # a head that needs what this config does not say
