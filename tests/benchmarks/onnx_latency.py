"""Latency, memory, size and fidelity in onnxruntime: dense float32, its own int8, and what mpoc exports.

    python tests/benchmarks/onnx_latency.py --network minilm|resnet20|… --data DATA --out FOLDER \
        [--minilm DIR] [-- OPTIONS of mpoc compress]

Files are made in FOLDER and kept there: dense; int8 by ``quantize_dynamic``, and by ``quantize_static`` (QDQ,
by channel, 256 training images) for convolutions; and ``mpoc compress --calibrate`` with the options of each
row (of MiniLM the encoder), then ``mpoc export --onnx``. Rows "decoded" set ``session.disable_quant_qdq``.
All dense networks are written by the same exporter. LeNet-5 is trained here for one epoch, PicoGPT as in
``calibration_picogpt.py`` unless FOLDER/dense.safetensors is there.

One thread; sessions are called in turns, and the median of the thread's CPU times is taken. Memory is the
peak of a process that loads one file and runs a batch of 32, less that of importing onnxruntime. Fidelity is
against the dense network, on data that nothing was fitted to: the mean cosine of embeddings of 250 docstrings
(mean over real tokens), the share of equal answers to 2,000 test images, and their accuracy, or bits per
character of 100 blocks of 256, which is what PicoGPT takes, from the last tenth of the text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from benchmarking import markdown_table, require_file, run_mpoc
from numpy.typing import NDArray
from torch import nn

from mpoc.models.export import InputSpec, _of_tensors, _write_onnx, trace_program
from mpoc.models.zoo import make

Array = NDArray[Any]
Inputs = tuple[Array, ...]
OURS = ("--bits 4", "--bits 8", "--size 13%", "--ratio 0.5 --form svd")
OURS_MINILM = ("--bits 4", "--bits 8", "--size 59.5%", "--ratio 0.5 --form svd")  # the encoder at 13 %
TOKENS = 32
MEMORY = """
import sys
import numpy as np, onnxruntime
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry("session.disable_quant_qdq", sys.argv[3])
session = onnxruntime.InferenceSession(sys.argv[1], options)
inputs = np.load(sys.argv[2])
session.run(None, {node.name: inputs[f"arr_{k}"] for k, node in enumerate(session.get_inputs())})
print((peak() - before) / 1e3)
"""


@dataclass
class Task:
    """A network, how mpoc is called for it, and what it is measured on."""

    source: Path
    options: list[str]  # of mpoc compress
    dense: nn.Module
    example: InputSpec
    draw: Callable[[int], Inputs]  # inputs of a batch
    unseen: Sequence[Inputs]
    fidelity: Callable[[list[Array], list[Array]], str]  # of outputs beside the dense network's
    seen: Sequence[Inputs]  # to calibrate static int8 on; empty: dynamic only


def minilm(arguments: argparse.Namespace) -> Task:
    """all-MiniLM-L6-v2."""
    from transformers import AutoModel, AutoTokenizer

    seen, unseen = (arguments.data / "text" / f"docstrings-{part}.jsonl" for part in ("calibration", "test"))
    texts = sorted((json.loads(line)["text"] for line in require_file(unseen, "texts").open("rb")), key=len)[
        :250
    ]
    tokenizer = AutoTokenizer.from_pretrained(arguments.minilm)
    given = []
    for start in range(0, len(texts), 25):
        found = tokenizer(texts[start : start + 25], padding=True, truncation=True, max_length=128)
        given.append((np.array(found["input_ids"]), np.array(found["attention_mask"])))

    def embedded(outputs: list[Array]) -> Array:
        rows = []
        for hidden, (_, mask) in zip(outputs, given, strict=True):
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            rows.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(rows)

    def fidelity(ours: list[Array], dense: list[Array]) -> str:
        return f"{(embedded(ours) * embedded(dense)).sum(1).mean():.4f}"

    def draw(batch: int) -> Inputs:
        return np.random.default_rng(0).integers(1000, 30000, (batch, TOKENS)), np.ones(
            (batch, TOKENS), np.int64
        )

    dense = AutoModel.from_pretrained(arguments.minilm).eval()
    options = ["--layers", "encoder.*", "--calibrate", str(seen)]
    return Task(arguments.minilm, options, dense, InputSpec((1, TOKENS)), draw, given, fidelity, [])


def classifier(
    source: Path, arch: str, data: Path, dense: nn.Module, seen: Array, unseen: Array, labels: Array
) -> Task:
    """A network of images."""

    def answers(outputs: list[Array]) -> Array:
        return np.concatenate([logits.argmax(1) for logits in outputs])

    def fidelity(ours: list[Array], wanted: list[Array]) -> str:
        same, right = answers(ours) == answers(wanted), answers(ours) == labels
        return f"{100 * same.mean():.2f} %, {100 * right.mean():.2f} %"

    images = [(part,) for part in np.split(unseen, range(200, len(unseen), 200))]
    spec = InputSpec((1, *unseen.shape[1:]), torch.float32)
    options = ["--arch", arch, "--calibrate", str(data)]
    calibration = [(image[None],) for image in seen]
    return Task(source, options, dense.eval(), spec, lambda n: (unseen[:n],), images, fidelity, calibration)


def resnet20(arguments: argparse.Namespace) -> Task:
    """ResNet-20 on CIFAR-10."""
    from resnet56_roundtrip import read_checkpoint, read_cifar

    folder = arguments.data / "cifar10"
    test = read_cifar(require_file(folder / "test.parquet", "test images"), 2000)
    seen = read_cifar(folder / "train.parquet", 256)
    (source,) = (arguments.data / "checkpoints").glob("resnet20-*.th")
    network = make("resnet20")
    network.load_state_dict(read_checkpoint(source), strict=True)
    known, unseen = seen.images.numpy(), test.images.numpy()
    return classifier(source, "resnet20", folder, network, known, unseen, test.labels.numpy())


def lenet5(arguments: argparse.Namespace) -> Task:
    """LeNet-5 on MNIST, trained for an epoch."""
    folder = arguments.data / "mnist"

    def read(name: str, header: int) -> Array:
        with gzip.open(require_file(folder / f"{name}-ubyte.gz", "MNIST")) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    images = {part: read(f"{part}-images-idx3", 16).reshape(-1, 1, 28, 28) for part in ("train", "t10k")}
    scaled = {part: (pixels / np.float32(255)) for part, pixels in images.items()}
    labels = {part: read(f"{part}-labels-idx1", 8).astype(np.int64) for part in images}
    torch.manual_seed(0)
    network, source = make("lenet5"), arguments.out / "lenet5.pt"
    if not source.exists():
        optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
        for at in torch.randperm(len(scaled["train"])).split(128):
            x, y = torch.from_numpy(scaled["train"][at]), torch.from_numpy(labels["train"][at])
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimiser.step()
        torch.save(network.state_dict(), source)
    network.load_state_dict(torch.load(source))
    unseen = scaled["t10k"][:2000], labels["t10k"][:2000]
    return classifier(source, "lenet5", folder, network, scaled["train"][:256], *unseen)


def picogpt(arguments: argparse.Namespace) -> Task:
    """PicoGPT on tiny Shakespeare."""
    from calibration_picogpt import CONTEXT, HELD_OUT, blocks, trained
    from safetensors.torch import load_file

    text = require_file(arguments.data / "text/tinyshakespeare.txt", "text").read_text("utf-8")
    characters, cut = sorted(set(text)), int(len(text) * (1 - HELD_OUT))
    arch, train = f"picogpt:vocab={len(characters)},context={CONTEXT}", arguments.out / "train.txt"
    train.write_text(text[:cut], "utf-8")
    source = arguments.out / "dense.safetensors"
    if not source.exists():
        trained(train, arguments.out, arch, len(characters))
    network = make(arch)
    network.load_state_dict(load_file(source))
    unseen = blocks(text[cut:], characters)[:100].numpy()

    def fidelity(ours: list[Array], _: list[Array]) -> str:
        logits = torch.from_numpy(np.concatenate(ours))[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(unseen[:, 1:].copy()).flatten())
        return f"{float(loss) / math.log(2):.4f}"

    def draw(batch: int) -> Inputs:
        return (unseen[np.arange(batch) % len(unseen)],)

    parts = [(part,) for part in np.split(unseen, 10)]
    spec = InputSpec((1, CONTEXT), torch.int64)
    options = ["--arch", arch, "--calibrate", str(train)]
    return Task(source, options, network.eval(), spec, draw, parts, fidelity, [])


def written(task: Task, arguments: argparse.Namespace) -> Iterator[tuple[str, Path, bool]]:
    """Label and file of each row, and whether its codes are decoded when the session is made."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    folder = arguments.out
    dense = folder / "dense.onnx"
    if not dense.exists():
        network, inputs = task.dense, [task.example]
        if task.example.dtype is None:
            network, inputs = _of_tensors(network, inputs)
        _write_onnx(trace_program(network, inputs), {}, dense)
    yield "dense, float32", dense, False
    dynamic, static = folder / "dynamic.onnx", folder / "static.onnx"
    if not dynamic.exists():
        quantize_dynamic(dense, dynamic, weight_type=QuantType.QInt8)
    yield "dense, int8, dynamic", dynamic, False
    if task.seen:
        if not static.exists():
            name = onnxruntime.InferenceSession(dense).get_inputs()[0].name
            feeds = iter([{name: image} for (image,) in task.seen])

            class Reader(CalibrationDataReader):  # type: ignore[misc]
                def get_next(self) -> Any:
                    return next(feeds, None)

            quantize_static(dense, static, Reader(), per_channel=True)
        yield "dense, int8, static", static, False
    for label in OURS_MINILM if task.source.is_dir() else OURS:
        goal = label.split()
        stem = "-".join(part.strip("-%") for part in goal)
        compressed, file = (
            folder / (stem if task.source.is_dir() else f"{stem}.safetensors"),
            folder / f"{stem}.onnx",
        )
        if not file.exists():
            run_mpoc(
                "compress", task.source, "-o", compressed, *task.options, *goal, *arguments.more, "--force"
            )
            shape = ["--input-shape", f"1x{TOKENS}"] if task.source.is_dir() else []
            run_mpoc("export", compressed, "--onnx", file, *shape)
        yield f"mpoc {label}", file, False
        if "svd" not in goal:
            yield f"mpoc {label}, decoded", file, True


