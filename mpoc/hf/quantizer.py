"""``import mpoc.hf`` lets transformers load what ``mpoc compress`` wrote.

    import mpoc.hf
    model = AutoModel.from_pretrained("bert-mpo")

transformers meets ``"quant_method": "mpo"`` in config.json and asks the quantizer registered here.  While the
network is still on the meta device, the quantizer swaps every compressed module for its counterpart with
cores; from there the cores are parameters like any other: they load from shards, move, train, tie and save.
Where a stored weight belongs in a network is transformers' own knowledge, and is taken from there.

A directory saved by ``save_pretrained`` gets the guard of a compressed one: without this import it does not
load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io.hub_directory import GUARD, GUARD_KEY, config_format, cores_of
from mpoc.io.manifest import FORMAT, ORDERED_FORMAT, core_prefix
from mpoc.io.manifest_reader import MAYBE_LATER, SAVED_AGAIN, check_format
from mpoc.nn.adopt import adopt_everywhere, unstack
from mpoc.tensor_networks.structure import Structure

# The conversions of expert weights that are undone here: one matrix an expert, or several below each other.
_STACKING = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


try:
    from transformers import __version__ as _version

    if tuple(map(int, _version.split(".")[:2])) < (5, 23):
        raise ImportError(f"found transformers {_version}")
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from mpoc.hf.names import Names
except ImportError as error:
    raise ImportError(
        f"mpoc.hf needs transformers 5.23 or later ({error}): pip install 'mpoc[hf]'"
    ) from error


@register_quantization_config("mpo")
@dataclass
class MpoConfig(QuantizationConfigMixin):
    """``quantization_config`` in the config.json of a compressed directory."""

    quant_method: str = "mpo"  # type: ignore[assignment]  # transformers lists only its own methods
    format: int = field(init=False)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # a weight's name → its cores' shapes

    def __post_init__(self) -> None:
        self.format = config_format(self.layers)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The checked configuration.

        Raises:
            MpocError: it has another format, or is damaged.
        """
        check_format(config_dict.get("format"), Path("config.json"), (FORMAT, ORDERED_FORMAT))
        layers = config_dict.get("layers")
        if not isinstance(layers, dict) or config_dict.keys() - {"quant_method", "format", "layers"}:
            said = "config.json: damaged quantization_config (no layers, or unknown keys)"
            raise MpocError(said, MAYBE_LATER)
        for name, layer in layers.items():
            cores_of(name, layer)
        config = cls(layers=layers)
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer("mpo")
class MpoQuantizer(HfQuantizer):
    """What transformers asks while it loads, trains and saves a network with cores."""

    requires_calibration = True  # so that transformers takes compressed directories only, no dense ones
    quantization_config: MpoConfig

    def __init__(self, quantization_config: MpoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._cores: dict[str, list[Tensor]] = {}  # of each swapped weight, by its name in the network
        self._targets: dict[str, str] = {}  # the names in quantization_config → those in the network
        self._unstacked: set[str] = set()  # targets of the conversions that are undone
        self._spared: set[str] = set()  # modules that transformers does not initialise
        self._other_sizes: list[WeightRenaming] = []

    def is_serializable(self) -> bool:
        """Cores save as they load."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Cores are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """``Trainer`` may train them without adapters."""
        return True

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Take the guard out: this is asked before the weights are looked up."""
        if getattr(config, GUARD_KEY, None) == GUARD:
            delattr(config, GUARD_KEY)
        return config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device map that leaves weights on disk, or on the CPU beside an accelerator.

        Raises:
            MpocError: it does.
        """
        device_map = kwargs.get("device_map")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise MpocError(
                f"device_map places weights on {', '.join(sorted(places))}, but cores cannot be offloaded",
                'device_map="cpu", or accelerators only',
            )

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """transformers' own, without those that are undone."""
        kept = [entry for entry in weight_conversions if entry.target_patterns[0] not in self._unstacked]
        return [*self._other_sizes, *kept]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Swap modules, while everything is on the meta device."""
        layers = self.quantization_config.layers
        conversions = get_model_conversion_mapping(model)
        self._unstack_experts(model, conversions)
        names = Names(model, self.update_weight_conversions(conversions))
        targets = {name: names.in_model(name) for name in layers}
        stored = {names.in_model(name) for name in _stored_names(kwargs.get("checkpoint_files") or ())}
        ties = _declared_ties(model)
        for name, target in targets.items():
            dense = names.state.get(target)
            structure, shapes = cores_of(name, layers[name])
            if dense is None:
                continue  # another head's: transformers lists its tensors as unexpected
            if tuple(dense.shape) != structure.shape:
                # transformers says that sizes differ, or starts anew where it was told to ignore it.
                core = re.escape(f"{core_prefix(name)}.0")
                self._other_sizes.append(WeightRenaming(f"^{core}$", target))
                continue
            tied = _tied_to(target, model.all_tied_weights_keys) - stored - set(targets.values())
            self._swap(model, [target, *sorted(tied)], structure, shapes)
        if layers and not (self._cores or self._other_sizes):
            raise MpocError(
                f"{model.config.name_or_path}: none of its {len(layers)} compressed layers "
                f"({next(iter(layers))}, …) is in a {type(model).__name__}"
            )
        _tie_cores(model, ties, self._cores)
        kept = {name: target for name, target in targets.items() if target in self._cores}
        self._targets = {names.saved(name): target for name, target in kept.items()}
        self.quantization_config = MpoConfig(layers={names.saved(name): layers[name] for name in kept})

    def _unstack_experts(self, model: PreTrainedModel, conversions: list[Any]) -> None:
        """Where compressed weights would be stacked while loading, hold them one by one.

        Raises:
            MpocError: a compressed weight would be converted in any other way.
        """
        names = Names(model, conversions)
        for name in self.quantization_config.layers:
            converter = names.converter(name)
            if converter is None or converter.target_patterns[0] in self._unstacked:
                continue
            head, _, weight = converter.target_patterns[0].rpartition(".")
            single = re.compile(rf"{re.escape(head)}\.\*\.(\w+)\.weight")
            found = [single.fullmatch(pattern) for pattern in converter.source_patterns]
            sources = tuple(match[1] for match in found if match)
            steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
            if len(sources) < len(found) or steps not in _STACKING:
                raise MpocError(
                    f"{model.config.name_or_path}: transformers makes {', '.join(converter.target_patterns)} "
                    f"of {name!r} while loading, which it cannot do with cores",
                    f"mpoc expand {model.config.name_or_path}",
                )
            for path, module in list(model.named_modules()):
                if f".{path}".endswith(f".{head.lstrip('.')}") and weight in module._parameters:
                    unstack(module, weight, sources)
                    self._spare(model, path)
            self._unstacked.add(converter.target_patterns[0])

    def _swap(
        self, model: PreTrainedModel, names: list[str], structure: Structure, shapes: list[tuple[int, ...]]
    ) -> None:
        """Cores, still empty, in the place of a weight, by all its names."""
        cores = [torch.empty(shape, device="meta") for shape in shapes]
        try:
            adopt_everywhere(model, names, cores, structure)
        except ValueError as error:
            raise MpocError(f"{model.config.name_or_path}: {names[0]!r}: {error}") from error
        for name in names:
            self._cores[name] = cores
            self._spare(model, name.rpartition(".")[0])

    def _spare(self, model: PreTrainedModel, path: str) -> None:
        """Keep a module from being initialised: dense weights would be built only to be filled at random."""
        vars(model.get_submodule(path))["_is_hf_initialized"] = True
        self._spared.add(path)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check that every core came from the files.

        Raises:
            MpocError: one did not.
        """
        for path in sorted(self._spared):
            for name, parameter in model.get_submodule(path).named_parameters(path):
                if not getattr(parameter, "_is_hf_initialized", False):
                    raise MpocError(f"{model.config.name_or_path}: tensor {name!r} is missing")
        self._cores.clear()
        conversions = getattr(model, "_weight_conversions", None) or []
        kept = [entry for entry in conversions if entry not in self._other_sizes]
        vars(model).update(_weight_conversions=kept, is_quantized=False)  # quantized: no .half(), no .float()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, Any]]:
        """Before saving: note the dtype that the cores have by now, and that an older manifest is void."""
        for name, target in self._targets.items():
            core = model.get_parameter(f"{core_prefix(target)}.0")
            self.quantization_config.layers[name]["dtype"] = str(core.dtype).removeprefix("torch.")
        return None, {SAVED_AGAIN: "transformers"}


def _stored_names(files: Iterable[str]) -> Iterator[str]:
    for file in files:
        with safe_open(file, "pt") as tensors:
            yield from tensors.keys()


def _tied_to(name: str, ties: dict[str, str]) -> set[str]:
    """All other names of the weight ``name``; ``ties`` says of which weight each alias is one."""
    first = ties.get(name, name)
    return {first, *(alias for alias, source in ties.items() if source == first)} - {name}


def _declared_ties(model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """For each network within the network, by its path: alias → first, both names within it."""
    models = (entry for entry in model.named_modules() if isinstance(entry[1], PreTrainedModel))
    return {path: module.get_expanded_tied_weights_keys(all_submodels=False) for path, module in models}


def _tie_cores(
    model: PreTrainedModel, ties: dict[str, dict[str, str]], cores: dict[str, list[Tensor]]
) -> None:
    """Where tied weights now have the same cores, tie these; where one has cores of its own, tie nothing."""
    for path, pairs in ties.items():
        kept: dict[str, str] = {}
        for alias, first in pairs.items():
            mine, other = (cores.get(f"{path}.{name}".lstrip(".")) for name in (alias, first))
            if mine is None and other is None:
                kept[alias] = first
            elif mine is other:
                kept[core_prefix(alias)] = core_prefix(first)
        if kept != pairs:
            vars(model.get_submodule(path))["_tied_weights_keys"] = kept
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


_to_diff_dict = PreTrainedConfig.to_diff_dict


def _with_guard(config: PreTrainedConfig) -> dict[str, Any]:
    """What is saved as config.json: transformers drops the guard on saving, here it comes back."""
    values = _to_diff_dict(config)
    if (values.get("quantization_config") or {}).get("quant_method") == "mpo":
        values[GUARD_KEY] = GUARD
    return values


PreTrainedConfig.to_diff_dict = _with_guard  # type: ignore[method-assign,assignment]
