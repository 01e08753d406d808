"""PicoGPT on tiny Shakespeare: "PicoGPT-MPO", arXiv:2603.28534.

Every linear layer of attention, feed-forward and head is an MPO of two or three sites at one D.  The paper's
text and its public code count differently; the numbers here are the code's, run: all parameters of the
network, embedding (8,320), norms (2,304) and biases (3,072) included, at nominal bonds:

    13,696 + 4·(4·320 D + 2·(96 D + 32 D²)) + 248 D  =  42,336, 79,168, 177,408, 472,192 at D = 4, 8, 16, 32
"""

from __future__ import annotations

from dataclasses import replace

from mpoc.reproduce.experiment import Experiment, Published, ReplacedLayer, Study, Training
from mpoc.train.settings import Settings

_SOURCE = "arXiv:2603.28534"
_SQUARE = (8, 16)
_WIDE, _NARROW = (8, 8, 8), (4, 4, 8)  # 512 and 128
PARAMETERS = {0: 808_448, 4: 42_336, 8: 79_168, 16: 177_408, 32: 472_192}  # of the whole network; 0: dense


_PAPER = Settings(steps=2000, batch=32, optimizer="adamw", lr=3e-4, weight_decay=0.01, schedule="constant")
_OURS = replace(_PAPER, lr=2e-3, schedule="cosine", warmup=0.05, clip=1.0, eval_every=250)


def _layers() -> tuple[ReplacedLayer, ...]:
    found: list[ReplacedLayer] = []
    for k in range(4):
        names = (f"layers.{k}.attention.{name}" for name in ("query", "key", "value", "out"))
        found += [ReplacedLayer(name, _SQUARE, _SQUARE) for name in names]
        found += [
            ReplacedLayer(f"layers.{k}.up", _NARROW, _WIDE),
            ReplacedLayer(f"layers.{k}.down", _WIDE, _NARROW),
        ]
    return (*found, ReplacedLayer("head", _SQUARE, (5, 13)))


_PICOGPT = Experiment(
    label="PicoGPT",
    network="picogpt:vocab=65,context=256",
    layers=_layers(),
    bonds=(4, 8, 16, 32),
    training=Training(_OURS),
    paper_training=Training(replace(_PAPER, eval_every=250), note="the paper's own"),
    data="tiny Shakespeare",
    dense=Published("its text", 52.8),
    published={
        d: Published("its text", accuracy) for d, accuracy in ((4, 36.8), (8, 46.8), (16, 51.6), (32, 52.4))
    },
    notes=("accuracy is that of the next character, on the last 10 % of the text",),
)

PICOGPT = Study("picogpt", "PicoGPT", _SOURCE, {"picogpt": _PICOGPT}, quick_batch=4)
