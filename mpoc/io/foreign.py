"""Name what cannot be compressed: quantised layouts, adapters, files and directories of other formats.

Each is refused by its own name, with the way to plain weights.  Tensor names, dtypes and configurations tell
the first two, the first bytes of a file and the names in a directory the others.  No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoc.errors import MpocError, command_line

if TYPE_CHECKING:
    from mpoc.io.safetensors_header import TensorInfo

_SOURCE = "compress the unquantised checkpoint that it was made from"
_DEQUANTIZE = (
    "in Python: AutoModelForCausalLM.from_pretrained(DIR, {}).{}save_pretrained(OUT), then compress OUT; "
    "or compress the unquantised checkpoint"
)
_TIMES_SCALE = "multiply each weight by its scale in float32 and save the product; or " + _SOURCE
_MERGE = "merge it into its base first: peft's merge_and_unload(), then save the model"
_FUSE = (
    "fuse it into its base first: pipe.load_lora_weights(FILE); pipe.fuse_lora(); pipe.save_pretrained(OUT)"
)
_PROMPT = "a prompt cannot be merged into weights: compress the base model, and keep the prompt beside it"


@dataclass(frozen=True)
class _Kind:
    """A layout or adapter, and the tensor names by which it is known."""

    name: str
    tensors: re.Pattern[str]
    hint: str

    @staticmethod
    def of(name: str, tensors: str, hint: str) -> _Kind:
        return _Kind(name, re.compile(tensors), hint)


_bitsandbytes = _DEQUANTIZE.format("device_map='auto'", "dequantize().")
_fp8 = _DEQUANTIZE.format("quantization_config=FineGrainedFP8Config(dequantize=True)", "")
_mxfp4 = _DEQUANTIZE.format("quantization_config=Mxfp4Config(dequantize=True)", "")
_compressed = _DEQUANTIZE.format("quantization_config=CompressedTensorsConfig(run_compressed=False)", "")
_mlx = "python -m mlx_lm convert --hf-path DIR --mlx-path OUT --dequantize, then compress OUT"

_OF_PEFT = (
    r"(fourierft|waveft)_spectrum|vblora_(vector_bank|logits_[AB])|randlora_(lambda|gamma|[AB])|hra_u|shira_weight|"
    r"c3a_kernel|road_(theta|alpha)|(bone|miss)_block"
)
# Side tensors of quantised weights, the more telling first.
_LAYOUTS = (
    _Kind.of("bitsandbytes, 4 bits", r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.", _bitsandbytes),
    _Kind.of("bitsandbytes, 8 bits", r"\.(SCB|weight_format)$", _bitsandbytes),
    _Kind.of("GPTQ", r"\.g_idx$", _SOURCE),
    _Kind.of("FP-Quant", r"\.dqweight$|\.(forward|backward)_hadamard_matrix$", _SOURCE),
    _Kind.of("GPTQ or AWQ", r"\.(qweight|qzeros|qscales)$", _SOURCE),
    _Kind.of("EXL2", r"\.q_(invperm|groups|scale_max)$", _SOURCE),
    _Kind.of("EXL3", r"\.(trellis|suh|svh)$", _SOURCE),
    _Kind.of("QuIP#", r"\.(Qidxs\w*|codebook_id)$", _SOURCE),
    _Kind.of("SpQR", r"\.(dense_weights|deq_cols_cnt)$", _SOURCE),
    _Kind.of("HQQ", r"\.W_q$", _SOURCE),
    _Kind.of("quanto", r"\.weight\._(data|scale|shift)$", _SOURCE),
    _Kind.of("torchao", r"\._weight_(qdata|scale|zero_point)$|:(qdata|int_data)$", _SOURCE),
    _Kind.of("ComfyUI, scaled", r"(^|\.)(scaled_fp8|comfy_quant)$", _TIMES_SCALE),
    _Kind.of("NVFP4", r"[._]weight_scale_2$", _SOURCE),
    _Kind.of(
        "compressed-tensors",
        r"\.weight_(packed|zero_point|g_idx|shape|global_scale)$|\.bitmask$",
        _compressed,
    ),
    _Kind.of("fp8 with block scales", r"_scale_inv$", _fp8),
    _Kind.of("EETQ", r"\.weight_scales$", _SOURCE),
    _Kind.of("fp8 or int8 with scales", r"\.weight_scale$", _compressed),
    _Kind.of("torch.ao", r"(^|\.)_packed_params(\.|$)", _SOURCE),
)
_ADAPTERS = (
    _Kind.of("a DoRA adapter", r"lora_magnitude_vector|\.dora_scale$", _MERGE),
    _Kind.of("a LoRA adapter", r"(^|\.)lora_(embedding_)?[ABE](\.|$)", _MERGE),
    _Kind.of("a LoRA adapter (kohya)", r"\.lora_(down|up|mid)(\.|$)", _FUSE),
    _Kind.of("a LoRA adapter (diffusers)", r"[._]lora(\d+|_linear_layer)?\.(down|up)\.", _FUSE),
    _Kind.of("a LoHa adapter", r"\.hada_(w[12]_[ab]|t[12])", _MERGE),
    _Kind.of("a LoKr adapter", r"\.lokr_(w[12](_[ab])?|t[12])", _MERGE),
    _Kind.of("an IA3 adapter", r"\.ia3_l(\.|$)|\.on_input$", _MERGE),
    _Kind.of("a VeRA adapter", r"(^|\.)vera_(lambda_[bd]|[AB])(\.|$)", _MERGE),
    _Kind.of("an OFT adapter", r"\.b?oft_([rRsS]|blocks|diag)(\.|$)", _MERGE),
    _Kind.of(
        "a LyCORIS adapter", r"^(lora|lycoris)_\w+\.(diff|diff_b|w_norm|b_norm|a1|b1|alpha)(\.|$)", _FUSE
    ),
    _Kind.of("a PEFT adapter", rf"\.({_OF_PEFT})(\.|$)", _MERGE),
    _Kind.of("an adaption prompt", r"\.adaption_(prompt|gate)$", _PROMPT),
    _Kind.of("a textual inversion", r"^(emb_params|<[^<>]+>)$", _PROMPT),
)
_ANY = re.compile("|".join(f"(?:{kind.tensors.pattern})" for kind in (*_ADAPTERS, *_LAYOUTS)))

# Integers under these names are codes of a weight where scales lie beside them.
_CODES = ("weight", "codes", "indices", "B", "embedding_quantized")
_SCALES = ("scales", "scale", "s", "scale_weight", "embedding_scale", "codebooks", "centroids.weight")
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
_PEFT_KINDS = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "VERA": "VeRA",
    "PROMPT_TUNING": "prompt tuning",
    "PREFIX_TUNING": "prefix tuning",
    "P_TUNING": "prompt tuning (P-tuning)",
    "MULTITASK_PROMPT_TUNING": "prompt tuning",
    "ADAPTION_PROMPT": "adaption prompt",
}
# A prompt alone; a whole network may hold a tensor of this name.
_MOST_OF_A_PROMPT = 4
_PROMPTS = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")


def refuse_layout(path: Path, infos: Mapping[str, TensorInfo], others: tuple[str, ...] = ()) -> None:
    """Refuse adapters and quantised weights, which their tensors tell.

    Args:
        path: of the checkpoint.
        infos: its tensors.
        others: names of entries that are not tensors.

    Raises:
        MpocError: naming the layout, a tensor, and the way to plain weights.
    """
    found = [name for name in (*infos, *others) if _ANY.search(name)]
    for kind in _ADAPTERS:
        if name := next(filter(kind.tensors.search, found), None):
            raise MpocError(f"{path}: {kind.name} (tensor {name!r}), not a whole model", kind.hint)
    if len(infos) <= _MOST_OF_A_PROMPT and (prompt := next((n for n in infos if n in _PROMPTS), None)):
        raise MpocError(f"{path}: a prompt (tensor {prompt!r}), not a whole model", _PROMPT)
    for kind in _LAYOUTS:
        if name := next(filter(kind.tensors.search, found), None):
            raise _quantised(path, kind.name, name, kind.hint)
    for info in infos.values():
        if len(info.shape) > 1:
            _refuse_codes(path, info, infos)


def adapter(path: Path, config: Mapping[str, Any]) -> MpocError:
    """The error of a directory that holds an adapter of PEFT, with its adapter_config.json."""
    kind = _PEFT_KINDS.get(str(config.get("peft_type", "LORA")).upper(), str(config.get("peft_type")))
    said = f"{path}: {'an' if kind[:1] in 'AIO' else 'a'} {kind} (PEFT) adapter, not a whole model"
    return MpocError(said, _PROMPT if "prompt" in kind or "prefix" in kind else _MERGE)


def refuse_stub(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse weights without entries, as ZeRO-3 saves a network whose parameters were not gathered.

    Raises:
        MpocError: naming the first such weight.
    """
    for name, info in infos.items():
        if info.shape == (0,) and name.rpartition(".")[2] == "weight":
            raise _zero_stub(path, f"tensor {name!r} is empty, its entries are in the zero_pp_rank files")


