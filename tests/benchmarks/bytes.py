"""Size against fidelity without training: mpoc and every other way to spend the same bytes, in one run.

    python tests/benchmarks/bytes.py --network minilm --minilm DIR --data DATA --out FILE.json

Networks: ``minilm`` (the 36 linear layers of the encoder), ``minilm-whole`` (with the pooler and the tables
of words and positions), ``resnet20``, ``resnet56`` (all convolutions and the head) and ``picogpt`` (linear
layers and head; trained here and kept beside FILE.json unless ``--checkpoint`` is one already). Shares are of
the fp32 bytes of these layers, weights and biases, and count all that stands for them; of ``minilm-whole``,
of its whole file. For mpoc all other tensors, the header and the manifest come on top and are listed as
``overhead``.

- ``ours``, ``grid``: ``mpoc compress --calibrate --size BYTES``, the latter with ``--storage grid``;
  ``ours-fast`` and ``grid-fast`` with ``--effort fast``.
- ``rtn``, ``gptq``: rounding to nearest, and GPTQ (in order, inputs of the rounded network), at 8, 4, 3 and 2
  bits; asymmetric, groups of 64 inputs, a scale in fp16 and a zero point each.
- ``mixed-gptq``: GPTQ with 2, 3, 4, 5, 6 or 8 bits for each layer, by what rounding that layer alone does to
  the outputs on calibration data; the largest size within the share.
- ``whitened-svd-int4``: SVD whitened by the dense network's inputs (SVD-LLM), both factors by GPTQ at 4 bits.
- ``hqq``, ``torchao``, ``quanto``: these libraries, where they are installed.
- ``llmcompressor``: its GPTQ, where it is installed; ``minilm`` only.

For the others nothing of mpoc is used but its GPTQ, which it compares itself with. Calibrated on 384
docstrings, 1,024 training images or 512 blocks of text. Measured on what no method sees: 250 docstrings, the
first 5,000 test images, the last tenth of the text. Each row is kept in FILE.json as it is done, and a row
that stands there is not made again.
``--plot FILE.png`` draws all rows of the network; with ``--methods`` empty it does nothing else.
"""

import argparse
import json
import math
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from benchmarking import markdown_table, require_file, run_mpoc
from torch import Tensor, nn
from torch.nn import functional as F

from mpoc.quantize.grid_rounding import gptq as gptq_values

GROUP, WIDTHS, MIXED = 64, (8, 4, 3, 2), (2, 3, 4, 5, 6, 8)
OURS = {
    "ours": [],
    "grid": ["--storage", "grid"],
    "ours-fast": ["--effort", "fast"],
    "grid-fast": ["--storage", "grid", "--effort", "fast"],
}
OTHERS = ("rtn", "gptq", "mixed-gptq", "whitened-svd-int4", "hqq", "torchao", "quanto", "llmcompressor")
LABELS = {
    "ours": "mpoc", "ours-fast": "mpoc --effort fast", "rtn": "to nearest", "gptq": "GPTQ",
    "grid": "mpoc --storage grid", "grid-fast": "mpoc --storage grid --effort fast",
    "mixed-gptq": "GPTQ, mixed bits", "whitened-svd-int4": "whitened SVD, int4",
    "hqq": "hqq", "torchao": "torchao", "quanto": "optimum-quanto",
    "llmcompressor": "llmcompressor",
}  # fmt: skip
TITLES = {"minilm": "all-MiniLM-L6-v2, encoder", "resnet20": "ResNet-20", "resnet56": "ResNet-56"}
# What is drawn of a network: a figure, its name on the axis, and what is lost.
LOST: list[tuple[str, str, Callable[[float], float]]] = [
    ("cosine", "1 - cosine", lambda cosine: 1 - cosine),
    ("KL", "KL from the dense network, nats", float),
    ("bits per character", "bits per character", float),
]
LAYERS = nn.Linear | nn.Conv2d | nn.Embedding
Rounding = Callable[[Tensor, Tensor | None, int], tuple[Tensor, float]]  # W, moment, bits → Ŵ, bytes


# Networks: what is compressed, on what it is calibrated, and what is measured.


