"""Entropy profiles as a picture: S_k over the cuts, a line a layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoc.entanglement.study import Entanglement, Profile
from mpoc.writer import staged

if TYPE_CHECKING:
    from mpoc.entanglement.spectra import Cut

# More layers than this have a scale of colours, and no names.
_NAMED = 8


def draw_entanglement(found: Entanglement, picture: Path) -> None:
    """Dense weights in full lines, what is stored dashed, the largest possible entropy dotted.

    Args:
        found: of :func:`mpoc.entanglement.study.entanglement_of`.
        picture: .png, .svg or .pdf.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    count = len(found.profiles)
    named = count <= _NAMED
    scale = Normalize(1, max(count, 2))
    for number, profile in enumerate(found.profiles, start=1):
        colour = f"C{number - 1}" if named else colormaps["viridis"](scale(number))
        _draw_profile(axes, profile, colour, named)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cut behind site k")
    axes.set_ylabel("entanglement entropy S (nats)")
    if named:
        axes.legend(fontsize="small")
    else:
        figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, label="layer, from the first to the last")
    with staged(picture) as scratch:
        figure.savefig(scratch)


def _draw_profile(axes: Any, profile: Profile, colour: Any, named: bool) -> None:
    parts = ((profile.weight, ".-", ""), (profile.stored, "x--", " stored"))
    drawn = [(cuts, style, said) for cuts, style, said in parts if cuts]
    for cuts, style, said in drawn:
        label = profile.layer + (said if len(drawn) > 1 else "")
        axes.plot(*_points(cuts), style, color=colour, label=label, lw=None if named else 1)
    if named and drawn:
        cuts = drawn[0][0]
        largest = [cut.largest_entropy for cut in cuts]
        axes.plot([cut.site for cut in cuts], largest, "_:", color=colour, lw=1)


def _points(cuts: tuple[Cut, ...]) -> tuple[list[int], list[float]]:
    return [cut.site for cut in cuts], [cut.entropy for cut in cuts]
