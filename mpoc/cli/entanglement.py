"""``mpoc entanglement``: what each cut of each layer carries, before and after truncation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpoc.cli.compress_options import (
    HOW,
    OUT,
    WHICH,
    Arch,
    Conv,
    Embeddings,
    Exclude,
    InputShapes,
    Layers,
    MinParams,
    Orders,
    Shape,
    Sites,
)
from mpoc.cli.console import Output, reported_errors

if TYPE_CHECKING:
    from mpoc.compression.entanglement import Entanglement, Profile


def entanglement(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A checkpoint, or a compressed file or directory.")
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="COMPRESSED",
            help="What MODEL was compressed to: its factors, and both side by side.",
            rich_help_panel=WHICH,
        ),
    ] = None,
    layers: Layers = None,
    exclude: Exclude = None,
    embeddings: Embeddings = None,
    min_params: MinParams = None,
    arch: Arch = None,
    sites: Sites = None,
    shape: Shape = None,
    order: Orders = None,
    conv: Conv = None,
    input_shape: InputShapes = None,
    weight: Annotated[
        float,
        typer.Option(
            help="Share of Σs² that the effective bond keeps.",
            rich_help_panel=HOW,
        ),
    ] = 0.99,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the entropy profiles: .png, .svg or .pdf.", rich_help_panel=OUT
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON on stdout, spectra too.", rich_help_panel=OUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel=OUT)
    ] = False,
) -> None:
    """Show the entanglement entropy and the effective bond at every cut of each layer's chain.

    Examples:

    mpoc entanglement fc2.pt

    mpoc entanglement mlp.pt --against mlp.mpo.safetensors --json > spectra.json
    """
    values = dict(locals())
    with reported_errors():
        from mpoc.cli.compress import recipe_options
        from mpoc.compression.entanglement import as_dict, entanglement_of
        from mpoc.reporting.plots import refuse_unknown_picture

        words = Output(quiet)
        if plot is not None:
            refuse_unknown_picture(plot)

        def tell(layer: str, number: int, total: int) -> None:
            words.say(f"[{number}/{total}] {layer}")

        found = entanglement_of(model, recipe_options(values), against, weight, arch, tell)
        if as_json:
            sys.stdout.write(json.dumps(as_dict(found), ensure_ascii=False) + "\n")
        else:
            _print(found, words)
        if plot is not None:
            from mpoc.reporting.plots import EntropyProfile, draw_entropies

            profiles = [EntropyProfile(one.layer, one.weight, one.stored) for one in found.profiles]
            draw_entropies(profiles, plot)
            words.say(f"wrote {plot}")


def _print(found: Entanglement, words: Output) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    stored = any(profile.stored is not None for profile in found.profiles)
    both = found.against is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    share = f"{100 * found.kept:g} %"
    titles = ["layer", "outputs J / inputs I", "full bonds", "S", "S / largest", f"D for {share}"]
    titles += ["D stored"] if stored else []
    titles += ["S stored"] if both else []
    for title in titles:
        table.add_column(title, overflow="fold")
    for profile in found.profiles:
        table.add_row(*(escape(cell) for cell in _row(profile, both)))
    words.result.print(table)
    words.result.print("S in nats at each cut of the chain; its largest value is ln of the full bond")
    if found.left:
        words.result.print(f"stored dense: {found.left} more")


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