@dataclass
class Task:
    """One network.

    Attributes:
        source: for mpoc.
        options: of ``mpoc compress``: layers, network, data.
        build: the dense network, in evaluation mode.
        stages: names of layers in order; those of one stage read inputs that none of them changes.
        run: outputs (n, …) of a batch: unit embeddings or log-probabilities.
        batches: for calibration.
        distance: of outputs from the dense network's.
        measure: figures of a network on held-out data, the one to draw first.
        whole: shares are of the whole file.
    """

    source: Path
    options: list[str]
    build: Callable[[], Any]
    stages: list[list[str]]
    run: Callable[[Any, Any], Tensor]
    batches: list[Any]
    distance: Callable[[Tensor, Tensor], float]
    measure: Callable[[Any], dict[str, float]]
    whole: bool = False

    @property
    def names(self) -> list[str]:
        return [name for stage in self.stages for name in stage]

    @cached_property
    def selected(self) -> int:
        """fp32 bytes of the layers, weights and biases."""
        dense = self.build()
        return sum(4 * p.numel() for name in self.names for p in dense.get_submodule(name).parameters())

    @cached_property
    def dense_moments(self) -> dict[str, Tensor]:
        return second_moments(self, self.build(), self.names)

    @cached_property
    def around(self) -> tuple[int, int]:
        """Bytes of all other tensors, and of header and manifest, in what mpoc writes from few examples."""
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / ("out" if self.source.is_dir() else "out.safetensors")
            options = without(self.options, "--calibration-samples")
            options += ["--calibration-samples", "128", "--bits", "4", "--storage", "coded", "--quiet"]
            run_mpoc("compress", self.source, "-o", out, *options)
            return written(out, self.names, self.source)[1:]

    @cached_property
    def reference(self) -> int:
        """The bytes that shares are of."""
        return sum(file.stat().st_size for file in weight_files(self.source)) if self.whole else self.selected

    def share(self, used: float) -> float:
        """Of a network whose layers take so many bytes."""
        return (used + (self.around[0] if self.whole else 0)) / self.reference

    def room(self, share: float) -> float:
        """Bytes for the layers."""
        return share * self.reference - (self.around[0] if self.whole else 0)


def without(options: list[str], name: str) -> list[str]:
    """Options, each followed by its value, but that of this name."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [part for pair in pairs if pair[0] != name for part in pair]


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def other_bytes(path: Path) -> int:
    """Of the files of a directory that hold no weights."""
    weights = weight_files(path)
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f not in weights)


def written(path: Path, names: list[str], source: Path) -> tuple[int, int, int]:
    """Bytes that ``--size`` limits: all; those of tensors outside the named layers; headers and the manifest,
    which a directory keeps in files beside the weights.
    """
    total = header = other_bytes(path) - other_bytes(source)
    outside = 0
    for file in weight_files(path):
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            entries = json.loads(opened.read(length))
        total, header = total + file.stat().st_size, header + 8 + length
        for tensor, entry in entries.items():
            if tensor != "__metadata__" and not any(tensor.startswith(f"{name}.") for name in names):
                outside += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total, outside, header


def minilm(arguments: argparse.Namespace, whole: bool) -> Task:
    """all-MiniLM-L6-v2; cosine of embeddings of docstrings."""
    from calibration_minilm import batches, embed
    from transformers import AutoModel, AutoTokenizer, logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if arguments.minilm is None:
        raise SystemExit("error: --network minilm needs --minilm DIR")
    files = [arguments.data / "text" / f"docstrings-{part}.jsonl" for part in ("calibration", "test")]
    seen, unseen = (
        sorted((json.loads(line)["text"] for line in require_file(f, "texts").open("rb")), key=len)
        for f in files
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.minilm)

    def build() -> Any:
        return AutoModel.from_pretrained(arguments.minilm).eval()

    def run(network: Any, batch: Any) -> Tensor:
        hidden, mask = network(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    wanted = embed(build(), tokenizer, unseen)
    stages = [[f"embeddings.{kind}_embeddings" for kind in ("word", "position")]] if whole else []
    for k in range(6):
        layer = f"encoder.layer.{k}."
        stages.append([f"{layer}attention.self.{kind}" for kind in ("query", "key", "value")])
        stages += [
            [layer + rest] for rest in ("attention.output.dense", "intermediate.dense", "output.dense")
        ]
    stages += [["pooler.dense"]] if whole else []
    patterns = ["encoder.*", *(["embeddings.word*", "embeddings.position*", "pooler.*"] if whole else ())]
    return Task(
        arguments.minilm,
        [*(part for p in patterns for part in ("--layers", p)), "--calibrate", str(files[0])],
        build, stages, run, list(batches(tokenizer, seen)),
        lambda ours, dense: float((ours - dense).square().sum(1).mean()),
        lambda network: {"cosine": float((embed(network, tokenizer, unseen) * wanted).sum(1).mean())},
        whole,
    )  # fmt: skip


def divergence(ours: Tensor, dense: Tensor) -> float:
    """Mean KL of log-probabilities (…, classes) from the dense network's, in nats."""
    return float((dense.exp() * (dense - ours)).sum(-1).mean())


