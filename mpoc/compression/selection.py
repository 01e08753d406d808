"""Select the linear maps among the tensors of a checkpoint, with a reason for every tensor left unchanged.

A checkpoint holds names and shapes, no modules.  Where the architecture is known, its modules tell kinds
(:attr:`Checkpoint.kinds`); otherwise names and shapes decide, and the report says so.  Either way a weight
that matches the table ``EXCLUSIONS`` is left unchanged by default: the network does not use it as a linear
map, or an error in it changes the output out of proportion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

from mpoc.errors import UsageError, nearest, shortened
from mpoc.io.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from mpoc.compression.recipe import Recipe

# Architectures whose attention and feed-forward weights are transformers' Conv1D: stored (inputs, outputs).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
# Fused expert weights stored (experts, inputs, outputs) rather than (experts, outputs, inputs).
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text")
_EXPERTS = re.compile(r"(^|\.)experts\.[\w.]*$")


# Embeddings under their many names; an embedding has no bias.
_EMBEDDINGS = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|\w*emb(s|_?\w)?|wte|wpe|shared|lut|lookup(_table)?|codebook|"
    r"relative_attention_bias)(\.\d+)?\.weight$|^w\.weight$"
)


@dataclass(frozen=True)
class Exclusion:
    """Weights that are left unchanged by default, told from their names and from what lies beside them."""

    reason: str
    name: re.Pattern[str]  # found in the tensor's name; "parent" is the module that holds the names beside
    beside: tuple[str, ...] = ()  # one of these is needed in "parent"; {own} is what "own" matched
    sound: bool = True  # an error in it is an error in what the network computes, so --layers may take it
    elementwise: bool = False  # only where what lies beside has the tensor's own shape
    names_alone: bool = False  # not where modules tell
    spares_all: bool = False  # not where every matrix of the file matches


_RECOMPUTED = "the network recomputes its weight (weight norm, spectral norm, pruning, …)"
_DERIVED = tuple(f"{{own}}_{end}" for end in ("g", "v", "u", "orig", "raw", "bar", "mask", "fake_quant"))
_EMBEDDING = "embedding (--embeddings includes it)"
_ROUTER = "router of experts (--layers takes it)"
EXCLUSIONS = (
    Exclusion(
        _RECOMPUTED,
        re.compile(r"(^|\.)parametrizations\.|(^|[._])weight\w*_(g|v|u|orig|raw|bar|mask)$"),
        sound=False,
    ),
    Exclusion(
        _RECOMPUTED,
        re.compile(r"^(?P<parent>.*\.)?(?P<own>\w*weight\w*)$"),
        beside=(*_DERIVED, "parametrizations"),
        sound=False,
    ),
    Exclusion(
        "norm: it scales elementwise",
        re.compile(r"(^|[._])(\w*norm|ln|bn|gn)(_?(\d+|[a-z]))?\.weight$", re.IGNORECASE),
        sound=False,
        names_alone=True,
    ),
    Exclusion(
        "it scales elementwise, as its bias shows",
        re.compile(r"^(?P<parent>.*\.)?weight$"),
        beside=("bias",),
        sound=False,
        elementwise=True,
        names_alone=True,
    ),
    Exclusion(
        "the network divides it in place (RWKV of transformers)",
        re.compile(r"^(?P<parent>(.*\.)?(attention(?=\.output)|feed_forward(?=\.value))\.)\w+\.weight$"),
        beside=("receptance",),
        sound=False,
    ),
    Exclusion(
        _ROUTER,
        re.compile(
            r"(^|\.)(\w*_)?(routers?(_\w+)?|wg|gate_inp|gat(e|ing)_network|(shared_)?experts?_gates?)"
            r"(\.|$)"
        ),
    ),
    Exclusion(
        _ROUTER,
        re.compile(
            r"^(?P<parent>.*?\.)??(\w*_)?(gates?|gating|routing|switch|scorers?)(_(logits|weights?))?(\.|$)"
        ),
        beside=("experts", "expert", "local_experts", "moe_experts", "routed_experts", "shared_experts"),
    ),
    Exclusion(
        "moving average of another weight (--layers takes it)",
        re.compile(r"^(\w+\.)?((\w*_)?(ema|swa)(_\w+)?|averaged_model|shadow_\w+)\."),
        spares_all=True,
    ),
)


class Described(Protocol):
    """What selection reads of a :class:`mpoc.io.checkpoint.Checkpoint`, whose fields these are."""

    infos: dict[str, TensorInfo]
    tied: dict[str, str]
    config: dict[str, Any] | None
    kinds: dict[str, tuple[str | None, bool]] | None
    left: dict[str, str]
    architecture: dict[str, str]


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
    halved: frozenset[str] = frozenset()  # vectors that are written as float16 beside codes


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
    checkpoint: Described,
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
    names = _Names(checkpoint)
    for info in checkpoint.infos.values():
        map, reason = _classify(info, checkpoint, names)
        if map is not None:
            reason = _reason_left(map, reason, layers, exclude, embeddings, min_params)
        if map is None or reason:
            left[info.name] = reason
        else:
            chosen.append(map)
    return Selection(chosen, left, _source_of_kinds(checkpoint), _notes(checkpoint, chosen))


def copies_by_name(checkpoint: Described) -> dict[str, tuple[int, ...]]:
    """Tensors that may be copies of one embedding, as a head is, by their shape: no module tells."""
    embeddings = {info.shape for name, info in checkpoint.infos.items() if _EMBEDDINGS.search(name)}
    matrices = (info for info in checkpoint.infos.values() if len(info.shape) == 2)
    return {info.name: info.shape for info in matrices if info.shape in embeddings}


def _notes(checkpoint: Described, chosen: list[LinearMap]) -> list[str]:
    tied = bool((checkpoint.config or {}).get("tie_word_embeddings"))
    firsts = set(checkpoint.tied.values())
    if any(map.kind == "embedding" and (tied or map.name in firsts) for map in chosen):
        return ["the output head is tied to the embedding: compressing one compresses both"]
    return []


class _Names:
    """The names and shapes of a checkpoint, with what lies beside each tensor."""

    def __init__(self, checkpoint: Described) -> None:
        self.shapes = {name: info.shape for name, info in checkpoint.infos.items()}
        self.shapes |= {alias: self.shapes[first] for alias, first in checkpoint.tied.items()}
        self.aliases: dict[str, list[str]] = {}  # name → the further names of its tensor
        for alias, first in checkpoint.tied.items():
            self.aliases.setdefault(first, []).append(alias)
        self._children: dict[str, set[str]] = {}  # "" or a module with its dot → what it holds directly
        for name in (*self.shapes, *checkpoint.tied):
            start = 0
            for part in name.split("."):
                self._children.setdefault(name[:start], set()).add(part)
                start += len(part) + 1
        self._by_modules = checkpoint.kinds is not None
        self._matrices = [name for name, shape in self.shapes.items() if len(shape) > 1]

    def has_bias(self, name: str) -> bool:
        """Whether a bias lies beside a weight."""
        return "bias" in self._children[name[: name.rfind(".") + 1]]

    def exclusion(self, name: str) -> Exclusion | None:
        """The first row of the table that this tensor matches by one of its names.

        A moving average that is the weight itself under a second name is none: there all names must match.
        """
        known = (name, *self.aliases.get(name, ()))
        rows = ((row, [self._matches(row, one) for one in known]) for row in EXCLUSIONS)
        return next((row for row, found in rows if (all if row.spares_all else any)(found)), None)

    def _matches(self, row: Exclusion, name: str) -> bool:
        match = None if row.names_alone and self._by_modules else row.name.search(name)
        if match is None or (row.spares_all and all(map(row.name.search, self._matrices))):
            return False
        if not row.beside:
            return True
        parent, own = match["parent"] or "", match.groupdict().get("own", "")
        beside = {other.format(own=own) for other in row.beside} & self._children[parent]
        if row.elementwise:
            return any(self.shapes.get(parent + other) == self.shapes[name] for other in beside)
        return bool(beside)


def _reason_left(
    map: LinearMap,
    by_default: str,
    layers: list[str],
    exclude: list[str],
    embeddings: bool,
    min_params: int,
) -> str:
    """Why the options leave a linear map unchanged, ``by_default`` unless they ask for it; else ""."""
    named = any(matches(pattern, map.name) for pattern in layers)
    if layers and not named:
        return "not matched by --layers"
    if any(matches(pattern, map.name) for pattern in exclude):
        return "matched by --exclude"
    if by_default and not named and not (embeddings and by_default == _EMBEDDING):
        return by_default
    if math.prod(map.shape) < min_params:
        return f"fewer than {min_params} parameters (--min-params)"
    return ""


def _source_of_kinds(checkpoint: Described) -> str:
    if checkpoint.kinds is None:
        return "names and shapes"
    known = "" if checkpoint.architecture else (checkpoint.config or {}).get("model_type")
    return f"config.json ({known})" if known else "the model's modules"


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


def _classify(info: TensorInfo, checkpoint: Described, names: _Names) -> tuple[LinearMap | None, str]:
    """The linear map that this tensor is, if any, and why it is left unchanged by default, else ""."""
    if "float" not in info.dtype:
        return None, f"not a floating dtype ({info.dtype})"
    if info.dtype.startswith("float8"):
        return None, f"already quantised ({info.dtype})"
    if info.name in checkpoint.left:
        return None, checkpoint.left[info.name]
    if len(info.shape) < 2:
        return None, "vector (bias, norm)"
    aliases = names.aliases.get(info.name, ())
    kinds = [_kind(replace(info, name=name), checkpoint, names) for name in (info.name, *aliases)]
    kind, transposed = next((kind for kind in kinds if kind[0] == "embedding"), kinds[0])
    excluded = names.exclusion(info.name)
    if excluded is not None and not excluded.sound:
        return None, excluded.reason
    if kind is None:
        return None, "not recognised as a linear map"
    if info.numel == 0:
        return None, "empty"
    found = LinearMap(info.name, kind, info.shape, info.dtype, transposed)
    if excluded is not None:
        return found, excluded.reason
    return found, _EMBEDDING if kind == "embedding" else ""


def _kind(info: TensorInfo, checkpoint: Described, names: _Names) -> tuple[str | None, bool]:
    """One of the kinds of linear maps, or None, and whether it is stored (inputs, outputs)."""
    if checkpoint.kinds is not None and info.name in checkpoint.kinds:
        return checkpoint.kinds[info.name]
    kind = _kind_by_name(info, names)
    return kind, _is_transposed(info, kind, str((checkpoint.config or {}).get("model_type", "")))


def _kind_by_name(info: TensorInfo, names: _Names) -> str | None:
    rank, name = len(info.shape), info.name
    last = name.rpartition(".")[2]
    if rank == 3 and _EXPERTS.search(name) and "bias" not in last:
        return "experts"
    if rank == 2 and _EMBEDDINGS.search(name) and not names.has_bias(name):
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


def check_rules(selection: Selection, recipe: Recipe) -> None:
    """Check that every pattern names a chosen weight.

    Raises:
        UsageError: a pattern does not.
    """
    chosen = [map.name for map in selection.chosen]
    given = [("[layer] pattern", rule.pattern) for rule in recipe.rules]
    given += [("--shape pattern", shape.pattern) for shape in recipe.shape if shape.pattern is not None]
    given += [("--order pattern", order.pattern) for order in recipe.order if order.pattern is not None]
    shapes = (("--input-shape pattern", shape.pattern) for shape in recipe.input_shape)
    given += [(option, pattern) for option, pattern in shapes if pattern is not None]
    for option, pattern in given:
        check_pattern(option, pattern, [*chosen, *selection.left])
        if not any(matches(pattern, name) for name in chosen):
            name = next(name for name in selection.left if matches(pattern, name))
            raise UsageError(f"{option} {pattern!r}: {name} is not compressed ({selection.left[name]})")