def _quantised(path: Path, layout: str, name: str, hint: str) -> MpocError:
    said = f"{path}: already quantised: {layout} (tensor {name!r}); mpoc needs unquantised weights"
    return MpocError(said, _of_directory(path, hint))


def _refuse_codes(path: Path, info: TensorInfo, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse a tensor of 8-bit floats, or of integers beside scales."""
    sides = _scales_of(info.name, infos)
    if info.dtype.startswith("float8"):
        layout = "ComfyUI, scaled fp8" if "scale_weight" in sides else f"fp8 ({info.dtype})"
        cast = "cast each weight to bfloat16 and save it; or " + _SOURCE
        raise _quantised(path, layout, info.name, _TIMES_SCALE if sides else cast)
    if info.dtype not in _INTEGERS or not sides:
        return
    layout, hint = f"integer codes ({info.dtype})", _SOURCE
    if info.name.endswith("_blocks"):
        layout, hint = "MXFP4", _mxfp4
    elif info.dtype == "uint32" and "scales" in sides:
        layout, hint = "MLX", _mlx
    elif "codebooks" in sides:
        layout = "AQLM"
    elif "centroids.weight" in sides:
        layout = "VPTQ"
    raise _quantised(path, layout, info.name, hint)


def _scales_of(name: str, infos: Mapping[str, TensorInfo]) -> set[str]:
    """The last parts of the names of a tensor's scales."""
    place, dot, last = name.rpartition(".")
    own = {f"{name}_scale", f"{name}_scales", f"{name.removesuffix('blocks')}scales"} & infos.keys()
    beside = {side for side in _SCALES if last in _CODES and f"{place}{dot}{side}" in infos}
    return beside | own - {name}


_QUANTISATIONS = ("quantization_config", "compression_config", "quantization", "quant_config")
_METHODS = ("quant_method", "quant_algo", "quant_type")
_SIZES = {"bits", "group_size", "w_bit", "config_groups", *_METHODS}
_METHOD_HINTS = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "MLX": _mlx,
}