def cifar(arguments: argparse.Namespace, depth: int) -> Task:
    """A ResNet; accuracy, agreement with the dense network and KL on test images."""
    from resnet56_roundtrip import read_checkpoint, read_cifar

    from mpoc.models.zoo.cifar import resnet

    folder = arguments.data / "cifar10"
    test = read_cifar(require_file(folder / "test.parquet", "test images"), 5000)
    seen = read_cifar(require_file(folder / "train.parquet", "training images"), 1024)
    found = sorted((arguments.data / "checkpoints").glob(f"resnet{depth}-*.th"))
    if not found:
        raise SystemExit(f"error: no ResNet-{depth} in {arguments.data / 'checkpoints'}")
    state = read_checkpoint(found[0])

    def build() -> Any:
        network = resnet(depth)
        network.load_state_dict(state, strict=True)
        return network.eval()

    def run(network: Any, batch: Tensor) -> Tensor:
        return network(batch).log_softmax(1)

    @torch.no_grad()
    def predict(network: Any) -> Tensor:
        return torch.cat([run(network, part) for part in test.images.split(250)])

    wanted = predict(build())

    def measure(network: Any) -> dict[str, float]:
        ours = predict(network)
        right, same = ours.argmax(1) == test.labels, ours.argmax(1) == wanted.argmax(1)
        percent = [100 * float(flags.float().mean()) for flags in (right, same)]
        return {"accuracy %": percent[0], "agreement %": percent[1], "KL": divergence(ours, wanted)}

    options = ["--arch", f"resnet:depth={depth}", "--calibrate", str(folder), "--calibration-samples", "1024"]
    stages = [[name] for name, m in build().named_modules() if isinstance(m, LAYERS)]
    return Task(found[0], options, build, stages, run, list(seen.images.split(64)), divergence, measure)


def picogpt(arguments: argparse.Namespace) -> Task:
    """PicoGPT on tiny Shakespeare; bits per character."""
    from calibration_picogpt import CONTEXT, HELD_OUT, SAMPLES, bits_per_character, blocks, trained
    from safetensors.torch import load_file

    from mpoc.models.zoo.picogpt import PicoGPT

    with require_file(arguments.data / "text/tinyshakespeare.txt", "text").open("r", newline="") as file:
        text = file.read()
    characters, cut = sorted(set(text)), int(len(text) * (1 - HELD_OUT))
    seen, unseen = blocks(text[:cut], characters), blocks(text[cut:], characters)
    arch, folder = f"picogpt:vocab={len(characters)},context={CONTEXT}", arguments.out.resolve().parent
    train = folder / "shakespeare-train.txt"
    train.write_text(text[:cut], encoding="utf-8", newline="")
    checkpoint = arguments.checkpoint or folder / "dense.safetensors"
    if not checkpoint.is_file():
        trained(train, folder, arch, len(characters))
    state = load_file(checkpoint)

    def build() -> Any:
        network = PicoGPT(len(characters), CONTEXT)
        network.load_state_dict(state, strict=True)
        return network.eval()

    stages: list[list[str]] = []
    for k in range(len(build().layers)):
        stages.append([f"layers.{k}.attention.{part}" for part in ("query", "key", "value")])
        stages += [[f"layers.{k}.{part}"] for part in ("attention.out", "up", "down")]
    drawn = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    options = ["--arch", arch, "--layers", "layers*", "--layers", "head"]
    return Task(
        checkpoint, [*options, "--calibrate", str(train), "--calibration-samples", str(SAMPLES)],
        build, [*stages, ["head"]], lambda network, batch: network(batch).log_softmax(-1),
        list(seen[drawn].split(8)), divergence,
        lambda network: {"bits per character": bits_per_character(network, unseen)},
    )  # fmt: skip


NETWORKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "minilm": lambda arguments: minilm(arguments, whole=False),
    "minilm-whole": lambda arguments: minilm(arguments, whole=True),
    "resnet20": lambda arguments: cifar(arguments, 20),
    "resnet56": lambda arguments: cifar(arguments, 56),
    "picogpt": picogpt,
}


# Rounding, in torch alone.


class Reached(Exception):  # noqa: N818 - no error: the last layer that is asked for has its inputs
    pass


@torch.no_grad()
def second_moments(task: Task, network: Any, names: list[str]) -> dict[str, Tensor]:
    """Σ x xᵀ (inputs, inputs) over the calibration data of the named layers, padding left out; no tables."""
    layers = {name: network.get_submodule(name) for name in names}
    layers = {name: module for name, module in layers.items() if not isinstance(module, nn.Embedding)}
    sums: dict[str, Any] = dict.fromkeys(layers, 0)
    waiting: set[str] = set()
    batch: Any = None

    def add(name: str, module: Any, x: Any) -> None:
        if isinstance(module, nn.Conv2d):
            padding: Any = module.padding
            x = F.unfold(x, module.kernel_size, padding=padding, stride=module.stride).transpose(1, 2)
        elif isinstance(batch, Mapping) and x.ndim == 3:
            x = x[batch["attention_mask"].bool()]
        rows = x.reshape(-1, x.shape[-1])
        sums[name] = sums[name] + (rows.T @ rows).double()
        waiting.discard(name)
        if not waiting:
            raise Reached

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: add(name, module, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    for batch in task.batches if layers else ():
        waiting.update(layers)
        try:
            task.run(network, batch)
        except Reached:
            continue
    for handle in handles:
        handle.remove()
    return sums


def stored(shape: Sequence[int], bits: int) -> float:
    """Bytes of codes, a zero point and an fp16 scale for each group of a row."""
    rows, columns = shape
    return rows * (columns * bits + math.ceil(columns / GROUP) * (16 + bits)) / 8


def to_nearest(weight: Tensor, _: Tensor | None, bits: int) -> tuple[Tensor, float]:
    """Each number to the nearest code of its group."""
    return gptq_values(weight, None, bits, GROUP), stored(weight.shape, bits)


def gptq(weight: Tensor, moment: Tensor | None, bits: int) -> tuple[Tensor, float]:
    """GPTQ, the one that mpoc compares with; without inputs to nearest."""
    return gptq_values(weight, moment, bits, GROUP), stored(weight.shape, bits)


def svd_in_four_bits(weight: Tensor, moment: Tensor | None, room: float) -> tuple[Tensor, float]:
    """SVD of W S, S Sᵀ the moment; the second factor by GPTQ in it, the first in what that leads to."""
    (rows, columns), bits = weight.shape, 4
    if moment is None:
        moment = torch.eye(columns, dtype=torch.float64)
    ranks = range(1, min(weight.shape) + 1)
    rank = max((r for r in ranks if stored((rows, r), bits) + stored((r, columns), bits) <= room), default=1)
    scaled = moment / moment.diagonal().mean() + 1e-6 * torch.eye(columns, dtype=torch.float64)
    root = torch.linalg.cholesky(scaled)
    left, values, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    halves = values[:rank].sqrt()
    second = torch.linalg.solve_triangular(root, halves[:, None] * right[:rank], upper=False, left=False)
    second, used = gptq(second.float(), moment, bits)
    inner = second.double() @ moment @ second.double().T
    first, more = gptq((left[:, :rank] * halves).float(), inner, bits)
    return first @ second, used + more


def by_hqq(weight: Tensor, _: Tensor | None, bits: int) -> tuple[Tensor, float]:
    """Half-quadratic: scale and zero point in fp16 for 64 numbers where they divide, else for a row."""
    from hqq.core.quantize import Quantizer

    group = GROUP if weight.numel() % GROUP == 0 else None
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, channel_wise=True, group_size=group, axis=1, device="cpu",
        compute_dtype=torch.float32,
    )  # fmt: skip
    scales = weight.numel() / GROUP if group else len(weight)
    return Quantizer.dequantize(codes, meta).view_as(weight), weight.numel() * bits / 8 + 4 * scales


