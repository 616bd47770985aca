/* Linear layers on prepacked weights: out[m][n] = residual[m][n] + (bias[n] + sum_k x[m][k] w[n][k]).
 *
 * Packed weights: panels of PANEL_WIDTH output columns, inside a panel one row per k, so that a
 * tile reads its panel front to back as one stream (and a panel is found by its number alone):
 *
 *            panel 0                    panel 1                       last panel
 *     k=0    w[0][0]  ... w[P-1][0]     w[P][0]  ... w[2P-1][0]       w[..][0] ... 0 0 0
 *     k=1    w[0][1]  ... w[P-1][1]     w[P][1]  ... w[2P-1][1]       w[..][1] ... 0 0 0
 *      :        one row = PANEL_WIDTH floats, 64-byte aligned          zero columns pad N
 *     k=K-1
 *
 * A tile holds rows x (panels * PANEL_WIDTH) results in registers for the whole of K:
 *
 *     acc[r][j] = fma(x[r][k], w[k][j], acc[r][j])     k = 0 .. K-1, nothing else in the chain
 *
 * Few rows are bound by reading weights (4 bytes per fma and row): a tile of 1 row takes 4
 * panels, which is 4 streams for the memory system and 8 chains for the FMA pipes. Many rows are
 * bound by the FMA pipes (2 per cycle): 12 x 2 vectors need 12 broadcasts and 2 loads per 24
 * FMAs, which two load pipes carry.
 *
 * Loop order: an item of the pool is a few panels of one block of rows; per panel the rows pass
 * by in tiles of equal height (13 rows are 7 + 6, not 12 + 1). The panel stays in L2 between
 * tiles; meanwhile the tiles prefetch the panel that comes next, so that memory works while the
 * FMA pipes do. All tiles come from one inlined body and any tile gives a row the same bits.
 */
#include "kernels.h"

enum {
    MAX_PANELS = 4,
    ROW_BLOCK = 20 * ROW_TILE, /* rows whose activations stay in L2 / L3 while panels pass by */
};

struct tile {
    const float *x, *panels, *prefetch, *bias, *residual;
    float *out;
    int64_t k, n, columns; /* columns: how many of the panels' columns exist, from here to N */
    int64_t prefetch_bytes_per_k;
};

/* Adds bias and residual to one vector of results and stores it; the last panel may be cut. */
INLINE void store_result(f32xn sum, const struct tile *t, int64_t row, int64_t column) {
    const int64_t width = min_i64(LANES, t->columns - column);
    const int64_t at = row * t->n + column;
    if (width == LANES) {
        if (t->bias) sum += LOAD(f32xn, t->bias + column);
        if (t->residual) sum += LOAD(f32xn, t->residual + at);
        STORE(f32xn, t->out + at, sum);
        return;
    }
    for (int64_t j = 0; j < width; j++) {
        float value = sum[j];
        if (t->bias) value += t->bias[column + j];
        if (t->residual) value += t->residual[at + j];
        t->out[at + j] = value;
    }
}

/* rows and num_panels are constants wherever this is inlined. The loop over k is not unrolled:
 * clang would gather the broadcasts of all steps at the top and spill them. */
INLINE void multiply_tile(const struct tile *t, const int rows, const int num_panels) {
    const int64_t k_size = t->k, panel_floats = t->k * PANEL_WIDTH;
    const float *x = t->x, *panels = t->panels;
    const char *prefetch = (const char *)t->prefetch;
    const int64_t prefetch_step = t->prefetch_bytes_per_k;
    f32xn acc[ROW_TILE * PANEL_VECTORS];
    UNROLL for (int i = 0; i < rows * num_panels * PANEL_VECTORS; i++) acc[i] = (f32xn){0};
    NO_UNROLL for (int64_t k = 0; k < k_size; k++) {
        f32xn w[MAX_PANELS * PANEL_VECTORS];
        UNROLL for (int p = 0; p < num_panels; p++) {
            UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
                w[p * PANEL_VECTORS + v] = *(const f32xn *)(
                    panels + p * panel_floats + k * PANEL_WIDTH + v * LANES);
        }
        UNROLL for (int i = 0; i < PANEL_WIDTH; i += CACHE_LINE_FLOATS)
            PREFETCH(prefetch + i * (int)sizeof(float));
        prefetch += prefetch_step;
        UNROLL for (int r = 0; r < rows; r++) {
            const f32xn x_r = splat_n(x[r * k_size + k]);
            UNROLL for (int v = 0; v < num_panels * PANEL_VECTORS; v++) {
                f32xn *a = &acc[r * num_panels * PANEL_VECTORS + v];
                *a = FMA(x_r, w[v], *a);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < num_panels * PANEL_VECTORS; v++) {
            if (v * LANES < t->columns)
                store_result(acc[r * num_panels * PANEL_VECTORS + v], t, r, v * LANES);
        }
    }
}

#define TILE(rows, panels) \
    static void tile_##rows##x##panels(const struct tile *t) { multiply_tile(t, rows, panels); }

typedef void (*tile_function)(const struct tile *);

/* Indexed by rows; NULL where the accumulators would not fit. */
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(1, 4)
#if defined(__AVX512F__)
TILE(7, 1) TILE(8, 1) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1)
TILE(4, 2) TILE(5, 2) TILE(6, 2) TILE(2, 4) TILE(3, 4)
static const tile_function ONE_PANEL[ROW_TILE + 1] = {
    0, tile_1x1, tile_2x1, tile_3x1, tile_4x1, tile_5x1, tile_6x1,
    tile_7x1, tile_8x1, tile_9x1, tile_10x1, tile_11x1, tile_12x1};
