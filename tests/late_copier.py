"""A device that is late with its copies, on the CPU: it computes at once, but tells nobody.

What is copied to the host is garbage there until a mark behind it was waited for, or was looked at
often enough. What is copied from the host must stay as it was until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

GARBAGE = 0xA5


@dataclass(eq=False)
class LateMark:
    """Implements `Mark`."""

    copier: LateCopier
    position: int  # among the deeds of the copier
    num_looks: int

    @property
    def is_reached(self) -> bool:
        self.num_looks -= 1
        if self.num_looks < 0:
            self.wait()
        return self.position <= self.copier.num_done

    def wait(self) -> None:
        self.copier.do_until(self.position)

    def seconds_since(self, earlier: LateMark) -> float:
        assert self.position <= self.copier.num_done
        return float(self.position - earlier.position)


class LateCopier:
    """Implements `Copier`.

    Attributes:
        num_done: how many copies and marks the device has come past.
        num_uploads, num_downloads, num_pinned: how often it was asked for what.
    """

    def __init__(self, num_looks: int = 1000) -> None:
        self.num_done = self.num_asked = 0
        self.num_uploads = self.num_downloads = self.num_pinned = 0
        self._num_looks = num_looks
        self._queue: deque[Callable[[], object]] = deque()

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.num_pinned += 1
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def upload(self, source: torch.Tensor) -> torch.Tensor:
        self.num_uploads += 1
        content = source.clone()

        def check() -> None:
            assert torch.equal(source, content), "it was written before it was copied"

        self._ask(check)
        return content.clone()

    def download(self, source: torch.Tensor) -> torch.Tensor:
        self.num_downloads += 1
        content = source.clone()
        target = torch.full((content.nbytes,), GARBAGE, dtype=torch.uint8)
        target = target.view(content.dtype).view(content.shape)

        self._ask(torch.inference_mode()(lambda: target.copy_(content)))
        return target

    def mark(self) -> LateMark:
        self._ask(lambda: None)
        return LateMark(self, self.num_asked, self._num_looks)

    def do_until(self, position: int) -> None:
        while self.num_done < position:
            self._queue.popleft()()
            self.num_done += 1

    def _ask(self, deed: Callable[[], object]) -> None:
        self._queue.append(deed)
        self.num_asked += 1