def by_torchao(weight: Tensor, _: Tensor | None, bits: int) -> tuple[Tensor, float]:
    """Symmetric; a scale, counted as fp16, for 64 inputs where they divide, else for a row."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    divides = weight.shape[1] % GROUP == 0
    layer = nn.Sequential(nn.Linear(weight.shape[1], len(weight), bias=False))
    layer[0].weight = nn.Parameter(weight.clone())
    granularity = PerGroup(GROUP) if divides else PerAxis(0)
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity))
    found: Any = layer[0].weight
    scales = weight.numel() / GROUP if divides else len(weight)
    return found.dequantize().float(), weight.numel() * bits / 8 + 2 * scales


def by_quanto(weight: Tensor, _: Tensor | None, bits: int) -> tuple[Tensor, float]:
    """8 bits: symmetric by row; 4 and 2: groups of 128, scale and shift counted as fp16."""
    from optimum import quanto

    layer = nn.Sequential(nn.Linear(weight.shape[1], len(weight), bias=False))
    layer[0].weight = nn.Parameter(weight.clone())
    quanto.quantize(layer, weights=getattr(quanto, f"qint{bits}"))
    quanto.freeze(layer)
    found: Any = layer[0].weight
    scales = 2 * len(weight) if bits == 8 else 4 * weight.numel() / 128
    return found.dequantize().float(), weight.numel() * bits / 8 + scales


UNIFORM: dict[str, tuple[Rounding, tuple[int, ...]]] = {
    "rtn": (to_nearest, WIDTHS), "gptq": (gptq, WIDTHS),
    "hqq": (by_hqq, WIDTHS), "torchao": (by_torchao, WIDTHS), "quanto": (by_quanto, (8, 4, 2)),
}  # fmt: skip


# Networks made of rounded layers.


@torch.no_grad()
def rounded(task: Task, rounding: Rounding, widths: Mapping[str, int]) -> tuple[Any, float]:
    """The network with its layers rounded in order, and their bytes, biases in fp32."""
    network, used = task.build(), 0.0
    for stage in task.stages:
        moments = second_moments(task, network, stage) if rounding is gptq else {}
        for name in stage:
            layer = network.get_submodule(name)
            used += replace(layer, rounding(layer.weight.flatten(1), moments.get(name), widths[name]))
    return network, used


def replace(layer: Any, made: tuple[Tensor, float]) -> float:
    """Give a layer this weight; its bytes and those of its bias."""
    layer.weight.data = made[0].reshape(layer.weight.shape)
    return made[1] + (4 * layer.bias.numel() if getattr(layer, "bias", None) is not None else 0)


def by_llmcompressor(task: Task, bits: int) -> tuple[Any, float]:
    """GPTQ of llmcompressor, block by block, asymmetric, for models of transformers; biases in fp32.

    Scales are fitted to the weights' error times E[x²] (``imatrix_mse``), the best of its observers here, and
    rounded to fp16. Each text is a batch of its own: padding would count as input.
    """
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader

    texts: Any = [
        {key: ids[k : k + 1, :length] for key, ids in batch.items()}
        for batch in task.batches
        for k, length in enumerate(batch["attention_mask"].sum(1).tolist())
    ]
    grid = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    layers = {"targets": task.names, "weights": {**grid, "observer": "imatrix_mse"}}
    network, made, used = task.build(), task.build(), 0.0
    oneshot(
        model=made, dataset=DataLoader(texts, batch_size=None),
        recipe=GPTQModifier(config_groups={"layers": layers}), pipeline="sequential",
    )  # fmt: skip
    for name in task.names:
        layer = made.get_submodule(name)
        scales = layer.weight_scale.detach()[..., None]
        codes = (layer.weight.detach().unflatten(1, (-1, GROUP)) / scales).round()
        weight = (codes * scales.half()).flatten(1)
        used += replace(network.get_submodule(name), (weight, stored(weight.shape, bits)))
    return network, used


@torch.no_grad()
def whitened(task: Task, share: float) -> tuple[Any, float]:
    """Every layer gets its share of the room, by its numbers; biases in fp32."""
    network, used = task.build(), 0.0
    for name in task.names:
        layer = network.get_submodule(name)
        bias = 4 * layer.bias.numel() if getattr(layer, "bias", None) is not None else 0
        room = task.room(share) / task.selected * (4 * layer.weight.numel() + bias) - bias
        moment = task.dense_moments.get(name)
        used += replace(layer, svd_in_four_bits(layer.weight.flatten(1), moment, room))
    return network, used


@torch.no_grad()
def sensitivities(task: Task) -> dict[str, dict[int, float]]:
    """How far rounding one layer alone moves the outputs, by bits; beyond 4 bits a quarter for each."""
    network, batches = task.build(), task.batches[::4]
    wanted = torch.cat([task.run(network, batch) for batch in batches])
    found: dict[str, dict[int, float]] = {}
    for name in task.names:
        layer, moved = network.get_submodule(name), {}
        dense = layer.weight.data
        for bits in (2, 3, 4):
            replace(layer, gptq(dense.flatten(1), task.dense_moments.get(name), bits))
            moved[bits] = task.distance(torch.cat([task.run(network, b) for b in batches]), wanted)
        layer.weight.data = dense
        found[name] = moved | {bits: moved[4] * 4.0 ** (4 - bits) for bits in MIXED if bits > 4}
    return found


def mixed_widths(task: Task, moved: dict[str, dict[int, float]], room: float) -> dict[str, int] | None:
    """From 2 bits on, always the step that gains most a byte and fits; None: 2 bits are too large."""
    dense, widths = task.build(), dict.fromkeys(task.names, 2)
    layers = {name: dense.get_submodule(name) for name in widths}
    shapes = {name: layer.weight.flatten(1).shape for name, layer in layers.items()}
    room -= task.selected - sum(4 * math.prod(shape) for shape in shapes.values())
    used = sum(stored(shape, 2) for shape in shapes.values())

    def steps() -> Iterator[tuple[float, float, str, int]]:
        for name, bits in widths.items():
            for more in (b for b in MIXED if b > bits):
                cost = stored(shapes[name], more) - stored(shapes[name], bits)
                if used + cost <= room:
                    yield (moved[name][bits] - moved[name][more]) / cost, cost, name, more

    if used > room:
        return None
    while best := max(steps(), default=None):
        used, widths[best[2]] = used + best[1], best[3]
    return widths


# Rows.


def of_mpoc(task: Task, share: float, options: list[str]) -> tuple[Any, dict[str, Any]]:
    """What ``mpoc compress --size`` writes; its command and its share, measured on the file."""
    import mpoc

    outside, header = task.around
    limit = int(share * task.reference) + (0 if task.whole else outside + header)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / ("out" if task.source.is_dir() else "out.safetensors")
        given = [*task.options, "--size", f"{limit}B", *options]
        run_mpoc("compress", task.source, "-o", out, *given, "--quiet")
        total, _, header = written(out, task.names, task.source)
        used = total if task.whole else total - outside - header
        facts = {"bytes": used, "share": used / task.reference, "overhead": outside + header}
        return mpoc.load(out).eval(), facts | {"command": " ".join(["mpoc compress MODEL", *given])}


def rows(task: Task, method: str, shares: list[float]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Settings of a method, and what makes the network and its facts."""

    def plain(make: Callable[[], tuple[Any, float]]) -> Callable[[], Any]:
        def made() -> Any:
            network, used = make()
            return network, {"bytes": round(used), "share": task.share(used)}

        return made

    if method in OURS:
        for share in shares:
            yield f"{share:g}", partial(of_mpoc, task, share, OURS[method])
    elif method in UNIFORM:
        rounding, widths = UNIFORM[method]
        for bits in widths:
            uniform = dict.fromkeys(task.names, bits)
            yield f"{bits} bits", plain(partial(rounded, task, rounding, uniform))
    elif method == "llmcompressor":
        for bits in WIDTHS:
            yield f"{bits} bits", plain(partial(by_llmcompressor, task, bits))
    elif method == "whitened-svd-int4":
        for share in shares:
            yield f"{share:g}", plain(partial(whitened, task, share))
    else:
        moved = sensitivities(task)
        for share in shares:
            if chosen := mixed_widths(task, moved, task.room(share)):
                yield f"{share:g}", plain(partial(rounded, task, gptq, chosen))


