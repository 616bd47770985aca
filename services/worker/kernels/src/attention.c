/* Paged attention: causal, grouped queries, prefill and decode rows in one call, K and V read in
 * place from the layer's pages (the layout is pictured in rope.c).
 *
 * One item of the pool is (a tile of query tokens of one sequence) x (one KV head). Its rows are
 * tokens x the G query heads that share the KV head, about 48 rows so that turning a K block
 * around is paid once for many:
 *
 *     for each block of 16 keys, in order of position:
 *         kt [D][16]      = K block, transposed in registers
 *         s  [rows][16]   = q [rows][D] x kt                    chain over D, one per key
 *         p  [rows][16]   = exp(s - running max); rescale the row if the max rose
 *         acc [rows][D]  += p [rows][16] x V block [16][D]      chain over keys, one per column
 *     out = acc / sum of p
 *
 * Blocks start at multiples of 16 positions and a row skips those it cannot see, so a row passes
 * through the same arithmetic as decode, in any prefill chunk and in any batch. At the edges (the
 * causal diagonal, the window's lower end, the end of the sequence) keys a row does not see take
 * no part: their scores become -inf before the max, and their V rows are not multiplied at all,
 * since 0 x NaN is NaN and memory beyond a sequence may hold anything.
 *
 * Both products are one inlined body of up to ROW_TILE x 16 accumulators. Decode is bound by
 * reading K and V (8 D bytes for 4 D G flops per key and KV head): the next block, which lies
 * anywhere, is prefetched while this one is computed.
 */
#include "kernels.h"

enum {
    TARGET_ROWS = 48,
    MAX_ROWS = 128, /* >= TARGET_ROWS and >= query heads per KV head */
    MAX_TILE_TOKENS = 16,
};

struct scratch {
    float kt[MAX_HEAD_DIM * KV_BLOCK_SIZE];
    float q[MAX_ROWS * MAX_HEAD_DIM];
    float acc[MAX_ROWS * MAX_HEAD_DIM];
    float p[MAX_ROWS * KV_BLOCK_SIZE];
    f32x16 sum[MAX_ROWS];
    float max[MAX_ROWS];
};
_Static_assert(sizeof(struct scratch) <= POOL_SCRATCH_BYTES, "scratch of one thread");

struct attention_call {
    const float *q, *kv;
    float *out;
    int64_t q_stride, tile_tokens, num_slots;
    const struct layer_geometry *geometry;
    const struct attention_batch *batch;
    struct pool *pool;
};

/* Query tokens [first, first + tokens) of a sequence for one KV head. */
struct query_tile {
    int64_t tokens, group, rows, head_dim;
    int64_t first_token;    /* row in q and out */
    int64_t first_position; /* in the sequence */
    int64_t window, block_begin, block_end;
    const int32_t *blocks;
};

struct key_range {
    int64_t begin, end; /* the keys of one block that a row sees */
};

/* c [rows, 16] += a [rows, k] x b [k, 16]: one fma chain per element, k ascending. */
INLINE void multiply_add(float *c, int64_t c_stride, const float *a, int64_t a_stride,
                         const float *b, int64_t b_stride, int64_t k_size, const int rows) {
    f32x16 acc[ROW_TILE];
    UNROLL for (int r = 0; r < rows; r++) acc[r] = LOAD(f32x16, c + r * c_stride);
    NO_UNROLL for (int64_t k = 0; k < k_size; k++) {
        const f32x16 b_k = LOAD(f32x16, b + k * b_stride);
        UNROLL for (int r = 0; r < rows; r++)
            acc[r] = FMA(splat16(a[r * a_stride + k]), b_k, acc[r]);
    }
    UNROLL for (int r = 0; r < rows; r++) STORE(f32x16, c + r * c_stride, acc[r]);
}

static void multiply_add_rows(float *c, int64_t c_stride, const float *a, int64_t a_stride,
                              const float *b, int64_t b_stride, int64_t k_size, int64_t rows) {
#define CASE(r) \
    case r: multiply_add(c, c_stride, a, a_stride, b, b_stride, k_size, r); break;
    for (; rows > 0; rows -= ROW_TILE, c += ROW_TILE * c_stride, a += ROW_TILE * a_stride) {
        switch (min_i64(rows, ROW_TILE)) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__)
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
        }
    }
