"""Compress a tiny random network of every class of transformers at full bond, and load it again.

    python -m tests.robustness.transformers_classes [--kinds causal-lm vision] [--only Llama] [--seconds 60]

For every causal-LM, encoder, encoder-decoder, vision and audio class whose config can be made small, the
network is saved, compressed at full bond with ``--embeddings``, loaded by ``from_pretrained`` and by
``mpoc.load``, saved again and loaded once more. The outputs of the three must be those of the network within
1e-5, relative. Prints the count, and each class that fails with the reason; exit status 1 where one fails.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mpoc
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe

transformers: Any = import_module("transformers")  # its own types are not complete
_TABLES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
# Entries of configs and what they become; lists keep their length.
_SMALL = {
    r"(hidden|d_model|n_embd|embed_dim|model_dim|dim|embedding|hidden_dim|d_embed)(_size)?": 32,
    r"(\w*intermediate_size\w*|\w*ffn_dim|ffn_hidden_size|d_ff|dff|n_inner|mlp_dim|d_inner)": 64,
    r"(num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|n_blocks)": 2,
    r"(num_attention_heads|n_heads?|num_heads|\w+_attention_heads)": 4,
    r"(num_key_value_heads|num_kv_heads)": 4,
    r"(head_dim|d_kv|kv_channels|attention_head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim)": 8,
    r"(kv_lora_rank|q_lora_rank|qk_head_dim)": 16,
    r"(vocab_size|n_vocab|entity_vocab_size)": 96,
    r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_source_positions)": 64,
    r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts)": 4,
    r"(num_experts_per_tok|moe_k|moe_topk|n_group|topk_group)": 1,
    r"(moe_intermediate_size|shared_expert_intermediate_size|expert_ffn_hidden_size)": 32,
    r"image_size": 32,
    r"patch_size": 8,
}
_WIDTHS = r"(hidden_sizes|embed_dims?|neck_hidden_sizes|encoder_hidden_sizes|dims|channels|stem_channels)"
_TOKENS = (r"\w+_token_id", r"\w+_index", r"padding_idx")
RECIPE = {"bond": 10**6, "allow_growth": True, "embeddings": True}


class NotPossibleError(Exception):
    """The class cannot be made small, or takes no input that is known here."""


def classes(kinds: list[str]) -> Iterator[tuple[str, str]]:
    """(kind, name) of every class, each once."""
    auto = import_module("transformers.models.auto.modeling_auto")
    seen: set[str] = set()
    for kind in kinds:
        for entry in getattr(auto, _TABLES[kind]).values():
            for name in [entry] if isinstance(entry, str) else entry:
                if name not in seen:
                    seen.add(name)
                    yield kind, name


def tiny(name: str) -> Any:
    """A random network of the class, in evaluation mode.

    Raises:
        NotPossibleError: transformers cannot make it small, or at all.
    """
    try:
        cls = getattr(transformers, name)
        config = _shrunk(cls.config_class())
        if sum(p.numel() for p in _on_meta(cls, config).parameters()) > 12_000_000:
            raise NotPossibleError("the config does not shrink")
        torch.manual_seed(0)
        model = cls(config)
    except NotPossibleError:
        raise
    except Exception as error:
        raise NotPossibleError(f"made by transformers: {_said(error)}") from error
    with torch.no_grad():
        # Zeros and ones of the start would hide what is lost.
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def _narrow(width: Any) -> Any:
    """A width, or several in a list, at an eighth, in multiples of eight."""
    if isinstance(width, list | tuple):
        return [_narrow(one) for one in width]
    return max(8, width // 64 * 8) if isinstance(width, int) else width


def _on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


def _shrunk(config: Any) -> Any:
    values: dict[str, Any] = {}
    for key, value in vars(config).items():
        small = next((small for pattern, small in _SMALL.items() if re.fullmatch(pattern, key)), None)
        if hasattr(value, "to_diff_dict"):
            values[key] = _shrunk(value).to_dict()
        elif any(re.fullmatch(pattern, key) for pattern in _TOKENS) and isinstance(value, int):
            values[key] = min(value, 3)
        elif small is not None and isinstance(value, int) and not isinstance(value, bool):
            values[key] = small
        elif re.fullmatch(_WIDTHS, key) and isinstance(value, list | tuple):
            values[key] = [_narrow(width) for width in value]
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(config, key, None) and key not in config.attribute_map and key in vars(config):
            values[key] = list(getattr(config, key))[:2]
    return type(config)(**values)


def inputs(model: Any, kind: str) -> list[dict[str, Tensor]]:
    """Inputs to try, until the network takes one."""
    ids = torch.arange(4, 20).reshape(2, 8)
    size = getattr(model.config, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    images = torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)
    waves = torch.linspace(-1, 1, 2 * 4000).reshape(2, 4000)
    spectrum = waves.reshape(2, 50, 80)
    return {
        "vision": [{"pixel_values": images}, {"pixel_values": images.repeat(1, 1, 2, 2)}],
        "audio": [{"input_values": waves}, {"input_features": spectrum}],
        "encoder-decoder": [
            {"input_ids": ids, "decoder_input_ids": ids[:, :4]},
            {"input_features": spectrum, "decoder_input_ids": ids[:, :4]},
        ],
    }.get(kind, [{"input_ids": ids}])


def answer(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The first tensor of the output, in float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model.eval()(**given)
    found: Tensor = next(
        value for value in outputs.to_tuple() if isinstance(value, Tensor) and value.dim() > 1
    )
    return found.double()


def check(name: str, kind: str, folder: Path) -> str:
    """Compress, load twice, save again; what went wrong, "" if nothing.

    Raises:
        NotPossibleError: as :func:`tiny`, or no input is taken.
    """
    model = tiny(name)
    given, wanted = _taken(model, kind)
    cls = type(model)
    model.save_pretrained(folder / "dense")
    if _differs(answer(cls.from_pretrained(folder / "dense"), given), wanted):
        raise NotPossibleError("transformers itself does not load what it saved")
    compress_checkpoint(folder / "dense", folder / "small", make_recipe(None, RECIPE))
    loaded = cls.from_pretrained(folder / "small")
    loaded.save_pretrained(folder / "again")
    again = folder / "again"
    ways: dict[str, Any] = {
        "from_pretrained": lambda: loaded,
        "mpoc.load": lambda: mpoc.load(folder / "small"),
        "saved again": lambda: cls.from_pretrained(again),
        "saved again, mpoc.load": lambda: mpoc.load(again),
    }
    for way, load in ways.items():
        problem = _differs(answer(load(), given), wanted)
        if problem:
            return f"{way}: {problem}"
    return ""


def _taken(model: Any, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """The first input that the network takes, and its output."""
    refused = ""
    for one in inputs(model, kind):
        try:
            wanted = answer(model, one)
        except Exception as error:
            refused = _said(error)
            continue
        if not wanted.isfinite().all():
            raise NotPossibleError("answers NaN")
        return one, wanted
    raise NotPossibleError(f"takes no input known here: {refused}")


def _differs(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"outputs {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    error = ((found - wanted).norm() / wanted.norm()).item()
    return "" if error < 1e-5 else f"outputs differ by {error:.1e}"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def outcome(name: str, kind: str, seconds: int = 60) -> tuple[str, str]:
    """("right", "failed" or "not possible", the reason)."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _within(seconds):
                problem = check(name, kind, Path(folder))
        except NotPossibleError as error:
            return "not possible", str(error)
        except Exception as error:
            return "failed", _said(error)
        return ("failed", problem) if problem else ("right", "")


def main() -> int:
    """Check the classes that the command line names, and print what fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="*", default=list(_TABLES), choices=list(_TABLES))
    parser.add_argument("--only", default="", help="regular expression of class names")
    parser.add_argument("--seconds", type=int, default=60, help="time limit of a class")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    counts: Counter[str] = Counter()
    for kind, name in classes(given.kinds):
        if not re.search(given.only, name):
            continue
        result, reason = outcome(name, kind, given.seconds)
        counts[result] += 1
        print(f"{result}\t{kind}\t{name}\t{reason}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
