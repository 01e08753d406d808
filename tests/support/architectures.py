"""Tiny random models of transformers, and what they answer."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# The class that loads a saved model of each kind, with the head that it was saved with.
AUTO = {
    "bert": "AutoModelForMaskedLM",
    "gpt2": "AutoModelForCausalLM",  # head tied to the embedding, Conv1D stored transposed
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
    "mixtral": "AutoModelForCausalLM",
}
ALL = {
    **AUTO,
    "qwen2": "AutoModelForCausalLM",  # biases in three of its layers
    "t5": "AutoModelForSeq2SeqLM",  # head tied to two embeddings
}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_OWN: dict[str, dict[str, Any]] = {
    "bert": {"vocab_size": 99},
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "llama": {"vocab_size": 97, "num_key_value_heads": 2},
    "vit": {"image_size": 16, "patch_size": 4, "num_labels": 5},
    "mixtral": {"vocab_size": 97, "num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2": {"vocab_size": 97, "num_key_value_heads": 2},
    "t5": {
        "vocab_size": 99,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}


def tiny(architecture: str, layers: int = 2, **options: Any) -> Any:
    """A random model of about 50,000 parameters, in evaluation mode; ``options`` of its configuration."""
    import transformers

    _be_quiet()
    own_names = {"gpt2": {"n_layer": layers}, "t5": {"num_layers": layers}}
    sizes = own_names.get(architecture, {**_SIZES, "num_hidden_layers": layers})
    config = transformers.AutoConfig.for_model(architecture, **sizes, **_OWN[architecture], **options)
    torch.manual_seed(0)
    return getattr(transformers, ALL[architecture]).from_config(config).eval()


def answer(model: Any) -> Tensor:
    """Logits of a model on an input that is always the same."""
    with torch.no_grad():
        if model.config.model_type == "vit":
            pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
            return model(pixel_values=pixels).logits
        ids = torch.arange(2, 18).reshape(2, 8)
        more = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **more).logits


def _be_quiet() -> None:
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main(folders: list[Path], answers: Path) -> None:
    """Load each folder as anyone would and save its logits; one that does not load is reported, by name."""
    import transformers

    _be_quiet()
    logits: dict[str, Tensor] = {}
    errors: dict[str, str] = {}
    for folder in folders:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        try:
            model = getattr(transformers, AUTO[kind]).from_pretrained(folder)
        except (OSError, ValueError, RuntimeError) as error:
            errors[folder.name] = f"{type(error).__name__}: {error}"
        else:
            logits[folder.name] = answer(model.eval())
    assert not [name for name in sys.modules if name.partition(".")[0] == "mpoc"]
    save_file(logits, answers)
    print(json.dumps(errors))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[2:]], Path(sys.argv[1]))
