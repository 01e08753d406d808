"""The figures of images as states: quality over stored numbers, entropy along the chain, and some images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpoc.reproduce.mps_images import NAME, ImageStates, approximate
from mpoc.reproduce.pixels import ORDERS
from mpoc.writer import staged

METHODS = {
    **{order: f"state, {name}" for order, name in ORDERS.items()},
    "svd": "SVD",
    "dct-own": "DCT, own places",
    "dct-common": "DCT, common places",
}
_STYLES = {"morton": "C0.-", "raster": "C1.-", "svd": "0.25", "dct-own": "C2", "dct-common": "C2--"}
_SHOWN = 8  # images


def draw_image_figures(done: ImageStates, folder: Path) -> list[Path]:
    """``mps-images.svg``, ``mps-images-entropy.svg`` and ``mps-images-examples.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    panels: list[tuple[str, Callable[[Any, ImageStates], None]]] = [
        ("", _draw_quality), ("-entropy", _draw_entropies), ("-examples", _draw_examples),
    ]  # fmt: skip
    return [_draw(done, folder / f"{NAME}{suffix}.svg", draw) for suffix, draw in panels]


def _draw(done: ImageStates, target: Path, draw: Callable[[Any, ImageStates], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    draw(figure, done)
    few = " (quick: few images)" if done.quick else ""
    figure.suptitle(f"{done.data.path.name}, {len(done.images):,} images{few}", fontsize="medium")
    with staged(target) as scratch:
        figure.savefig(scratch)
    return target


def _draw_quality(figure: Any, done: ImageStates) -> None:
    axes = figure.subplots()
    for name, found in {**done.states, **done.peers}.items():
        points = {at.numbers / done.pixels: at.decibels for at in found if at.kept}
        axes.plot([*points], [*points.values()], _STYLES[name], lw=1, label=METHODS[name])
    axes.set_xscale("log")
    axes.axvline(1, color="0.6", lw=1, ls=":")
    axes.set_xlabel("numbers stored / numbers of the image")
    axes.set_ylabel("peak signal-to-noise, mean (dB)")
    axes.legend(fontsize="small")


def _draw_entropies(figure: Any, done: ImageStates) -> None:
    axes = figure.subplots()
    for name, values in done.entropies.items():
        axes.plot(range(1, len(values) + 1), values, _STYLES[name], lw=1, label=METHODS[name])
    axes.set_xticks(range(1, len(next(iter(done.entropies.values()))) + 1))
    axes.set_xlabel("bond, from the coarsest site to the finest")
    axes.set_ylabel("entanglement entropy, mean")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _draw_examples(figure: Any, done: ImageStates) -> None:
    """The first images, and what every second bond that compresses keeps of them, in either order."""
    x = done.images[:_SHOWN]
    states = [at for at in done.states["morton"] if at.numbers < done.pixels][1::2]
    rows = [("image", x)]
    for order in ORDERS:
        rows += [(f"{ORDERS[order]}, D = {at.kept}", approximate(x, order, at.kept)[0]) for at in states]
    grid = figure.subplots(len(rows), len(x), squeeze=False)
    for line, (label, images) in zip(grid, rows, strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")
