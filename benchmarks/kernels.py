"""`python -m benchmarks.kernels`: the CPU kernels against the machine's bounds and the peers.

Three tables per thread count, each the best of interleaved repetitions in one run:
  linears    all linears of one decode step of SmolLM2-135M, per row count: ours, oneDNN with a
             prepacked weight, and F.linear; shares of the read and the FMA bound
  decode     paged attention of one token each of many sequences, against gather + SDPA
  prefill    paged attention of one whole prompt, against the same
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.machine import inspect_machine, versions
from benchmarks.report import Report, Table
from services.worker.kernels.build import find_compiler
from services.worker.kernels.cpu import AttentionBatch, CpuKernels
from services.worker.kernels.library import LayerGeometry
from tests import oracles

ROWS = (1, 4, 8, 16, 32, 128, 256)
NUM_LAYERS = 30
LAYER_SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
LM_HEAD_SHAPE = (49152, 576)
BLOCK_SIZE = 16
#: SmolLM2-135M's attention, then a larger grouped one.
HEADS = ((9, 3, 64), (32, 8, 128))

#: Ten independent chains of FMAs on full registers (two pipes of latency 4 need eight).
_FMA_PROBE = """
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
long flops_per_round(void) { return 10 * LANES * 2; }
float fma_probe(long rounds) {
    vec acc[10], x, y;
    for (int i = 0; i < LANES; i++) x[i] = 0.5f + rounds * 1e-9f, y[i] = x[i] * 0.5f;
    for (int i = 0; i < 10; i++) acc[i] = x * (float)i;
    for (long n = 0; n < rounds; n++) {
        _Pragma("GCC unroll 10")
        for (int i = 0; i < 10; i++) acc[i] = acc[i] * x + y;
    }
    for (int i = 1; i < 10; i++) acc[0] += acc[i];
    return acc[0][0];
}
"""


def best_seconds(actions: Sequence[Callable[[], object]], repetitions: int) -> list[float]:
    """The fastest of some interleaved runs of each, after one to warm up."""
    for action in actions:
        action()
    best = [float("inf")] * len(actions)
    for _ in range(repetitions):
        for i, action in enumerate(actions):
            started = time.perf_counter()
            action()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


def measure_fma_rate() -> float:
    """FLOP/s of one core doing nothing but independent fused multiply-adds."""
    compiler = find_compiler(os.environ)
    flags = [flag for flag in compiler.flags if not flag.startswith("-ffp-contract")]
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory) / "probe.c", Path(directory) / "probe.so"
        source.write_text(_FMA_PROBE)
        output = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run([*compiler.command, *flags, *output], check=True, timeout=120)
        probe = ctypes.CDLL(str(library))
    rounds = 2_000_000
    probe.fma_probe.argtypes = (ctypes.c_long,)
    (seconds,) = best_seconds([lambda: probe.fma_probe(rounds)], 10)
    return rounds * int(probe.flops_per_round()) / seconds


def measure_memory_rates() -> tuple[float, float]:
    """Bytes/s of torch reading 256 MiB, and of copying it (bytes read + bytes written)."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    read, copy = best_seconds([source.sum, lambda: target.copy_(source)], 8)
    return source.nbytes / read, 2 * source.nbytes / copy


