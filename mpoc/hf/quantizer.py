"""``import mpoc.hf`` lets transformers load what ``mpoc compress`` wrote.

    import mpoc.hf
    model = AutoModel.from_pretrained("bert-mpo")

transformers meets ``"quant_method": "mpo"`` in config.json and asks the quantizer registered here.  While the
network is still on the meta device, the quantizer swaps every compressed module for its counterpart with
cores. From then on the cores are ordinary parameters: they load from shards, move, train, tie and save. The
mapping from stored names to names in the network comes from transformers itself (``mpoc.hf.names``).

``save_pretrained`` writes the guard of a compressed directory again, so that the saved directory does not
load without this import.
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

from mpoc.errors import MpocError, command_line
from mpoc.io.coded_parts import codes_from_file, tensor_of
from mpoc.io.hub_directory import GUARD, GUARD_KEY, config_format, configured_layer
from mpoc.io.manifest import DENSE, CodedPart, LayerRecord, core_prefix
from mpoc.io.manifest_reader import CONFIG_FORMATS, MAYBE_LATER, SAVED_AGAIN, check_format
from mpoc.nn.adopt import adopt_everywhere
from mpoc.tensor_networks.structure import Structure

# Conversions that stack the experts' weights, and that are undone here: one matrix per expert, or several
try:
    from transformers import __version__ as _version

    if tuple(map(int, _version.split(".")[:2])) < (5, 23):
        raise ImportError(f"found transformers {_version}")
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from mpoc.hf.names import Names, unstack_experts
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
        """Check the configuration and make it.

        Raises:
            MpocError: the format is unknown, or the configuration is damaged.
        """
        check_format(config_dict.get("format"), Path("config.json"), CONFIG_FORMATS)
        layers = config_dict.get("layers")
        if not isinstance(layers, dict) or config_dict.keys() - {"quant_method", "format", "layers"}:
            raise MpocError(
                "config.json: damaged quantization_config (no layers, or unknown keys)", MAYBE_LATER
            )
        for name, layer in layers.items():
            configured_layer(name, layer)
        config = cls(layers=layers)
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer("mpo")
class MpoQuantizer(HfQuantizer):
    """Answers transformers while it loads, trains and saves a network with cores."""

    requires_calibration = True  # so that transformers takes compressed directories only, no dense ones
    quantization_config: MpoConfig

    def __init__(self, quantization_config: MpoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._cores: dict[str, list[Tensor]] = {}  # of each swapped weight, by its name in the network
        self._targets: dict[str, str] = {}  # the names in quantization_config → those in the network
        self._unstacked: set[str] = set()  # targets of the conversions that are undone
        self._spared: set[str] = set()  # modules that transformers does not initialise
        self._renamed: list[WeightRenaming] = []
        self._decoders: list[WeightConverter] = []
        self.damaged: list[MpocError] = []  # found while decoding

    def is_serializable(self) -> bool:
        """True: ``save_pretrained`` writes the cores as it writes any parameter."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: cores are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: ``Trainer`` may train the cores without adapters."""
        return True

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Remove the guard from ``config``; transformers calls this before it looks up the weights.

        Beside codes it must not take the dtype of the network from the first floats in the file.
        """
        stored = [entry["dtype"] for entry in self.quantization_config.layers.values() if "storage" in entry]
        if stored and getattr(config, "dtype", None) is None:
            config.dtype = getattr(torch, stored[0], None)
        if getattr(config, GUARD_KEY, None) == GUARD:
            delattr(config, GUARD_KEY)
        return config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device map that offloads weights.

        Raises:
            MpocError: the map places weights on disk, or on the CPU beside an accelerator.
        """
        device_map = kwargs.get("device_map")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise MpocError(
                f"device_map places weights on {', '.join(sorted(places))}, but cores cannot be offloaded",
                'device_map="cpu", or accelerators only',
            )

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """The conversions of transformers, without those that are undone here."""
        kept = [entry for entry in weight_conversions if entry.target_patterns[0] not in self._unstacked]
        return [*self._renamed, *self._decoders, *kept]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Give the compressed modules empty cores while the network is on the meta device."""
        layers = self.quantization_config.layers
        conversions = get_model_conversion_mapping(model)
        self._unstack_experts(model, conversions)
        names = Names(model, self.update_weight_conversions(conversions))
        records = {name: configured_layer(name, entry) for name, entry in layers.items()}
        parts = [part for record in records.values() for part in record.coded_parts]
        logical = {own: part.name for part in parts for own in part.file_names}
        files = _stored_names(kwargs.get("checkpoint_files") or ())
        stored = {names.in_model(logical.get(name, name)) for name in files}
        targets = {name: names.in_model(name) for name in layers}
        stored |= set(targets.values())
        targets = {name: self._first_name(model, name, target, stored) for name, target in targets.items()}
        ties = _declared_ties(model)
        for name, target in targets.items():
            dense = names.state.get(target)
            record = records[name]
            if dense is None:
                continue  # it belongs to another head; transformers lists its tensors as unexpected
            if record.form == DENSE:
                continue
            structure, shapes = record.structure, record.core_shapes
            if tuple(dense.shape) != structure.shape:
                # transformers reports the mismatch, or initialises the weight under ignore_mismatched_sizes.
                core = re.escape(f"{core_prefix(name)}.0")
                self._renamed.append(WeightRenaming(f"^{core}$", target))
                continue
            tied = _tied_to(target, model.all_tied_weights_keys)
            # Names that are not stored belong to the first one that is.
            first = model.all_tied_weights_keys.get(target, target)
            owner = first if first in stored else min(stored & {target, *tied}, default=target)
            aliases = sorted(tied - stored) if owner == target else []
            self._swap(model, [target, *aliases], structure, shapes)
        is_used = any(target in names.state for target in targets.values())
        if layers and not is_used:
            raise MpocError(
                f"{model.config.name_or_path}: none of its {len(layers)} compressed layers "
                f"({next(iter(layers))}, …) is in a {type(model).__name__}"
            )
        _tie_cores(model, ties, self._cores)
        # Saved under the names in the network where the renamings, taken back, would not bring cores home.
        before = len(self._renamed)
        saved = Names(model, self.update_weight_conversions(conversions))
        self._rename_cores(saved, targets)
        self._decode(Names(model, self.update_weight_conversions(conversions)), records, targets)
        moved = {entry.target_patterns[0] for entry in self._renamed[before:]}
        kept = {name: target for name, target in targets.items() if target in self._cores}
        saves = {n: t if f"{core_prefix(t)}." in moved else names.saved(n) for n, t in kept.items()}
        self._targets = {saves[name]: target for name, target in kept.items()}
        entries = {saves[name]: dict(layers[name]) for name in kept}
        for entry in entries.values():
            entry.pop("storage", None)  # the network holds floats, and is saved with them
        self.quantization_config = MpoConfig(layers=entries)

    def _decode(self, names: Names, records: dict[str, LayerRecord], targets: dict[str, str]) -> None:
        """Have transformers decode what is stored as codes while it loads them."""
        for name, record in records.items():
            place = targets[name]
            if place not in names.state and place not in self._cores:
                continue
            for number, part in enumerate(record.coded_parts):
                wanted = place if record.form == DENSE else f"{core_prefix(place)}.{number}"
                sources = [f"^{re.escape(names.renamed(own))}$" for own in part.file_names]
                decode: list[ConversionOps] = [_Decode(part, self)]
                self._decoders.append(WeightConverter(sources, wanted, decode, force_cpu=True))

    def _first_name(self, model: PreTrainedModel, name: str, target: str, stored: set[str]) -> str:
        """The name that other weights are tied to, where only one of theirs is stored; cores move there."""
        first = model.all_tied_weights_keys.get(target, target)
        if first == target or stored & ({first} | _tied_to(target, model.all_tied_weights_keys)):
            return target
        stored.symmetric_difference_update({target, first})
        return first

    def _rename_cores(self, names: Names, targets: dict[str, str]) -> None:
        """Bring cores to their targets where the renamings of transformers, made for weights, do not."""
        for name, target in targets.items():
            stored, wanted = core_prefix(name), core_prefix(target)
            if target in self._cores and names.in_model(f"{stored}.0") != f"{wanted}.0":
                self._renamed.append(WeightRenaming(f"^{re.escape(stored)}\\.", f"{wanted}."))

    def _unstack_experts(self, model: PreTrainedModel, conversions: list[Any]) -> None:
        """Hold compressed expert weights one by one where transformers would stack them while loading.

        Raises:
            MpocError: transformers would convert a compressed weight in any other way.
        """
        names = Names(model, conversions)
        for name in self.quantization_config.layers:
            converter = names.converter(name)
            if converter is None or converter.target_patterns[0] in self._unstacked:
                continue
            paths = unstack_experts(model, converter)
            if paths is None:
                raise MpocError(
                    f"{model.config.name_or_path}: transformers makes {', '.join(converter.target_patterns)} "
                    f"of {name!r} while loading, which it cannot do with cores",
                    command_line("mpoc", "expand", model.config.name_or_path),
                )
            for path in paths:
                self._spare(model, path)
            self._unstacked.add(converter.target_patterns[0])

    def _swap(
        self, model: PreTrainedModel, names: list[str], structure: Structure, shapes: list[tuple[int, ...]]
    ) -> None:
        """Replace a weight, under all its ``names``, by empty cores of these ``shapes``."""
        cores = [torch.empty(shape, device="meta") for shape in shapes]
        try:
            adopt_everywhere(model, names, cores, structure)
        except ValueError as error:
            raise MpocError(f"{model.config.name_or_path}: {names[0]!r}: {error}") from error
        for name in names:
            self._cores[name] = cores
            self._spare(model, name.rpartition(".")[0])

    def _spare(self, model: PreTrainedModel, path: str) -> None:
        """Keep transformers from initialising a module: that would build the dense weight at random.

        A module with buffers of its own is initialised, for these are computed then.
        """
        module = model.get_submodule(path)
        if not module._non_persistent_buffers_set:
            vars(module)["_is_hf_initialized"] = True
        self._spared.add(path)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check that every core was read from the files.

        Raises:
            MpocError: a core is missing, or codes are damaged.
        """
        if self.damaged:
            raise MpocError(f"{model.config.name_or_path}: {self.damaged[0]}")
        for path in sorted(self._spared):
            for name, parameter in model.get_submodule(path).named_parameters(path):
                if not getattr(parameter, "_is_hf_initialized", False):
                    raise MpocError(f"{model.config.name_or_path}: tensor {name!r} is missing")
        self._cores.clear()
        conversions = getattr(model, "_weight_conversions", None) or []
        own = {id(entry) for entry in (*self._renamed, *self._decoders)}
        kept = [entry for entry in conversions if id(entry) not in own]
        if not self.quantization_config.layers:  # all are plain weights now
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        vars(model).update(_weight_conversions=kept, is_quantized=False)  # quantized: no .half(), no .float()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, Any]]:
        """Before saving, record the cores' dtype and the metadata that voids an older manifest."""
        for name, target in self._targets.items():
            core = model.get_parameter(f"{core_prefix(target)}.0")
            self.quantization_config.layers[name]["dtype"] = str(core.dtype).removeprefix("torch.")
        return None, {SAVED_AGAIN: "transformers"}


