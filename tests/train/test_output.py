"""What is said of the weights that are written is true of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mpoc.demo
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.models import zoo
from mpoc.train.evaluate_file import evaluate_file
from mpoc.train.finetune import finetune
from mpoc.train.output import CodePrices
from mpoc.train.settings import DataOptions, EvaluationRequest, FinetuneRequest, Settings
from tests.data.samples import pixels
from tests.support.marks import slow_except

STORED: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "cores in bfloat16": {"bond": 4, "dtype": "bfloat16"},
    "grid": {"bits": 2},
    "cores on a grid": {"bond": 4, "bits": 4},
    "coded": {"bits": 2, "storage": "coded"},
}
_QUICK = [("bfloat16", True), ("grid", True)]


@pytest.mark.parametrize(
    ("stored", "best"), slow_except([(name, best) for name in STORED for best in (False, True)], *_QUICK)
)
def test_final_score_is_that_of_the_stored_weights(tmp_path: Path, stored: str, best: bool) -> None:
    source, small = tmp_path / "fc2.safetensors", tmp_path / "small.safetensors"
    state, options = zoo.make("fc2").state_dict(), STORED[stored]
    save_file(state if options else {name: tensor.bfloat16() for name, tensor in state.items()}, source)
    if options:
        compress_checkpoint(source, small, make_recipe(None, options), arch="fc2")
        source = small
    arrays: dict[str, Any] = {}
    for k, split in enumerate(("train", "validation", "test")):
        arrays |= {f"x_{split}": pixels(60, 28, 28, seed=k), f"y_{split}": np.arange(60) % 10}
    np.savez(tmp_path / "a.npz", allow_pickle=False, **arrays)
    request = FinetuneRequest(
        source, DataOptions(tmp_path / "a.npz"), Settings(steps=4, lr=0.01, eval_every=1, keep_best=best),
        tmp_path / "tuned.safetensors", arch="fc2", device="cpu",
    )  # fmt: skip
    training = finetune(request).training
    before, after = load_file(source), load_file(request.target)
    steps = [name for name in before if name.endswith(("_scale", "_zero_point"))]
    assert steps or "grid" not in stored
    assert all(torch.equal(before[name], after[name]) for name in steps)
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    for split, key in (("validation", "final"), ("test", "test")):
        asked = EvaluationRequest(request.target, request.data, split, arch="fc2", device="cpu", batch=64)
        for name, value in evaluate_file(asked).scores.items():
            assert training[key][name] == pytest.approx(value, rel=1e-5)


def entropy(codes: torch.Tensor) -> float:
    """Bits of all codes, each at its frequency among them."""
    counts = np.unique(codes.numpy(), return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@pytest.mark.parametrize("spread", [0.6, 3.0])
def test_codes_that_are_held_take_no_more_bits(spread: float) -> None:
    torch.manual_seed(0)
    start = torch.round(torch.randn(40, 30) * spread)
    exact = start + torch.randn(40, 30) * 0.6
    found = torch.round(exact)
    held = CodePrices.of(start.to(torch.int8)).hold(exact, found)
    assert entropy(held) <= entropy(start) < entropy(found)
    undone = held != found
    assert bool(undone.any()) and torch.equal(held[undone], start[undone])
    rarer = (start == found[..., None, None]).sum((-2, -1)) < (start == start[..., None, None]).sum((-2, -1))
    kept = (held == found) & rarer
    assert float((exact - start).abs()[undone].max()) <= float((exact - start).abs()[kept].min())


def test_codes_that_became_cheaper_can_be_held_further() -> None:
    """The stream has tables of its own: it may grow where prices of one table fall."""
    torch.manual_seed(0)
    start = torch.round(torch.randn(40, 30) * 3)
    exact = 0.7 * start + torch.randn(40, 30) * 0.8
    found, prices = torch.round(exact), CodePrices.of(start.to(torch.int8))
    costs = [float(prices.of_each(codes).sum()) for codes in (start, found, prices.hold(exact, found, 30.0))]
    assert costs[1] < costs[0] - 60 and costs[2] <= costs[1] - 30
    assert torch.equal(prices.hold(exact, found), found)


def test_distilling_a_coded_network_nears_the_teacher_in_as_many_bytes(tmp_path: Path) -> None:
    demo, arch, small = (
        Path(mpoc.demo.__path__[0]),
        "mpoc.demo.network:DigitsNet",
        tmp_path / "small.safetensors",
    )
    teacher = demo / "digits-cnn.safetensors"
    compress_checkpoint(teacher, small, make_recipe(None, STORED["coded"]), arch=arch)
    images = np.load(demo / "digits.npz")["images"][:96, None] / np.float32(16)
    np.savez(tmp_path / "a.npz", allow_pickle=False, x_train=images[:64], x_test=images[64:])
    request = FinetuneRequest(
        small, DataOptions(tmp_path / "a.npz"), Settings(steps=20, batch=16, lr=0.006, eval_every=20),
        tmp_path / "tuned.safetensors", arch=arch, teacher=teacher, device="cpu",
    )  # fmt: skip
    training = finetune(request).training
    assert training["final"]["loss"] < 0.7 * training["start"]["loss"]
    before, after = load_file(small), load_file(request.target)
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    coded = [name for name in before if name.endswith("_coded")]
    assert any(not torch.equal(before[name], after[name]) for name in coded)
    assert all(after[name].numel() <= before[name].numel() for name in coded)