def quantisation_of(config: Mapping[str, Any]) -> str | None:
    """The method of quantisation that a configuration names, at any depth; None if it names none."""
    for key, value in _walk(config):
        if key in _QUANTISATIONS and value:
            method = _method(key, value)
            if method is not None:
                return method
    return None


def _method(key: str, value: Any) -> str | None:
    certain = key == "quantization_config"
    if not isinstance(value, Mapping):
        return str(value) if certain else None
    if not (certain or _SIZES & value.keys()):
        return None  # of something else: an audio codec's quantiser
    method = next((str(value[name]) for name in _METHODS if name in value), None)
    loads = {value.get(f"{prefix}load_in_{bits}bit") for prefix in ("", "_") for bits in (4, 8)}
    if method == "bitsandbytes" and False in loads and True not in loads:
        return None  # plain weights, loaded by a configuration that quantises none
    return method or ("MLX" if key == "quantization" else "unknown method")


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, of mappings within mappings and lists."""
    todo = [value]
    while todo:
        current = todo.pop()
        if isinstance(current, Mapping):
            yield from current.items()
            todo += current.values()
        elif isinstance(current, list):
            todo += current


def refuse_quantised(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a directory whose configuration says that its weights are quantised.

    Raises:
        MpocError: naming the method and the way to plain weights.
    """
    method = quantisation_of(config)
    if method is not None:
        hint = _of_directory(path, _METHOD_HINTS.get(method, _SOURCE))
        raise MpocError(f"{path}: already quantised ({method}); mpoc needs unquantised weights", hint)


