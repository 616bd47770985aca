/* The CPU kernels of a worker: vector types, arithmetic helpers and the library's interface.
 *
 * Who uses it: every .c file here, and cpu.py through ctypes. All numbers are fp32.
 *
 * The rule everything here obeys is batch invariance: the bits of an output row depend on that
 * row's own inputs only. Hence each output element is ONE chain of fused multiply-adds in one
 * fixed order, and vectors run over independent outputs. Where a sum must run over lanes
 * (rms_norm, softmax), it always has 16 lanes and one reduction tree, whatever the register
 * width. So the row count, tiling, threads and even the vector width of the machine change the
 * speed and never a bit (as long as it has FMA; without it, products are rounded first).
 *
 * Contraction is off (clang) or left on where every product feeds exactly one sum (gcc);
 * fma is spelled out.
 */
#pragma once

#include <stdint.h>

/* ---------------------------------------------------------------------------------- tile sizes
 * A GEMM tile keeps ROW_TILE x PANEL_VECTORS accumulators in registers, next to PANEL_VECTORS
 * weight vectors and one broadcast activation:
 *
 *   AVX-512  32 registers:  12 x 2 + 2 + 1 = 27     panel of 32 columns
 *   AVX2     16 registers:   6 x 2 + 2 + 1 = 15     panel of 16 columns
 *   NEON     32 registers:   6 x 4 + 4 + 1 = 29     panel of 16 columns
 *
 * Two FMA pipes of latency 4 need 8 independent chains; all have at least 12. */
#if defined(__AVX512F__)
enum { LANES = 16, PANEL_VECTORS = 2, ROW_TILE = 12 };
#elif defined(__AVX__)
enum { LANES = 8, PANEL_VECTORS = 2, ROW_TILE = 6 };
#elif defined(__aarch64__)
enum { LANES = 4, PANEL_VECTORS = 4, ROW_TILE = 6 };
#else
enum { LANES = 4, PANEL_VECTORS = 2, ROW_TILE = 6 };
#endif
enum {
    PANEL_WIDTH = LANES * PANEL_VECTORS,
    KV_BLOCK_SIZE = 16, /* tokens in a block of paged KV: one f32x16 of scores */
    MAX_HEAD_DIM = 256,
    CACHE_LINE_FLOATS = 16,
};

/* -------------------------------------------------------------------------------- vector types
 * f32xn fills a register; f32x16 is 16 lanes everywhere (the compiler splits it). The _u forms
 * may be loaded from any float's address. */
