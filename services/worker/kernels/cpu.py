"""The CPU kernels as methods on torch tensors: what a worker's model code calls.

A `CpuKernels` owns a thread pool and nothing else. Activations are contiguous fp32 CPU tensors;
packed weights and KV are addresses, because they live in memory of the worker's own (arenas and
ranges that are mapped and unmapped, `services/worker/memory`). Arguments are checked here, so that
a wrong one is a ValueError; what addresses point to is the caller's word.

Every result is batch-invariant: an output row has the same bits whatever other rows, threads or
chunks it is computed with (`src/kernels.h` says how).

    packed weight of [N, K]     ceil(N / P) panels of P = panel_width columns:

        panel 0   k=0  w[0][0] w[1][0] ... w[P-1][0]
                  k=1  w[0][1] w[1][1] ... w[P-1][1]
                   :
        panel 1   k=0  w[P][0] w[P+1][0] ...             columns past N are zero
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

from services.worker.kernels.blocks import gather_blocks, scatter_blocks
from services.worker.kernels.build import build_library, find_compiler
from services.worker.kernels.library import (
    AttentionBatchStruct,
    LayerGeometry,
    LlamaLayerWeights,
    load_library,
)
from shared.cache_dir import default_cache_dir

ALIGNMENT_BYTES = 64
FLOAT_BYTES = 4
MAX_HEAD_DIM = 256
MAX_HEADS_PER_KV_HEAD = 128


class AttentionBatch:
    """The tokens of one step as attention sees them; built once, used by every layer.

    Tokens of all sequences lie one after the other. Sequence s owns tokens
    [cu_seqlens_q[s], cu_seqlens_q[s + 1]), has seqused_k[s] keys in all (these tokens' included)
    and keeps them in the blocks block_table[s]; its last token is at position seqused_k[s] - 1.
    A negative slot means that the token's K and V are not stored.
    """

    def __init__(
        self,
        *,
        cos: torch.Tensor,  # [num_tokens, head_dim] fp32, HF layout (halves repeated)
        sin: torch.Tensor,  # [num_tokens, head_dim] fp32
        slot_mapping: torch.Tensor,  # [num_tokens] int64, block * 16 + offset
        block_table: torch.Tensor,  # [num_seqs, max_blocks] int32
        cu_seqlens_q: torch.Tensor,  # [num_seqs + 1] int32
        seqused_k: torch.Tensor,  # [num_seqs] int32
        block_size: int = 16,
    ) -> None:
        """Raises ValueError when shapes, types or lengths do not fit each other."""
        num_tokens, head_dim = cos.shape
        num_seqs, max_blocks = block_table.shape
        self.num_tokens, self.head_dim = num_tokens, head_dim
        self.cos, self.sin, self.slot_mapping = cos, sin, slot_mapping
        self.block_table, self.cu_seqlens_q, self.seqused_k = block_table, cu_seqlens_q, seqused_k
        lengths = cu_seqlens_q.diff()
        if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != num_tokens or (lengths < 1).any():
            raise ValueError(f"cu_seqlens_q must rise from 0 to {num_tokens}")
        if (seqused_k < lengths).any() or (seqused_k > max_blocks * block_size).any():
            raise ValueError("seqused_k must cover the queries and fit the block table")
        self.struct = AttentionBatchStruct(
            num_tokens,
            num_seqs,
            max_blocks,
            _address("slot_mapping", slot_mapping, (num_tokens,), torch.int64),
            _address("block_table", block_table, (num_seqs, max_blocks), torch.int32),
            _address("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,), torch.int32),
            _address("seqused_k", seqused_k, (num_seqs,), torch.int32),
            _address("cos", cos, (num_tokens, head_dim)),
            _address("sin", sin, (num_tokens, head_dim)),
        )


class CpuKernels:
    """The kernels with a pool of `num_threads` threads, the calling one included.

    Compiles the library at first use (KernelBuildError when that fails). Calls from several
    threads are serialised. Close it, or use it as a context manager, to end the threads.
    """

    gather_blocks = staticmethod(gather_blocks)
    scatter_blocks = staticmethod(scatter_blocks)

    def __init__(
        self, num_threads: int, *, cache_dir: Path | None = None, library: Path | None = None
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {num_threads}")
        if library is None:
            cache_dir = cache_dir or default_cache_dir(os.environ) / "kernels"
            library = build_library(find_compiler(os.environ), cache_dir)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.num_threads = num_threads
        #: Tells kernels that were compiled differently apart.
        self.build_id = library.stem
        self._library = load_library(library)
        self.panel_width = int(self._library.panel_width())
        self.block_size = int(self._library.kv_block_size())
        self._pool: int | None = self._library.pool_create(num_threads)
        if self._pool is None:
            raise MemoryError(f"cannot start {num_threads} kernel threads")

    def close(self) -> None:
        """Ends the pool's threads; no method may be called afterwards."""
        if self._pool is not None:
            self._library.pool_destroy(self._pool)
            self._pool = None

    def __enter__(self) -> CpuKernels:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _threads(self) -> int:
        if self._pool is None:
            raise ValueError("these kernels are closed")
        return self._pool

    def packed_nbytes(self, n: int, k: int) -> int:
        """Bytes of a packed [n, k] weight."""
        return -(-n // self.panel_width) * self.panel_width * k * FLOAT_BYTES

    def pack_weight(self, weight: torch.Tensor, dst: int) -> None:  # weight [N, K]
        """Writes `packed_nbytes(N, K)` bytes at dst, which is aligned to 64 bytes."""
        n, k = weight.shape
        self._library.pack_weight(_address("weight", weight, (n, k)), n, k, _aligned(dst))

    def linear(
        self,
        x: torch.Tensor,  # [M, K]
        packed: int,
        n: int,
        out: torch.Tensor,  # [M, N]
        *,
        bias: torch.Tensor | None = None,  # [N]
        residual: torch.Tensor | None = None,  # [M, N], may be out
    ) -> None:
        """out = residual + (x @ w.T + bias), w packed at `packed`."""
        m, k = x.shape
        self._library.linear(
            self._threads,
            _address("x", x, (m, k)),
            _aligned(packed),
            None if bias is None else _address("bias", bias, (n,)),
            None if residual is None else _address("residual", residual, (m, n)),
            _address("out", out, (m, n)),
            m,
            n,
            k,
        )

    def embedding(
        self,
        packed: int,
        num_embeddings: int,
        ids: torch.Tensor,  # [M] int64
        out: torch.Tensor,  # [M, K]
    ) -> None:
        """out[i] = w[ids[i]], w [num_embeddings, K] packed: tied embeddings need one copy."""
        m, k = out.shape
        wrong = self._library.embedding(
            _aligned(packed),
            _address("ids", ids, (m,), torch.int64),
            _address("out", out, (m, k)),
            m,
            num_embeddings,
            k,
        )
        if wrong >= 0:
            raise ValueError(f"token id {int(ids[wrong])} is outside [0, {num_embeddings})")

    def rms_norm(
        self,
        x: torch.Tensor,  # [M, K]
        weight: torch.Tensor,  # [K]
        eps: float,
        out: torch.Tensor,  # [M, K]
    ) -> None:
        """out = x / sqrt(mean(x ** 2) + eps) * weight, row by row."""
        m, k = x.shape
        x_address, out_address = _address("x", x, (m, k)), _address("out", out, (m, k))
        weight_address = _address("weight", weight, (k,))
        self._library.rms_norm(self._threads, x_address, weight_address, eps, out_address, m, k)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:  # [M, 2F], [M, F]
        """out = silu(gate) * up, where gate_up is [gate | up] in each row."""
        m, f = out.shape
        gate_up_address = _address("gate_up", gate_up, (m, 2 * f))
        self._library.silu_mul(self._threads, gate_up_address, _address("out", out, (m, f)), m, f)

    def rope_and_store(
        self,
        qkv: torch.Tensor,  # [T, (Hq + 2 Hkv) * D], q and k rotated in place
        kv: int,
        geometry: LayerGeometry,
        batch: AttentionBatch,
        *,
        q_norm: torch.Tensor | None = None,  # [D]
        k_norm: torch.Tensor | None = None,  # [D]
    ) -> None:
        """(Normalises and) rotates q and k, and stores k and v at their slots of the layer's KV.

        kv: address of [blocks, 2, block_size, Hkv, D].
        """
        dim = _check_geometry(geometry, batch)
        width = (geometry.num_heads + 2 * geometry.num_kv_heads) * dim
        self._library.rope_and_store(
            self._threads,
            _address("qkv", qkv, (batch.num_tokens, width)),
            None if q_norm is None else _address("q_norm", q_norm, (dim,)),
            None if k_norm is None else _address("k_norm", k_norm, (dim,)),
            _aligned(kv),
            geometry,
            batch.struct,
        )

    def paged_attention(
        self,
        q: torch.Tensor,  # [T, Hq, D]; tokens may be strided (a view into qkv)
        kv: int,
        geometry: LayerGeometry,
        batch: AttentionBatch,
        out: torch.Tensor,  # [T, Hq, D]
    ) -> None:
        """Causal grouped-query attention of the batch's tokens over the layer's paged KV."""
        dim = _check_geometry(geometry, batch)
        shape = (batch.num_tokens, geometry.num_heads, dim)
        if q.shape != shape or q.dtype != torch.float32 or q.stride()[1:] != (dim, 1):
            raise ValueError(f"q must be fp32 {list(shape)} with contiguous tokens")
        self._library.paged_attention(
            self._threads,
            q.data_ptr(),
            q.stride(0),
            _aligned(kv),
            geometry,
            batch.struct,
            _address("out", out, shape),
        )

    def llama_layer_workspace_nbytes(self, geometry: LayerGeometry, max_tokens: int) -> int:
        """Bytes of workspace that `llama_layer` needs for up to max_tokens tokens."""
        return int(self._library.llama_layer_workspace_floats(geometry, max_tokens)) * FLOAT_BYTES

    def llama_layer(
        self,
        hidden: torch.Tensor,  # [T, hidden], in place
        kv: int,
        geometry: LayerGeometry,
        weights: LlamaLayerWeights,
        batch: AttentionBatch,
        workspace: torch.Tensor,  # at least llama_layer_workspace_nbytes, any dtype
    ) -> None:
        """One whole decoder layer of the Llama family, one release of the GIL."""
        _check_geometry(geometry, batch)
        needed_bytes = self.llama_layer_workspace_nbytes(geometry, batch.num_tokens)
        if workspace.nbytes < needed_bytes or not workspace.is_contiguous():
            raise ValueError(f"the workspace has {workspace.nbytes} of {needed_bytes} bytes")
        self._library.llama_layer(
            self._threads,
            geometry,
            weights,
            batch.struct,
            _aligned(kv),
            _address("hidden", hidden, (batch.num_tokens, geometry.hidden_size)),
            workspace.data_ptr(),
        )

    def copy_blocks(self, kv: int, pairs: torch.Tensor, geometry: LayerGeometry) -> None:
        """Copies KV blocks, pairs [n, 2] int64 of (source, destination), in order."""
        address = _address("pairs", pairs, (len(pairs), 2), torch.int64)
        self._library.copy_blocks(_aligned(kv), address, len(pairs), self._block_floats(geometry))

    def zero_blocks(self, kv: int, blocks: torch.Tensor, geometry: LayerGeometry) -> None:
        """Clears KV blocks, blocks [n] int64."""
        address = _address("blocks", blocks, (len(blocks),), torch.int64)
        self._library.zero_blocks(
            self._threads, _aligned(kv), address, len(blocks), self._block_floats(geometry)
        )

    def _block_floats(self, geometry: LayerGeometry) -> int:
        return 2 * self.block_size * geometry.num_kv_heads * geometry.head_dim


def _address(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> int:
    """The tensor's address, after making sure that C may take it for what it should be."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous CPU tensor")
    return tensor.data_ptr()


def _aligned(address: int) -> int:
    if address == 0 or address % ALIGNMENT_BYTES != 0:
        raise ValueError(f"address {address:#x} is not aligned to {ALIGNMENT_BYTES} bytes")
    return address


def _check_geometry(geometry: LayerGeometry, batch: AttentionBatch) -> int:
    """The head dimension, if the kernels can handle the geometry and the batch fits it."""
    dim, heads, kv_heads = geometry.head_dim, geometry.num_heads, geometry.num_kv_heads
    if dim % 16 != 0 or not 0 < dim <= MAX_HEAD_DIM or dim != batch.head_dim:
        raise ValueError(f"head_dim {dim} must be a multiple of 16, at most {MAX_HEAD_DIM}")
    if heads % kv_heads != 0 or heads // kv_heads > MAX_HEADS_PER_KV_HEAD:
        raise ValueError(f"{heads} heads cannot share {kv_heads} KV heads")
    return dim
