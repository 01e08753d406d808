"""``mpoc finetune`` from file to file: open, check, train, measure, write; top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mpoc.errors import UsageError
from mpoc.hub_directory import left_behind
from mpoc.manifest import Manifest
from mpoc.processes import is_main
from mpoc.train.choose import choose_task
from mpoc.train.collisions import refuse_collisions
from mpoc.train.curves import draw_curves, refuse_unknown_picture
from mpoc.train.engine import describe, make_accelerator
from mpoc.train.evaluate import evaluate
from mpoc.train.history import data_record, make_history
from mpoc.train.log import Log, read_log
from mpoc.train.loop import train
from mpoc.train.losses import DivergedError
from mpoc.train.material import DataOptions, Material, monitored_split, open_material
from mpoc.train.model import Model, open_beside, open_model
from mpoc.train.result import default_tuned_output, round_to_stored, write_tuned
from mpoc.train.settings import Settings
from mpoc.train.state import Keeper, Saved
from mpoc.train.stop import Interrupted
from mpoc.train.tasks import Task
from mpoc.train.watch import Outcome, Told, Watch
from mpoc.writer import refuse_existing, refuse_misnamed, staged


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    source: Path
    data: DataOptions
    settings: Settings = field(default_factory=Settings)
    output: Path | None = None  # None: default_tuned_output
    arch: str | None = None
    task: str | None = None
    teacher: Path | None = None
    teacher_arch: str | None = None
    temperature: float = 2.0
    hidden_weight: float = 1.0
    runs: int = 1
    device: str = "auto"
    force: bool = False
    resume: bool = False
    save_seconds: float = 60.0
    save_steps: int | None = None
    log: Path | None = None  # None: beside the output
    plot: Path | None = None
    max_shard_size: int = 5 * 10**9

    @property
    def target(self) -> Path:
        """The output."""
        return self.output or default_tuned_output(self.source)

    @property
    def checkpoint(self) -> Path:
        """Where an interrupted training is kept."""
        return self._beside(".checkpoint.safetensors")

    @property
    def log_file(self) -> Path:
        """The training log."""
        return self.log or self._beside(".jsonl")

    def _beside(self, ending: str) -> Path:
        return self.target.with_name(self.target.name.removesuffix(".safetensors") + ending)


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning did."""

    output: Path
    manifest: Manifest | None  # None: dense
    training: dict[str, Any]  # the history, as the manifest keeps it
    rate: float  # examples a second


def finetune(
    request: Request,
    say: Callable[[str], None] = lambda text: None,
    told: Callable[[Told], None] | None = None,
) -> Finetuned:
    """Train the network of a file on a data set and write it as a file like it.

    Args:
        request: what, on what, how, where to.
        say: gets messages.
        told: called while training runs.

    Raises:
        UsageError: something exists already, or does not fit, or the checkpoint is of another training.
        MpocError: bad data or checkpoint, no finite loss, a package is missing.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was saved.
        OSError: of reading or writing.
    """
    request.settings.check()
    if is_main():
        _check(request)
    model = open_model(request.source, request.arch)
    material = open_material(request.data, model, request.settings.seed, request.settings.keeps_best)
    if "train" not in material.data.splits:
        raise UsageError(f"{material.data.path}: no training split, only {', '.join(material.data.splits)}")
    if request.settings.keeps_best and "validation" not in material.data.splits:
        raise UsageError("the best weights are chosen on a validation split, and there is none", "--hold-out")
    _announce(model, material, say)
    task = _task(request, model, material)
    keeper = Keeper(request.checkpoint, _identity(request, model, material, task))
    saved = keeper.load() if request.resume and keeper.path.exists() else None
    if request.resume:
        at = f"going on from step {saved.progress.step:,}" if saved else "no checkpoint, from the start"
        say(f"{keeper.path}: {at}")
    if saved is not None:
        keeper.extra = saved.extra
    log = Log(request.log_file if is_main() else None, keeper.extra.get("log", 0))
    try:
        done = _train_all(request, model, material, task, keeper, saved, Watch(log, keeper), say, told)
    except BaseException as error:
        log.close()
        _tidy(request, keeper, error)
        raise
    log.close()
    if is_main() and request.plot is not None:
        with staged(request.plot) as picture:
            draw_curves(read_log(request.log_file), picture)
    return done


def _check(request: Request) -> None:
    """All that can be said before anything is opened; the main process does it, which is to write."""
    if request.runs < 1:
        raise UsageError(f"--runs {request.runs}: must be at least 1")
    refuse_existing(request.target, request.source, request.force)
    refuse_misnamed(request.target, request.source)
    if request.checkpoint.exists() and not (request.resume or request.force):
        raise UsageError(
            f"{request.checkpoint}: the checkpoint of an interrupted training",
            "--resume goes on from it, --force starts anew",
        )
    if request.plot is not None:
        refuse_unknown_picture(request.plot)
    for file in (request.log_file, request.plot):
        if file is not None and not (request.resume and file == request.log_file):
            folder = request.source.is_dir()  # what is written here is a file all the same
            refuse_existing(file, request.source / "file" if folder else request.source, request.force)
    written = (request.target, request.checkpoint, request.log_file, request.plot)
    read = (request.source, request.teacher, request.data.tokenizer)
    refuse_collisions(filter(None, written), filter(None, read), request.data)


