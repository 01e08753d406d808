"""``mpoc finetune`` from file to file: open, check, train, evaluate, write.

No input is written over, with or without ``--force``, and no output is written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpoc.data.recognise import is_data
from mpoc.errors import UsageError
from mpoc.io.atomic import refuse_existing, refuse_misnamed
from mpoc.io.hub_directory import notes_on_files
from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.models.loading import Model, open_beside, open_model
from mpoc.quantize.storage import Coded
from mpoc.reporting.plots import draw_curves, refuse_unknown_picture
from mpoc.runtime.distributed import is_main
from mpoc.runtime.formatting import counted, human_bytes
from mpoc.runtime.signals import Interrupted
from mpoc.train.engine import describe, make_accelerator
from mpoc.train.evaluate import evaluate
from mpoc.train.loop import DivergedError, train
from mpoc.train.monitor import OnEvent, Outcome, TrainingLog, TrainingMonitor, read_log
from mpoc.train.output import data_record, hold_to_steps, make_history, round_to_stored, write_tuned
from mpoc.train.settings import RATE_IN_FEW_BITS, DataOptions, FinetuneRequest, Settings
from mpoc.train.task_choice import infer_task
from mpoc.train.tasks import Task
from mpoc.train.training_checkpoint import CheckpointFile, SavedTraining
from mpoc.train.training_data import TrainingData, monitored_split, open_training_data


def refuse_collisions(written: Iterable[Path], read: Iterable[Path], data: DataOptions) -> None:
    """Check that no output is an input, and that outputs differ; called before any work.

    Args:
        written: files and directories.
        read: files and directories.
        data: the data set, which is read too; other files may be written into its folder.

    Raises:
        UsageError: a file would be written over.
    """
    inputs = {path.resolve() for path in (*read, *([data.path] if data.path else []))}
    taken: set[Path] = set()
    for file in written:
        target = file.resolve()
        in_data = data.path is not None and file.exists() and is_data(file, data.path, data.format)
        if target in inputs or in_data:
            raise UsageError(f"{file}: would write over or into an input", "choose another name")
        if target in taken:
            raise UsageError(f"{file}: written twice", "choose another name")
        taken.add(target)


@dataclass(frozen=True)
class Finetuned:
    """The result of a fine-tuning."""

    output: Path
    manifest: Manifest | None  # None: dense
    training: dict[str, Any]  # the training history, as the manifest stores it
    rate: float  # examples per second


def finetune(
    request: FinetuneRequest, say: Callable[[str], None] = lambda text: None, on_event: OnEvent = None
) -> Finetuned:
    """Train the network of a file on a data set and write it as a file of the same kind.

    Args:
        request: what is trained, on what, how, and where it is written.
        say: called with messages.
        on_event: called while training runs.

    Raises:
        UsageError: an output exists, options do not fit, or the checkpoint is of another training.
        MpocError: bad data or checkpoint, a loss that is not finite, a missing package.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was saved.
        OSError: reading or writing failed.
    """
    request.settings.check()
    if is_main():
        _check(request)
    model = open_model(request.source, request.arch)
    if _in_few_bits(model) and request.settings.optimizer == "adamw" and request.settings.lr is None:
        request = replace(request, settings=replace(request.settings, lr=RATE_IN_FEW_BITS))
    teacher = _open_teacher(request, model)
    training_data = _open_data(request, model, teacher)
    _announce(model, training_data, say)
    task = infer_task(
        request.task, training_data, model.network, None if teacher is None else teacher.network,
        request.temperature, request.hidden_weight,
    )  # fmt: skip
    checkpoint = CheckpointFile(request.checkpoint, _identity(request, model, training_data, task))
    saved = _resume(checkpoint, say) if request.resume else None
    log = TrainingLog(request.log_file if is_main() else None, checkpoint.extra.get("log", 0))
    every = request.checkpoint_every
    monitor = TrainingMonitor(log, checkpoint, every.seconds, every.steps, on_event, resume=saved)
    monitor.split = monitored_split(training_data.data) or ""
    try:
        finetuned = _Finetuning(request, training_data, task, checkpoint, monitor, say).run(model)
    except BaseException as error:
        log.close()
        _clean_up(request, checkpoint, error)
        raise
    log.close()
    if is_main() and request.plot is not None:
        draw_curves(read_log(request.log_file), request.plot)
    return finetuned


def _resume(checkpoint: CheckpointFile, say: Callable[[str], None]) -> SavedTraining | None:
    """The saved state of an interrupted training; None where there is no checkpoint."""
    if not checkpoint.path.exists():
        say(f"{checkpoint.path}: no checkpoint, starting over")
        return None
    saved = checkpoint.load()
    say(f"{checkpoint.path}: resuming from step {saved.progress.step:,}")
    checkpoint.extra = saved.extra
    return saved


def _open_teacher(request: FinetuneRequest, model: Model) -> Model | None:
    if request.teacher is None:
        return None
    if request.teacher_arch is None:
        return open_beside(request.teacher, model.architecture)
    return open_model(request.teacher, request.teacher_arch)


def _open_data(request: FinetuneRequest, model: Model, teacher: Model | None) -> TrainingData:
    """The data set, with the splits that the training needs."""
    keeps_best = request.settings.keeps_best
    training_data = open_training_data(request.data, model, request.settings.seed, keeps_best, teacher)
    splits = training_data.data.splits
    if "train" not in splits:
        raise UsageError(f"{training_data.data.path}: no training split, only {', '.join(splits)}")
    if keeps_best and "validation" not in splits:
        raise UsageError("the best weights are chosen on a validation split, and there is none", "--hold-out")
    return training_data


def _check(request: FinetuneRequest) -> None:
    """Check everything that needs no open file; called by the main process, which writes."""
    if request.data.path is None and request.teacher is None:
        raise UsageError("there is nothing to learn from", "--data PATH, or --teacher DENSE, or both")
    if request.runs < 1:
        raise UsageError(f"--runs {request.runs}: must be at least 1")
    refuse_existing(request.target, request.source, request.force)
    refuse_misnamed(request.target, request.source)
    if request.checkpoint.exists() and not (request.resume or request.force):
        raise UsageError(
            f"{request.checkpoint}: the checkpoint of an interrupted training",
            "--resume continues it, --force starts over",
        )
    if request.plot is not None:
        refuse_unknown_picture(request.plot)
    for file in (request.log_file, request.plot):
        if file is not None and not (request.resume and file == request.log_file):
            source = request.source / "file" if request.source.is_dir() else request.source
            refuse_existing(file, source, request.force)  # log and plot are files in any case
    written = (request.target, request.checkpoint, request.log_file, request.plot)
    read = (request.source, request.teacher, request.data.tokenizer)
    refuse_collisions(filter(None, written), filter(None, read), request.data)


def _announce(model: Model, training_data: TrainingData, say: Callable[[str], None]) -> None:
    say(training_data.data.announce())
    notes = [*training_data.data.notes, *model.notes]
    if rounded := _in_few_bits(model):
        notes.append(
            f"{counted(len(rounded), 'layer')} of few bits: trained through rounding to the steps that are "
            "stored"
        )
    if model.stored.is_directory:
        notes += notes_on_files(model.path, model.stored.weight_files)
    for note in notes:
        say(f"note: {note}")


def _in_few_bits(model: Model) -> list[LayerRecord]:
    return [layer for layer in (model.manifest.changed if model.manifest else ()) if layer.storage]


def _identity(
    request: FinetuneRequest, model: Model, training_data: TrainingData, task: Task
) -> dict[str, Any]:
    """The identity that a training must share with the checkpoint that it resumes."""
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


@dataclass(frozen=True)
class _Finetuning:
    """All runs of a training; the last has the requested seed, and its network is written."""

    request: FinetuneRequest
    training_data: TrainingData
    task: Task
    checkpoint: CheckpointFile
    monitor: TrainingMonitor
    say: Callable[[str], None]

    def run(self, model: Model) -> Finetuned:
        """Train as often as requested, and write the last network."""
        request, monitor = self.request, self.monitor
        results: list[dict[str, Any]] = self.checkpoint.extra.setdefault("runs", [])
        first, outcome = len(results), None
        for k in range(first, request.runs):
            seed = request.settings.seed + request.runs - 1 - k
            if request.runs > 1:
                self.say(f"run {k + 1} of {request.runs}, seed {seed}")
                if monitor.resume is None:  # a resumed log has this line
                    monitor.log.write(run=k + 1, seed=seed)
            if k > first:
                model = open_model(request.source, request.arch)
            outcome, scores = self._one_run(model, replace(request.settings, seed=seed))
            monitor.resume = None
            results.append({"seed": seed, **scores})
        assert outcome is not None
        training = make_history(request.settings, self.training_data, self.task, outcome, results)
        manifest = None
        if is_main():
            manifest = write_tuned(model, outcome.weights, training, request.target, request.max_shard_size)
            self.checkpoint.remove()
        return Finetuned(request.target, manifest, training, outcome.rate)

    def _one_run(self, model: Model, settings: Settings) -> tuple[Outcome, dict[str, Any]]:
        """Train once; the outcome, and the final scores, on test where there is such a split."""
        accelerator = make_accelerator(self.request.device, settings.precision)
        self.say(f"{describe(accelerator)}, {settings.precision}")
        hold_to_steps(model, accelerator.device)
        monitored = monitored_split(self.training_data.data)
        validation = self.training_data.loader(monitored) if monitored else None
        loader = self.training_data.loader("train")
        outcome = train(model.network, self.task, loader, settings, validation, self.monitor, accelerator)

        def scored(split: str) -> dict[str, float]:
            device, batches = accelerator.device, self.training_data.loader(split)
            evaluation = evaluate(
                model.network, self.task, batches, settings.batch, device, accelerator=accelerator
            )
            return evaluation.rounded()

        changed = round_to_stored(model, outcome.weights)
        if changed and monitored:
            self.say("the final scores are those of the weights as they are stored")
            outcome = replace(outcome, chosen={**outcome.chosen, **scored(monitored)})
        self._tell_coded_bytes(model)
        scores = {name: value for name, value in outcome.chosen.items() if name not in ("step", "epoch")}
        if "test" in self.training_data.data.splits and monitored != "test":
            scores = scored("test")
            self.monitor.log.write(split="test", step=outcome.steps, **scores)
        return outcome, scores

    def _tell_coded_bytes(self, model: Model) -> None:
        """The bytes of entropy-coded layers whose codes have changed, before and after the training."""
        after = [
            record for record, _ in model.rounded.values() if isinstance(record.coded_parts[0].storage, Coded)
        ]
        before = {
            layer.name: layer.stored_bytes for layer in (model.manifest.layers if model.manifest else ())
        }
        if after:
            old = human_bytes(sum(before[record.name] for record in after))
            new = human_bytes(sum(record.stored_bytes for record in after))
            self.say(f"{counted(len(after), 'coded layer')} with new codes: {old} → {new}")


def _clean_up(request: FinetuneRequest, checkpoint: CheckpointFile, error: BaseException) -> None:
    """After a failure, remove what no resume needs."""
    if not is_main() or isinstance(error, Interrupted):
        return
    if isinstance(error, DivergedError) and not request.resume:
        checkpoint.remove()  # a resume would diverge again
    if not checkpoint.path.exists():
        request.log_file.unlink(missing_ok=True)