def _of_directory(path: Path, hint: str) -> str:
    """The hint with the directory's name in the place of DIR."""
    folder = path if path.is_dir() else path.parent
    named = repr(str(folder)) if hint.startswith("in Python") else command_line(folder)
    return hint.replace("DIR", named)


# First bytes of files that are given in place of a checkpoint.
_MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
    (b"<", "an HTML or XML page, not a checkpoint"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file (Keras, TensorFlow)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"{", "a JSON file, perhaps an error of the server it was downloaded from"),
)
_SUFFIXES = {
    ".gguf": "a GGUF file",
    ".ggml": "a GGML file",
    ".onnx": "an ONNX network",
    ".h5": "an HDF5 file (Keras, TensorFlow)",
    ".keras": "a Keras network",
    ".msgpack": "Flax weights",
    ".ot": "weights of rust-bert",
    ".tflite": "a TensorFlow Lite network",
    ".mlmodel": "a Core ML network",
    ".pt2": "a torch.export program",
    ".npz": "numpy arrays",
    ".nemo": "a NeMo archive",
    ".distcp": "a part of a distributed checkpoint",
}


def foreign_file(path: Path) -> MpocError | None:
    """The error of a file whose first bytes or suffix are those of another format; None for any other."""
    with path.open("rb") as file:
        start = file.read(64)
    is_torch, is_safetensors = start.startswith((b"PK\x03\x04", b"\x80\x02")), start[8:10] == b'{"'
    if is_safetensors if path.suffix != ".safetensors" else is_torch:
        kind, suffix = ("safetensors", ".safetensors") if is_safetensors else ("torch", ".pt")
        renamed = command_line("mv", "-n", path, path.with_suffix(suffix))
        return MpocError(f"{path}: a {kind} file under another suffix", f"rename it: {renamed}")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, what in _MAGIC:
        if text.startswith(magic.lower()) and not (magic == b"{" and path.suffix == ".json"):
            return MpocError(f"{path}: {what}", _format_hint(path, what))
    what = _SUFFIXES.get(path.suffix.lower(), "")
    return MpocError(f"{path}: {what}", _format_hint(path, what)) if what else None


def _format_hint(path: Path, what: str) -> str:
    folder, name, stem = str(path.parent), path.name, path.stem
    if "LFS" in what:
        return command_line("git", "-C", folder, "lfs", "pull", "--include", name)
    if "page" in what or "JSON" in what:
        return "download the file itself: hf download, or the resolve/ link of a hub, not its blob/ page"
    if "archive" in what:
        return "unpack it, and give mpoc the checkpoint inside"
    if what == "a GGUF file":
        call = f"AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={name!r})"
        return f"in Python: {call}.save_pretrained({stem!r}), then compress {stem}"
    if what == "a torch.export program":
        return in_python(f"torch.save(torch.export.load({str(path)!r}).state_dict, {stem + '-state.pt'!r})")
    if what == "numpy arrays":
        arrays = f"{{k: torch.from_numpy(a) for k, a in __import__('numpy').load({str(path)!r}).items()}}"
        return in_python(f"torch.save({arrays}, {stem + '-state.pt'!r})")
    return "save its weights as a torch state dict or as safetensors, with the library that wrote it"


