"""Select the linear maps among the tensors of a checkpoint, with a reason for every tensor left unchanged.

A checkpoint holds names and shapes, not modules. A Hugging Face ``config.json`` settles what names leave open
(GPT-2 stores its ``Conv1D`` weights transposed, a head may be tied to the embedding). Without one, names and
shapes decide, and the report says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mpoc.errors import UsageError, nearest, shortened
from mpoc.io.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from mpoc.io.checkpoint import Checkpoint

# Architectures whose attention and feed-forward weights are transformers' Conv1D: stored (inputs, outputs).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
_EMBEDDINGS = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|emb|wte|wpe|shared|tok\w*_emb|pos\w*_emb|relative_attention_bias)\.weight$"
)
# Fused expert weights stored (experts, inputs, outputs) rather than (experts, outputs, inputs).
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text")
_EXPERTS = re.compile(r"(^|\.)experts\.[\w.]*$")


@dataclass(frozen=True)
class LinearMap:
    """A weight that can be factorised."""

    name: str  # name of the tensor, e.g. "layer1.0.conv1.weight"
    kind: str  # one of mpoc.tensor_networks.structure.KINDS
    shape: tuple[int, ...]
    dtype: str
    transposed: bool  # stored (inputs, outputs)

    @property
    def layer(self) -> str:
        """The name users know a layer by: the tensor's without ``.weight``."""
        return self.name.removesuffix(".weight")


@dataclass
class Selection:
    """The chosen linear maps, and the reason for every tensor left unchanged."""

    chosen: list[LinearMap]
    left: dict[str, str]
    source: str  # what layer kinds were read from: "config.json (bert)" or "names and shapes"
    notes: list[str] = field(default_factory=list)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (a glob, or ``re:`` and a regular expression) names this tensor or its layer."""
    names = (name, name.removesuffix(".weight"))
    if pattern.startswith("re:"):
        return any(re.search(pattern[3:], n) for n in names)
    return any(fnmatchcase(n, pattern) for n in names)


def check_regular_expressions(patterns: Iterable[str], option: str = "pattern ") -> None:
    """Refuse patterns with an invalid regular expression.

    Raises:
        UsageError: a pattern is invalid; the message names ``option``.
    """
    for pattern in patterns:
        try:
            matches(pattern, "")
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"{option}{shortened(pattern)}: not a regular expression ({error})") from error


def select(
    checkpoint: Checkpoint,
    layers: Iterable[str] = (),
    exclude: Iterable[str] = (),
    embeddings: bool = False,
    min_params: int = 0,
) -> Selection:
    """Choose the linear maps of a checkpoint.

    Args:
        checkpoint: the checkpoint; only names, shapes and dtypes are read.
        layers: patterns; only matching weights are chosen. Empty: all.
        exclude: patterns; matching weights are left unchanged.
        embeddings: choose embeddings too. An embedding that ``layers`` names is chosen anyway.
        min_params: leave weights with fewer entries unchanged.

    Raises:
        UsageError: a pattern is not valid or matches nothing.
    """
    layers, exclude = list(layers), list(exclude)
    _check_patterns(layers, exclude, list(checkpoint.infos) + list(checkpoint.tied))
    chosen: list[LinearMap] = []
    left: dict[str, str] = {name: f"tied to {first}" for name, first in checkpoint.tied.items()}
    for info in checkpoint.infos.values():
        map = _classify(info, checkpoint)
        reason = map if isinstance(map, str) else _reason_left(map, layers, exclude, embeddings, min_params)
        if isinstance(map, LinearMap) and not reason:
            chosen.append(map)
        else:
            left[info.name] = reason
    selection = Selection(chosen, left, _source_of_kinds(checkpoint))
    tied = (checkpoint.config or {}).get("tie_word_embeddings")
    if tied and any(m.kind == "embedding" for m in chosen):
        selection.notes.append("the output head is tied to the embedding: compressing one compresses both")
    return selection


def _reason_left(
    map: LinearMap, layers: list[str], exclude: list[str], embeddings: bool, min_params: int
) -> str:
    """Why the options leave a linear map unchanged; "" if they choose it."""
    named = any(matches(pattern, map.name) for pattern in layers)
    if layers and not named:
        return "not matched by --layers"
    if any(matches(pattern, map.name) for pattern in exclude):
        return "matched by --exclude"
    if map.kind == "embedding" and not embeddings and not named:
        return "embedding (--embeddings includes it)"
    if math.prod(map.shape) < min_params:
        return f"fewer than {min_params} parameters (--min-params)"
    return ""


def _source_of_kinds(checkpoint: Checkpoint) -> str:
    if checkpoint.kinds is not None:
        return "the model's modules"
    known = (checkpoint.config or {}).get("model_type")
    return f"config.json ({known})" if known else "names and shapes"


def _check_patterns(layers: list[str], exclude: list[str], names: list[str]) -> None:
    for option, patterns in (("--layers", layers), ("--exclude", exclude)):
        for pattern in patterns:
            check_pattern(option, pattern, names)


def check_pattern(option: str, pattern: str, names: list[str]) -> None:
    """Refuse a pattern that is not a valid regular expression or matches none of ``names``.

    Raises:
        UsageError: the pattern is invalid or matches nothing; the message names ``option`` and a near name.
    """
    check_regular_expressions([pattern], f"{option} ")
    if not any(matches(pattern, name) for name in names):
        layers = [name.removesuffix(".weight") for name in names if name.endswith("weight")]
        raise UsageError(
            f"{option} {pattern!r} matches no tensor{nearest(pattern, layers)}",
            f"names of layers are {', '.join(layers[:3])}, …" if layers else None,
        )


def _classify(info: TensorInfo, checkpoint: Checkpoint) -> LinearMap | str:
    """The tensor as a linear map, or the reason why it is not one."""
    if checkpoint.kinds is not None:
        kind, transposed = checkpoint.kinds.get(info.name, (None, False))
    else:
        kind = _kind(info)
        transposed = _is_transposed(info, kind, str((checkpoint.config or {}).get("model_type", "")))
    if "float" not in info.dtype:
        return f"not a floating dtype ({info.dtype})"
    if info.dtype.startswith("float8"):
        return f"already quantised ({info.dtype})"
    if kind is None:
        return "vector (bias, norm)" if len(info.shape) < 2 else "not recognised as a linear map"
    if info.numel == 0:
        return "empty"
    return LinearMap(info.name, kind, info.shape, info.dtype, transposed)


def _kind(info: TensorInfo) -> str | None:
    rank, name = len(info.shape), info.name
    last = name.rpartition(".")[2]
    if rank == 3 and _EXPERTS.search(name) and "bias" not in last:
        return "experts"
    if rank == 2 and _EMBEDDINGS.search(name):
        return "embedding"
    if rank == 2 and (last.endswith("weight") or last.startswith(("weight_ih", "weight_hh"))):
        return "linear"
    if rank in (3, 4, 5) and last == "weight":
        return f"conv{rank - 2}d"
    return None


def _is_transposed(info: TensorInfo, kind: str | None, model_type: str) -> bool:
    if kind == "experts":
        return model_type in _TRANSPOSED_EXPERTS
    return kind == "linear" and model_type in _CONV1D_MODELS and bool(_CONV1D_NAMES.search(info.name))
