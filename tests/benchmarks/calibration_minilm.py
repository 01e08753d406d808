"""all-MiniLM-L6-v2 compressed without training: what calibration keeps of its embeddings.

    python tests/benchmarks/calibration_minilm.py --minilm DIR --data DATA [--ratios 0.5 0.25 0.1 0.05]

The 36 linear layers of the encoder at equal ρ, by plain TT-SVD (``mpoc compress``: four or five sites, and
two), plain SVD (``--form svd``), SVD whitened by each layer's inputs in the dense network (SVD-LLM, written
here, with torch alone) and ``mpoc compress --calibrate``: each layer's best form and, at the first ratio, two
factors and chains alone too. Calibrated on
``text/docstrings-calibration.jsonl``; measured on ``text/docstrings-test.jsonl``, which no method sees: 128
tokens, mean over real tokens, normalised. Cosine: mean over texts to the original's embedding. Spearman: of
the similarities of all pairs of texts.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarking import markdown_table, require_file, run_mpoc
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import mpoc

LAYERS = "encoder*"
ONE_FORM = (["--form", "svd"], ["--form", "mpo"])


def batches(tokenizer: Any, texts: list[str]) -> Iterator[Any]:
    for start in range(0, len(texts), 50):
        yield tokenizer(
            texts[start : start + 50], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Unit embeddings (texts, 384)."""
    parts = []
    for batch in batches(tokenizer, texts):
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        parts.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)


def spearman(ours: Tensor, original: Tensor) -> float:
    """Of the cosines of all pairs."""
    upper = torch.triu_indices(len(ours), len(ours), 1)
    ranks = [(e @ e.T)[upper[0], upper[1]].argsort().argsort().double() for e in (ours, original)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@torch.no_grad()
def whitened(model: Any, tokenizer: Any, texts: list[str], ratio: float) -> nn.Module:
    """Every linear layer of the encoder by SVD of W S, S Sᵀ = E[x xᵀ] of its inputs at real tokens."""
    model = copy.deepcopy(model)
    layers = {name: m for name, m in model.encoder.named_modules() if isinstance(m, nn.Linear)}
    sums = {
        name: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for name, m in layers.items()
    }
    mask = torch.empty(0)

    def hook(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0][mask.bool()].double()
            sums[name] += rows.T @ rows

        return add

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in layers.items()]
    for batch in batches(tokenizer, texts):
        mask = batch["attention_mask"]
        model(**batch)
    for handle in handles:
        handle.remove()
    for name, m in layers.items():
        moment = sums[name] / sums[name].diagonal().mean()
        root = torch.linalg.cholesky(moment + 1e-6 * torch.eye(len(moment), dtype=torch.float64))
        left, values, right = torch.linalg.svd(m.weight.double() @ root, full_matrices=False)
        rank = int(ratio * m.weight.numel() / sum(m.weight.shape))
        low = (left[:, :rank] * values[:rank]) @ right[:rank]
        m.weight.copy_(torch.linalg.solve_triangular(root, low, upper=False, left=False))
    return model


def compressed(
    arguments: argparse.Namespace, out: Path, ratio: float, options: list[str]
) -> tuple[nn.Module, float, float]:
    """The network that ``mpoc compress`` writes, its ρ over all selected layers, and seconds."""
    start = time.perf_counter()
    command = ["compress", arguments.minilm, "-o", out, "--layers", LAYERS, "--ratio", ratio, *options]
    report = json.loads(run_mpoc(*map(str, command), "--force", "--json", "--quiet"))
    seconds = time.perf_counter() - start
    return mpoc.load(out).eval(), report["totals"]["rho_selected"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    arguments = parser.parse_args()
    files = [arguments.data / "text" / f"docstrings-{part}.jsonl" for part in ("calibration", "test")]
    seen, unseen = (
        [json.loads(line)["text"] for line in require_file(file, "texts").read_text("utf-8").splitlines()]
        for file in files
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.minilm)
    model = AutoModel.from_pretrained(arguments.minilm).eval()
    original = embed(model, tokenizer, unseen)
    rows = []

    def add(method: str, rho: float, network: nn.Module, seconds: float) -> None:
        ours = embed(network, tokenizer, unseen)
        cosine = float((ours * original).sum(1).mean())
        figures = [f"{rho:.4f}", f"{cosine:.4f}", f"{spearman(ours, original):.4f}", f"{seconds:.0f}"]
        rows.append([method, *figures])
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "compressed"
        for ratio in arguments.ratios:
            for options in ([], ["--sites", "2"], ["--form", "svd"]):
                network, rho, seconds = compressed(arguments, out, ratio, options)
                add(" ".join(["mpoc, weights alone", *options]), rho, network, seconds)
            start = time.perf_counter()
            network = whitened(model, tokenizer, seen, ratio)
            add("whitened SVD", ratio, network, time.perf_counter() - start)
            for options in ([], *(ONE_FORM if ratio == arguments.ratios[0] else ())):
                given = ["--calibrate", str(files[0]), "--moments", str(Path(scratch) / "moments"), *options]
                network, rho, seconds = compressed(arguments, out, ratio, given)
                add(" ".join(["mpoc --calibrate", *options]), rho, network, seconds)
    print(markdown_table(["method", "ρ", "mean cosine", "Spearman", "seconds"], rows))


if __name__ == "__main__":
    main()
