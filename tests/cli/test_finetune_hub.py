"""``mpoc finetune`` and ``mpoc eval`` on directories of transformers, tokenizers and images made here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from mpoc.io.manifest_reader import read_manifest
from mpoc.io.training_history import HISTORY_FILE
from tests.support.hub_models import compress_saved, transformers
from tests.support.process import Here, Mpoc, run_python

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [*"abcdefghijklmn"]
CLASSES = ("red", "green", "blue")  # numbered so by the networks; sorted, as data have them, they are not
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
TEXT = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 32}
GPT2 = {"vocab_size": TEXT["vocab_size"], "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: k for k, name in enumerate(CLASSES)}}
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", SIZES | TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"bos_token_id": 2, "eos_token_id": 3}),
    "classifier": ("BertForSequenceClassification", "BertConfig", SIZES | TEXT | LABELS),
    "vit": ("ViTForImageClassification", "ViTConfig", SIZES | LABELS | {"image_size": 16, "patch_size": 4}),
}
METRIC = {"bert": "loss", "gpt2": "perplexity", "classifier": "accuracy", "vit": "accuracy"}
RATE = {"bert": 0.003, "gpt2": 0.01, "classifier": 0.01, "vit": 0.003}


def network(kind: str) -> Any:
    name, config, values = NETWORKS[kind]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**values)).eval()


def save_tokenizer(folder: Path) -> None:
    """One token a word, [CLS] and [SEP] around."""
    numbers = {word: k for k, word in enumerate([*SPECIAL, *WORDS])}
    made: Any = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


def save_data(kind: str, folder: Path) -> Path:
    """Texts of successive letters; or of a class that the first word tells; or images of three colours."""
    draw = random.Random(0)
    if kind == "vit":
        from PIL import Image

        for k in range(48):
            place = folder / ("train" if k < 36 else "test") / CLASSES[k % 3]
            place.mkdir(parents=True, exist_ok=True)
            colour = tuple(200 if c == k % 3 else draw.randrange(80) for c in range(3))
            Image.new("RGB", (20, 18), colour).save(place / f"{k}.png")
        return folder
    lines = []
    for k in range(90):
        words = [WORDS[(k + j) % 14] for j in range(5 + k % 4)]
        lines.append({"text": " ".join(words)})
        if kind == "classifier":
            shown = [WORDS[k % 3]] * 4 + draw.choices(WORDS[3:], k=3)
            lines[-1] = {"text": " ".join(shown), "label": CLASSES[k % 3]}
    folder.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder.with_suffix(".jsonl")


def make(kind: str, folder: Path) -> Path:
    """``original/`` and ``compressed/``; the path of the data."""
    network(kind).save_pretrained(folder / "original")
    if kind == "vit":
        words = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}}
        (folder / "original" / "preprocessor_config.json").write_text(json.dumps(words))
    else:
        save_tokenizer(folder / "original")
    compress_saved(folder, bond=8)
    return save_data(kind, folder / "data")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["original", "compressed"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_finetune_and_eval_agree_with_transformers(here: Here, kind: str, form: str) -> None:
    data = make(kind, here.folder)
    how = ("--epochs", 8, "--batch", 12, "--lr", RATE[kind], "--device", "cpu")
    done = json.loads(here("finetune", form, "--data", data, *how, "--json").stdout)
    assert done["written"] == f"{form}-tuned"
    start, final = (done[key][METRIC[kind]] for key in ("start", "final"))
    assert final > 90 if METRIC[kind] == "accuracy" else final < 0.97 * start
    measured = json.loads(here("eval", f"{form}-tuned", "--data", data, "--json").stdout)
    final_scores = {name: done["final"][name] for name in measured["scores"]}
    assert measured["scores"] == pytest.approx(final_scores, rel=1e-5)  # weights are built another way
    loaded = getattr(transformers, NETWORKS[kind][0]).from_pretrained(f"{form}-tuned").eval()
    if METRIC[kind] == "accuracy":
        assert answers(loaded, kind, data) > 90
    kept = {file.name for file in Path(form).iterdir()}
    history = {HISTORY_FILE} if form == "original" else set()
    assert {file.name for file in Path(f"{form}-tuned").iterdir()} == kept | history
    if form == "compressed":
        assert read_manifest(Path("compressed-tuned")).training["steps"] == done["steps"]


def answers(loaded: Any, kind: str, data: Path) -> float:
    """Per cent of the examples where the network names their class, without mpoc's data and tasks."""
    if kind == "vit":
        from PIL import Image

        files = sorted(data.rglob("test/*/*.png"))
        colours = [torch.tensor(Image.open(file).convert("RGB").getpixel((0, 0))) for file in files]
        x = (torch.stack(colours).float() / 255 - 0.5) / 0.5
        inputs, truth = x[:, :, None, None].expand(-1, 3, 16, 16), [file.parent.name for file in files]
        return right(loaded(pixel_values=inputs).logits, loaded, truth)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained("original")
    inputs = tokenizer([line["text"] for line in lines], return_tensors="pt", padding=True)
    named = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return right(loaded(**named).logits, loaded, [line["label"] for line in lines])


def right(logits: Tensor, loaded: Any, truth: list[str]) -> float:
    named = [loaded.config.id2label[k] for k in logits.argmax(-1).tolist()]
    return 100 * sum(map(str.__eq__, named, truth)) / len(truth)


def test_distils_towards_the_original(run: Mpoc) -> None:
    """Distilled with recomputed activations; a process that imports mpoc.hf loads it."""
    data = make("gpt2", run.folder)
    how = ("--teacher", "original", "--epochs", 6, "--batch", 12, "--lr", 0.003, "--gradient-checkpointing")
    done = run("finetune", "compressed", "--data", data, *how)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "next: mpoc report compressed-tuned"
    training = read_manifest(run.folder / "compressed-tuned").training
    assert training["final"]["loss"] < 0.9 * training["start"]["loss"]
    code = f"""if True:
        import mpoc.hf, transformers
        loaded = transformers.AutoModelForCausalLM.from_pretrained({str(run.folder / "compressed-tuned")!r})
        print(sum(".cores." in name for name, _ in loaded.named_parameters()))
    """
    assert int(run_python("-c", code)) > 0