static const tile_function TWO_PANELS[ROW_TILE + 1] = {
    0, tile_1x2, tile_2x2, tile_3x2, tile_4x2, tile_5x2, tile_6x2};
static const tile_function FOUR_PANELS[ROW_TILE + 1] = {0, tile_1x4, tile_2x4, tile_3x4};
#else
static const tile_function ONE_PANEL[ROW_TILE + 1] = {
    0, tile_1x1, tile_2x1, tile_3x1, tile_4x1, tile_5x1, tile_6x1};
static const tile_function TWO_PANELS[ROW_TILE + 1] = {0, tile_1x2, tile_2x2, tile_3x2};
static const tile_function FOUR_PANELS[ROW_TILE + 1] = {0, tile_1x4};
#endif

struct linear_call {
    const float *x, *packed, *bias, *residual;
    float *out;
    int64_t m, n, k, num_panels, panels_per_item, items_per_row_block;
};

static int tallest_panel_group(int64_t rows, int64_t panels_left) {
    if (panels_left >= 4 && FOUR_PANELS[rows]) return 4;
    if (panels_left >= 2 && TWO_PANELS[rows]) return 2;
    return 1;
}

/* Multiplies rows [row, row + rows) by `width` neighbouring panels, tile by tile. */
static void multiply_panels(const struct linear_call *c, int64_t row, int64_t rows,
                            int64_t panel, int width) {
    const int64_t num_tiles = ceil_div(rows, ROW_TILE), panel_floats = c->k * PANEL_WIDTH;
    const int64_t column = panel * PANEL_WIDTH;
    const int64_t next = min_i64(panel + width, c->num_panels - 1);
    const tile_function *functions =
        width == 4 ? FOUR_PANELS : width == 2 ? TWO_PANELS : ONE_PANEL;
    for (int64_t i = 0; i < num_tiles; i++) {
        const int64_t begin = row + rows * i / num_tiles;
        const int64_t end = row + rows * (i + 1) / num_tiles;
        const struct tile t = {
            .x = c->x + begin * c->k,
            .panels = c->packed + panel * panel_floats,
            .prefetch = c->packed + next * panel_floats + panel_floats * i / num_tiles,
            .bias = c->bias ? c->bias + column : 0,
            .residual = c->residual ? c->residual + begin * c->n + column : 0,
            .out = c->out + begin * c->n + column,
            .k = c->k,
            .n = c->n,
            .columns = c->n - column,
            .prefetch_bytes_per_k = PANEL_WIDTH * 4 / num_tiles,
        };
        functions[end - begin](&t);
    }
}

static void linear_item(const void *context, int64_t item, int thread) {
    const struct linear_call *c = context;
    const int64_t row = item / c->items_per_row_block * ROW_BLOCK;
    const int64_t rows = min_i64(ROW_BLOCK, c->m - row);
    const int64_t tallest = ceil_div(rows, ceil_div(rows, ROW_TILE));
    int64_t panel = item % c->items_per_row_block * c->panels_per_item;
    const int64_t panel_end = min_i64(panel + c->panels_per_item, c->num_panels);
    (void)thread;
    while (panel < panel_end) {
        const int width = tallest_panel_group(tallest, panel_end - panel);
        multiply_panels(c, row, rows, panel, width);
        panel += width;
    }
}

/* x [m, k], packed from w [n, k], bias [n] or null, residual [m, n] or null (may be out),
 * out [m, n]; all contiguous. */
void linear(struct pool *pool, const float *x, const float *packed, const float *bias,
            const float *residual, float *out, int64_t m, int64_t n, int64_t k) {
    const int64_t num_panels = ceil_div(n, PANEL_WIDTH);
    const int64_t fair_share = num_panels / (8 * pool_num_threads(pool));
    const int64_t panels_per_item = max_i64(1, min_i64(16, fair_share));
    const struct linear_call c = {
        x, packed, bias, residual, out, m, n, k,
        num_panels, panels_per_item, ceil_div(num_panels, panels_per_item)};
    pool_run(pool, ceil_div(m, ROW_BLOCK) * c.items_per_row_block, linear_item, &c);
}

/* weight [n, k] row-major -> packed [ceil(n / PANEL_WIDTH)][k][PANEL_WIDTH] */
void pack_weight(const float *weight, int64_t n, int64_t k, float *packed) {
    for (int64_t column = 0; column < n; column += PANEL_WIDTH) {
        const int64_t width = min_i64(PANEL_WIDTH, n - column);
        for (int64_t i = 0; i < k; i++, packed += PANEL_WIDTH) {
            for (int64_t j = 0; j < width; j++) packed[j] = weight[(column + j) * k + i];
            for (int64_t j = width; j < PANEL_WIDTH; j++) packed[j] = 0.0f;
        }
    }
}

int64_t panel_width(void) { return PANEL_WIDTH; }
int64_t kv_block_size(void) { return KV_BLOCK_SIZE; }

/* Rows of the packed matrix (w [n, k]) by number: out[i] = w[ids[i]]. Returns -1, or the index
 * of the first id outside [0, n), and then writes nothing. */
int64_t embedding(const float *packed, const int64_t *ids, float *out, int64_t m, int64_t n,
                  int64_t k) {
    for (int64_t i = 0; i < m; i++)
        if (ids[i] < 0 || ids[i] >= n) return i;
    for (int64_t i = 0; i < m; i++) {
        const float *column =
            packed + ids[i] / PANEL_WIDTH * k * PANEL_WIDTH + ids[i] % PANEL_WIDTH;
        for (int64_t j = 0; j < k; j++) out[i * k + j] = column[j * PANEL_WIDTH];
    }
    return -1;
}
