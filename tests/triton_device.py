"""Where Triton kernels run in tests: on the CUDA device, or in Triton's interpreter on the CPU.

Import this before Triton and any kernel: the switch is read when they are imported. The interpreter
does not know bfloat16's arithmetic.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":
    DTYPES.append(torch.bfloat16)
else:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="Triton is not installed")