class _Decode(ConversionOps):
    """Decode a part from the tensors of the file that hold its codes; :class:`WeightConverter` calls it."""

    def __init__(self, part: CodedPart, quantizer: MpoQuantizer) -> None:
        self._part = part
        self.hf_quantizer = quantizer  # by it transformers knows that it must not cast what is stored

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The part's values under its name in the network, in that tensor's dtype; zeros where damaged."""
        found = dict(zip(self._part.file_names, source_patterns, strict=True))
        tensors = {name: input_dict[pattern][0] for name, pattern in found.items() if pattern in input_dict}
        dtype = kwargs["model"].state_dict()[target_patterns[0]].dtype
        try:
            values = tensor_of(self._part, codes_from_file(self._part, tensors).values())
        except MpocError as error:
            self.hf_quantizer.damaged.append(error)
            values = torch.zeros(self._part.shape)
        return {target_patterns[0]: values.to(dtype)}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Decode:
        """Itself: transformers copies a converter for each tensor, and errors are collected in one list."""
        return self


def _stored_names(files: Iterable[str]) -> Iterator[str]:
    for file in files:
        with safe_open(file, "pt") as tensors:
            yield from tensors.keys()


def _tied_to(name: str, ties: dict[str, str]) -> set[str]:
    """All other names of the weight ``name``; ``ties`` maps each alias to the weight it is tied to."""
    first = ties.get(name, name)
    return {first, *(alias for alias, source in ties.items() if source == first)} - {name}


def _declared_ties(model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """Path of each submodel → the ties it declares, as alias → first name within the submodel."""
    models = (entry for entry in model.named_modules() if isinstance(entry[1], PreTrainedModel))
    return {path: module.get_expanded_tied_weights_keys(all_submodels=False) for path, module in models}


def _tie_cores(
    model: PreTrainedModel, ties: dict[str, dict[str, str]], cores: dict[str, list[Tensor]]
) -> None:
    """Tie the cores of tied weights that share them; drop the tie where only one of the weights has cores."""
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
    """The contents of config.json, with the guard that transformers drops on saving."""
    values = _to_diff_dict(config)
    if (values.get("quantization_config") or {}).get("quant_method") == "mpo":
        values[GUARD_KEY] = GUARD
    return values


PreTrainedConfig.to_diff_dict = _with_guard  # type: ignore[method-assign,assignment]
