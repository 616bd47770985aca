"""`make bench-gpu`: one worker's model on one GPU, against what the GPU's memory and matrices give.

Random weights of a true shape. Has never run on a GPU; where there is none it says so and measures
nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu_measure import (
    DecodeFinding,
    DropFinding,
    PrefillFinding,
    copy_rate,
    matmul_rate,
    measure_decode,
    measure_drop,
    measure_prefill,
)
from benchmarks.gpu_model import SHAPES, model_config, random_model
from benchmarks.gpu_throughput import (
    Workload,
    measure_ours,
    render_throughput,
    run_theirs,
    transformers_model,
)
from benchmarks.machine import inspect_machine, versions
from benchmarks.report import Report, Table, milliseconds
from services.worker.device import default_chunk_bytes, select_device
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.runner import ModelRunner
from services.worker.settings import Device
from shared.errors import ConfigError

BATCH_SIZES = (1, 32, 128)
CONTEXT = 1024
NUM_PROMPTS, PROMPT_LENGTH = 8, 2048
WORKLOADS = (Workload(32, 256, 256), Workload(128, 512, 128))
COPY_BYTES = 4 * 1024**3
MATMUL_SIZE = 8192


def measure(
    report: Report,
    runner: ModelRunner,
    bytes_per_second: float,
    operations_per_second: float,
    theirs_seconds: Mapping[Workload, float],
) -> dict[str, object]:
    """All tables; the model has given up half of its layers afterwards."""
    decode = [measure_decode(runner, size, CONTEXT) for size in BATCH_SIZES]
    report.add(render_decode(decode, bytes_per_second))
    prefill = measure_prefill(runner, NUM_PROMPTS, PROMPT_LENGTH)
    report.add(render_prefill(prefill, operations_per_second))
    throughput = [
        measure_ours(runner, workload, NUM_PROMPTS * PROMPT_LENGTH, seconds)
        for workload, seconds in theirs_seconds.items()
    ]
    report.add(render_throughput(throughput))
    drop = measure_drop(runner)
    report.add(render_drop(drop))
    return {
        "decode": [asdict(one) for one in decode],
        "prefill": asdict(prefill),
        "throughput": [asdict(one) for one in throughput],
        "drop": asdict(drop),
    }


def measure_theirs(
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    workloads: Sequence[Workload],
    **limits: int,
) -> dict[Workload, float]:
    """Seconds that transformers' continuous batching takes; its memory is free again afterwards."""
    model = transformers_model(shape, dtype, device)
    vocab_size = model_config(shape).vocab_size
    return {workload: run_theirs(model, workload, vocab_size, limits) for workload in workloads}


def render_decode(findings: list[DecodeFinding], bytes_per_second: float) -> str:
    rows = [
        [
            f"{one.batch_size} x {one.context} tokens",
            milliseconds(one.seconds),
            milliseconds(one.bytes_needed / bytes_per_second),
            f"{one.share_of(bytes_per_second):.2f}",
            f"{one.batch_size / one.seconds:.0f}",
        ]
        for one in findings
    ]
    return Table(["decode", "step ms", "memory's ms", "ratio", "tokens/s"], rows).render()


def render_prefill(one: PrefillFinding, operations_per_second: float) -> str:
    rate = one.operations / one.seconds
    cells = [milliseconds(one.seconds), f"{one.tokens_per_second:.0f}"]
    cells += [f"{rate / 1e12:.0f}", f"{rate / operations_per_second:.0%}"]
    row = [f"{one.num_prompts} x {one.length} tokens", *cells]
    return Table(["prefill", "ms", "tokens/s", "TFLOP/s", "of matmul rate"], [row]).render()


def render_drop(one: DropFinding) -> str:
    row = [
        f"{one.dropped_bytes / 1e9:.1f} GB",
        f"{one.seconds * 1e3:.2f}",
        str(one.blocks_before),
        str(one.blocks_after),
    ]
    return Table(["half of the layers dropped", "ms", "blocks", "blocks after"], [row]).render()


def run(arguments: argparse.Namespace) -> None:
    device = select_device(Device.CUDA)
    from services.worker.kernels.cuda.ops import TritonOps  # needs Triton, so not before

    report = Report("One GPU")
    free_bytes, _ = torch.cuda.mem_get_info(device)
    report.add(
        f"{arguments.shape}, bf16, random weights; {torch.cuda.get_device_name(device)},"
        f" {free_bytes / 2**30:.0f} GiB free; {inspect_machine().describe()};"
        f" {versions(['torch', 'triton', 'cuda-bindings', 'transformers'])}."
    )
    bytes_per_second = copy_rate(device, COPY_BYTES)
    operations_per_second = matmul_rate(device, torch.bfloat16, MATMUL_SIZE)
    report.add(
        f"Copy {bytes_per_second / 1e12:.2f} TB/s (read + written), bf16 product of"
        f" {MATMUL_SIZE}² {operations_per_second / 1e12:.0f} TFLOP/s."
    )
    theirs_seconds = measure_theirs(arguments.shape, torch.bfloat16, device, WORKLOADS)
    gc.collect()  # the models of transformers refer to themselves
    torch.cuda.empty_cache()
    memory_bytes = int(arguments.memory_share * torch.cuda.mem_get_info(device)[0])
    runner = random_model(
        arguments.shape,
        TorchKernels(device, torch.bfloat16, TritonOps()),
        memory_bytes,
        default_chunk_bytes(device, memory_bytes),
        NUM_PROMPTS * PROMPT_LENGTH,
    )
    found = measure(report, runner, bytes_per_second, operations_per_second, theirs_seconds)
    runner.close()
    rates = {"copy": bytes_per_second, "matmul": operations_per_second}
    report.save(arguments.out, {"shape": arguments.shape, "rates": rates, **found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--memory-share", type=float, default=0.7, help="of what is free")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    arguments = parser.parse_args()
    try:
        run(arguments)
    except ConfigError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
