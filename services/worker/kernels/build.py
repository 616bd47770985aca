"""Compiles the C kernels on the user's machine at first use, and caches the shared object.

Called by `CpuKernels`. The compiler is the clang inside the `ziglang` wheel, which brings its own
headers and C library stubs, so a machine without any compiler works; `$KUNSERVE_CC` names another
one (gcc or clang). The code is compiled for exactly this CPU, so the cache key covers it:

    <cache_dir>/kernels-<hash of sources, flags, compiler version, CPU features>.so
    <cache_dir>/kernels-<hash>.log      what the compiler said, kept when it failed

    <cache_dir>/kernels-<hash>.lock     held while one process builds; others wait for it

A build happens in a private directory and ends with a rename, so whoever looks finds either no
file or a whole one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import KunserveError
from shared.file_lock import file_lock

SOURCE_DIR = Path(__file__).parent / "src"
_COMPILER_DEADLINE_SECONDS = 180.0
_OLDEST_GLIBC = "2.28"  # torch's own wheels ask for this one
_COMMON_FLAGS = (
    "-std=c11",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wno-psabi",
)


class KernelBuildError(KunserveError):
    """The CPU kernels cannot be compiled or loaded; the message names the compiler's log."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler and the flags that make it build for this CPU.

    Contraction of a * b + c must be off in clang, where fma is written out, and on in gcc, which
    has no vector fma to write out (kernels.h).
    """

    command: tuple[str, ...]
    flags: tuple[str, ...]

    def version(self) -> str:
        """First words of `--version`; KernelBuildError when the compiler cannot be run."""
        try:
            done = subprocess.run(
                [*self.command, "--version"],
                capture_output=True,
                text=True,
                check=True,
                timeout=_COMPILER_DEADLINE_SECONDS,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise KernelBuildError(
                f"the C compiler {shlex.join(self.command)!r} cannot be run: {error}"
            ) from error
        return done.stdout


def find_compiler(environ: Mapping[str, str], cpu: str = "native") -> Compiler:
    """`$KUNSERVE_CC` if set, else the `ziglang` wheel's clang; cpu is a compiler's CPU name."""
    machine = platform.machine()
    if named := environ.get("KUNSERVE_CC"):
        tune = f"-march={cpu}" if machine == "x86_64" else f"-mcpu={cpu}"
        command = tuple(shlex.split(named))
        is_clang = "clang" in Compiler(command, ()).version()
        return Compiler(command, (tune, f"-ffp-contract={'off' if is_clang else 'fast'}"))
    if importlib.util.find_spec("ziglang") is None:
        raise KernelBuildError(
            "no C compiler for the CPU kernels: install the Python package 'ziglang', "
            "or name a compiler in $KUNSERVE_CC"
        )
    target = f"{machine}-linux-gnu.{_OLDEST_GLIBC}"
    return Compiler(
        (sys.executable, "-m", "ziglang", "cc"),
        ("-target", target, f"-mcpu={cpu}", "-ffp-contract=off", "-fno-sanitize=undefined"),
    )


def build_library(compiler: Compiler, cache_dir: Path) -> Path:
    """The shared object for this machine, compiled if the cache does not have it (some 5 s)."""
    key = _cache_key(compiler)
    library = cache_dir / f"kernels-{key}.so"
    if library.exists():
        return library
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(library.with_suffix(".lock"), 2 * _COMPILER_DEADLINE_SECONDS):
            if not library.exists():
                _build(compiler, library)
    except TimeoutError as error:
        raise KernelBuildError(f"{error} while compiling the CPU kernels; look at it") from error
    except OSError as error:
        raise KernelBuildError(f"cannot write the kernel cache {cache_dir}: {error}") from error
    return library


def _build(compiler: Compiler, library: Path) -> None:
    work_dir = Path(tempfile.mkdtemp(prefix=f"{library.stem}-", dir=library.parent))
    try:
        _compile(compiler, work_dir, library)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


def _compile(compiler: Compiler, work_dir: Path, library: Path) -> None:
    output, log = work_dir / "kernels.so", library.with_suffix(".log")
    sources = sorted(str(path) for path in SOURCE_DIR.glob("*.c"))
    command = [*compiler.command, *compiler.flags, *_COMMON_FLAGS, *sources, "-o", str(output)]
    environ = os.environ | {
        "ZIG_GLOBAL_CACHE_DIR": str(work_dir / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(work_dir / "zig"),
    }
    try:
        done = subprocess.run(
            command,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_COMPILER_DEADLINE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(
            f"the C compiler {shlex.join(compiler.command)!r} cannot be run: {error}"
        ) from error
    if done.returncode != 0 or not output.exists():
        log.write_text(f"{shlex.join(command)}\n{done.stdout}")
        raise KernelBuildError(
            f"the CPU kernels do not compile with {shlex.join(compiler.command)!r} "
            f"(exit status {done.returncode}); its messages are in {log}"
        )
    os.replace(output, library)


def _cache_key(compiler: Compiler) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCE_DIR.iterdir()):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    for text in (*compiler.command, *compiler.flags, *_COMMON_FLAGS):
        digest.update(text.encode() + b"\0")
    digest.update(compiler.version().encode())
    digest.update(_cpu_features().encode())
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    """What `native` means here: the first core's model and instruction set extensions."""
    lines = {platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first_core = cpuinfo.read_text().split("\n\n", 1)[0]
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        lines |= {line for line in first_core.splitlines() if line.startswith(wanted)}
    return "\n".join(sorted(lines))
