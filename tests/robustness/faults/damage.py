"""Files as a disk or a download damages them: bits flipped, ends cut off, blocks blank, shards mixed up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mpoc
from mpoc.cli.console import reported_errors
from mpoc.demo.network import DigitsNet
from tests.robustness.faults.cases import TRAIN, Case, Material, Undisturbed
from tests.robustness.faults.child import Ended, Fault, attempt, command
from tests.robustness.faults.judge import Before, Finding, judge_words
from tests.support.checkpoints import contents

_BLOCK = 512  # bytes
_WEIGHTS = (".pt", ".safetensors")
_COMPRESS = ("compress", "--device", "cpu", "-o")


def flip(file: Path, choose: random.Random) -> None:
    """One to four bits."""
    data = bytearray(file.read_bytes())
    for _ in range(choose.choice((1, 1, 1, 4))):
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    file.write_bytes(data)


def cut(file: Path, choose: random.Random) -> None:
    """The end, from anywhere."""
    file.write_bytes(file.read_bytes()[: choose.randrange(file.stat().st_size)])


def blank(file: Path, choose: random.Random) -> None:
    """A block of zeros, as after a loss of power."""
    data = bytearray(file.read_bytes())
    start = choose.randrange(len(data)) // _BLOCK * _BLOCK
    end = min(start + _BLOCK, len(data))
    data[start:end] = bytes(end - start)
    file.write_bytes(data)


DAMAGES = {"bits flipped": flip, "end cut off": cut, "block blank": blank}


@dataclass(frozen=True)
class Use:
    """A command that reads what is damaged."""

    name: str
    arguments: tuple[str, ...]
    output: str
    usage: bool = False  # whether what is damaged is part of the command line
    checked: bool = False  # whether any change is noticed
    own: tuple[str, ...] = ()  # what it may change or write besides

    def work(self) -> Callable[[], object]:
        """For a child."""
        return _load(self.arguments[0]) if self.name == "load" else command(self.name, *self.arguments)

    @property
    def reads_data(self) -> bool:
        """Not the headers alone."""
        return self.name != "report"


def _load(path: str) -> Callable[[], object]:
    def run() -> None:
        with reported_errors():
            mpoc.load(path, DigitsNet())

    return run


def _uses_of_compressed(path: str, dense: str) -> list[Use]:
    return [
        Use("report", (path, "--html", "report.html"), "report.html"),
        Use("report", (path, "--json", "--verbose"), "none"),
        Use("expand", (path, "-o", dense), dense),
        Use("load", (path,), "none"),
    ]


_KEPT = ("d.tuned.checkpoint.safetensors", "d.tuned.jsonl")
_RESUME = Use("finetune", (*TRAIN, "--resume"), "d.tuned.safetensors", checked=True, own=_KEPT)
# What is damaged, and by which commands it is read.
SUBJECTS = {
    "m.pt": [Use("compress", ("m.pt", "--bond", "4", "--device", "cpu"), "m.mpo.safetensors")],
    "m.safetensors": [
        Use("compress", ("m.safetensors", "--bond", "4", "--device", "cpu"), "m.mpo.safetensors")
    ],
    "m": [Use("compress", ("m", "--bond", "4", "--device", "cpu"), "m-mpo")],
    "d.safetensors": _uses_of_compressed("d.safetensors", "dense.safetensors"),
    "d": _uses_of_compressed("d", "dense"),
    "recipe.toml": [
        Use(
            "compress",
            ("m.pt", "--recipe", "recipe.toml", "--device", "cpu"),
            "m.mpo.safetensors",
            usage=True,
        )
    ],
    "digits.npz": [Use("finetune", (*TRAIN, "-o", "t.safetensors"), "t.safetensors", own=("t.jsonl",))],
    "d.tuned.checkpoint.safetensors": [_RESUME],
    "d.tuned.jsonl": [replace(_RESUME, checked=False)],
}


def damaged(subject: str, what: str, made: Material, choose: random.Random) -> tuple[Ended, list[Finding]]:
    """Damage a file of a subject, and run one of the commands that read it."""
    use = choose.choice(SUBJECTS[subject])
    with made.copied() as folder:
        path = folder / subject
        file = path if path.is_file() else choose.choice(sorted(path.iterdir()))
        whole = file.read_bytes()
        DAMAGES[what](file, choose)
        cut_off = what == "end cut off" and file.suffix in _WEIGHTS and use.reads_data
        noticed = cut_off or (use.checked and file.read_bytes() != whole)
        return _read(use, folder, (1,) if noticed else (0, 1, 2) if use.usage else (0, 1))[:2]


def _read(use: Use, folder: Path, allowed: tuple[int, ...]) -> tuple[Ended, list[Finding], dict[str, bytes]]:
    """Run a command on damaged files: an answer or one message, and an output only with an answer."""
    untouched = {name: data for name, data in contents(folder).items() if name not in use.own}
    ended = attempt(use.work(), folder)
    output = folder / use.output
    held = contents(output) if output.exists() else {}
    found = [*judge_words(ended, allowed)]
    before = Before(untouched, use.output, {}, held if ended.status == 0 else {})
    return _injected(ended), [*found, *before.judge_files(folder, ended, use.own.__contains__)], held


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def drop_a_shard(folder: Path, choose: random.Random) -> None:
    choose.choice(_shards(folder)).unlink()


def swap_shards(folder: Path, choose: random.Random) -> None:
    one, other = choose.sample(_shards(folder), 2)
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def double_a_shard(folder: Path, choose: random.Random) -> None:
    """One in the place of another."""
    one, other = choose.sample(_shards(folder), 2)
    other.write_bytes(one.read_bytes())


def lose_the_index(folder: Path, choose: random.Random) -> None:
    next(folder.glob("*.index.json")).unlink()


def lose_a_tensor(folder: Path, choose: random.Random) -> None:
    """From its shard; the index has it still."""
    file = choose.choice(_shards(folder))
    tensors = load_file(file)
    del tensors[choose.choice(sorted(tensors))]
    save_file(tensors, file, _metadata(file))


def repeat_a_tensor(folder: Path, choose: random.Random) -> None:
    """In a second shard; the index says which counts."""
    one, other = choose.sample(_shards(folder), 2)
    tensors = load_file(one)
    name = choose.choice(sorted(tensors))
    save_file({**load_file(other), name: tensors[name] + 1}, other, _metadata(other))


def misplace_a_tensor(folder: Path, choose: random.Random) -> None:
    """In the index alone."""
    index_file = next(folder.glob("*.index.json"))
    index = json.loads(index_file.read_text())
    name = choose.choice(sorted(index["weight_map"]))
    files = {file.name for file in _shards(folder)} - {index["weight_map"][name]}
    index["weight_map"][name] = choose.choice(sorted(files))
    index_file.write_text(json.dumps(index))


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as handle:
        return dict(handle.metadata() or {})


# With whether a command that reads the data must refuse it; else it gives what it gave before.
SHARD_DAMAGES: dict[str, tuple[Callable[[Path, random.Random], None], bool]] = {
    "shard dropped": (drop_a_shard, True),
    "shards swapped": (swap_shards, True),
    "shard in another's place": (double_a_shard, True),
    "index lost": (lose_the_index, True),
    "tensor lost": (lose_a_tensor, True),
    "tensor in two shards": (repeat_a_tensor, False),
    "tensor misplaced": (misplace_a_tensor, True),
}


def mixed_up(subject: str, what: str, made: Material, choose: random.Random) -> tuple[Ended, list[Finding]]:
    """Mix up the shards of a directory, and run one of the commands that read it."""
    use = choose.choice(SUBJECTS[subject])
    change, fails = SHARD_DAMAGES[what]
    with made.copied() as folder:
        change(folder / subject, choose)
        allowed = (0,) if not fails else (1,) if use.reads_data else (0, 1)
        ended, found, held = _read(use, folder, allowed)
    if not fails:
        with made.copied() as folder:
            whole = _read(use, folder, (0,))[2]
        if _weights(held) != _weights(whole):
            found.append(Finding("loss", f"{use.output} has other weights than that of undamaged shards"))
    return ended, found


def _weights(held: dict[str, bytes]) -> dict[str, bytes]:
    """Not what tells of the source's size."""
    return {name: data for name, data in held.items() if name.endswith(".safetensors")}


def resumed(
    case: Case, what: str, made: Material, normal: Undisturbed, choose: random.Random
) -> tuple[Ended, list[Finding]]:
    """Damage what a command kept that was killed; given again it must end as if nothing had been."""
    with made.copied(case) as folder:
        fault = Fault("SIGKILL", "files", int(normal.moments["files"] * choose.uniform(0.4, 0.8)))
        attempt(command(*case.arguments), folder, fault)
        kept = [file for file in sorted((folder / case.kept[0]).rglob("*")) if file.is_file()]
        DAMAGES[what](choose.choice([file for file in kept if file.stat().st_size]), choose)
        now = Before.of(folder, case.output, normal.new)
        inputs = {name: data for name, data in now.inputs.items() if not name.startswith(case.kept)}
        ended = attempt(command(*case.arguments), folder)
        before = replace(now, inputs=inputs)
        found = [*judge_words(ended, (0,)), *before.judge_files(folder, ended, lambda name: False)]
        return _injected(ended), found


def _injected(ended: Ended) -> Ended:
    """The fault was there before the command."""
    return replace(ended, struck="before", begun=True)