def _announce(model: Model, material: Material, say: Callable[[str], None]) -> None:
    say(material.data.announce())
    notes = [*material.data.notes, *model.notes]
    if model.stored.is_directory:
        notes += left_behind(model.path, model.stored.weight_files)
    for note in notes:
        say(f"note: {note}")


def _task(request: Request, model: Model, material: Material) -> Task:
    teacher = None
    if request.teacher is not None:
        if request.teacher_arch is None:
            teacher = open_beside(request.teacher, model.architecture).network
        else:
            teacher = open_model(request.teacher, request.teacher_arch).network
    return choose_task(
        request.task, material, model.network, teacher, request.temperature, request.hidden_weight
    )


def _identity(request: Request, model: Model, material: Material, task: Task) -> dict[str, Any]:
    """What a checkpoint must share with the training that goes on from it."""
    images = material.images.as_dict() if material.data.kind == "images" else {}
    tokenizer = material.data.tokenizer and material.data.tokenizer.state()
    text = {"tokenizer": tokenizer, "block": material.block} if material.data.kind == "text" else {}
    return {
        "model": {"name": model.path.resolve().name, "fingerprint": model.stored.fingerprint()},
        "data": data_record(material) | images | text,
        "task": {"name": task.name, "teacher": request.teacher and request.teacher.resolve().name},
        "distillation": {"temperature": request.temperature, "hidden_weight": request.hidden_weight},
        "options": {**asdict(request.settings), "runs": request.runs},
    }


def _train_all(
    request: Request,
    model: Model,
    material: Material,
    task: Task,
    keeper: Keeper,
    saved: Saved | None,
    watch: Watch,
    say: Callable[[str], None],
    told: Callable[[Told], None] | None,
) -> Finetuned:
    """All runs; the last has the seed that was asked for, and is the one that is written."""
    watch.save_seconds, watch.save_steps, watch.told = request.save_seconds, request.save_steps, told
    results: list[dict[str, Any]] = keeper.extra.setdefault("runs", [])
    first, done = len(results), None
    for k in range(first, request.runs):
        seed = request.settings.seed + request.runs - 1 - k
        if request.runs > 1:
            say(f"run {k + 1} of {request.runs}, seed {seed}")
            if saved is None:  # else the log has that line
                watch.log.write(run=k + 1, seed=seed)
        if k > first:
            model = open_model(request.source, request.arch)
        done = _one_run(request, model, material, task, seed, watch, saved, say)
        saved = None
        results.append({"seed": seed, **done[1]})
    assert done is not None
    outcome = done[0]
    training = make_history(request.settings, request.runs, material, task, outcome, results)
    manifest = None
    if is_main():
        manifest = write_tuned(model, outcome.weights, training, request.target, request.max_shard_size)
        keeper.remove()
    return Finetuned(request.target, manifest, training, outcome.rate)


def _one_run(
    request: Request,
    model: Model,
    material: Material,
    task: Task,
    seed: int,
    watch: Watch,
    saved: Saved | None,
    say: Callable[[str], None],
) -> tuple[Outcome, dict[str, Any]]:
    """Train once; the outcome and the scores that count: on test where there is one."""
    settings = replace(request.settings, seed=seed)
    accelerator = make_accelerator(request.device, settings.precision)
    say(f"{describe(accelerator)}, {settings.precision}")
    monitor = monitored_split(material.data)
    validation = material.feed(monitor) if monitor else None
    outcome = train(
        model.network, task, material.feed("train"), settings, validation, watch, accelerator, saved
    )

    def scored(split: str) -> dict[str, float]:
        device, feed = accelerator.device, material.feed(split)
        found = evaluate(model.network, task, feed, settings.batch, device, accelerator=accelerator)
        return found.rounded()

    if round_to_stored(model) and monitor:
        say("half precision: the final scores are those of the weights as they are stored")
        outcome = replace(outcome, chosen={**outcome.chosen, **scored(monitor)})
    scores = {name: value for name, value in outcome.chosen.items() if name not in ("step", "epoch")}
    if "test" in material.data.splits and monitor != "test":
        scores = scored("test")
        watch.log.write(split="test", step=outcome.steps, **scores)
    return outcome, scores


def _tidy(request: Request, keeper: Keeper, error: BaseException) -> None:
    """After a failure: what a resume needs stays, nothing else."""
    if not is_main() or isinstance(error, Interrupted):
        return
    if isinstance(error, DivergedError) and not request.resume:
        keeper.remove()  # the same would happen again
    if not keeper.path.exists():
        request.log_file.unlink(missing_ok=True)
