/* Rotary embedding and storing of K and V: from the fused QKV product into the paged KV.
 *
 *     qkv, one row per token    [ q: Hq heads x D | k: Hkv heads x D | v: Hkv heads x D ]
 *                                  rotated in place    |                  |
 *                                                      v rotated          v as it is
 *     layer KV   [ blocks ][ K ][ 16 tokens ][ Hkv ][ D ]
 *                          [ V ][ 16 tokens ][ Hkv ][ D ]     slot = block * 16 + token
 *
 * Rotation is Hugging Face's: halves of a head, not neighbours, form the pairs (rotate_half).
 * Qwen3 normalises each head of Q and K first. One item of the pool is a few tokens.
 */
#include <string.h>

#include "kernels.h"

enum { ITEM_TOKENS = 8 };

/* head [D] in place; D is a multiple of 16, so a half is a multiple of 8 */
INLINE void rotate(float *head, const float *cos, const float *sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += 8) {
        const f32x8 low = LOAD(f32x8, head + i), high = LOAD(f32x8, head + half + i);
        const f32x8 low_cos = low * LOAD(f32x8, cos + i);
        const f32x8 high_cos = high * LOAD(f32x8, cos + half + i);
        STORE(f32x8, head + i, FMA(-high, LOAD(f32x8, sin + i), low_cos));
        STORE(f32x8, head + half + i, FMA(low, LOAD(f32x8, sin + half + i), high_cos));
    }
}

struct rope_call {
    float *qkv, *kv;
    const float *q_norm, *k_norm;
    const struct layer_geometry *geometry;
    const struct attention_batch *batch;
};

static void rope_token(const struct rope_call *c, int64_t token) {
    const struct layer_geometry *g = c->geometry;
    const int64_t dim = g->head_dim, kv_row = g->num_kv_heads * dim;
    const int64_t slot = c->batch->slot_mapping[token];
    float *q = c->qkv + token * (g->num_heads * dim + 2 * kv_row);
    float *k = q + g->num_heads * dim;
    for (int64_t h = 0; h < g->num_heads + g->num_kv_heads; h++) {
        const float *norm = h < g->num_heads ? c->q_norm : c->k_norm;
        float *head = q + h * dim;
        if (norm) rms_norm_row(head, norm, g->rms_norm_eps, head, dim);
        rotate(head, c->batch->cos + token * dim, c->batch->sin + token * dim, dim);
    }
    if (slot < 0) return;
    const int64_t block = slot / KV_BLOCK_SIZE, offset = slot % KV_BLOCK_SIZE;
    float *k_out = c->kv + (block * 2 * KV_BLOCK_SIZE + offset) * kv_row;
    memcpy(k_out, k, (size_t)kv_row * 4);
    memcpy(k_out + KV_BLOCK_SIZE * kv_row, k + kv_row, (size_t)kv_row * 4);
}

static void rope_item(const void *context, int64_t item, int thread) {
    const struct rope_call *c = context;
    const int64_t end = min_i64((item + 1) * ITEM_TOKENS, c->batch->num_tokens);
    (void)thread;
    for (int64_t token = item * ITEM_TOKENS; token < end; token++) rope_token(c, token);
}

void rope_and_store(struct pool *pool, float *qkv, const float *q_norm, const float *k_norm,
                    float *kv, const struct layer_geometry *geometry,
                    const struct attention_batch *batch) {
    const struct rope_call c = {qkv, kv, q_norm, k_norm, geometry, batch};
    pool_run(pool, ceil_div(batch->num_tokens, ITEM_TOKENS), rope_item, &c);
}
