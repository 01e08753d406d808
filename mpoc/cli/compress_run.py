"""What ``mpoc compress`` does with a request: one compression, or a search for the smallest."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mpoc.cli.compress_output import Compressed, goal_line, trial_line
from mpoc.cli.compress_request import CompressRequest
from mpoc.cli.console import Output
from mpoc.cli.progress import layer_progress, stage_lines

if TYPE_CHECKING:
    from mpoc.search import Smallest
    from mpoc.search.figure import SizeTrials
    from mpoc.train.measure import Measured

_UNITS = {"accuracy": " (%)", "agreement": " (%)"}


def run(request: CompressRequest, words: Output) -> Compressed:
    """Do it, in words on stderr.

    Raises:
        MpocError: as :func:`mpoc.pipeline.compress_checkpoint` and :func:`mpoc.search.compress_within`.
    """
    done = _once(request, words) if request.recipe.max_drop is None else _search(request, words)
    for note in done.done.notes:
        words.say(f"note: {note}")
    return done


def _once(request: CompressRequest, words: Output) -> Compressed:
    from mpoc.pipeline import compress_checkpoint

    before = _measure(request.model, request, words)
    _say_what_begins(request, words)
    with layer_progress(words) as progress:
        done = compress_checkpoint(
            request.model,
            request.output,
            request.recipe,
            request.force,
            request.dry_run,
            progress,
            request.arch,
            request.calibration,
            stage_lines(words),
            request.resume,
        )
    return Compressed(done, before, _measure(done.output, request, words))


def _search(request: CompressRequest, words: Output) -> Compressed:
    """Tries are told a line each; of their layers there is a bar on a terminal, and nothing elsewhere."""
    from mpoc.search import Watch, compress_within
    from mpoc.train.material import DataOptions

    assert request.eval_data is not None

    def start(before: Measured) -> None:
        words.say(goal_line(before, request.recipe.max_drop))
        _say_what_begins(request, words)

    watch = Watch(
        start,
        lambda trial, kept: words.say(trial_line(trial, kept)),
        partial(layer_progress, words) if words.words.is_terminal else nullcontext,
        stage_lines(words),
    )
    words.say(f"measuring {request.model}")
    found = compress_within(
        request.model,
        request.output,
        request.recipe,
        DataOptions(request.eval_data),
        request.force,
        request.arch,
        request.calibration,
        watch,
    )
    if request.plot is not None:
        from mpoc.search.figure import draw_size_trials

        draw_size_trials(_size_trials(found), request.plot)
        words.say(f"wrote {request.plot}")
    return Compressed(found.done, found.before, found.after, found.search)


def _size_trials(found: Smallest) -> SizeTrials:
    """The trials of a search as the picture takes them."""
    from mpoc.search.figure import SizeTrials

    search, before, metric = found.search, found.before, found.before.metric
    chosen = search.chosen
    assert chosen is not None
    sign = -1 if before.higher_is_better else 1
    return SizeTrials(
        sorted((trial.nbytes, trial.scores[metric]) for trial in search.trials),
        (chosen.nbytes, chosen.scores[metric]),
        f"chosen: --ratio {chosen.ratio:g}",
        (found.done.manifest.source.nbytes, before.scores[metric]),
        before.scores[metric] + sign * search.max_drop,
        f"dense {'−+'[sign > 0]} {search.max_drop:g}",
        f"{metric} on {before.data}, {before.split}{_UNITS.get(metric, '')}",
    )


def _say_what_begins(request: CompressRequest, words: Output) -> None:
    from mpoc.pipeline import choose_device

    words.say(f"device {choose_device(request.recipe.device)}")
    if request.calibration is not None:
        data = request.calibration.data
        words.say(f"calibrating on {data}: first the dense network, then layer by layer")


def _measure(path: Path, request: CompressRequest, words: Output) -> Measured | None:
    """The network's scores on the data of ``--eval``."""
    if request.eval_data is None:
        return None
    from mpoc.train.material import DataOptions
    from mpoc.train.measure import MeasureRequest, measure

    words.say(f"measuring {path}")
    return measure(
        MeasureRequest(
            path,
            DataOptions(request.eval_data),
            arch=request.arch,
            stand_in=request.model,
            device=request.recipe.device,
        )
    )
