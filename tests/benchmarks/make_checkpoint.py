"""Write a large synthetic Hugging Face checkpoint to measure time and memory on.

    python tests/benchmarks/make_checkpoint.py OUT_DIR --gigabytes 6 [--shard 1GB]

The directory holds a ``config.json`` of a llama, bfloat16 shards and their index: token embeddings and
head, and as many layers (seven matrices and two norms each) as come nearest to the size asked for; 13.5
GB are the 32 layers of Llama-7B. A matrix is a product of rank 64 whose singular values fall as 1/k,
plus noise that carries a tenth of its norm, so that truncation finds something to keep and something to
discard. The same seed gives the same bytes. A shard is filled in memory before it is written, which
sets the memory this needs.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 64
NOISE = 0.1
BYTES_PER_NUMBER = 2
VOCABULARY = 32000
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

Shapes = dict[str, tuple[int, ...]]


def parse_bytes(text: str) -> int:
    """Bytes in a size such as 500MB or 1.5GB (decimal units)."""
    match = re.fullmatch(r"([0-9.]+)(KB|MB|GB)", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def layer_shapes(layer: int, hidden: int, intermediate: int) -> Shapes:
    """Names and shapes of one layer, as transformers names them."""
    prefix = f"model.layers.{layer}."
    return {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "mlp.down_proj.weight": (hidden, intermediate),
        prefix + "mlp.gate_proj.weight": (intermediate, hidden),
        prefix + "mlp.up_proj.weight": (intermediate, hidden),
        prefix + "post_attention_layernorm.weight": (hidden,),
        **{prefix + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "kqvo"},
    }


def model_shapes(gigabytes: float, hidden: int, intermediate: int) -> tuple[Shapes, int]:
    """Of a whole network of about this size, and the number of its layers."""
    ends = size((VOCABULARY, hidden))
    layer = sum(map(size, layer_shapes(0, hidden, intermediate).values()))
    layers = max(1, round((gigabytes * 1e9 - 2 * ends) / layer))
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for number in range(layers):
        shapes |= layer_shapes(number, hidden, intermediate)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}, layers


def size(shape: tuple[int, ...]) -> int:
    """Bytes of a bfloat16 tensor of this shape."""
    return math.prod(shape) * BYTES_PER_NUMBER


def plan_shards(shapes: Shapes, limit: int) -> list[Shapes]:
    """Fill shards in order; each but the last holds as much as fits below the limit in bytes."""
    shards: list[Shapes] = [{}]
    used = 0
    for name, shape in shapes.items():
        if shards[-1] and used + size(shape) > limit:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size(shape)
    return shards


def make_tensor(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones for a norm; for a matrix (rows, columns) singular values 1/k in the first 64, noise."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    rows, columns = shape
    left = torch.randn(rows, RANK, generator=generator) / rows**0.5
    right = torch.randn(RANK, columns, generator=generator) / columns**0.5
    spectrum = 1 / torch.arange(1, RANK + 1)  # the random factors are orthonormal, nearly
    matrix = torch.randn(rows, columns, generator=generator)
    matrix.mul_(NOISE * spectrum.norm() / math.sqrt(rows * columns))
    return matrix.addmm_(left * spectrum, right).to(torch.bfloat16)


def write_checkpoint(directory: Path, shapes: Shapes, config: dict[str, object], shard: int) -> int:
    """Write config, shards and index into an empty or new directory; returns the bytes of data."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise SystemExit(f"error: {directory} is not empty; name a new directory")
    shards = plan_shards(shapes, shard)
    total = sum(map(size, shapes.values()))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: make_tensor(shape, generator) for name, shape in part.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        del tensors  # before the next shard is made
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="OUT_DIR")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size (10**9 bytes; 6)")
    parser.add_argument("--rows", type=int, default=4096, help="hidden size (4096)")
    parser.add_argument("--columns", type=int, default=11008, help="MLP size (11008)")
    parser.add_argument("--shard", type=parse_bytes, default="1GB", help="largest shard (1GB)")
    arguments = parser.parse_args()

    shapes, layers = model_shapes(arguments.gigabytes, arguments.rows, arguments.columns)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": arguments.rows,
        "intermediate_size": arguments.columns,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    total = write_checkpoint(arguments.directory, shapes, config, arguments.shard)
    print(f"{arguments.directory}: {layers} layers, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
