"""What large networks would cost, computed from what small ones were measured to cost here.

    python tests/benchmarks/how_far.py

Nothing is run.  Weights alone: the fit takes ``FIT`` thread seconds a number at bond 64, and every byte is
read once at the disk's speed.  Calibrated: a layer of m × n costs ``APPLY`` thread seconds for each of its
m²n + mn² (an application of G E M, of which all fits together need a number that hardly depends on the size),
and ``PASS`` for each number and token of calibration; layers wider than 12,288 are fitted by weights alone.

Of a calibrated compression ``OFFERS`` of the fits is shared by all processes, and of the rest two at a time;
passes are shared by eight at most.  Each process holds the network twice in float32 (dense and compressed)
and, in float64, E[x xᵀ] of each distinct input twice (seen and held out, which the merging of parts doubles
while they are made) and E[g gᵀ] of each output.

A GPU is taken to do the work of ``GPU`` of these threads: an assumption, none was there to measure.
"""

from dataclasses import dataclass
from math import prod

from benchmarking import markdown_table

FIT = 51e-9  # processes.py: 171.8 s of two threads for 6.74e9 numbers
APPLY = 29e-9  # all-MiniLM-L6-v2's encoder: 253 s of two threads, less the passes in them, for 1.63e10
PASS = 4.4e-10  # likewise: 19 s of two threads before the fits and about as many in them, 16,384 tokens
OFFERS = 0.6
GPU = 400
DISK = 2.76e9  # bytes a second read
TOKENS = 128 * 2048
WIDEST = 12_288
COLUMNS = ("2 threads", "64 threads", "1 GPU", "8 GPUs")


@dataclass(frozen=True)
class Llama:
    """Shapes of a network of Llama's kind."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    keys: int  # width of keys and of values
    vocabulary: int

    @property
    def block(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the matrices of one layer."""
        ends = [(self.hidden, self.hidden)] * 2 + [(self.keys, self.hidden)] * 2
        return [*ends, (self.hidden, self.intermediate), *[(self.intermediate, self.hidden)] * 2]

    @property
    def numbers(self) -> int:
        """Of all matrices, embeddings too."""
        return self.layers * sum(map(prod, self.block)) + 2 * self.vocabulary * self.hidden


MODELS = (
    Llama("Llama-7B", 32, 4096, 11008, 4096, 32000),
    Llama("Llama-2-70B", 80, 8192, 28672, 1024, 32000),
    Llama("Llama-3.1-405B", 126, 16384, 53248, 1024, 128256),
)


def plain(model: Llama, threads: float) -> float:
    """Seconds; reading goes on beside the fits."""
    return max(model.numbers * FIT / threads, 2 * model.numbers / DISK)


def calibrated(model: Llama, threads: float, processes: int) -> float:
    """Seconds; ``threads`` in all."""
    known = [(m, n) for m, n in model.block if max(m, n) <= WIDEST]
    fits = APPLY * model.layers * sum(m * m * n + m * n * n for m, n in known) / threads
    passes = PASS * TOKENS * model.numbers / threads * processes / min(8, processes)
    in_order = (1 - OFFERS) * fits * processes / min(2, processes)
    return OFFERS * fits + in_order + passes + plain(model, threads)


def memory(model: Llama) -> float:
    """Bytes that a calibrated compression takes in each process."""
    hidden, wide = model.hidden, model.intermediate
    known = [(m, n) for m, n in model.block if max(m, n) <= WIDEST]
    inputs = [hidden] * 2 + ([hidden, wide] if wide <= WIDEST else [])  # queries, output, gate, down
    squares = 3 * sum(n * n for n in inputs) + sum(m * m for m, _ in known)
    return 2 * 4 * model.numbers + 8 * model.layers * squares


def clock(seconds: float) -> str:
    """In the largest unit that fits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def main() -> None:
    kinds = ((2, 1), (64, 1), (GPU, 1), (8 * GPU, 8))
    rows, others = [], []
    for model in MODELS:
        name = f"{model.name}, {2 * model.numbers / 1e9:.0f} GB"
        rows.append([name, *(clock(plain(model, threads)) for threads, _ in kinds)])
        if max(model.hidden, model.keys) <= WIDEST:
            times = [clock(calibrated(model, threads, processes)) for threads, processes in kinds]
            wide = sum(prod(one) for one in model.block if max(one) > WIDEST) / sum(map(prod, model.block))
            others.append([name, *times, f"{memory(model) / 1e9:,.0f} GB", f"{wide:.0%}"])
    print(markdown_table(["weights alone, bond 64", *COLUMNS], rows) + "\n")
    print(markdown_table(["calibrated", *COLUMNS, "memory of each process", "too wide"], others))


if __name__ == "__main__":
    main()