# Modules of the classes that torch refuses to load, and what a file that holds one is.
_OF_CLASSES = {
    "torch.distributed": "a sharded state dict (FSDP, DTensor): save a full state dict of the network",
    "torchao": "already quantised: torchao",
    "optimum.quanto": "already quantised: quanto",
    "bitsandbytes": "already quantised: bitsandbytes",
    "hqq": "already quantised: HQQ",
    "megatron": "a Megatron-LM checkpoint",
    "deepspeed": "a DeepSpeed checkpoint",
}


def format_of_class(name: str) -> str | None:
    """What a pickle that holds this class is; None for a class of somebody's own."""
    return next((said for module, said in _OF_CLASSES.items() if name.startswith(module)), None)


def in_python(code: str) -> str:
    """A shell command that runs Python code with torch."""
    return f"save its weights once: {command_line('python', '-c', 'import torch; ' + code)}"


_OF_MEGATRON = re.compile(r"mp_rank_\d+(_\d+)*$|model_optim_rng\.pt$|iter_\d{7}$")


def distributed_checkpoint(path: Path) -> MpocError | None:
    """The error of a directory that a distributed training wrote; None for any other."""
    parts = [*path.glob("*.distcp"), *path.glob("*/*.distcp")]
    names = {file.name for file in (*path.iterdir(), *path.glob("*/*"))}
    if parts or ".metadata" in names:
        folder = parts[0].parent if parts else path
        module = ["python", "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
        command = command_line(*module, folder, f"{path.resolve().name}.pt")
        return _sharded(path, "a torch distributed checkpoint (DCP, FSDP)", command)
    if "zero_to_fp32.py" in names or any(re.match(r"(bf16_)?zero_pp_rank_", name) for name in names):
        return _zero_stub(path, "its weights are split over the processes")
    if "latest_checkpointed_iteration.txt" in names or any(map(_OF_MEGATRON.match, names)):
        return _sharded(path, "a Megatron-LM checkpoint", _megatron_hint(path))
    if "_CHECKPOINT_METADATA" in names or "saved_model.pb" in names:
        what = "an Orbax (JAX) checkpoint" if "_CHECKPOINT_METADATA" in names else "a TensorFlow SavedModel"
        return _sharded(path, what, "save its weights as safetensors with the library that wrote it")
    return None


def _megatron_hint(folder: Path) -> str:
    """How to convert a checkpoint of Megatron-LM."""
    call = f"AutoBridge.from_hf_pretrained(HUB_ID).export_ckpt({str(folder)!r}, OUT)"
    return f"export it with Megatron Bridge, in Python: {call}; then compress OUT"


def _zero_stub(path: Path, why: str) -> MpocError:
    """The error of a file or directory of DeepSpeed ZeRO whose weights lie in the files of all processes."""
    folder = path if path.is_dir() else path.parent
    folder = folder.parent if re.match(r"global_step\d+$", folder.name) else folder
    target = f"{folder.resolve().name}-fp32"
    command = command_line("python", "-m", "deepspeed.utils.zero_to_fp32", folder, target)
    return MpocError(f"{path}: of DeepSpeed ZeRO: {why}", command)


def refuse_payload(path: Path, payload: Mapping[Any, Any]) -> None:
    """Refuse the contents of a torch file that their keys tell.

    Raises:
        MpocError: a textual inversion, or a part of a checkpoint of DeepSpeed or Megatron-LM.
    """
    if "string_to_param" in payload:
        raise MpocError(f"{path}: a textual inversion, not a whole model", _PROMPT)
    if {"ds_config", "ds_version", "param_shapes"} & payload.keys():
        raise _zero_stub(path, "its weights are split over the processes")
    if {"checkpoint_version", "num_floating_point_operations_so_far"} & payload.keys():
        raise MpocError(f"{path}: a Megatron-LM checkpoint", _megatron_hint(path.parent))


def _sharded(path: Path, what: str, hint: str) -> MpocError:
    return MpocError(f"{path}: {what}, not a directory of weights", hint)