def table(found: list[dict[str, Any]]) -> str:
    """Of one network, by falling size."""
    facts = ("network", "method", "setting", "share", "bytes", "seconds", "overhead", "command")
    figures = [key for key in found[0] if key not in facts]
    lines = [
        [row["method"], row["setting"], f"{row['share']:.4f}", *(f"{row[f]:.4f}" for f in figures),
         f"{row['seconds']:.0f}"]
        for row in sorted(found, key=lambda row: -row["share"])
    ]  # fmt: skip
    return markdown_table(["method", "setting", "share", *figures, "seconds"], lines)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Share against what is lost, upwards the less, a curve a method; of one at two efforts, the default."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5))
    key, label, lost = next(way for way in LOST if way[0] in found[0])
    methods = list(dict.fromkeys(row["method"] for row in found if row["method"] != "dense"))
    methods = [m for m in methods if not (m.endswith("-fast") and m.removesuffix("-fast") in methods)]
    for method in methods:
        rows_of_it = [row for row in found if row["method"] == method]
        points = sorted((100 * row["share"], max(lost(row[key]), 1e-5)) for row in rows_of_it)
        color, width = (f"C{OTHERS.index(method)}", 1.2) if method in OTHERS else ("black", 3.0)
        color = "dimgray" if method in ("grid", "grid-fast") else color
        style: dict[str, Any] = {"color": color, "linewidth": width, "markersize": 4}
        axes.plot(*zip(*points, strict=True), "o-", label=LABELS[method], **style)
    title = TITLES.get(found[0]["network"], found[0]["network"])
    axes.set(xlabel="share of the layers' float32 bytes, %", ylabel=label, title=title)
    axes.set(xscale="log", yscale="log")
    axes.invert_yaxis()
    ticks = [3, 5, 7, 10, 14, 20, 27]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; rows that it holds are not made again")
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="of picogpt, dense")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.27, 0.135, 0.1, 0.07, 0.05, 0.035])
    parser.add_argument(
        "--methods", nargs="*", choices=[*OURS, *OTHERS], default=["ours", "grid", *OTHERS[:4]]
    )
    parser.add_argument("--bits", type=int, nargs="+", choices=WIDTHS, default=[*WIDTHS])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if "llmcompressor" in arguments.methods and arguments.network != "minilm":
        parser.error("--methods llmcompressor takes --network minilm only")
    every = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else []
    mine = [row for row in every if row["network"] == arguments.network]
    done = {(row["method"], row["setting"]) for row in mine}

    def keep(method: str, setting: str, network: Any, facts: dict[str, Any], seconds: float) -> None:
        facts = {**task.measure(network), **facts, "seconds": round(seconds, 1)}
        row = {"network": arguments.network, "method": method, "setting": setting, **facts}
        mine.append(row)
        every.append(row)
        unfinished = arguments.out.with_suffix(".partial")
        unfinished.write_text(json.dumps(every, indent=1), "utf-8")
        unfinished.replace(arguments.out)
        print(row, flush=True)

    if arguments.methods:
        task = NETWORKS[arguments.network](arguments)
        if ("dense", "") not in done:
            keep("dense", "", task.build(), {"bytes": task.selected, "share": 1.0}, 0.0)
    unwanted = {f"{bits} bits" for bits in WIDTHS if bits not in arguments.bits}
    for method in arguments.methods:
        for setting, make in rows(task, method, arguments.shares):
            if setting not in unwanted and (method, setting) not in done:
                start = time.perf_counter()
                network, facts = make()
                keep(method, setting, network, facts, time.perf_counter() - start)
    if mine:
        print(table(mine))
    if mine and arguments.plot:
        draw(mine, arguments.plot)


if __name__ == "__main__":
    main()
