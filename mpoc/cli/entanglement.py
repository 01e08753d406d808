"""``mpoc entanglement``: the entropy at each cut of each layer's chain, before and after truncation."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoc.cli.console import Output, plain
from mpoc.cli.options import takes
from mpoc.compression.recipe import Recipe
from mpoc.runtime.options import COMMON, argument, nested, option
from mpoc.train.settings import architecture_option

if TYPE_CHECKING:
    from mpoc.compression.entanglement import Entanglement, Profile

# Fields of a recipe that choose layers and their factors.
_CHOOSING = (
    "layers",
    "exclude",
    "embeddings",
    "min_params",
    "sites",
    "shape",
    "order",
    "conv",
    "input_shape",
)


@dataclass(frozen=True)
class EntanglementOptions:
    """The command line of ``mpoc entanglement``."""

    model: Path = argument("MODEL", "A checkpoint, or a compressed file or directory.")
    choice: dict[str, Any] = nested(Recipe, make=dict, only=_CHOOSING)  # those given, by the names of fields
    against: Path | None = option(
        "Compare with this compressed version of MODEL, at its factors.",
        None, metavar="COMPRESSED", panel=COMMON,
    )  # fmt: skip
    arch: str | None = architecture_option()
    weight: float = option("Keep this share of Σs² with the effective bond.", 0.99, panel=COMMON)
    plot: Path | None = option(
        "Draw the entropy profiles as .png, .svg or .pdf.", None, metavar="FILE", panel=COMMON
    )
    as_json: bool = option("Print entropies and spectra as JSON on stdout.", False, "--json", panel=COMMON)
    quiet: bool = option("Print no progress.", False, panel=COMMON)


@takes(EntanglementOptions)
def entanglement(options: EntanglementOptions) -> None:
    """Show the entanglement entropy and the effective bond at every cut of each layer's chain.

    Examples:

    mpoc entanglement fc2.pt

    mpoc entanglement mlp.pt --against mlp.mpo.safetensors --json > spectra.json
    """
    from mpoc.compression.entanglement import as_dict, entanglement_of
    from mpoc.reporting.plots import EntropyProfile, draw_entropies, refuse_unknown_picture

    console = Output(options.quiet)
    if options.plot is not None:
        refuse_unknown_picture(options.plot)

    def progress(layer: str, number: int, total: int) -> None:
        console.say(f"[{number}/{total}] {layer}")

    result = entanglement_of(
        options.model, options.choice, options.against, options.weight, options.arch, progress
    )
    if options.as_json:
        sys.stdout.write(json.dumps(as_dict(result), ensure_ascii=False) + "\n")
    else:
        _print(result, console)
    if options.plot is not None:
        profiles = [EntropyProfile(each.layer, each.weight, each.stored) for each in result.profiles]
        draw_entropies(profiles, options.plot)
        console.say(f"wrote {options.plot}")


def _print(result: Entanglement, console: Output) -> None:
    from rich import box
    from rich.table import Table

    stored = any(profile.stored is not None for profile in result.profiles)
    both = result.against is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    share = f"{100 * result.kept:g} %"
    titles = ["layer", "outputs J / inputs I", "full bonds", "S", "S / largest", f"D for {share}"]
    titles += ["D stored"] if stored else []
    titles += ["S stored"] if both else []
    for title in titles:
        table.add_column(title, overflow="fold")
    for profile in result.profiles:
        table.add_row(*(plain(cell) for cell in _row(profile, both)))
    console.result.print(table)
    console.result.print("S in nats at each cut of the chain; its largest value is ln of the full bond")
    if result.left:
        console.result.print(f"stored dense: {result.left} more")


def _row(profile: Profile, both: bool) -> list[str]:
    from mpoc.runtime.formatting import times

    cuts, structure = profile.weight or profile.stored or (), profile.structure
    row = [
        profile.layer,
        f"{times(structure.output_factors)} / {times(structure.input_factors)}",
        _spaced(cut.full_bond for cut in cuts),
        _spaced(f"{cut.entropy:.3f}" for cut in cuts),
        _spaced(f"{cut.entropy / (cut.largest_entropy or 1):.3f}" for cut in cuts),
        _spaced(cut.effective_bond for cut in cuts),
    ]
    if profile.record is not None and profile.stored is not None:
        row.append(profile.record.bonds_text())
        row += [_spaced(f"{cut.entropy:.3f}" for cut in profile.stored)] if both else []
    return row


def _spaced(values: Any) -> str:
    return " ".join(map(str, values))
