"""Paged attention against gather + SDPA, and the same bits for any chunking and batch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import Pages, batch_of, geometry

from services.worker.kernels.cpu import AttentionBatch, CpuKernels
from tests import oracles

Span = tuple[int, int, int]  # sequence, first and last + 1 position of its query tokens


@dataclass
class Case:
    """Random Q for every position of some sequences, K and V in pages, NaN elsewhere."""

    lengths: list[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int = 0

    def __post_init__(self) -> None:
        self.pages = Pages.empty(self.lengths, self.num_kv_heads, self.head_dim)
        self.pages.fill(self.lengths)
        self.q = [torch.randn(n, self.num_heads, self.head_dim) * 2 for n in self.lengths]
        self.geometry = geometry(
            self.num_heads, self.num_kv_heads, self.head_dim, sliding_window=self.sliding_window
        )

    def run(self, kernels: CpuKernels, spans: list[Span]) -> torch.Tensor:
        q = torch.cat([self.q[s][begin:end] for s, begin, end in spans])
        out = torch.full_like(q, torch.nan)
        batch = batch_of(self.pages, spans)
        kernels.paged_attention(q, self.pages.kv.data_ptr(), self.geometry, batch, out)
        return out

    def oracle(self, spans: list[Span]) -> torch.Tensor:
        lengths = torch.tensor([0] + [end - begin for _, begin, end in spans])
        return oracles.paged_attention(
            torch.cat([self.q[s][begin:end] for s, begin, end in spans]).double(),
            self.pages.kv.double(),
            self.pages.block_table[[s for s, _, _ in spans]],
            lengths.cumsum(0),
            torch.tensor([end for _, _, end in spans]),
            self.geometry.scale,
            self.sliding_window,
        )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, list[Span]]:
    kv_heads = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    case = Case(
        lengths,
        kv_heads * draw(st.sampled_from([1, 2, 3, 7])),
        kv_heads,
        draw(st.sampled_from([16, 48, 64, 80, 128, 256])),
        draw(st.sampled_from([0, 0, 1, 5, 16, 40])),
    )
    decode = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    begins = [
        length - 1 if one else draw(st.integers(0, length - 1))
        for length, one in zip(lengths, decode, strict=True)
    ]
    return case, [(s, begins[s], length) for s, length in enumerate(lengths)]


@settings(max_examples=60)
@given(cases())
def test_equals_gather_and_sdpa(kernels: CpuKernels, drawn: tuple[Case, list[Span]]) -> None:
    case, spans = drawn
    torch.testing.assert_close(
        case.run(kernels, spans).double(), case.oracle(spans), rtol=1e-5, atol=5e-6
    )


@pytest.mark.parametrize("sliding_window", [0, 24])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 32), (14, 1, 128)])
def test_decode_prefill_and_chunks_give_the_same_bits(
    kernels: CpuKernels,
    single: CpuKernels,
    heads: int,
    kv_heads: int,
    head_dim: int,
    sliding_window: int,
) -> None:
    case = Case([75, 33, 130], heads, kv_heads, head_dim, sliding_window)
    whole = case.run(kernels, [(0, 0, 75)])
    one_by_one = torch.cat([case.run(single, [(0, i, i + 1)]) for i in range(75)])
    assert torch.equal(whole, one_by_one)
    for size in (2, 7, 16, 32, 50):
        chunks = [(0, i, min(i + size, 75)) for i in range(0, 75, size)]
        assert torch.equal(whole, torch.cat([case.run(kernels, [chunk]) for chunk in chunks]))
    for threads in (kernels, single):
        mixed = case.run(threads, [(2, 129, 130), (0, 10, 75), (1, 0, 33)])
        assert torch.equal(mixed[1:66], whole[10:])


def test_what_a_token_cannot_see_cannot_touch_it(kernels: CpuKernels) -> None:
    case = Case([40], 3, 1, 64)
    want = case.run(kernels, [(0, 0, 40)])
    slots = case.pages.slots(0, 30, 40)
    case.pages.kv[slots // 16, :, slots % 16] = torch.nan
    got = case.run(kernels, [(0, 0, 40)])
    assert torch.equal(got[:30], want[:30])
    assert got[30:].isnan().all()


def test_large_scores_do_not_overflow(kernels: CpuKernels) -> None:
    case = Case([64], 2, 2, 64)
    case.q[0] *= 1000
    got = case.run(kernels, [(0, 0, 64)])
    torch.testing.assert_close(got.double(), case.oracle([(0, 0, 64)]), rtol=1e-3, atol=1e-3)


def test_queries_may_be_a_view_into_the_fused_product(kernels: CpuKernels) -> None:
    case = Case([20], 4, 2, 32)
    want = case.run(kernels, [(0, 0, 20)])
    qkv = torch.full((20, 8, 32), torch.nan)
    qkv[:, :4] = case.q[0]
    out, batch = torch.empty(20, 4, 32), batch_of(case.pages, [(0, 0, 20)])
    kernels.paged_attention(qkv[:, :4], case.pages.kv.data_ptr(), case.geometry, batch, out)
    assert torch.equal(out, want)


def test_what_does_not_fit_is_refused(kernels: CpuKernels) -> None:
    case = Case([20], 4, 2, 32)
    address, out = case.pages.kv.data_ptr(), torch.empty(20, 4, 32)
    batch = batch_of(case.pages, [(0, 0, 20)])
    with pytest.raises(ValueError, match="q must be"):
        kernels.paged_attention(case.q[0][:19], address, case.geometry, batch, out)
    with pytest.raises(ValueError, match="head_dim 24"):
        kernels.paged_attention(case.q[0], address, geometry(4, 2, 24), batch, out)
    with pytest.raises(ValueError, match="cannot share"):
        kernels.paged_attention(case.q[0], address, geometry(5, 2, 32), batch, out)
    with pytest.raises(ValueError, match="seqused_k"):
        AttentionBatch(
            cos=torch.zeros(1, 32),
            sin=torch.zeros(1, 32),
            slot_mapping=torch.tensor([16]),
            block_table=case.pages.block_table[:, :1].contiguous(),
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            seqused_k=torch.tensor([17], dtype=torch.int32),
        )
