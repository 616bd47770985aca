/* The two matrix routines under attention: a small product, and turning 16 x 16 floats around.
 *
 * multiply_add: c += a x b, where b and c are a few 16-float vectors wide and each vector of
 * them may lie anywhere (a page of transposed keys, or 16 columns of V):
 *
 *                            b   [ k ][ vector 0 ][ vector 1 ] ...
 *                                        |            |
 *     a  [ row ][ k ]   ->   c   [ row ][ vector 0 ][ vector 1 ] ...
 *
 * Each element is one chain c = fma(a[row][k], b[k], c), k ascending, so how rows and vectors are
 * cut into tiles changes no bit. A tile keeps its part of c in registers over all k: 6 x 4
 * vectors of 16 with AVX-512 (24 of 32 registers, 24 FMAs per 10 loads), 3 x 2 otherwise (12 of
 * 16 registers of AVX2). A decode step has as many rows as query heads share a KV head, often
 * three: three rows of four vectors are still more chains than the FMA pipes' latency.
 */
#include "kernels.h"

#if defined(__AVX512F__)
enum { TILE_ROWS = 6, TILE_VECTORS = 4 };
#else
enum { TILE_ROWS = 3, TILE_VECTORS = 2 };
#endif

/* rows and vectors are constants wherever this is inlined. */
INLINE void multiply_tile(const struct small_product *m, int64_t row, int64_t vector,
                          const int rows, const int vectors) {
    const int64_t a_stride = m->a_stride, b_stride = m->b_stride, k_size = m->k;
    const int64_t b_vector = m->b_vector_stride;
    const float *a = m->a + row * a_stride, *b = m->b + vector * b_vector;
    float *c = m->c + row * m->c_stride + vector * m->c_vector_stride;
    f32x16 acc[TILE_ROWS * TILE_VECTORS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vectors; v++)
            acc[r * vectors + v] = LOAD(f32x16, c + r * m->c_stride + v * m->c_vector_stride);
    }
    NO_UNROLL for (int64_t k = 0; k < k_size; k++) {
        f32x16 b_k[TILE_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++)
            b_k[v] = LOAD(f32x16, b + k * b_stride + v * b_vector);
        UNROLL for (int r = 0; r < rows; r++) {
            const f32x16 a_r = splat16(a[r * a_stride + k]);
            UNROLL for (int v = 0; v < vectors; v++)
                acc[r * vectors + v] = FMA(a_r, b_k[v], acc[r * vectors + v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vectors; v++)
            STORE(f32x16, c + r * m->c_stride + v * m->c_vector_stride, acc[r * vectors + v]);
    }
}

INLINE void multiply_vectors(const struct small_product *m, int64_t vector, const int vectors) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= m->rows; row += TILE_ROWS)
        multiply_tile(m, row, vector, TILE_ROWS, vectors);
    switch (m->rows - row) {
        case 1: multiply_tile(m, row, vector, 1, vectors); break;
        case 2: multiply_tile(m, row, vector, 2, vectors); break;
#if defined(__AVX512F__)
        case 3: multiply_tile(m, row, vector, 3, vectors); break;
        case 4: multiply_tile(m, row, vector, 4, vectors); break;
        case 5: multiply_tile(m, row, vector, 5, vectors); break;
#endif
    }
}

void multiply_add(const struct small_product *m) {
    int64_t vector = 0;
    for (; vector + TILE_VECTORS <= m->vectors; vector += TILE_VECTORS)
        multiply_vectors(m, vector, TILE_VECTORS);
    switch (m->vectors - vector) {
        case 1: multiply_vectors(m, vector, 1); break;
#if defined(__AVX512F__)
        case 2: multiply_vectors(m, vector, 2); break;
        case 3: multiply_vectors(m, vector, 3); break;
#endif
    }
}

/* Elements i, j of v and k, l of w in every 128-bit quarter. */
#define IN_QUARTERS(v, w, i, j, k, l) \
    __builtin_shufflevector(v, w, i, j, 16 + k, 16 + l, 4 + i, 4 + j, 20 + k, 20 + l, 8 + i, \
                            8 + j, 24 + k, 24 + l, 12 + i, 12 + j, 28 + k, 28 + l)
/* Quarters i, j of v and i, j of w. */
#define QUARTERS(v, w, i, j) \
    __builtin_shufflevector(v, w, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * j, 4 * j + 1, \
                            4 * j + 2, 4 * j + 3, 16 + 4 * i, 17 + 4 * i, 18 + 4 * i, \
                            19 + 4 * i, 16 + 4 * j, 17 + 4 * j, 18 + 4 * j, 19 + 4 * j)
#define INTERLEAVE(v, w, i, j) \
    __builtin_shufflevector(v, w, i, 16 + i, j, 16 + j, 4 + i, 20 + i, 4 + j, 20 + j, 8 + i, \
                            24 + i, 8 + j, 24 + j, 12 + i, 28 + i, 12 + j, 28 + j)

/* out[j][i] = in[i][j]: two rounds inside 128-bit quarters, two rounds of whole quarters, which
 * is what every vector unit shuffles cheapest. */
void transpose_16x16(const float *in, int64_t in_stride, float *out) {
    f32x16 a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = LOAD(f32x16, in + i * in_stride);
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = INTERLEAVE(a[i], a[i + 1], 0, 1);
        b[i + 1] = INTERLEAVE(a[i], a[i + 1], 2, 3);
    }
    UNROLL for (int i = 0; i < 16; i += 4) { /* a[i + c]: columns c, 4 + c, ... of 4 rows */
        a[i] = IN_QUARTERS(b[i], b[i + 2], 0, 1, 0, 1);
        a[i + 1] = IN_QUARTERS(b[i], b[i + 2], 2, 3, 2, 3);
        a[i + 2] = IN_QUARTERS(b[i + 1], b[i + 3], 0, 1, 0, 1);
        a[i + 3] = IN_QUARTERS(b[i + 1], b[i + 3], 2, 3, 2, 3);
    }
    UNROLL for (int c = 0; c < 4; c++) {
        const f32x16 even_top = QUARTERS(a[c], a[4 + c], 0, 2);
        const f32x16 odd_top = QUARTERS(a[c], a[4 + c], 1, 3);
        const f32x16 even_low = QUARTERS(a[8 + c], a[12 + c], 0, 2);
        const f32x16 odd_low = QUARTERS(a[8 + c], a[12 + c], 1, 3);
        STORE(f32x16, out + (0 + c) * 16, QUARTERS(even_top, even_low, 0, 2));
        STORE(f32x16, out + (4 + c) * 16, QUARTERS(odd_top, odd_low, 0, 2));
        STORE(f32x16, out + (8 + c) * 16, QUARTERS(even_top, even_low, 1, 3));
        STORE(f32x16, out + (12 + c) * 16, QUARTERS(odd_top, odd_low, 1, 3));
    }
}
