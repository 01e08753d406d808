"""Sentences on a compressed file: what it keeps of the network, how it was calibrated and trained; advice.

They need the manifest alone, and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpoc.io.manifest import MANIFEST_FILE, Manifest
from mpoc.runtime.formatting import counted
from mpoc.runtime.packages import is_packaged

# Above this relative error of its weights, a network usually needs fine-tuning.
LARGE_ERROR = 0.1
# The same for outputs after calibration, where later layers compensate a part.
LARGE_OUTPUT_ERROR = 0.3
_PER_CENT = ("accuracy", "agreement")  # scores in per cent


def headline(manifest: Manifest) -> str:
    """What the network keeps: its scores and the likeness of its outputs; "" where neither is known."""
    calibration, parts = manifest.calibration, []
    if measured := manifest.measured:
        metric = measured.get("metric", "loss")
        before, after = measured.get("before", {}).get(metric), measured.get("after", {}).get(metric)
        if before is not None and after is not None:
            data = f"{measured.get('split', '?')} of {measured.get('data', '?')}"
            parts.append(
                f"{scores_line({metric: before})} before compression, {score_text(metric, after)} after it "
                f"({data}, {counted(measured.get('examples', 0), 'example')})"
            )
    likeness = calibration.get("likeness", {}).get("this", {})
    if likeness:
        unseen, held_out = calibration.get("unseen", 0), calibration.get("held_out", 0)
        examples = counted(unseen, "unseen example") if unseen else counted(held_out, "held-out example")
        data = calibration.get("data", {}).get("name", "?")
        parts.append(f"outputs beside the original's: {likeness_text(likeness)} ({examples} of {data})")
    return "; ".join(parts)


def scores_line(scores: Mapping[str, float]) -> str:
    """``{"loss": 0.5, "accuracy": 98.1}`` → ``loss 0.5000, accuracy 98.10 %``."""
    shown = [name for name in scores if name not in ("step", "epoch", "train_loss")]
    return ", ".join(f"{name.replace('_', ' ')} {score_text(name, scores[name])}" for name in shown)


def score_text(name: str, value: float) -> str:
    """The value of a score, with its unit."""
    return f"{value:.2f} %" if name in _PER_CENT else f"{value:.4g}"


def likeness_text(likeness: Mapping[str, float]) -> str:
    """``{"agreement": 98.1, "kl": 0.0123}`` → ``agreement 98.10 %, KL 0.0123``."""
    shown = {"cosine": "cosine {:.4f}", "agreement": "agreement {:.2f} %", "kl": "KL {:.3g}"}
    return ", ".join(text.format(likeness[name]) for name, text in shown.items() if name in likeness)


def remarks(manifest: Manifest) -> list[str]:
    """Remarks beside the totals: missing records, calibration, advice, training."""
    lines: list[str] = []
    if not manifest.is_complete:
        lines.append(
            f"{MANIFEST_FILE} is missing (transformers does not save it): errors, entropies, original size "
            "and layers left dense are unknown"
        )
    ordered = [
        f"{layer.layer} ({layer.order if isinstance(layer.order, str) else 'learned'})"
        for layer in manifest.replaced
        if layer.order
    ]
    if ordered:
        lines.append(f"inputs reordered before factorisation: {', '.join(ordered)}")
    lines += calibration_lines(manifest.calibration)
    lines += same_size_lines(manifest)
    lines += _advice(manifest)
    if "zoo" in manifest.architecture:
        lines.append(f"architecture {manifest.architecture['zoo']} (zoo)")
    elif "factory" in manifest.architecture:
        factory = manifest.architecture["factory"]
        lines.append(
            f"architecture {factory}{'' if is_packaged(factory) else ' (your code: pass --arch again)'}"
        )
    return lines + training_lines(manifest.training)


def calibration_lines(calibration: dict[str, Any]) -> list[str]:
    """Lines on the calibration: its data, the budget allocation, the batch norms."""
    if not calibration:
        return []
    data = calibration.get("data", {})
    held_out = calibration.get("held_out", 0)
    line = (
        f"calibrated on {calibration.get('samples', 0):,} examples of {data.get('name', '?')} "
        f"({held_out:,} held out to choose with), layer by layer in the order of the network"
    )
    shares, allocation = calibration.get("shares", {}), ""
    if any(shares.get("distances", {}).values()):
        divergences = "; ".join(f"{way} {value:.4g}" for way, value in shares["distances"].items())
        allocation = (
            f"budget allocated by {shares.get('chosen', '?')}, for the smallest held-out divergence from the "
            f"dense network before the sequential fit ({divergences})"
        )
    norms = calibration.get("norms")
    lines = [line, allocation] if allocation else [line]
    lines += _likeness_lines(calibration.get("likeness", {}))
    if norms is None:
        return lines
    chosen = "recalibrated" if norms.get("renewed") else "kept"
    kept, recalibrated = (f"{norms.get(key, 0):.4g}" for key in ("before", "after"))
    return [
        *lines,
        f"batch-norm statistics {chosen}, for the smaller held-out divergence from the dense network "
        f"(kept {kept}, recalibrated {recalibrated})",
    ]


def _likeness_lines(likeness: dict[str, dict[str, float]]) -> list[str]:
    """What likeness of outputs others reach in the same bytes; the headline says it of this network."""
    texts = {way: text for way, found in likeness.items() if (text := likeness_text(found))}
    others = "; ".join(f"{way}: {text}" for way, text in texts.items() if way != "this")
    return [f"likeness of the outputs in the same bytes: {others}"] if others else []


def same_size_lines(manifest: Manifest) -> list[str]:
    """The errors of other methods at the same size."""
    rounded = [layer.same_size for layer in manifest.changed if layer.same_size and layer.storage]
    floats = [layer.same_size for layer in manifest.changed if layer.same_size and not layer.storage]
    lines = _compared(rounded, "in the same bytes") if rounded else []
    return lines + (_compared(floats, "other methods storing as many numbers") if floats else [])


def _compared(errors: Sequence[Mapping[str, float]], title: str) -> list[str]:
    others = [name for name in errors[0] if name != "this" and all(name in of_layer for of_layer in errors)]
    means = {name: sum(of_layer[name] for of_layer in errors) / len(errors) for name in ("this", *others)}
    compared = ", ".join(f"{name} {means[name]:.4f}" for name in others)
    return [
        f"output-weighted held-out error, mean over {counted(len(errors), 'layer')}: {means['this']:.4f}"
        + (f"; {title}: {compared}" if compared else "")
    ]


def training_lines(training: dict[str, Any]) -> list[str]:
    """One line per run of ``mpoc finetune``, the first run first."""
    if not training:
        return []
    if "steps" not in training:
        return [f"before compression {line}" for line in training_lines(training.get("earlier", {}))]
    data, metric = training.get("data", {}), training.get("metric", "loss")
    parts = [f"{training.get('steps', 0):,} steps of {training.get('task', 'training')}"]
    if training.get("split") and training.get("final"):
        start, final = (training.get(key, {}).get(metric) for key in ("start", "final"))
        change = f"{start:.4g} → {final:.4g}" if start is not None else f"{final:.4g}"
        parts.append(f"{metric} {change} on {training['split']}")
    if metric in training.get("test", {}):
        parts.append(f"{training['test'][metric]:.4g} on test")
    if "sigma" in training:
        parts.append(f"{training['mean']:.4g} ± {training['sigma']:.2g} over {len(training['runs'])} runs")
    line = f"fine-tuned on {data.get('name', '?')}: {', '.join(parts)}"
    return [*training_lines(training.get("earlier", {})), line]


def _advice(manifest: Manifest) -> list[str]:
    """A warning where errors are large."""
    if manifest.calibration:
        return _calibrated_advice(manifest)
    errors = [layer.relative_error for layer in manifest.changed if layer.relative_error is not None]
    large = [error for error in errors if error > LARGE_ERROR]
    if not large:
        return []
    have = f"layers {'has' if len(large) == 1 else 'have'} a relative error above {LARGE_ERROR:.0%}"
    worst = f"(worst {max(large):.0%})"
    if not manifest.replaced:
        return [
            f"{len(large)} of {len(errors)} rounded {have} {worst}: measure the network before use "
            f"(mpoc eval). {_wider_option(manifest)}, or --calibrate DATA, keeps more of it."
        ]
    kind = "replaced" if len(manifest.replaced) == len(manifest.changed) else "changed"
    return [
        f"{len(large)} of {len(errors)} {kind} {have} {worst}: the network usually needs fine-tuning; "
        f"measure its accuracy before use. {_more_accurate_option(manifest)} gives smaller errors. "
        "With --calibrate DATA the same size keeps more."
    ]


def _wider_option(manifest: Manifest) -> str:
    """What spends more bytes, to begin a sentence."""
    if "size" in manifest.options:
        return "A larger --size"
    return "A larger --ratio" if manifest.replaced else "More --bits"


def _more_accurate_option(manifest: Manifest) -> str:
    if "discard" in manifest.options:
        return "A smaller --discard"
    if not all(layer.structure.info.can_truncate for layer in manifest.replaced):
        return "A larger --bond or --ratio, or another --form,"
    return "A larger --bond or --ratio, or --max-error 0.1,"


def _calibrated_advice(manifest: Manifest) -> list[str]:
    """A warning about outputs; after calibration the error of a weight may be large where no inputs are."""
    errors = [layer.held_out_error for layer in manifest.changed if layer.held_out_error is not None]
    large = [error for error in errors if error > LARGE_OUTPUT_ERROR]
    if not large:
        return []
    have = "has" if len(large) == 1 else "have"
    return [
        f"{len(large)} of {len(errors)} fitted layers {have} a held-out error above "
        f"{LARGE_OUTPUT_ERROR:.0%} (worst {max(large):.0%}): evaluate the network before use (mpoc eval). "
        f"{_wider_option(manifest)}, more --calibration-samples or mpoc finetune reduces it."
    ]