typedef float f32xn __attribute__((vector_size(LANES * 4), may_alias));
typedef float f32xn_u __attribute__((vector_size(LANES * 4), may_alias, aligned(4)));
typedef float f32x8_u __attribute__((vector_size(32), may_alias, aligned(4)));
typedef float f32x4 __attribute__((vector_size(16), may_alias));
typedef float f32x8 __attribute__((vector_size(32), may_alias));
typedef float f32x16 __attribute__((vector_size(64), may_alias));
typedef float f32x16_u __attribute__((vector_size(64), may_alias, aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define LOAD(type, address) ((type)(*(const type##_u *)(address)))
#define STORE(type, address, value) (*(type##_u *)(address) = (value))
#define PREFETCH(address) __builtin_prefetch((address), 0, 3)
#define PREFETCH_L2(address) __builtin_prefetch((address), 0, 2)

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#define NO_UNROLL _Pragma("GCC unroll 1")
#endif

#if defined(__clang__) && (defined(__FMA__) || defined(__aarch64__))
#define FMA(a, b, c) __builtin_elementwise_fma((a), (b), (c))
#else /* gcc contracts this to one fma instruction; without FMA hardware it is two roundings */
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE f32xn splat_n(float value) { return value - (f32xn){0}; }
INLINE f32x8 splat8(float value) { return value - (f32x8){0}; }
INLINE f32x16 splat16(float value) { return value - (f32x16){0}; }

/* mask lanes are 0 or -1 */
INLINE f32x16 select16(i32x16 mask, f32x16 yes, f32x16 no) {
    return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
}

/* The one reduction tree over 16 lanes: lane i meets i + 8, then i + 4, i + 2, i + 1. */
INLINE float sum16(f32x16 v) {
    const f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    const f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) +
                    __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

INLINE float larger(float a, float b) { return a > b ? a : b; }

INLINE float max16(f32x16 v) {
    const f32x16 w = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12,
                                             13, 14, 15);
    const f32x16 a = select16(v > w, v, w);
    const f32x16 x = __builtin_shufflevector(a, a, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
    const f32x16 b = select16(a > x, a, x);
    return larger(larger(b[0], b[2]), larger(b[1], b[3]));
}

/* e^x within 1 ulp of the true value for x in [-87.3, 88.3]; 0 below, infinity above.
 * x = n ln2 + r, |r| <= ln2 / 2; 2^n enters the exponent bits; e^r is a degree 7 polynomial.
 * NaN stays NaN. No libm: the same bits on every machine. */
INLINE f32x16 exp16(f32x16 x) {
    const f32x16 lowest = splat16(-87.33654f), highest = splat16(88.37626f);
    const f32x16 shifter = splat16(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    f32x16 clamped = select16(x < lowest, lowest, x);
    clamped = select16(clamped > highest, highest, clamped);
    const f32x16 shifted = FMA(clamped, splat16(1.44269504f), shifter);
    const f32x16 n = shifted - shifter;
    f32x16 r = FMA(n, splat16(-0.693145752f), clamped);
    r = FMA(n, splat16(-1.42860677e-6f), r);
    f32x16 p = splat16(1.98412698e-4f);
    p = FMA(p, r, splat16(1.38888889e-3f));
    p = FMA(p, r, splat16(8.33333333e-3f));
    p = FMA(p, r, splat16(4.16666667e-2f));
    p = FMA(p, r, splat16(1.66666667e-1f));
    p = FMA(p, r, splat16(0.5f));
    p = FMA(p, r, splat16(1.0f));
    p = FMA(p, r, splat16(1.0f));
    const i32x16 exponent = ((i32x16)shifted - (i32x16)shifter) << 23;
    f32x16 result = (f32x16)((i32x16)p + exponent);
    result = select16(x < lowest, splat16(0.0f), result);
    result = select16(x > highest, splat16(__builtin_inff()), result);
    return select16(x != x, x, result);
}

/* ---------------------------------------------------------------------------------- the threads
 * pool_run calls task(context, item, thread) once for every item in [0, num_items) and returns
 * when all are done. Which thread runs an item is left open and must not matter. */
struct pool;
typedef void (*pool_task)(const void *context, int64_t item, int thread);

EXPORT struct pool *pool_create(int num_threads);
EXPORT void pool_destroy(struct pool *pool);
int pool_num_threads(const struct pool *pool);
void *pool_scratch(struct pool *pool, int thread); /* POOL_SCRATCH_BYTES, 64-byte aligned */
void pool_run(struct pool *pool, int64_t num_items, pool_task task, const void *context);

enum { POOL_SCRATCH_BYTES = 512 * 1024 };

/* ----------------------------------------------------------------------------------- the kernels
 * Shapes and meaning are documented at each definition and in cpu.py. */
struct attention_batch {
    int64_t num_tokens, num_seqs, max_blocks;
    const int64_t *slot_mapping;  /* [num_tokens] slot of each token's K and V; < 0: none */
    const int32_t *block_table;   /* [num_seqs, max_blocks] */
    const int32_t *cu_seqlens_q;  /* [num_seqs + 1] */
    const int32_t *seqused_k;     /* [num_seqs] */
    const float *cos, *sin;       /* [num_tokens, head_dim] */
};

struct layer_geometry {
    int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
    int64_t sliding_window; /* 0: none */
    float rms_norm_eps, scale;
};

struct llama_layer_weights {
    const float *input_norm, *post_attention_norm;            /* [hidden] */
    const float *qkv_proj, *o_proj, *gate_up_proj, *down_proj; /* packed */
    const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias; /* each may be null */
    const float *q_norm, *k_norm;                              /* [head_dim] or null */
};

EXPORT int64_t panel_width(void);
EXPORT int64_t kv_block_size(void);
EXPORT void pack_weight(const float *weight, int64_t n, int64_t k, float *packed);
EXPORT void linear(struct pool *pool, const float *x, const float *packed, const float *bias,
                   const float *residual, float *out, int64_t m, int64_t n, int64_t k);
EXPORT int64_t embedding(const float *packed, const int64_t *ids, float *out, int64_t m,
                         int64_t n, int64_t k);
EXPORT void rms_norm(struct pool *pool, const float *x, const float *weight, float eps,
                     float *out, int64_t rows, int64_t dim);
EXPORT void silu_mul(struct pool *pool, const float *gate_up, float *out, int64_t rows,
                     int64_t intermediate_size);
EXPORT void rope_and_store(struct pool *pool, float *qkv, const float *q_norm,
                           const float *k_norm, float *kv,
                           const struct layer_geometry *geometry,
                           const struct attention_batch *batch);
EXPORT void paged_attention(struct pool *pool, const float *q, int64_t q_stride, const float *kv,
                            const struct layer_geometry *geometry,
                            const struct attention_batch *batch, float *out);
EXPORT int64_t llama_layer_workspace_floats(const struct layer_geometry *geometry,
                                            int64_t num_tokens);
EXPORT void llama_layer(struct pool *pool, const struct layer_geometry *geometry,
                        const struct llama_layer_weights *weights,
                        const struct attention_batch *batch, float *kv, float *hidden,
                        float *workspace);
EXPORT void copy_blocks(float *kv, const int64_t *pairs, int64_t num_pairs,
                        int64_t block_floats);
EXPORT void zero_blocks(struct pool *pool, float *kv, const int64_t *blocks, int64_t num_blocks,
                        int64_t block_floats);

/* c [rows, 16 * vectors] += a [rows, k] x b [k, 16 * vectors]; strides in floats. */
struct small_product {
    float *c;
    const float *a, *b;
    int64_t c_stride, a_stride, b_stride, c_vector_stride, b_vector_stride;
    int64_t rows, vectors, k;
};
void multiply_add(const struct small_product *product);
void transpose_16x16(const float *in, int64_t in_stride, float *out);

/* One row of rms_norm; out may be x. */
void rms_norm_row(const float *x, const float *weight, float eps, float *out, int64_t dim);
