"""The guide's picture of the demo: accuracy of its network over file size, one point a bond dimension.

    python tests/benchmarks/demo_curve.py .readme/demo.svg

Each point is measured as compressed and after the demo's fine-tuning. Needs the extras ``plot`` and
``train``; prints the figures as a table too.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarking import markdown_table

from mpoc.cli.demo import DemoResult, fine_tune_demo, run_demo

BONDS = (4, 8, 12, 16, 20, 24, 32, 48)


def draw(stories: list[DemoResult], healed: list[float], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mpoc"
    from matplotlib import pyplot as plt

    before = stories[0]
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    sizes = [story.compression.nbytes / 1e3 for story in stories]
    axes.axhline(before.accuracy_before, color="0.5", linestyle="--", linewidth=1)
    dense = (before.compression.manifest.source.nbytes or 0) / 1e3
    axes.text(sizes[0], before.accuracy_before + 1.5, f"dense, {dense:.0f} kB", color="0.35", fontsize=9)
    plain = [story.accuracy_after for story in stories]
    axes.plot(sizes, plain, "o-", color="#1f6fb4", label="as compressed")
    axes.plot(sizes, healed, "o-", color="#c8552b", label="fine-tuned")
    for bond, size, value in zip(BONDS, sizes, plain, strict=True):
        axes.annotate(f"D={bond}", (size, value), (5, -12), textcoords="offset points", fontsize=8)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.set(xlabel="file size, kB", ylabel="test accuracy, %", ylim=(0, 108))
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, metadata=metadata, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stories = [run_demo(Path(scratch) / str(bond), bond, False) for bond in BONDS]
        healed = [accuracy for story in stories if (accuracy := fine_tune_demo(story)) is not None]
    draw(stories, healed, arguments.file)
    rows = [
        [
            str(bond),
            f"{s.compression.manifest.rho_selected:.3f}",
            f"{s.compression.nbytes:,}",
            f"{s.accuracy_after:.2f}",
            f"{tuned:.2f}",
        ]
        for bond, s, tuned in zip(BONDS, stories, healed, strict=True)
    ]
    print(markdown_table(["bond D", "ρ (selected)", "bytes", "accuracy %", "fine-tuned %"], rows))


if __name__ == "__main__":
    main()