def session_of(file: Path, decoded: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", str(int(decoded)))
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: Inputs) -> Array:
    named = {node.name: x for node, x in zip(session.get_inputs(), inputs, strict=True)}
    first: Array = session.run(None, named)[0]
    return first


def milliseconds(sessions: dict[str, Any], inputs: Inputs, budget: float) -> dict[str, float]:
    """Median CPU time of each, called in turns."""
    taken: dict[str, list[float]] = {label: [] for label in sessions}
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(taken[next(iter(taken))]) < 5:
        for label, session in sessions.items():
            run(session, inputs)  # what the other left in the caches is not this one's fault
            start = time.thread_time()
            run(session, inputs)
            taken[label].append(1e3 * (time.thread_time() - start))
    return {label: statistics.median(values) for label, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=["minilm", "resnet20", "lenet5", "picogpt"], required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minilm", type=Path, help="a directory of all-MiniLM-L6-v2")
    parser.add_argument("--seconds", type=float, default=20, help="of measuring for each batch size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("more", nargs="*", help="options of mpoc compress, after --")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(exist_ok=True, parents=True)
    tasks = {"minilm": minilm, "resnet20": resnet20, "lenet5": lenet5, "picogpt": picogpt}
    task = tasks[arguments.network](arguments)
    files = {label: (file, decoded) for label, file, decoded in written(task, arguments)}
    np.savez(arguments.out / "inputs.npz", *task.draw(32))
    rows: dict[str, list[str]] = {}
    for label, (file, decoded) in files.items():
        command = [sys.executable, "-c", MEMORY, file, arguments.out / "inputs.npz", str(int(decoded))]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows[label] = [label, f"{file.stat().st_size / 1e6:.2f}", f"{peak:.0f}"]
    sessions = {label: session_of(*item) for label, item in files.items()}
    for batch in arguments.batches:
        for label, taken in milliseconds(sessions, task.draw(batch), arguments.seconds).items():
            rows[label].append(f"{taken:,.0f}" if taken >= 1000 else f"{taken:.3g}")
    outputs = {label: [run(session, x) for x in task.unseen] for label, session in sessions.items()}
    for label, found in outputs.items():
        rows[label].append(task.fidelity(found, outputs["dense, float32"]))
    header = [
        arguments.network,
        "file MB",
        "peak MB",
        *(f"ms, batch {batch}" for batch in arguments.batches),
        "fidelity",
    ]
    print(markdown_table(header, list(rows.values())))


if __name__ == "__main__":
    main()
