"""No file that a training reads, and no other that it writes, is replaced, ``--force`` or not.

``mpoc finetune`` from file to file: open, check, train, measure, write; top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpoc.data.recognise import is_data
from mpoc.errors import UsageError
from mpoc.io.atomic import refuse_existing, refuse_misnamed, staged
from mpoc.io.hub_directory import left_behind
from mpoc.io.manifest import Manifest
from mpoc.models.loading import Model, open_beside, open_model
from mpoc.reporting.plots import draw_curves, refuse_unknown_picture
from mpoc.runtime.distributed import is_main
from mpoc.runtime.signals import Interrupted
from mpoc.train.engine import describe, make_accelerator
from mpoc.train.evaluate import evaluate
from mpoc.train.loop import DivergedError, train
from mpoc.train.monitor import Outcome, TrainingEvent, TrainingLog, TrainingMonitor, read_log
from mpoc.train.output import data_record, make_history, round_to_stored, write_tuned
from mpoc.train.settings import DataOptions, FinetuneRequest
from mpoc.train.task_choice import infer_task
from mpoc.train.tasks import Task
from mpoc.train.training_checkpoint import CheckpointFile, SavedTraining
from mpoc.train.training_data import TrainingData, monitored_split, open_training_data


def refuse_collisions(written: Iterable[Path], read: Iterable[Path], data: DataOptions) -> None:
    """Check the names of all files before any work.

    Args:
        written: files and directories.
        read: files and directories.
        data: the set, which is read too; other files may be written into its folder.

    Raises:
        UsageError: one would be written over.
    """
    inputs = {path.resolve() for path in (*read, data.path)}
    taken: set[Path] = set()
    for file in written:
        target = file.resolve()
        if target in inputs or (file.exists() and is_data(file, data.path, data.format)):
            raise UsageError(f"{file}: would write over or into an input", "choose another name")
        if target in taken:
            raise UsageError(f"{file}: written twice", "choose another name")
        taken.add(target)


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning did."""

    output: Path
    manifest: Manifest | None  # None: dense
    training: dict[str, Any]  # the history, as the manifest keeps it
    rate: float  # examples a second