def aligned_floats(count: int) -> torch.Tensor:
    spare = torch.zeros(count + 16)
    first = (-spare.data_ptr() // 4) % 16
    return spare[first : first + count]


class DecodeStep:
    """Weights of all linears of one decode step, as each contestant wants them."""

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels
        shapes = [*LAYER_SHAPES * NUM_LAYERS, LM_HEAD_SHAPE]
        self.weights = [torch.randn(n, k) for n, k in shapes]
        self.ours = [aligned_floats(kernels.packed_nbytes(n, k) // 4) for n, k in shapes]
        for weight, packed in zip(self.weights, self.ours, strict=True):
            kernels.pack_weight(weight, packed.data_ptr())
        self.onednn = [torch.ops.mkldnn._reorder_linear_weight(w, 32) for w in self.weights]
        self.numel = sum(weight.numel() for weight in self.weights)

    def contestants(self, rows: int) -> list[Callable[[], None]]:
        x = {k: torch.randn(rows, k) for k in {w.shape[1] for w in self.weights}}
        out = {n: torch.empty(rows, n) for n in {w.shape[0] for w in self.weights}}

        def ours() -> None:
            for weight, packed in zip(self.weights, self.ours, strict=True):
                n, k = weight.shape
                self.kernels.linear(x[k], packed.data_ptr(), n, out[n])

        def onednn() -> None:
            for weight, packed in zip(self.weights, self.onednn, strict=True):
                operand = x[weight.shape[1]]
                torch.ops.mkldnn._linear_pointwise(operand, packed, None, "none", [], "")

        def plain() -> None:
            for weight in self.weights:
                torch.nn.functional.linear(x[weight.shape[1]], weight)

        return [ours, onednn, plain]


def linears_table(step: DecodeStep, read_rate: float, fma_rate: float) -> Table:
    rows = []
    for count in ROWS:
        ours, onednn, plain = best_seconds(step.contestants(count), 7 if count < 100 else 3)
        read = step.numel * 4 / ours
        flops = step.numel * 2 * count / ours
        cells = [f"{seconds * 1e3:.1f}" for seconds in (ours, onednn, plain)]
        cells += [f"{onednn / ours:.2f}", f"{plain / ours:.2f}"]
        rows.append([str(count), *cells, f"{read / read_rate:.0%}", f"{flops / fma_rate:.0%}"])
    headers = ["rows", "ours ms", "oneDNN ms", "F.linear ms", "oneDNN/ours", "F.linear/ours"]
    return Table([*headers, "of read rate", "of FMA rate"], rows)


class PagedSequences:
    """Sequences of one length in shuffled pages, over layers enough to outgrow the caches."""

    def __init__(self, num_seqs: int, length: int, q_len: int, heads: tuple[int, int, int]) -> None:
        num_heads, kv_heads, head_dim = heads
        pages = length // BLOCK_SIZE
        shape = (num_seqs * pages, 2, BLOCK_SIZE, kv_heads, head_dim)
        layer_numel = torch.Size(shape).numel()
        num_layers = max(1, (128 << 20) // (4 * layer_numel))
        self.layers = [aligned_floats(layer_numel).view(shape) for _ in range(num_layers)]
        for layer in self.layers:
            layer.normal_()
        self.kv_nbytes = layer_numel * 4
        self.q = torch.randn(num_seqs * q_len, num_heads, head_dim)
        self.out = torch.empty_like(self.q)
        table = torch.randperm(num_seqs * pages).int().view(num_seqs, pages)
        position = torch.zeros(num_seqs * q_len, head_dim)
        self.batch = AttentionBatch(
            cos=position,
            sin=position,
            slot_mapping=torch.zeros(num_seqs * q_len, dtype=torch.int64),
            block_table=table,
            cu_seqlens_q=torch.arange(0, (num_seqs + 1) * q_len, q_len, dtype=torch.int32),
            seqused_k=torch.full((num_seqs,), length, dtype=torch.int32),
        )
        self.geometry = LayerGeometry(
            num_heads=num_heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5
        )

    def measure(self, kernels: CpuKernels) -> tuple[float, float]:
        """Seconds per layer: ours, the oracle."""

        def ours() -> None:
            for kv in self.layers:
                kernels.paged_attention(self.q, kv.data_ptr(), self.geometry, self.batch, self.out)

        def oracle() -> None:
            batch, scale = self.batch, self.geometry.scale
            for kv in self.layers:
                oracles.paged_attention(
                    self.q, kv, batch.block_table, batch.cu_seqlens_q, batch.seqused_k, scale
                )

        first, second = best_seconds([ours, oracle], 4)
        return first / len(self.layers), second / len(self.layers)


def decode_table(kernels: CpuKernels, copy_rate: float) -> Table:
    rows = []
    for num_seqs, length, heads in [(32, 512, h) for h in HEADS] + [(1, 8192, HEADS[0])]:
        case = PagedSequences(num_seqs, length, 1, heads)
        ours, oracle = case.measure(kernels)
        name = f"{num_seqs} x {length}, {heads[0]}/{heads[1]} heads of {heads[2]}"
        rate = case.kv_nbytes / ours
        cells = [f"{ours * 1e3:.2f}", f"{oracle * 1e3:.2f}", f"{oracle / ours:.1f}"]
        rows.append([name, *cells, f"{rate / 1e9:.1f}", f"{rate / copy_rate:.0%}"])
    headers = ["decode", "ours ms", "gather + SDPA ms", "ratio", "GB/s", "of copy rate"]
    return Table(headers, rows)


def prefill_table(kernels: CpuKernels, fma_rate: float) -> Table:
    rows = []
    for length in (512, 2048):
        case = PagedSequences(1, length, length, HEADS[0])
        case.layers = case.layers[:2]
        ours, oracle = case.measure(kernels)
        num_heads, _, head_dim = HEADS[0]
        rate = 4 * num_heads * head_dim * length * (length + 1) / 2 / ours
        cells = [f"{ours * 1e3:.2f}", f"{oracle * 1e3:.2f}", f"{oracle / ours:.1f}"]
        rows.append([f"{length} tokens", *cells, f"{rate / fma_rate:.0%}"])
    return Table(["prefill", "ours ms", "gather + SDPA ms", "ratio", "of FMA rate"], rows)


@torch.inference_mode()
def measure(report: Report, num_threads: int) -> dict[str, object]:
    """All tables with this many threads."""
    torch.set_num_threads(num_threads)
    fma_rate = measure_fma_rate() * num_threads
    read_rate, copy_rate = measure_memory_rates()
    report.add(
        f"## {num_threads} thread{'s' if num_threads > 1 else ''}\n\n"
        f"Memory read {read_rate / 1e9:.1f} GB/s, copy {copy_rate / 1e9:.1f} GB/s (read + "
        f"written); FMA {fma_rate / 1e9:.0f} GFLOP/s."
    )
    with CpuKernels(num_threads) as kernels:
        tables = {
            "linears": linears_table(DecodeStep(kernels), read_rate, fma_rate),
            "decode": decode_table(kernels, copy_rate),
            "prefill": prefill_table(kernels, fma_rate),
        }
    for table in tables.values():
        report.add(table.render())
    rates = {"read": read_rate, "copy": copy_rate, "fma": fma_rate}
    return {"rates": rates} | {name: asdict(table) for name, table in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels"))
    arguments = parser.parse_args()
    report = Report("CPU kernels")
    machine = inspect_machine()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    report.add(f"{machine.describe()}. {versions(['torch', 'ziglang'])}. Load before: {load}.")
    results = {str(count): measure(report, count) for count in arguments.threads}
    report.save(arguments.out, {"machine": asdict(machine), "threads": results})


if __name__ == "__main__":
    main()
