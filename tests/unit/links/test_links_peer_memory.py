"""Memory of another worker: it can be read, for as long as somebody looks at it, and no more."""

from __future__ import annotations

import os

import pytest

from services.worker.links.base import LinkError
from services.worker.links.peer_memory import MappedPeerMemory, open_for_peers
from services.worker.memory.base import ChunkRun, FileRun
from services.worker.memory.cpu import CpuMemory
from services.worker.memory.tensors import tensor_at

CHUNK = 64 * 1024


def test_what_the_owner_writes_is_seen_and_outlives_it() -> None:
    owner = CpuMemory(4 * CHUNK, CHUNK)
    reserved = owner.reserve(CHUNK)
    reserved.map(0, ChunkRun(2, 1))
    memory = MappedPeerMemory(owner.shareable_file)
    tensor_at(reserved.address, (CHUNK // 4,)).fill_(7.0)
    seen = memory.view(FileRun(2 * CHUNK, CHUNK))
    del memory
    reserved.close()
    owner.close()
    assert (seen.view("float32") == 7.0).all()


@pytest.mark.parametrize("run", [(0, 4 * CHUNK + 1), (4 * CHUNK, 1), (-1, 2), (8, -1)])
def test_there_is_nothing_outside_the_file(run: tuple[int, int]) -> None:
    owner = CpuMemory(4 * CHUNK, CHUNK)
    memory = MappedPeerMemory(owner.shareable_file)
    assert len(memory.view(FileRun(0, 4 * CHUNK))) == 4 * CHUNK
    with pytest.raises(ValueError, match="no"):
        memory.view(FileRun(*run))


def test_a_peer_cannot_write() -> None:
    owner = CpuMemory(4 * CHUNK, CHUNK)
    file = open_for_peers(owner.shareable_file)
    try:
        with pytest.raises(ValueError, match="read-only"):
            MappedPeerMemory(file).view(FileRun(0, 1))[0] = 1
        with pytest.raises(OSError, match="descriptor"):
            os.pwrite(file, b"x", 0)
    finally:
        os.close(file)


def test_what_could_shrink_is_not_mapped() -> None:
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(file, CHUNK)
        with pytest.raises(LinkError, match="sealed"):
            MappedPeerMemory(file)
    finally:
        os.close(file)
