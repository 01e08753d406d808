"""Small checkpoints made on the spot, and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {"model_type": "test", "architectures": ["TestModel"], "layer_norm_eps": 1e-12}
CARD = "---\nlicense: mit\n---\n# A model\n"


def mlp_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two linear maps, 48 → 64 → 32, with their biases."""
    return {
        "fc1.weight": torch.randn(64, 48, dtype=dtype),
        "fc1.bias": torch.randn(64, dtype=dtype),
        "fc2.weight": torch.randn(32, 64, dtype=dtype),
        "fc2.bias": torch.randn(32, dtype=dtype),
    }


def network_state() -> dict[str, Tensor]:
    """Linear maps, a convolution, an embedding, a layer too small to shrink; the same at every call."""
    torch.manual_seed(0)
    return {
        **mlp_state(),
        "conv.weight": torch.randn(16, 12, 3, 3),
        "norm.weight": torch.randn(16),
        "tiny.weight": torch.randn(3, 2),
        "embeddings.weight": torch.randn(100, 32),
        "half.weight": torch.randn(48, 64).bfloat16(),
        "steps": torch.tensor(7),
    }


def save_directory(
    path: Path,
    state: dict[str, Tensor],
    shards: int = 1,
    config: dict[str, Any] | None = None,
    suffix: str = ".safetensors",
) -> Path:
    """A Hugging Face directory: config.json, tokenizer, card, and the weights in ``shards`` files.

    With ``suffix`` ".bin" the weights are torch files.
    """
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config, indent=2) + "\n")
    (path / "tokenizer.json").write_bytes(b'{"version": "1.0"}\n')
    (path / "README.md").write_text(CARD)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = list(state)
    files = [f"{stem}-{k:05d}-of-{shards:05d}{suffix}" for k in range(1, shards + 1)]
    files = files if shards > 1 else [stem + suffix]
    where = {name: files[k * shards // len(names)] for k, name in enumerate(names)}
    for file in files:
        part = {name: state[name] for name in names if where[name] == file}
        if suffix == ".safetensors":
            save_file(part, path / file, {"format": "pt"})
        else:
            torch.save(part, path / file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (path / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return path


def contents(path: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, by its relative name; of a file itself its bytes."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def num_bytes(path: Path) -> int:
    """Bytes of a file or of all files of a folder."""
    return sum(map(len, contents(path).values()))


def relative_error(original: Tensor, approximation: Tensor) -> float:
    """‖W − Ŵ‖_F / ‖W‖_F in float64."""
    reference = original.double()
    return float((reference - approximation.double()).norm() / reference.norm())
