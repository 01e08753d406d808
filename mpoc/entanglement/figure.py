"""Entropies as a picture: S_k over the cuts, a line a layer; S over layers where none has two cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoc.entanglement.spectra import Cut
from mpoc.writer import staged

# More layers than this have a scale of colours, and no names.
_NAMED = 8
_LAYERS = "layer, from the first to the last"
_ENTROPY = "entanglement entropy S (nats)"


@dataclass(frozen=True)
class EntropyProfile:
    """The cuts of one layer: of its dense weight, of what is stored of it, or of both."""

    layer: str
    weight: tuple[Cut, ...] | None
    stored: tuple[Cut, ...] | None


def draw_entropies(profiles: Sequence[EntropyProfile], picture: Path) -> None:
    """Dense weights in full lines, what is stored dashed, the largest possible entropy dotted.

    Where no layer has two cuts there are no lines: all layers then stand below each other.

    Args:
        profiles: a layer each, in the order of the network.
        picture: .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    single = all(len(profile.weight or profile.stored or ()) <= 1 for profile in profiles)
    (_draw_layers if single else _draw_profiles)(figure.subplots(), profiles)
    with staged(picture) as scratch:
        figure.savefig(scratch)


def _draw_layers(axes: Any, profiles: Sequence[EntropyProfile]) -> None:
    """The only cut of each, below each other."""
    from matplotlib.ticker import MaxNLocator

    weights = [(k, cut) for k, profile in enumerate(profiles, start=1) for cut in profile.weight or ()]
    stored = [(k, cut) for k, profile in enumerate(profiles, start=1) for cut in profile.stored or ()]
    largest = [(k, cut.largest_entropy) for k, cut in weights or stored]
    for said, style, colour, points in (
        ("dense", ".", "C0", [(k, cut.entropy) for k, cut in weights]),
        ("stored", "x", "C1", [(k, cut.entropy) for k, cut in stored]),
        ("largest possible", "|", "0.6", largest),
    ):
        if points:
            axes.plot([s for _, s in points], [k for k, _ in points], style, color=colour, label=said)
    axes.set_xlim(left=0)
    axes.set_xlabel(_ENTROPY)
    axes.set_ylim(len(profiles) + 0.5, 0.5)
    if len(profiles) <= _NAMED:
        axes.set_yticks(
            range(1, len(profiles) + 1), [profile.layer for profile in profiles], fontsize="small"
        )
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(_LAYERS)
    if largest:
        axes.figure.legend(loc="outside upper right", ncols=3, fontsize="small")


def _draw_profiles(axes: Any, profiles: Sequence[EntropyProfile]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    named = len(profiles) <= _NAMED
    scale = Normalize(1, max(len(profiles), 2))
    for number, profile in enumerate(profiles, start=1):
        colour = f"C{number - 1}" if named else colormaps["viridis"](scale(number))
        _draw_profile(axes, profile, colour, named)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("cut behind site k")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(_ENTROPY)
    _tell_styles(axes, profiles, named)
    if named:
        axes.legend(fontsize="small")
    else:
        axes.figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, label=_LAYERS)


def _tell_styles(axes: Any, profiles: Sequence[EntropyProfile], named: bool) -> None:
    """A legend of what kinds of lines there are, whatever their colour."""
    styles = (
        ("dense", ".-", any(profile.weight for profile in profiles)),
        ("stored", "x--", any(profile.stored for profile in profiles)),
        ("largest possible", "_:", named),
    )
    drawn = {said: axes.plot([], [], style, color="0.4")[0] for said, style, there in styles if there}
    axes.figure.legend(drawn.values(), drawn, loc="outside upper right", ncols=3, fontsize="small")


def _draw_profile(axes: Any, profile: EntropyProfile, colour: Any, named: bool) -> None:
    parts = ((profile.weight, ".-"), (profile.stored, "x--"))
    drawn = [(cuts, style) for cuts, style in parts if cuts]
    for cuts, style in drawn:
        label = profile.layer if cuts is drawn[0][0] else None
        axes.plot(*_points(cuts), style, color=colour, label=label, lw=None if named else 1)
    if named and drawn:
        cuts = drawn[0][0]
        largest = [cut.largest_entropy for cut in cuts]
        axes.plot([cut.site for cut in cuts], largest, "_:", color=colour, lw=1)


def _points(cuts: tuple[Cut, ...]) -> tuple[list[int], list[float]]:
    return [cut.site for cut in cuts], [cut.entropy for cut in cuts]
