"""The machine a number was measured on, and whether anything else was running."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

#: CPU flags that decide which matrix kernels a library picks.
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts that a reader needs to judge a number."""

    cpu_model: str
    cpu_flags: tuple[str, ...]
    usable_cores: int
    memory_gib: float
    kernel: str
    python: str

    def describe(self) -> str:
        return (
            f"{self.cpu_model}, {self.usable_cores} usable cores ({', '.join(self.cpu_flags)}),"
            f" {self.memory_gib:.0f} GiB, Linux {self.kernel}, Python {self.python}"
        )


def inspect_machine() -> Machine:
    """Read the facts of this machine from /proc."""
    cpu = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    family = f"family {cpu['cpu family']} model {cpu['model']}" if "cpu family" in cpu else ""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu_model=" ".join(filter(None, [cpu.get("model name", platform.machine()), family])),
        cpu_flags=tuple(flag for flag in _TELLING_FLAGS if flag in flags),
        usable_cores=len(os.sched_getaffinity(0)),
        memory_gib=memory_bytes / 2**30,
        kernel=platform.release(),
        python=platform.python_version(),
    )


def parse_cpuinfo(text: str) -> dict[str, str]:
    """Fields of the first processor of /proc/cpuinfo."""
    first = text.strip().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def busy_share(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of all cores' time spent busy between two `cpu` lines of /proc/stat, in ticks.

    Fields 3 and 4 are idle and waiting for disk.
    """
    spent = [late - early for early, late in zip(before, after, strict=True)]
    total = sum(spent)
    return 1 - (spent[3] + spent[4]) / total if total else 0.0


async def measure_busy_share(interval_seconds: float = 2.0) -> float:
    """How busy the machine is now, 0 to 1; run before a measurement starts."""
    before = _cpu_ticks()
    await asyncio.sleep(interval_seconds)
    return busy_share(before, _cpu_ticks())


def _cpu_ticks() -> list[int]:
    first = Path("/proc/stat").read_text().splitlines()[0]
    return [int(field) for field in first.split()[1:9]]


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions in this environment; packages that are not installed are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
