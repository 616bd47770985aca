"""Rotary embedding and storing into pages, against transformers' own rotation."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import Pages, batch_of, geometry
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from services.worker.kernels.cpu import CpuKernels


@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_rotates_and_stores_at_the_slots(kernels: CpuKernels, head_dim: int) -> None:
    pages, shape = Pages.empty([50], 2, head_dim), geometry(4, 2, head_dim)
    cos, sin = torch.randn(50, head_dim), torch.randn(50, head_dim)
    qkv = torch.randn(30, 8 * head_dim)
    heads = qkv.clone().view(30, 8, head_dim)
    batch = batch_of(pages, [(0, 20, 50)], cos, sin)
    kernels.rope_and_store(qkv, pages.kv.data_ptr(), shape, batch)
    q, k = apply_rotary_pos_emb(heads[:, :4], heads[:, 4:6], cos[20:], sin[20:], unsqueeze_dim=1)
    slots = pages.slots(0, 20, 50)
    stored = pages.kv[slots // 16, :, slots % 16]
    torch.testing.assert_close(qkv.view(30, 8, head_dim)[:, :4], q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stored[:, 0], k, rtol=1e-6, atol=1e-6)
    assert torch.equal(stored[:, 1], heads[:, 6:])
    assert int(pages.kv.isnan().sum()) == pages.kv.numel() - stored.numel()


def test_a_negative_slot_stores_nothing(kernels: CpuKernels) -> None:
    pages = Pages.empty([16], 2, 16)
    batch = batch_of(pages, [(0, 0, 4)])
    batch.slot_mapping.fill_(-1)
    qkv = torch.randn(4, 8 * 16)
    kernels.rope_and_store(qkv, pages.kv.data_ptr(), geometry(4, 2, 16), batch)
    assert pages.kv.isnan().all()