#undef CASE
}

/* 16 x 16 floats: two rounds inside 128-bit quarters, two rounds of whole quarters. */
INLINE void transpose_16x16(const float *in, int64_t in_stride, float *out) {
    f32x16 a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = LOAD(f32x16, in + i * in_stride);
#define QUARTERS(v, w, i, j, k, l) \
    __builtin_shufflevector(v, w, i, j, k, l, 4 + i, 4 + j, 4 + k, 4 + l, 8 + i, 8 + j, 8 + k, \
                            8 + l, 12 + i, 12 + j, 12 + k, 12 + l)
#define HALVES(v, w, i, j) \
    __builtin_shufflevector(v, w, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * j, 4 * j + 1, \
                            4 * j + 2, 4 * j + 3, 16 + 4 * i, 17 + 4 * i, 18 + 4 * i, \
                            19 + 4 * i, 16 + 4 * j, 17 + 4 * j, 18 + 4 * j, 19 + 4 * j)
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = QUARTERS(a[i], a[i + 1], 0, 16, 1, 17);
        b[i + 1] = QUARTERS(a[i], a[i + 1], 2, 18, 3, 19);
    }
    UNROLL for (int i = 0; i < 16; i += 4) { /* a[i + c]: columns c, 4 + c, ... of 4 rows */
        a[i] = QUARTERS(b[i], b[i + 2], 0, 1, 16, 17);
        a[i + 1] = QUARTERS(b[i], b[i + 2], 2, 3, 18, 19);
        a[i + 2] = QUARTERS(b[i + 1], b[i + 3], 0, 1, 16, 17);
        a[i + 3] = QUARTERS(b[i + 1], b[i + 3], 2, 3, 18, 19);
    }
    UNROLL for (int c = 0; c < 4; c++) {
        const f32x16 even_top = HALVES(a[c], a[4 + c], 0, 2);
        const f32x16 odd_top = HALVES(a[c], a[4 + c], 1, 3);
        const f32x16 even_low = HALVES(a[8 + c], a[12 + c], 0, 2);
        const f32x16 odd_low = HALVES(a[8 + c], a[12 + c], 1, 3);
        STORE(f32x16, out + (0 + c) * 16, HALVES(even_top, even_low, 0, 2));
        STORE(f32x16, out + (4 + c) * 16, HALVES(odd_top, odd_low, 0, 2));
        STORE(f32x16, out + (8 + c) * 16, HALVES(even_top, even_low, 1, 3));
        STORE(f32x16, out + (12 + c) * 16, HALVES(odd_top, odd_low, 1, 3));
    }
#undef QUARTERS
#undef HALVES
}

INLINE void prefetch_rows(const float *block, int64_t stride, int64_t dim) {
    for (int64_t i = 0; i < KV_BLOCK_SIZE; i++) {
        for (int64_t d = 0; d < dim; d += CACHE_LINE_FLOATS) PREFETCH(block + i * stride + d);
    }
}

static struct key_range visible_keys(const struct query_tile *t, int64_t row, int64_t block) {
    const int64_t position = t->first_position + row / t->group;
    const int64_t first = block * KV_BLOCK_SIZE;
    const int64_t oldest = t->window ? max_i64(0, position - t->window + 1) : 0;
    return (struct key_range){max_i64(0, oldest - first),
                              min_i64(KV_BLOCK_SIZE, position + 1 - first)};
}

/* Whether every row of the tile sees all keys of the block. */
static int all_visible(const struct query_tile *t, int64_t block) {
    const struct key_range first = visible_keys(t, 0, block);
    const struct key_range last = visible_keys(t, t->rows - 1, block);
    return first.end == KV_BLOCK_SIZE && last.begin == 0;
}

