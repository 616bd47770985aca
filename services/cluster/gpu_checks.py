"""The doctor's look at the GPU: has `services.worker.cuda_probe` try it, and judges what it says.

no driver, no device    one line; workers compute on the CPU
otherwise               a line per probe, and what workers will use
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from services.cluster.checks import Check, Finding

PROBE_SECONDS = 120.0
_SOFTWARE = "GPU software"
_MAPPING = "GPU memory mapping"
_IPC = ("CUDA IPC memory", "CUDA IPC words")
_NCCL = "NCCL"


def check_gpu() -> Iterable[Check]:
    """Try out the first GPU, if there is one."""
    if not _has_device():
        yield Check("GPU", Finding.OK, "none; workers compute on the CPU")
        return
    command = [sys.executable, "-m", "services.worker.cuda_probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        yield Check("GPU", Finding.FAILED, f"trying it out took more than {PROBE_SECONDS:.0f} s")
        return
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Check("GPU", Finding.FAILED, f"trying it out failed: {reason}")
    yield from judge_probes([json.loads(line) for line in done.stdout.splitlines()])


def judge_probes(probes: Sequence[Mapping[str, object]]) -> Iterator[Check]:
    """Say what each probe found and what workers with `--device auto` will use."""
    is_ok = {str(probe["subject"]): probe["is_ok"] is True for probe in probes}
    uses_gpu = is_ok.get(_SOFTWARE, False)
    for probe in probes:
        subject = str(probe["subject"])
        finding = Finding.OK if is_ok[subject] else Finding.WARNING
        if subject == _MAPPING and uses_gpu and not is_ok[subject]:
            finding = Finding.FAILED  # a worker on this GPU would not start
        yield Check(subject, finding, str(probe["detail"]))
    if probes:
        yield Check("workers use", Finding.OK, _uses(is_ok) if uses_gpu else "the CPU in float32")


def _uses(is_ok: Mapping[str, bool]) -> str:
    """Of a GPU, and between GPUs; links find out for themselves whether these reach each other."""
    between = "NCCL" if is_ok.get(_NCCL, False) else "host memory"
    within = "CUDA IPC" if all(is_ok.get(each, False) for each in _IPC) else between
    return (
        f"the GPU in bfloat16; tensors travel by {within} between workers of this host,"
        f" by {between} between hosts"
    )


def _has_device() -> bool:
    """Ask the driver itself, which needs no package."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    has_failed = driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0
    return not has_failed and count.value > 0
