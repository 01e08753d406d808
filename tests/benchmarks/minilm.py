"""all-MiniLM-L6-v2: size, time and what plain TT-SVD costs; loaded back by transformers alone.

    python tests/benchmarks/minilm.py --minilm DIR --data DATA

``DIR`` is the model's directory, ``DATA`` holds ``text/docstrings-test.jsonl``. Each row compresses,
expands, and embeds the test sentences (128 tokens, mean over real tokens, normalised) in a process
that has transformers but must not have mpoc; the figure is the mean cosine to the original's
embeddings.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarking import markdown_table, require_file, run_mpoc

EMBED = """
import json, sys
import numpy as np, torch
from transformers import AutoModel, AutoTokenizer
model_dir, texts_file, out = sys.argv[1:]
texts = [json.loads(line)["text"] for line in open(texts_file)]
tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModel.from_pretrained(model_dir).eval()
parts = []
with torch.no_grad():
    for start in range(0, len(texts), 50):
        batch = tokenizer(texts[start:start + 50], padding=True, truncation=True, max_length=128,
                          return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        parts.append(torch.nn.functional.normalize(mean, dim=1))
assert "mpoc" not in sys.modules
np.save(out, torch.cat(parts).numpy())
"""
ROWS = (["--bond", "64"], ["--ratio", "0.5"], ["--ratio", "0.25"], ["--bond", "100000", "--allow-growth"])


def embed(model: Path, texts: Path, out: Path) -> np.ndarray:
    """Unit embeddings (sentences, 384)."""
    subprocess.run([sys.executable, "-c", EMBED, str(model), str(texts), str(out)], check=True)
    return np.asarray(np.load(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    require_file(arguments.minilm / "config.json", "model directory")
    texts = require_file(arguments.data / "text" / "docstrings-test.jsonl", "test sentences").resolve()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        original = embed(arguments.minilm.resolve(), texts, folder / "original.npy")
        for options in ROWS:
            start = time.perf_counter()
            compressed, dense = folder / "compressed", folder / "dense"
            text = run_mpoc(
                "compress", arguments.minilm, "-o", compressed, *options, "--force", "--json", "--quiet"
            )
            seconds = time.perf_counter() - start
            totals = json.loads(text)["totals"]
            run_mpoc("expand", compressed, "-o", dense, "--force")
            cosine = float((original * embed(dense, texts, folder / "dense.npy")).sum(1).mean())
            rows.append(
                [
                    " ".join(options),
                    f"{totals['rho']:.4f}",
                    f"{totals['parameters_after']:,}",
                    f"{totals['bytes_after'] / 1e6:.1f}",
                    f"{seconds:.1f}",
                    f"{cosine:.4f}",
                ]
            )
    print(markdown_table(["options", "ρ", "parameters", "MB", "seconds", "mean cosine"], rows))


if __name__ == "__main__":
    main()
