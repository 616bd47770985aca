"""The servers that `benchmarks.serving` compares: how each is started, asked and told apart.

Each adapter is the fastest way known to run that server on a CPU machine (`benchmarks/README.md`
says how its environment is made). `{port}` in a command is replaced by a free port.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.client import LengthControl
from shared.errors import ConfigError

_LIBRARY_DIRS = ("/usr/lib", "/usr/local/lib", "/lib")


@dataclass(frozen=True, slots=True)
class ServerAdapter:
    """One server under test. Requests call the model `model_name`, or what the server calls it."""

    name: str
    python: Path
    package: str
    command: tuple[str, ...]
    ready_path: str
    model_name: str | None = None
    length_control: LengthControl = LengthControl.IGNORE_EOS
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_timeout_seconds: float = 420.0

    def command_line(self, port: int) -> list[str]:
        """The command with its port filled in."""
        return [part.replace("{port}", str(port)) for part in self.command]


def kunserve_server(executable: Path, model_dir: Path, arguments: Sequence[str]) -> ServerAdapter:
    """`kunserve up` from the environment that `executable` lies in."""
    command = ["up", "--port", "{port}", "--model", str(model_dir), *arguments]
    return ServerAdapter(
        name="kunserve",
        python=_existing(executable).parent / "python",
        package="kunserve",
        command=(str(executable), *command),
        ready_path="/ready",
        ready_timeout_seconds=120.0,
    )


def vllm_server(python: Path, model_dir: Path, arguments: Sequence[str]) -> ServerAdapter:
    """vLLM's CPU build with one OpenMP thread per core, tcmalloc and Intel's OpenMP preloaded."""
    prefix = _existing(python).parent.parent
    command = ["serve", str(model_dir), "--served-model-name", "model", "--host", "127.0.0.1"]
    command += ["--port", "{port}", "--dtype", "float32", "--max-model-len", "4096", *arguments]
    preloaded = [_find_library("libtcmalloc_minimal.so.4"), prefix / "lib" / "libiomp5.so"]
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "LD_PRELOAD": ":".join(str(_existing(library)) for library in preloaded),
    }
    return ServerAdapter(
        name="vllm",
        python=python,
        package="vllm",
        command=(str(prefix / "bin" / "vllm"), *command),
        ready_path="/health",
        model_name="model",
        environment=environment,
    )


def transformers_server(python: Path, model_dir: Path, arguments: Sequence[str]) -> ServerAdapter:
    """`transformers serve` with continuous batching and as many KV tokens as vLLM gets."""
    command = ["-m", "transformers.cli.transformers", "serve", str(model_dir)]
    command += ["--continuous-batching", "--cb-block-size", "128", "--cb-num-blocks", "182"]
    command += ["--cb-max-batch-tokens", "512", "--device", "cpu", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", "{port}", *arguments]
    threads = str(len(os.sched_getaffinity(0)))
    return ServerAdapter(
        name="transformers",
        python=_existing(python),
        package="transformers",
        command=(str(python), *command),
        ready_path="/health",
        model_name=str(model_dir),
        length_control=LengthControl.GENERATION_CONFIG,
        environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads},
    )


async def package_version(python: Path, package: str) -> str:
    """The version of `package` in the environment of `python`; "unknown" where it has none."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    process = await asyncio.create_subprocess_exec(
        str(python), "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await asyncio.wait_for(process.communicate(), timeout=60)
    return output.decode().strip() or "unknown"


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ConfigError(f"there is no {path}; benchmarks/README.md says how to set the peers up")
    return path


def _find_library(name: str) -> Path:
    for directory in _LIBRARY_DIRS:
        for found in Path(directory).glob(f"*/{name}"):
            return found
    raise ConfigError(f"{name} is not installed; benchmarks/README.md says how to set the peers up")
