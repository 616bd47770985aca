"""The C library as ctypes sees it: structures, prototypes, loading. Used by cpu.py only.

Field by field the same as `src/kernels.h`. ctypes releases the GIL during each call.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from pathlib import Path

from services.worker.kernels.build import KernelBuildError


class LayerGeometry(ctypes.Structure):
    """Sizes and constants of a decoder layer; equal for all layers of most models.

    hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim: as in the model's config.
    sliding_window: a query sees this many last positions, its own included; 0 means all.
    scale: what scores are multiplied by, usually head_dim ** -0.5.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int
    rms_norm_eps: float
    scale: float
    _fields_ = [
        ("hidden_size", c_int64),
        ("intermediate_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("sliding_window", c_int64),
        ("rms_norm_eps", c_float),
        ("scale", c_float),
    ]


class LlamaLayerWeights(ctypes.Structure):
    """Addresses of one layer's weights; 0 (or left out) where the model has none.

    input_norm, post_attention_norm [hidden]; q_norm, k_norm [head_dim] (Qwen3);
    qkv_proj, o_proj, gate_up_proj, down_proj: packed by `CpuKernels.pack_weight` from
    [(Hq + 2 Hkv) D, hidden], [hidden, Hq D], [2 F, hidden], [hidden, F]; biases like their rows.
    """

    _fields_ = [
        (name, c_void_p)
        for name in (
            "input_norm",
            "post_attention_norm",
            "qkv_proj",
            "o_proj",
            "gate_up_proj",
            "down_proj",
            "qkv_bias",
            "o_bias",
            "gate_up_bias",
            "down_bias",
            "q_norm",
            "k_norm",
        )
    ]


class AttentionBatchStruct(ctypes.Structure):
    """`struct attention_batch`; made and owned by `cpu.AttentionBatch`."""

    _fields_ = [
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("max_blocks", c_int64),
        ("slot_mapping", c_void_p),
        ("block_table", c_void_p),
        ("cu_seqlens_q", c_void_p),
        ("seqused_k", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
    ]


_GEOMETRY, _BATCH = POINTER(LayerGeometry), POINTER(AttentionBatchStruct)
_PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "pool_create": (c_void_p, (c_int,)),
    "pool_destroy": (None, (c_void_p,)),
    "panel_width": (c_int64, ()),
    "kv_block_size": (c_int64, ()),
    "pack_weight": (None, (c_void_p, c_int64, c_int64, c_void_p)),
    "linear": (None, (c_void_p,) * 6 + (c_int64,) * 3),
    "embedding": (c_int64, (c_void_p,) * 3 + (c_int64,) * 3),
    "rms_norm": (None, (c_void_p, c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int64)),
    "silu_mul": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64)),
    "rope_and_store": (None, (c_void_p,) * 5 + (_GEOMETRY, _BATCH)),
    "paged_attention": (
        None,
        (c_void_p, c_void_p, c_int64, c_void_p, _GEOMETRY, _BATCH, c_void_p),
    ),
    "llama_layer_workspace_floats": (c_int64, (_GEOMETRY, c_int64)),
    "llama_layer": (
        None,
        (c_void_p, _GEOMETRY, POINTER(LlamaLayerWeights), _BATCH, c_void_p, c_void_p, c_void_p),
    ),
    "copy_blocks": (None, (c_void_p, c_void_p, c_int64, c_int64)),
    "zero_blocks": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64)),
}


def load_library(path: Path) -> ctypes.CDLL:
    """Opens the shared object and declares every function's types."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(f"the compiled CPU kernels cannot be loaded: {error}") from error
    for name, (restype, argtypes) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype = restype
        function.argtypes = argtypes
    return library
