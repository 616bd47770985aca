"""`python -m services.worker.cuda_probe`: what this machine's GPU can do, tried out.

    doctor --- starts ---> probe --- starts ---> peer, a second process
                            |  one JSON line per probe: subject, is_ok, detail
                            +--- handles and descriptors over a socket pair --->

In processes of its own, because what fails in a driver can end a process or leave its context
unusable. `kunserve doctor` reads the lines. Never run on a GPU yet: what calls the driver has run
against an imitation of its library, which checks arguments and keeps memory in files.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from services.worker.channels.words import SharedWords, drained, filled, words_bytes
from services.worker.links.files import create_sealed
from services.worker.memory.base import ChunkRun
from services.worker.memory.cuda import CudaMemory
from services.worker.memory.cuda_driver import CudaDriver
from services.worker.memory.cuda_ipc import CudaIpc

_PEER_SECONDS = 30.0
_PATTERN = b"kunserve" * 16
_ANSWER = _PATTERN[::-1]
_PEER_ARGUMENT = "--peer"


class ProbeError(Exception):
    """A probe did not give what it should."""


class _Peer:
    """The second process: is told what to open, opens it, and answers."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_PEER_SECONDS)
        command = [sys.executable, "-m", __spec__.name, _PEER_ARGUMENT, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def ask(self, action: str, payload: bytes = b"", files: tuple[int, ...] = ()) -> None:
        """Let the peer do something and wait until it has.

        Raises:
            ProbeError: it could not.
        """
        message = json.dumps({"action": action, "payload": payload.hex()}).encode()
        socket.send_fds(self._socket, [message], list(files))
        answer = self._socket.recv(4096).decode()
        if answer != "ok":
            raise ProbeError(answer or "the second process has died")

    def close(self) -> None:
        """End the peer."""
        self._socket.close()
        try:
            self._process.wait(_PEER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _probe_device(driver: CudaDriver) -> str:
    free_bytes, total_bytes = driver.memory_info()
    return f"{driver.name}, {free_bytes >> 20} of {total_bytes >> 20} MiB free"


def _probe_remap(driver: CudaDriver) -> str:
    """Bytes stay when a chunk moves to another range, as in a drop."""
    chunk_bytes = driver.granularity_bytes
    memory = CudaMemory(driver, 2 * chunk_bytes, chunk_bytes)
    weights, kv = memory.reserve(chunk_bytes), memory.reserve(4 * chunk_bytes)
    weights.map(0, ChunkRun(1, 1))
    driver.write(weights.address, _PATTERN)
    weights.unmap(0, 1)
    kv.map(2, ChunkRun(1, 1))
    found = driver.read(kv.address + 2 * chunk_bytes, len(_PATTERN))
    for reserved in (weights, kv):
        reserved.close()
    memory.close()
    if found != _PATTERN:
        raise ProbeError("a chunk lost its bytes when it was mapped elsewhere")
    return f"chunks of {chunk_bytes >> 10} KiB move between ranges"


def _probe_export(driver: CudaDriver, peer: _Peer) -> str:
    """Another process maps a chunk of ours through a file descriptor."""
    if not driver.is_exportable:
        raise ProbeError("the device does not export memory as file descriptors")
    nbytes = driver.granularity_bytes
    handle = driver.create(nbytes)
    address = driver.reserve(nbytes)
    driver.map(address, nbytes, handle)
    driver.set_access(address, nbytes)
    driver.write(address, _PATTERN)
    with open(driver.export_handle(handle), "rb") as file:
        peer.ask("map", files=(file.fileno(),))
    found = driver.read(address, len(_ANSWER))
    driver.unmap(address, nbytes)
    driver.free(address, nbytes)
    driver.release(handle)
    if found != _ANSWER:
        raise ProbeError("what the second process wrote did not arrive")
    return "a second process maps chunks through file descriptors"


def _probe_ipc_memory(driver: CudaDriver, peer: _Peer) -> str:
    ipc = CudaIpc(driver)
    address = ipc.allocate(len(_PATTERN))
    driver.write(address, _PATTERN)
    peer.ask("open memory", ipc.export_memory(address))
    found = driver.read(address, len(_ANSWER))
    ipc.free(address)
    if found != _ANSWER:
        raise ProbeError("what the second process wrote did not arrive")
    return "a second process opens device memory"


def _probe_ipc_words(driver: CudaDriver, peer: _Peer) -> str:
    """A stream of each process writes a word that one of the other waits for."""
    with open(create_sealed("kunserve-probe", words_bytes(1)), "rb") as file:
        words = SharedWords(CudaIpc(driver), file.fileno(), 1)
        words.launch_write(filled(0), 1)
        peer.ask("wait for word", files=(file.fileno(),))
        words.launch_wait(drained(0), 1)
        driver.synchronize()
        words.close()
    return "streams of two processes wait for each other"


def _probe_torch() -> str:
    import torch
    import triton

    if not torch.cuda.is_available():
        raise ProbeError(f"torch {torch.__version__} cannot use the device")
    return f"torch {torch.__version__} for CUDA {torch.version.cuda}, Triton {triton.__version__}"


def _probe_nccl() -> str:
    """Both must be one version: two libraries in one process do not talk to each other."""
    import torch
    from cupy.cuda import nccl

    torch_version: Any = torch.cuda.nccl.version  # untyped
    of_torch, number = ".".join(map(str, torch_version())), int(nccl.get_version())
    of_cupy = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    if of_torch != of_cupy:
        raise ProbeError(f"torch has NCCL {of_torch}, CuPy has {of_cupy}")
    return f"NCCL {of_torch}"


def _report(subject: str, probe: Callable[[], str]) -> None:
    """Run a probe and write its line."""
    try:
        line = {"subject": subject, "is_ok": True, "detail": probe()}
    except Exception as error:  # whatever it is, the other probes go on
        line = {"subject": subject, "is_ok": False, "detail": str(error) or repr(error)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _serve_peer(connection: socket.socket) -> None:
    """The second process: act on every message until the first one hangs up."""
    driver = CudaDriver(0)
    while True:
        message, files, _, _ = socket.recv_fds(connection, 4096, 1)
        if not message:
            return
        request = json.loads(message)
        try:
            _act(driver, request["action"], bytes.fromhex(request["payload"]), files)
            answer = "ok"
        except Exception as error:  # told to the first process
            answer = str(error) or repr(error)
        connection.sendall(answer.encode())


def _act(driver: CudaDriver, action: str, payload: bytes, files: list[int]) -> None:
    match action:
        case "map":
            _map_and_answer(driver, files[0])
        case "open memory":
            ipc = CudaIpc(driver)
            address = ipc.open_memory(payload)
            _check_and_answer(driver, address)
            ipc.close_memory(address)
        case "wait for word":
            _wait_and_answer(driver, files[0])
        case _:
            raise ProbeError(f"no such action: {action}")


def _map_and_answer(driver: CudaDriver, file: int) -> None:
    nbytes = driver.granularity_bytes
    with open(file, "rb"):
        handle = driver.import_handle(file)
    address = driver.reserve(nbytes)
    driver.map(address, nbytes, handle)
    driver.set_access(address, nbytes)
    _check_and_answer(driver, address)
    driver.unmap(address, nbytes)
    driver.free(address, nbytes)
    driver.release(handle)


def _wait_and_answer(driver: CudaDriver, file: int) -> None:
    with open(file, "rb"):
        words = SharedWords(CudaIpc(driver), file, 1)
    words.launch_wait(filled(0), 1)
    words.launch_write(drained(0), 1)
    driver.synchronize()
    words.close()


def _check_and_answer(driver: CudaDriver, address: int) -> None:
    if driver.read(address, len(_PATTERN)) != _PATTERN:
        raise ProbeError("the second process sees other bytes")
    driver.write(address, _ANSWER)


def main(arguments: list[str]) -> None:
    """Run all probes, or be the second process of some."""
    if arguments[:1] == [_PEER_ARGUMENT]:
        with socket.socket(fileno=int(arguments[1])) as connection:
            _serve_peer(connection)
        return
    driver = CudaDriver(0)
    peer = _Peer()
    _report("GPU", lambda: _probe_device(driver))
    _report("GPU software", _probe_torch)
    _report("GPU memory mapping", lambda: _probe_remap(driver))
    _report("GPU memory export", lambda: _probe_export(driver, peer))
    _report("CUDA IPC memory", lambda: _probe_ipc_memory(driver, peer))
    _report("CUDA IPC words", lambda: _probe_ipc_words(driver, peer))
    _report("NCCL", _probe_nccl)
    peer.close()


if __name__ == "__main__":
    main(sys.argv[1:])