/* Turns the row's 16 scores in s->p into weights, keeping the running max and sum. */
INLINE void soften_row(struct scratch *s, const struct query_tile *t, int64_t row,
                       f32x16 scores) {
    const float max = larger(max16(scores), s->max[row]);
    const f32x16 p = exp16(scores - splat16(max));
    if (max > s->max[row]) {
        const f32x16 shrink = exp16(splat16(s->max[row] - max));
        float *acc = s->acc + row * t->head_dim;
        for (int64_t d = 0; d < t->head_dim; d += 16)
            STORE(f32x16, acc + d, LOAD(f32x16, acc + d) * shrink);
        s->sum[row] *= shrink;
        s->max[row] = max;
    }
    s->sum[row] += p;
    STORE(f32x16, s->p + row * KV_BLOCK_SIZE, p);
}

/* The keys of one block for all rows: v is the block's first V row of this head. */
static void attend_whole_block(struct scratch *s, const struct query_tile *t, const float *v,
                               int64_t v_stride) {
    for (int64_t row = 0; row < t->rows; row++)
        soften_row(s, t, row, LOAD(f32x16, s->p + row * KV_BLOCK_SIZE));
    for (int64_t d = 0; d < t->head_dim; d += 16) {
        multiply_add_rows(s->acc + d, t->head_dim, s->p, KV_BLOCK_SIZE, v + d, v_stride,
                          KV_BLOCK_SIZE, t->rows);
    }
}

/* The same for a block that some row sees only in part, or not at all. */
static void attend_cut_block(struct scratch *s, const struct query_tile *t, int64_t block,
                             const float *v, int64_t v_stride) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const f32x16 hidden = splat16(-__builtin_inff());
    for (int64_t row = 0; row < t->rows; row++) {
        const struct key_range keys = visible_keys(t, row, block);
        if (keys.begin >= keys.end) continue;
        const i32x16 seen = (lane >= (int32_t)keys.begin) & (lane < (int32_t)keys.end);
        float *p = s->p + row * KV_BLOCK_SIZE;
        soften_row(s, t, row, select16(seen, LOAD(f32x16, p), hidden));
        for (int64_t d = 0; d < t->head_dim; d += 16) {
            multiply_add(s->acc + row * t->head_dim + d, 0, p + keys.begin, 0,
                         v + keys.begin * v_stride + d, v_stride, keys.end - keys.begin, 1);
        }
    }
}

static void load_queries(const struct attention_call *c, const struct query_tile *t, int64_t head,
                         struct scratch *s) {
    const f32x16 scale = splat16(c->geometry->scale);
    for (int64_t row = 0; row < t->rows; row++) {
        const float *q = c->q + (t->first_token + row / t->group) * c->q_stride +
                         (head * t->group + row % t->group) * t->head_dim;
        float *q_row = s->q + row * t->head_dim, *acc_row = s->acc + row * t->head_dim;
        for (int64_t d = 0; d < t->head_dim; d += 16) {
            STORE(f32x16, q_row + d, LOAD(f32x16, q + d) * scale);
            STORE(f32x16, acc_row + d, (f32x16){0});
        }
        s->sum[row] = (f32x16){0};
        s->max[row] = -__builtin_inff();
    }
}

static void store_results(const struct attention_call *c, const struct query_tile *t,
                          int64_t head, const struct scratch *s) {
    const int64_t out_stride = c->geometry->num_heads * t->head_dim;
    for (int64_t row = 0; row < t->rows; row++) {
        float *out = c->out + (t->first_token + row / t->group) * out_stride +
                     (head * t->group + row % t->group) * t->head_dim;
        const f32x16 scale = splat16(1.0f / sum16(s->sum[row]));
        for (int64_t d = 0; d < t->head_dim; d += 16)
            STORE(f32x16, out + d, LOAD(f32x16, s->acc + row * t->head_dim + d) * scale);
    }
}

