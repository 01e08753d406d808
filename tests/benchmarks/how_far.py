"""What large networks would cost, computed from what small ones were measured to cost here.

    python tests/benchmarks/how_far.py

Nothing is run.  Weights alone: the fit takes ``FIT`` thread seconds a number at bond 64, and every byte is
read once at the disk's speed.  Calibrated, ``--ratio 0.5 --effort fast``: a layer of m × n costs ``APPLY``
thread seconds for each of its m²n + mn², and ``PASS`` for each number and token of calibration; layers of
more than 12,288 outputs are fitted by weights alone.

Of a calibrated compression the prices, ``OFFERS`` of the fits, are shared by all processes; passes are shared
by eight at most.  A process holds some eight squares in float64 of the widest inputs below 8,192, from there
on rows, four of the outputs' gradients, and the largest matrix in float32.  In files lie the network twice in
float32 (dense and compressed), half of each square, and the inputs of all blocks, with gradients at four.

A GPU is taken to do the work of ``GPU`` of these threads: an assumption, none was there to measure.
"""

from dataclasses import dataclass
from math import prod

from benchmarking import markdown_table

FIT = 33.4e-9  # processes.py: 112.6 s of two threads for 6.74e9 numbers
# make_checkpoint.py's TinyLlama, two layers, 8,192 tokens, two threads.  A layer: prices 53 s, fits 87 s
APPLY = 2 * (53 + 87) / 3.03e11
PASS = 2 * (20 + 26) / (8192 * 44e6)  # the dense network 20 s, both networks group by group 26 s
OFFERS = 53 / (53 + 87)
GPU = 400
DISK = 2.76e9  # bytes a second read
TOKENS = 128 * 2048
WIDEST = 12_288
ROWS_FROM = 8192
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
    known = [(m, n) for m, n in model.block if m <= WIDEST]
    fits = APPLY * model.layers * sum(m * m * n + m * n * n for m, n in known) / threads
    passes = PASS * TOKENS * model.numbers / threads * processes / min(8, processes)
    in_order = (1 - OFFERS) * fits * processes
    return OFFERS * fits + in_order + passes + plain(model, threads)


def memory(model: Llama) -> float:
    """Bytes in each process."""
    known = [(m, n) for m, n in model.block if m <= WIDEST]
    squares = 8 * max((n for _, n in known if n < ROWS_FROM), default=0) ** 2
    squares += 4 * max(m for m, _ in known) ** 2
    return 8 * squares + 4 * model.vocabulary * model.hidden + 0.5e9


def disk(model: Llama) -> float:
    """Bytes of the files meanwhile, of one process."""
    known = [(m, n) for m, n in model.block if m <= WIDEST]
    inputs = {n for _, n in known if n < ROWS_FROM}
    squares = 2 * sum(n * n for n in inputs) + sum(m * m for m, _ in known)
    between = 4 * TOKENS * model.hidden
    return 8 * model.numbers + model.layers * (8 / 2 * squares + between) + 4 * between


def clock(seconds: float) -> str:
    """In the largest unit that fits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.{0 if seconds > 10 * size else 1}f} {unit}"
    return f"{seconds:.2g} s"


def main() -> None:
    kinds = ((2, 1), (64, 1), (GPU, 1), (8 * GPU, 8))
    rows, others = [], []
    for model in MODELS:
        name = f"{model.name}, {2 * model.numbers / 1e9:.0f} GB"
        rows.append([name, *(clock(plain(model, threads)) for threads, _ in kinds)])
        if any(m <= WIDEST for m, _ in model.block):
            times = [clock(calibrated(model, threads, processes)) for threads, processes in kinds]
            wide = sum(prod(one) for one in model.block if one[0] > WIDEST) / sum(map(prod, model.block))
            sizes = [f"{of(model) / 1e9:,.0f} GB" for of in (memory, disk)]
            others.append([name, *times, *sizes, f"{wide:.0%}"])
    print(markdown_table(["weights alone, bond 64", *COLUMNS], rows) + "\n")
    print(markdown_table(["calibrated", *COLUMNS, "memory", "files", "too wide"], others))


if __name__ == "__main__":
    main()
