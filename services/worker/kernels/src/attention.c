/* Paged attention: causal, grouped queries, prefill and decode rows in one call, K and V read in
 * place from the layer's pages (the layout is pictured in rope.c).
 *
 * One item of the pool is (a tile of query tokens of one sequence) x (one KV head). Its rows are
 * tokens x the G query heads that share the KV head, about 48 rows, so that transposing K is
 * paid once for many. Keys pass by in spans of 4 pages of 16:
 *
 *     for each span of 64 keys, in order of position:
 *         kt [4][D][16]   = K pages, transposed
 *         p  [rows][64]   = q [rows][D] x kt                    one chain over D per key
 *         p               = exp(p - running max); if the max rose, acc and sum shrink
 *         acc [rows][D]  += p [rows][64] x V pages [64][D]      one chain over keys per column
 *     out = acc / sum of p
 *
 * Spans start at multiples of 64 positions and a row skips those it cannot see, so a row passes
 * through the same arithmetic in decode, in any prefill chunk and in any batch. At the edges (the
 * causal diagonal, the window's lower end, the end of the sequence) keys that a row does not see
 * take no part: their scores become -inf before the max, and their V rows are not multiplied at
 * all, since 0 x NaN is NaN and memory beyond a sequence may hold anything.
 *
 * Decode is bound by reading K and V (8 D bytes for 4 D G flops per key): the span after this
 * one, whose pages lie anywhere, is prefetched page by page while this one is computed.
 */
#include "kernels.h"

enum {
    TARGET_ROWS = 48,
    MAX_ROWS = 128, /* >= TARGET_ROWS and >= query heads per KV head */
    MAX_TILE_TOKENS = 16,
    SPAN_PAGES = 4,
    SPAN_KEYS = SPAN_PAGES * KV_BLOCK_SIZE,
};

