"""Calibrated fits of networks whose layers have many inputs and few outputs: seconds and peak memory.

    python tests/benchmarks/calibration_wide.py [--cases audio unet bert] [--threads 2] [-- MORE OPTIONS]

``audio`` has the kernels of a small pitch tracker (CREPE, Kim et al. 2018), one of them 16×128×64×1, on
512 sums of harmonics.  ``unet`` is a text detector (CRAFT, Baek et al. 2019), VGG16-BN with a U-shaped head,
20 million weights, on 16 images of 192².  ``bert`` is the linear maps of two layers of BERT-base on 240 texts
of 64 tokens.  All weights are random, those of ``bert`` with decaying spectra; statistics of batch norms are
of the data.  ``mpoc compress --calibrate --ratio 0.5`` runs as a process of its own; its anonymous memory is
sampled 20 times a second.
"""

import argparse
import itertools
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from benchmarking import markdown_table, mpoc_command, run_mpoc
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, layer_norm, max_pool2d, pad


class Audio(nn.Module):
    """(n, 1024) samples → (n, 360): six convolutions over time, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.taps, channels = [512] + 5 * [64], [1, 128, 16, 16, 16, 32, 64]
        strides = [4] + 5 * [1]
        shapes = zip(channels, channels[1:], self.taps, strides, strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, (k, 1), (s, 1)) for a, b, k, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in channels[1:])
        self.head = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for conv, norm, taps in zip(self.convs, self.norms, self.taps, strict=True):
            ends = (254, 254) if taps == 512 else (31, 32)
            x = max_pool2d(norm(conv(pad(x, (0, 0, *ends))).relu()), (2, 1))
        out: Tensor = self.head(x.flatten(1))
        return out


def _conv(a: int, b: int, taps: int = 3, dilation: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(a, b, taps, padding=dilation * (taps // 2), dilation=dilation)
    return [conv, nn.BatchNorm2d(b), nn.ReLU()]


class UNet(nn.Module):
    """(n, 3, 192, 192) → (n, 2, 96, 96): the features of VGG16-BN, and their skips merged on the way up."""

    def __init__(self) -> None:
        super().__init__()
        stages = [[3, 64, 64], [64, 128, 128], [128, 256, 256, 256], [256, 512, 512, 512], [512, 512, 512]]
        self.stages = nn.ModuleList(
            nn.Sequential(*(layer for a, b in itertools.pairwise(w) for layer in _conv(a, b))) for w in stages
        )
        self.top = nn.Sequential(*_conv(512, 1024, dilation=6), *_conv(1024, 1024, 1))
        widths = [(1536, 512), (768, 256), (384, 128), (192, 64)]
        self.ups = nn.ModuleList(nn.Sequential(*_conv(a, b, 1), *_conv(b, b // 2)) for a, b in widths)
        self.head = nn.Sequential(*_conv(32, 32), *_conv(32, 32), *_conv(32, 16), nn.Conv2d(16, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
            x = max_pool2d(x, 2)
        x = self.top(x)
        for up, skip in zip(self.ups, reversed(skips), strict=False):
            x = up(torch.cat([interpolate(x, size=skip.shape[2:]), skip], 1))
        out: Tensor = self.head(x)
        return out


class Bert(nn.Module):
    """(n, t, 768) → (n, t, 768): the linear maps of two layers of BERT-base, without attention."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(768, 768), (768, 3072), (3072, 768)]
        self.maps = nn.ModuleList(nn.Linear(a, b) for _ in range(2) for a, b in shapes)

    def forward(self, x: Tensor) -> Tensor:
        for one, up, down in zip(self.maps[::3], self.maps[1::3], self.maps[2::3], strict=True):
            x = layer_norm(x + one(x), x.shape[-1:])
            x = layer_norm(x + down(gelu(up(x))), x.shape[-1:])
        return x


def _sounds() -> Tensor:
    pitch = 50 * 40 ** torch.rand(512, 1, 1)  # Hz, at 16,000 samples a second
    overtones = torch.arange(1, 9)[:, None]
    phases, strength = torch.rand(512, 8, 1), torch.rand(512, 8, 1) / overtones
    waves = (2 * torch.pi * (pitch * overtones * torch.arange(1024) / 16_000 + phases)).sin()
    return (strength * waves).sum(1) + 0.1 * torch.randn(512, 1024)


def _images() -> Tensor:
    sizes = [3, 12, 48, 192]
    return sum(
        (interpolate(torch.randn(16, 3, s, s), size=192, mode="bilinear") for s in sizes), torch.zeros(())
    )


def _rows() -> Tensor:
    return torch.randn(240, 64, 256) @ torch.randn(256, 768) / 16 + 0.1 * torch.randn(240, 64, 768)


def _with_decay(network: nn.Module) -> nn.Module:
    """Singular values of linear maps fall as 1/√k."""
    for weight in (p for p in network.parameters() if p.dim() == 2):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        decay = torch.arange(1, len(values) + 1) ** -0.5
        weight.copy_(left * (values[0] * decay) @ right)
    return network


NETWORKS = {"audio": Audio, "unet": UNet, "bert": Bert}  # also the factories of --arch
DATA = {"audio": _sounds, "unet": _images, "bert": _rows}
SAMPLES = {"audio": 512, "unet": 16, "bert": 240}


def peak_memory(command: list[str], threads: int, log: Path) -> tuple[float, float, int]:
    """Run a command: seconds, CPU seconds, and the peak of its anonymous memory in bytes."""
    start, peak = time.perf_counter(), 0
    before = os.times()
    with log.open("w") as said:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            held = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(1024 * int(number) for number in held)])
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(
            f"error: {' '.join(command)}: status {process.returncode}\n{log.read_text()[-2000:]}"
        )
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, spent, peak


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for the outputs")
    parser.add_argument("more", nargs="*", help="options of mpoc compress, after --")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        for case in arguments.cases:
            torch.manual_seed(0)
            network = NETWORKS[case]().eval()
            network = _with_decay(network) if case == "bert" else network
            dense, data, out = (
                folder / f"{case}{end}" for end in (".safetensors", "-data.safetensors", "-out.safetensors")
            )
            inputs = DATA[case]()
            for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
                norm.momentum = None
            network.train()(inputs[:64])
            save_file(network.state_dict(), dense)
            save_file({"inputs": inputs}, data)
            command = mpoc_command(
                "compress", dense, "--arch", f"{Path(__file__).resolve()}:{NETWORKS[case].__name__}",
                "--ratio", "0.5", "--calibrate", data, "--calibration-samples", str(SAMPLES[case]),
                "--force", "-o", out, *arguments.more,
            )  # fmt: skip
            seconds, spent, peak = peak_memory(command, arguments.threads, folder / f"{case}.log")
            report = json.loads(run_mpoc("report", out, "--json"))
            errors = [layer["held_out_error"] for layer in report["layers"] if layer.get("held_out_error")]
            rows.append([case, f"{seconds:.0f}", f"{spent:.0f}", f"{peak / 1e6:.0f}", f"{max(errors):.4f}"])
            print(rows[-1], flush=True)
    print(markdown_table(["network", "seconds", "CPU seconds", "peak MB", "largest held-out error"], rows))


if __name__ == "__main__":
    main()