def finetune(
    request: FinetuneRequest,
    say: Callable[[str], None] = lambda text: None,
    on_event: Callable[[TrainingEvent], None] | None = None,
) -> Finetuned:
    """Train the network of a file on a data set and write it as a file like it.

    Args:
        request: what, on what, how, where to.
        say: gets messages.
        on_event: called while training runs.

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
    training_data = open_training_data(
        request.data, model, request.settings.seed, request.settings.keeps_best
    )
    if "train" not in training_data.data.splits:
        raise UsageError(
            f"{training_data.data.path}: no training split, only {', '.join(training_data.data.splits)}"
        )
    if request.settings.keeps_best and "validation" not in training_data.data.splits:
        raise UsageError("the best weights are chosen on a validation split, and there is none", "--hold-out")
    _announce(model, training_data, say)
    task = _task(request, model, training_data)
    checkpoint = CheckpointFile(request.checkpoint, _identity(request, model, training_data, task))
    saved = checkpoint.load() if request.resume and checkpoint.path.exists() else None
    if request.resume:
        at = f"going on from step {saved.progress.step:,}" if saved else "no checkpoint, from the start"
        say(f"{checkpoint.path}: {at}")
    if saved is not None:
        checkpoint.extra = saved.extra
    log = TrainingLog(request.log_file if is_main() else None, checkpoint.extra.get("log", 0))
    try:
        done = _train_all(
            request,
            model,
            training_data,
            task,
            checkpoint,
            saved,
            TrainingMonitor(log, checkpoint),
            say,
            on_event,
        )
    except BaseException as error:
        log.close()
        _tidy(request, checkpoint, error)
        raise
    log.close()
    if is_main() and request.plot is not None:
        with staged(request.plot) as picture:
            draw_curves(read_log(request.log_file), picture)
    return done


def _check(request: FinetuneRequest) -> None:
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


def _announce(model: Model, training_data: TrainingData, say: Callable[[str], None]) -> None:
    say(training_data.data.announce())
    notes = [*training_data.data.notes, *model.notes]
    if model.stored.is_directory:
        notes += left_behind(model.path, model.stored.weight_files)
    for note in notes:
        say(f"note: {note}")


def _task(request: FinetuneRequest, model: Model, training_data: TrainingData) -> Task:
    teacher = None
    if request.teacher is not None:
        if request.teacher_arch is None:
            teacher = open_beside(request.teacher, model.architecture).network
        else:
            teacher = open_model(request.teacher, request.teacher_arch).network
    return infer_task(
        request.task, training_data, model.network, teacher, request.temperature, request.hidden_weight
    )


def _identity(
    request: FinetuneRequest, model: Model, training_data: TrainingData, task: Task
) -> dict[str, Any]:
    """What a checkpoint must share with the training that goes on from it."""
    images = training_data.images.as_dict() if training_data.data.kind == "images" else {}
    tokenizer = training_data.data.tokenizer and training_data.data.tokenizer.state()
    text = {"tokenizer": tokenizer, "block": training_data.block} if training_data.data.kind == "text" else {}
    return {
        "model": {"name": model.path.resolve().name, "fingerprint": model.stored.fingerprint()},
        "data": data_record(training_data) | images | text,
        "task": {"name": task.name, "teacher": request.teacher and request.teacher.resolve().name},
        "distillation": {"temperature": request.temperature, "hidden_weight": request.hidden_weight},
        "options": {**asdict(request.settings), "runs": request.runs},
    }


def _train_all(
    request: FinetuneRequest,
    model: Model,
    training_data: TrainingData,
    task: Task,
    checkpoint: CheckpointFile,
    saved: SavedTraining | None,
    monitor: TrainingMonitor,
    say: Callable[[str], None],
    on_event: Callable[[TrainingEvent], None] | None,
) -> Finetuned:
    """All runs; the last has the seed that was asked for, and is the one that is written."""
    every = request.checkpoint_every
    monitor.save_seconds, monitor.save_steps, monitor.on_event = every.seconds, every.steps, on_event
    results: list[dict[str, Any]] = checkpoint.extra.setdefault("runs", [])
    first, done = len(results), None
    for k in range(first, request.runs):
        seed = request.settings.seed + request.runs - 1 - k
        if request.runs > 1:
            say(f"run {k + 1} of {request.runs}, seed {seed}")
            if saved is None:  # else the log has that line
                monitor.log.write(run=k + 1, seed=seed)
        if k > first:
            model = open_model(request.source, request.arch)
        done = _one_run(request, model, training_data, task, seed, monitor, saved, say)
        saved = None
        results.append({"seed": seed, **done[1]})
    assert done is not None
    outcome = done[0]
    training = make_history(request.settings, request.runs, training_data, task, outcome, results)
    manifest = None
    if is_main():
        manifest = write_tuned(model, outcome.weights, training, request.target, request.max_shard_size)
        checkpoint.remove()
    return Finetuned(request.target, manifest, training, outcome.rate)


def _one_run(
    request: FinetuneRequest,
    model: Model,
    training_data: TrainingData,
    task: Task,
    seed: int,
    monitor: TrainingMonitor,
    saved: SavedTraining | None,
    say: Callable[[str], None],
) -> tuple[Outcome, dict[str, Any]]:
    """Train once; the outcome and the scores that count: on test where there is one."""
    settings = replace(request.settings, seed=seed)
    accelerator = make_accelerator(request.device, settings.precision)
    say(f"{describe(accelerator)}, {settings.precision}")
    monitored = monitored_split(training_data.data)
    validation = training_data.loader(monitored) if monitored else None
    outcome = train(
        model.network, task, training_data.loader("train"), settings, validation, monitor, accelerator, saved
    )

    def scored(split: str) -> dict[str, float]:
        device, loader = accelerator.device, training_data.loader(split)
        found = evaluate(model.network, task, loader, settings.batch, device, accelerator=accelerator)
        return found.rounded()

    if round_to_stored(model) and monitored:
        say("half precision: the final scores are those of the weights as they are stored")
        outcome = replace(outcome, chosen={**outcome.chosen, **scored(monitored)})
    scores = {name: value for name, value in outcome.chosen.items() if name not in ("step", "epoch")}
    if "test" in training_data.data.splits and monitored != "test":
        scores = scored("test")
        monitor.log.write(split="test", step=outcome.steps, **scores)
    return outcome, scores


def _tidy(request: FinetuneRequest, checkpoint: CheckpointFile, error: BaseException) -> None:
    """After a failure: what a resume needs stays, nothing else."""
    if not is_main() or isinstance(error, Interrupted):
        return
    if isinstance(error, DivergedError) and not request.resume:
        checkpoint.remove()  # the same would happen again
    if not checkpoint.path.exists():
        request.log_file.unlink(missing_ok=True)