static void attend_tile(const struct attention_call *c, const struct query_tile *t, int64_t head,
                        struct scratch *s) {
    const int64_t dim = t->head_dim, stride = c->geometry->num_kv_heads * dim;
    const int64_t half_block = KV_BLOCK_SIZE * stride;
    load_queries(c, t, head, s);
    for (int64_t b = t->block_begin; b < t->block_end; b++) {
        const float *k = c->kv + t->blocks[b] * 2 * half_block + head * dim;
        if (b + 1 < t->block_end) {
            const float *next = c->kv + t->blocks[b + 1] * 2 * half_block + head * dim;
            prefetch_rows(next, stride, dim);
            prefetch_rows(next + half_block, stride, dim);
        }
        for (int64_t d = 0; d < dim; d += 16)
            transpose_16x16(k + d, stride, s->kt + d * KV_BLOCK_SIZE);
        for (int64_t row = 0; row < t->rows; row++)
            STORE(f32x16, s->p + row * KV_BLOCK_SIZE, (f32x16){0});
        multiply_add_rows(s->p, KV_BLOCK_SIZE, s->q, dim, s->kt, KV_BLOCK_SIZE, dim, t->rows);
        if (all_visible(t, b)) {
            attend_whole_block(s, t, k + half_block, stride);
        } else {
            attend_cut_block(s, t, b, k + half_block, stride);
        }
    }
    store_results(c, t, head, s);
}

/* Tiles are numbered over the flat token axis without a table: sequence s starts at slot
 * cu_seqlens_q[s] / tile_tokens + s, which leaves it at least as many slots as it has tiles
 * (vLLM's unified attention kernel finds its query block the same way). */
static int64_t find_sequence(const struct attention_call *c, int64_t slot) {
    int64_t low = 0, high = c->batch->num_seqs;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        const int64_t start = c->batch->cu_seqlens_q[middle] / c->tile_tokens + middle;
        if (start <= slot) low = middle; else high = middle;
    }
    return low;
}

static void attention_item(const void *context, int64_t item, int thread) {
    const struct attention_call *c = context;
    const struct layer_geometry *g = c->geometry;
    /* Backwards, so that the long last tiles of a prompt are not what is left at the end. */
    const int64_t slot = c->num_slots - 1 - item / g->num_kv_heads;
    const int64_t s = find_sequence(c, slot), start = c->batch->cu_seqlens_q[s];
    const int64_t q_len = c->batch->cu_seqlens_q[s + 1] - start;
    const int64_t first = (slot - start / c->tile_tokens - s) * c->tile_tokens;
    if (first >= q_len) return;
    struct query_tile t = {
        .tokens = min_i64(c->tile_tokens, q_len - first),
        .group = g->num_heads / g->num_kv_heads,
        .head_dim = g->head_dim,
        .first_token = start + first,
        .first_position = c->batch->seqused_k[s] - q_len + first,
        .window = g->sliding_window,
        .blocks = c->batch->block_table + s * c->batch->max_blocks,
    };
    t.rows = t.tokens * t.group;
    t.block_end = (t.first_position + t.tokens - 1) / KV_BLOCK_SIZE + 1;
    t.block_begin = visible_keys(&t, 0, 0).begin / KV_BLOCK_SIZE;
    attend_tile(c, &t, item % g->num_kv_heads, pool_scratch(c->pool, thread));
}

/* q: rows of q_stride floats, the first Hq x D of each being queries; kv: this layer's pages;
 * out [num_tokens, Hq, D]. Query i of sequence s is at position seqused_k[s] - q_len + i. */
void paged_attention(struct pool *pool, const float *q, int64_t q_stride, const float *kv,
                     const struct layer_geometry *geometry, const struct attention_batch *batch,
                     float *out) {
    const int64_t group = geometry->num_heads / geometry->num_kv_heads;
    const int64_t tile_tokens = max_i64(1, min_i64(MAX_TILE_TOKENS, TARGET_ROWS / group));
    const int64_t num_slots = batch->cu_seqlens_q[batch->num_seqs] / tile_tokens + batch->num_seqs;
    const struct attention_call c = {
        q, kv, out, q_stride, tile_tokens, num_slots, geometry, batch, pool};
    pool_run(pool, num_slots * geometry->num_kv_heads, attention_item, &c);
}
