/* Row-wise kernels: rms_norm and silu_mul, and moving or clearing KV blocks.
 *
 * rms_norm reads a row twice: once for the sum of squares, in 16 lanes that meet in one tree
 *
 *     lane j:  x[j]^2 + x[16+j]^2 + x[32+j]^2 + ...      (a short last vector is padded with 0)
 *
 * and once to scale. silu_mul takes the fused gate-up product, one row being
 *
 *     [ gate: F floats | up: F floats ]   ->   [ gate / (1 + e^-gate) * up : F floats ]
 *
 * Items of the pool are a few rows each. All of these are bound by memory or by the cache.
 */
#include <string.h>

#include "kernels.h"

enum { ITEM_FLOATS = 16384 }; /* 64 KiB of input per item: far above the cost of claiming one */

/* Up to 16 floats, the missing lanes 0. */
INLINE f32x16 load_padded(const float *p, int64_t count) {
    float lanes[16] = {0};
    if (count >= 16) return LOAD(f32x16, p);
    for (int64_t i = 0; i < count; i++) lanes[i] = p[i];
    return LOAD(f32x16, lanes);
}

INLINE void store_padded(float *p, int64_t count, f32x16 v) {
    float lanes[16];
    if (count >= 16) {
        STORE(f32x16, p, v);
        return;
    }
    STORE(f32x16, lanes, v);
    for (int64_t i = 0; i < count; i++) p[i] = lanes[i];
}

void rms_norm_row(const float *x, const float *weight, float eps, float *out, int64_t dim) {
    f32x16 squares = {0};
    for (int64_t i = 0; i < dim; i += 16) {
        const f32x16 v = load_padded(x + i, dim - i);
        squares = FMA(v, v, squares);
    }
    const float mean = sum16(squares) / (float)dim;
    const f32x16 scale = splat16(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < dim; i += 16) {
        const f32x16 v = load_padded(x + i, dim - i) * scale;
        store_padded(out + i, dim - i, v * load_padded(weight + i, dim - i));
    }
}

struct row_call {
    const float *in, *weight;
    float *out, eps;
    int64_t rows, dim, rows_per_item;
};

static void rms_norm_item(const void *context, int64_t item, int thread) {
    const struct row_call *c = context;
    const int64_t begin = item * c->rows_per_item;
    const int64_t end = min_i64(begin + c->rows_per_item, c->rows);
    (void)thread;
    for (int64_t i = begin; i < end; i++)
        rms_norm_row(c->in + i * c->dim, c->weight, c->eps, c->out + i * c->dim, c->dim);
}

/* x [rows, dim], weight [dim] -> out [rows, dim] = x / sqrt(mean(x^2) + eps) * weight */
void rms_norm(struct pool *pool, const float *x, const float *weight, float eps, float *out,
              int64_t rows, int64_t dim) {
    const int64_t rows_per_item = max_i64(1, ITEM_FLOATS / dim);
    const struct row_call c = {x, weight, out, eps, rows, dim, rows_per_item};
    pool_run(pool, ceil_div(rows, rows_per_item), rms_norm_item, &c);
}

static void silu_mul_item(const void *context, int64_t item, int thread) {
    const struct row_call *c = context;
    const int64_t begin = item * c->rows_per_item;
    const int64_t end = min_i64(begin + c->rows_per_item, c->rows);
    const f32x16 one = splat16(1.0f);
    (void)thread;
    for (int64_t row = begin; row < end; row++) {
        const float *gate = c->in + row * 2 * c->dim, *up = gate + c->dim;
        for (int64_t i = 0; i < c->dim; i += 16) {
            const int64_t count = c->dim - i;
            const f32x16 g = load_padded(gate + i, count);
            const f32x16 silu = g / (one + exp16(-g));
            store_padded(c->out + row * c->dim + i, count, silu * load_padded(up + i, count));
        }
    }
}

/* gate_up [rows, 2 * intermediate_size] -> out [rows, intermediate_size] */
void silu_mul(struct pool *pool, const float *gate_up, float *out, int64_t rows,
              int64_t intermediate_size) {
    const int64_t rows_per_item = max_i64(1, ITEM_FLOATS / intermediate_size / 4);
    const struct row_call c = {gate_up, 0, out, 0, rows, intermediate_size, rows_per_item};
    pool_run(pool, ceil_div(rows, rows_per_item), silu_mul_item, &c);
}

struct block_call {
    float *kv;
    const int64_t *blocks;
    int64_t block_floats;
};

static void zero_item(const void *context, int64_t item, int thread) {
    const struct block_call *c = context;
    (void)thread;
    memset(c->kv + c->blocks[item] * c->block_floats, 0, (size_t)c->block_floats * 4);
}

/* Clears blocks of one layer's KV; block_floats = 2 * KV_BLOCK_SIZE * kv_heads * head_dim. */
void zero_blocks(struct pool *pool, float *kv, const int64_t *blocks, int64_t num_blocks,
                 int64_t block_floats) {
    const struct block_call c = {kv, blocks, block_floats};
    pool_run(pool, num_blocks, zero_item, &c);
}

/* Copies block pairs[i][0] to pairs[i][1], one after the other, so that a pair may read what an
 * earlier one wrote (compaction moves blocks down step by step). */
void copy_blocks(float *kv, const int64_t *pairs, int64_t num_pairs, int64_t block_floats) {
    for (int64_t i = 0; i < num_pairs; i++) {
        memmove(kv + pairs[2 * i + 1] * block_floats, kv + pairs[2 * i] * block_floats,
                (size_t)block_floats * 4);
    }
}
