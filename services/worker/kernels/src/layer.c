/* One decoder layer of the Llama family in one call: nothing but the kernels, in order.
 *
 *     hidden [T, H] --+-- rms_norm -> qkv_proj -> (q/k norm) rope -> KV -> attention -> o_proj --+
 *                     +------------------------------- residual ------------------------------- + --+
 *     hidden [T, H] <-+-- down_proj <- silu_mul <- gate_up_proj <- rms_norm <-----------------------+
 *
 * Workspace, in floats; the two halves of a layer use the second area in turn:
 *
 *     [ normed: T x H ][ qkv: T x (Hq + 2 Hkv) D | attention out: T x Hq D ]
 *                      [ gate_up: T x 2F         | activated: T x F        ]
 *
 * hidden is read and written in place; o_proj and down_proj add their result to it.
 */
#include "kernels.h"

static int64_t whole_lines(int64_t floats) {
    return ceil_div(floats, CACHE_LINE_FLOATS) * CACHE_LINE_FLOATS;
}

static int64_t qkv_size(const struct layer_geometry *g) {
    return (g->num_heads + 2 * g->num_kv_heads) * g->head_dim;
}

int64_t llama_layer_workspace_floats(const struct layer_geometry *g, int64_t num_tokens) {
    const int64_t attention = whole_lines(num_tokens * qkv_size(g)) +
                              whole_lines(num_tokens * g->num_heads * g->head_dim);
    const int64_t mlp = whole_lines(num_tokens * 2 * g->intermediate_size) +
                        whole_lines(num_tokens * g->intermediate_size);
    return whole_lines(num_tokens * g->hidden_size) + max_i64(attention, mlp);
}

/* hidden [T, H] in and out; batch describes the T tokens; kv is this layer's paged KV. */
void llama_layer(struct pool *pool, const struct layer_geometry *g,
                 const struct llama_layer_weights *w, const struct attention_batch *batch,
                 float *kv, float *hidden, float *workspace) {
    const int64_t tokens = batch->num_tokens, h = g->hidden_size, f = g->intermediate_size;
    const int64_t q_size = g->num_heads * g->head_dim;
    float *normed = workspace, *area = workspace + whole_lines(tokens * h);
    float *qkv = area, *attended = area + whole_lines(tokens * qkv_size(g));
    float *gate_up = area, *activated = area + whole_lines(tokens * 2 * f);

    rms_norm(pool, hidden, w->input_norm, g->rms_norm_eps, normed, tokens, h);
    linear(pool, normed, w->qkv_proj, w->qkv_bias, 0, qkv, tokens, qkv_size(g), h);
    rope_and_store(pool, qkv, w->q_norm, w->k_norm, kv, g, batch);
    paged_attention(pool, qkv, qkv_size(g), kv, g, batch, attended);
    linear(pool, attended, w->o_proj, w->o_bias, hidden, hidden, tokens, h, q_size);

    rms_norm(pool, hidden, w->post_attention_norm, g->rms_norm_eps, normed, tokens, h);
    linear(pool, normed, w->gate_up_proj, w->gate_up_bias, 0, gate_up, tokens, 2 * f, h);
    silu_mul(pool, gate_up, activated, tokens, f);
    linear(pool, activated, w->down_proj, w->down_bias, hidden, hidden, tokens, h, f);
}
