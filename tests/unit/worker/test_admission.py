"""What a worker accepts, and what it says where it does not."""

from __future__ import annotations

import pytest

from services.worker.admission import AdmissionLimits, admit
from shared.messages import GenerateStatus

LIMITS = AdmissionLimits(max_model_len=8, vocab_size=100, max_num_requests=2)


@pytest.mark.parametrize(
    ("tokens", "num_open", "draining", "status"),
    [
        ([1], 0, False, GenerateStatus.ACCEPTED),
        ([99] * 7, 1, False, GenerateStatus.ACCEPTED),
        ([1] * 8, 0, False, GenerateStatus.TOO_LONG),
        ([], 0, False, GenerateStatus.INVALID),
        ([100], 0, False, GenerateStatus.INVALID),
        ([-1], 0, False, GenerateStatus.INVALID),
        ([1], 2, False, GenerateStatus.OVERLOADED),
        ([1], 0, True, GenerateStatus.DRAINING),
    ],
)
def test_admission(
    tokens: list[int], num_open: int, draining: bool, status: GenerateStatus
) -> None:
    reply = admit(LIMITS, tokens, num_open, is_draining=draining)
    assert reply.status is status
    assert bool(reply.detail) == (status is not GenerateStatus.ACCEPTED)
