"""`python -m benchmarks.gpu_burst`: several workers on one GPU through a burst, drop against none.

    random weights of a true shape --> a safetensors directory --> `benchmarks.overload`

The overload benchmark with CUDA workers that share one GPU, and with the trace's own lengths: P50
and P99 of TTFT and TPOT for both policies. The workers' memory is chosen so that the burst of the
trace needs more KV than there is, as much more as there. Never run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import overload
from benchmarks.command import run_command
from benchmarks.gpu_model import SHAPES, RandomWeights, model_config
from benchmarks.model import DEFAULT_MODEL, tokenizer_directory
from benchmarks.overload_workload import BODY_TRACE, BURST_SECONDS, BURST_TRACE, read_trace
from services.worker.device import select_device
from services.worker.model.checkpoint import tensor_shapes
from services.worker.model.config import ModelConfig
from services.worker.settings import Device
from shared.errors import ConfigError

#: KV of the burst over that of all workers, as in the overload benchmark.
NEED = 1.5
LONGEST_PROMPT, LONGEST_OUTPUT = 4096, 1024
#: Share of the trace's burst that is used: what is left lets seeds differ.
TRACE_SHARE = 0.8
#: Share of the GPU that budgets may take; the rest is for workspace and contexts.
MEMORY_SHARE = 0.85
_SHARD_BYTES = 2 * 1024**3
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_model(shape: str, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A safetensors directory of random weights, with the built-in model's tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model_config(shape)
    weights = RandomWeights(config, dtype, device)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    num_shards = 0
    names = [name for name, _ in tensor_shapes(config)]
    for name in names:
        shard[name] = weights.tensor(name).cpu().clone()
        weight_map[name] = f"model-{num_shards:05}.safetensors"
        if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES or name == names[-1]:
            save_file(shard, directory / weight_map[name])
            num_shards += 1
            shard = {}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(SHAPES[shape]))
    source = tokenizer_directory(DEFAULT_MODEL)
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, directory / name)


def burst_tokens() -> int:
    """KV tokens that the trace's burst needs when all its requests come."""
    rows = read_trace()
    start, end = BURST_SECONDS
    num_requests = sum(
        row.trace == BURST_TRACE and start <= row.arrival_seconds < end for row in rows
    )
    bodies = [row for row in rows if row.trace == BODY_TRACE]
    tokens = [
        min(row.context_tokens, LONGEST_PROMPT) + min(row.generated_tokens, LONGEST_OUTPUT)
        for row in bodies
    ]
    return round(num_requests * sum(tokens) / len(tokens))


def worker_bytes(
    config: ModelConfig, dtype: torch.dtype, num_workers: int, trace_tokens: int, free_bytes: int
) -> int:
    """The budget of one worker: weights, and a share of the KV that the burst overflows.

    Raises:
        ConfigError: the GPU does not have so much for all of them.
    """
    weights = sum(math.prod(shape) for _, shape in tensor_shapes(config)) * dtype.itemsize
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    kv_bytes = round(TRACE_SHARE * trace_tokens / NEED * token_bytes / num_workers)
    if num_workers * (weights + kv_bytes) > MEMORY_SHARE * free_bytes:
        raise ConfigError(
            f"{num_workers} workers need {num_workers * (weights + kv_bytes) / 1e9:.0f} GB;"
            f" of the GPU, {MEMORY_SHARE:.0%} of {free_bytes / 1e9:.0f} GB may be used"
        )
    return weights + kv_bytes


def overload_options(
    model: Path, num_workers: int, budget_bytes: int, out: Path, seeds: int
) -> argparse.Namespace:
    """The overload benchmark's command line."""
    return overload.build_parser().parse_args(
        [
            *("--model", str(model), "--workers", str(num_workers)),
            *("--device-memory", f"{budget_bytes // 2**20}MiB", "--kunserve-args=--device cuda"),
            *("--need", str(NEED), "--context-scale", "1", "--output-scale", "1"),
            *("--max-context", str(LONGEST_PROMPT), "--max-output", str(LONGEST_OUTPUT)),
            *("--time-scale", "1", "--base-rate", "1", "--base-seconds", "60"),
            *("--seeds", str(seeds), "--out", str(out)),
        ]
    )


async def run(options: argparse.Namespace) -> None:
    device = select_device(Device.CUDA)
    config, dtype = model_config(options.shape), torch.bfloat16
    free_bytes, _ = torch.cuda.mem_get_info(device)
    directory = options.out.parent / f"model-{options.shape}"
    if not (directory / "config.json").exists():
        write_model(options.shape, directory, device, dtype)
        torch.cuda.empty_cache()
    for num_workers in options.workers:
        budget = worker_bytes(config, dtype, num_workers, burst_tokens(), free_bytes)
        out = options.out.with_name(f"{options.out.name}-{num_workers}")
        await overload.run(overload_options(directory, num_workers, budget, out, options.seeds))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4], help="on the one GPU")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu-burst"))
    return run_command(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