struct scratch {
    float kt[SPAN_PAGES * MAX_HEAD_DIM * KV_BLOCK_SIZE];
    float q[MAX_ROWS * MAX_HEAD_DIM];
    float acc[MAX_ROWS * MAX_HEAD_DIM];
    float p[MAX_ROWS * SPAN_KEYS];
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

/* Query tokens of one sequence for one KV head. */
struct query_tile {
    int64_t group, rows, head_dim, tokens;
    int64_t first_token;    /* row in q and out */
    int64_t first_position; /* in the sequence */
    int64_t window;
    int64_t page_begin, page_end; /* pages that some row sees */
    const int32_t *blocks;
    const float *k;                     /* this head's first K row in block 0 */
    int64_t token_stride, block_stride; /* of kv, in floats */
};

struct key_range {
    int64_t begin, end;
};

/* The keys in [first, first + count) that a row sees, counted from first. */
static struct key_range visible_keys(const struct query_tile *t, int64_t row, int64_t first,
                                     int64_t count) {
    const int64_t position = t->first_position + row / t->group;
    const int64_t oldest = t->window ? max_i64(0, position - t->window + 1) : 0;
    return (struct key_range){max_i64(0, oldest - first), min_i64(count, position + 1 - first)};
}

/* Whether every row of the tile sees all these keys. */
static int all_visible(const struct query_tile *t, int64_t first, int64_t count) {
    const struct key_range low = visible_keys(t, 0, first, count);
    const struct key_range high = visible_keys(t, t->rows - 1, first, count);
    return low.end == count && high.begin == 0;
}

static const float *page_keys(const struct query_tile *t, int64_t page) {
    return t->k + t->blocks[page] * t->block_stride;
}

static const float *page_values(const struct query_tile *t, int64_t page) {
    return page_keys(t, page) + KV_BLOCK_SIZE * t->token_stride;
}

static void prefetch_rows(const struct query_tile *t, const float *rows) {
    for (int64_t i = 0; i < KV_BLOCK_SIZE; i++) {
        for (int64_t d = 0; d < t->head_dim; d += CACHE_LINE_FLOATS)
            PREFETCH_L2(rows + i * t->token_stride + d);
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

/* p = q x keys of pages [begin, end), which lie in one span. */
static void score_span(struct scratch *s, const struct query_tile *t, int64_t begin,
                       int64_t end) {
    const int64_t dim = t->head_dim, page_floats = dim * KV_BLOCK_SIZE;
    for (int64_t page = begin; page < end; page++) {
        const int64_t soon = page + SPAN_PAGES;
        if (soon < t->page_end) prefetch_rows(t, page_keys(t, soon));
        float *kt = s->kt + page % SPAN_PAGES * page_floats;
        for (int64_t d = 0; d < dim; d += 16)
            transpose_16x16(page_keys(t, page) + d, t->token_stride, kt + d * KV_BLOCK_SIZE);
    }
    for (int64_t row = 0; row < t->rows; row++) {
        for (int64_t i = 0; i < SPAN_KEYS; i += 16)
            STORE(f32x16, s->p + row * SPAN_KEYS + i, (f32x16){0});
    }
    multiply_add(&(struct small_product){
        .c = s->p + begin % SPAN_PAGES * KV_BLOCK_SIZE,
        .a = s->q,
        .b = s->kt + begin % SPAN_PAGES * page_floats,
        .c_stride = SPAN_KEYS,
        .a_stride = dim,
        .b_stride = KV_BLOCK_SIZE,
        .c_vector_stride = KV_BLOCK_SIZE,
        .b_vector_stride = page_floats,
        .rows = t->rows,
        .vectors = end - begin,
        .k = dim,
    });
}

/* Scores outside the range become -inf. */
static void hide_keys(float *p, struct key_range seen) {
    for (int64_t i = 0; i < seen.begin; i++) p[i] = -__builtin_inff();
    for (int64_t i = max_i64(0, seen.end); i < SPAN_KEYS; i++) p[i] = -__builtin_inff();
}

/* Turns a row's scores into weights, keeping its running max and sum. */
INLINE void soften_row(struct scratch *s, int64_t row, int64_t head_dim) {
    float *p = s->p + row * SPAN_KEYS;
    f32x16 v[SPAN_PAGES];
    UNROLL for (int i = 0; i < SPAN_PAGES; i++) v[i] = LOAD(f32x16, p + 16 * i);
    const f32x16 low = select16(v[0] > v[1], v[0], v[1]);
    const f32x16 high = select16(v[2] > v[3], v[2], v[3]);
    const float max = larger(max16(select16(low > high, low, high)), s->max[row]);
    UNROLL for (int i = 0; i < SPAN_PAGES; i++) {
        v[i] = exp16(v[i] - splat16(max));
        STORE(f32x16, p + 16 * i, v[i]);
    }
    if (max > s->max[row]) {
        const f32x16 shrink = exp16(splat16(s->max[row] - max));
        float *acc = s->acc + row * head_dim;
        for (int64_t d = 0; d < head_dim; d += 16)
            STORE(f32x16, acc + d, LOAD(f32x16, acc + d) * shrink);
        s->sum[row] *= shrink;
        s->max[row] = max;
    }
    s->sum[row] += (v[0] + v[1]) + (v[2] + v[3]);
}

static void soften_span(struct scratch *s, const struct query_tile *t, int64_t first) {
    const int whole = all_visible(t, first, SPAN_KEYS);
    for (int64_t row = 0; row < t->rows; row++) {
        if (!whole) {
            const struct key_range seen = visible_keys(t, row, first, SPAN_KEYS);
            if (seen.begin >= seen.end) continue;
            hide_keys(s->p + row * SPAN_KEYS, seen);
        }
        soften_row(s, row, t->head_dim);
    }
}

/* acc += p x V for keys [keys.begin, keys.end) of one page and rows [row, row + rows). */
static void add_values(struct scratch *s, const struct query_tile *t, int64_t page, int64_t row,
                       int64_t rows, struct key_range keys) {
    if (keys.begin >= keys.end) return;
    multiply_add(&(struct small_product){
        .c = s->acc + row * t->head_dim,
        .a = s->p + row * SPAN_KEYS + page % SPAN_PAGES * KV_BLOCK_SIZE + keys.begin,
        .b = page_values(t, page) + keys.begin * t->token_stride,
        .c_stride = t->head_dim,
        .a_stride = SPAN_KEYS,
        .b_stride = t->token_stride,
        .c_vector_stride = 16,
        .b_vector_stride = 16,
        .rows = rows,
        .vectors = t->head_dim / 16,
        .k = keys.end - keys.begin,
    });
}

static void add_page_values(struct scratch *s, const struct query_tile *t, int64_t page) {
    const int64_t first = page * KV_BLOCK_SIZE, soon = page + SPAN_PAGES;
    if (soon < t->page_end) prefetch_rows(t, page_values(t, soon));
    if (all_visible(t, first, KV_BLOCK_SIZE)) {
        add_values(s, t, page, 0, t->rows, (struct key_range){0, KV_BLOCK_SIZE});
        return;
    }
    for (int64_t row = 0; row < t->rows; row += t->group)
        add_values(s, t, page, row, t->group, visible_keys(t, row, first, KV_BLOCK_SIZE));
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
    load_queries(c, t, head, s);
    for (int64_t begin = t->page_begin; begin < t->page_end;) {
        const int64_t span = begin / SPAN_PAGES;
        const int64_t end = min_i64(t->page_end, (span + 1) * SPAN_PAGES);
        score_span(s, t, begin, end);
        soften_span(s, t, span * SPAN_KEYS);
        for (int64_t page = begin; page < end; page++) add_page_values(s, t, page);
        begin = end;
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
    const int64_t head = item % g->num_kv_heads, token_stride = g->num_kv_heads * g->head_dim;
    struct query_tile t = {
        .tokens = min_i64(c->tile_tokens, q_len - first),
        .group = g->num_heads / g->num_kv_heads,
        .head_dim = g->head_dim,
        .first_token = start + first,
        .first_position = c->batch->seqused_k[s] - q_len + first,
        .window = g->sliding_window,
        .blocks = c->batch->block_table + s * c->batch->max_blocks,
        .k = c->kv + head * g->head_dim,
        .token_stride = token_stride,
        .block_stride = 2 * KV_BLOCK_SIZE * token_stride,
    };
    t.rows = t.tokens * t.group;
    t.page_end = (t.first_position + t.tokens - 1) / KV_BLOCK_SIZE + 1;
    t.page_begin = visible_keys(&t, 0, 0, 0).begin / KV_BLOCK_SIZE;
    attend_tile(c, &t, head, pool_scratch(c->pool, thread));
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
