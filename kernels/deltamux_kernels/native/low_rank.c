/* shrink and expand on a CPU, in float32: see shrink.py, expand.py. What a row's numbers go through,
 * and in which order, is the same whatever stands beside the row and whichever thread computes it. */

/* Without the first GCC loads a number again for each product that it is in; without the second, more
 * of them ahead than there are registers. */
#pragma GCC optimize("schedule-insns", "sched-pressure")

#include <omp.h>

#include "matrices.h"
#include "vectors.h"

/* A tile is ROWS rows of the step by TILE rows of A, or by TILE vectors of y: its sums fill the
 * registers. */
#ifdef __AVX512F__
#define TILE 4
#else
#define TILE 2
#endif
#define ROWS 4
#define PANEL (TILE * LANES)
/* Rows of an adapter that one thread takes at a time, and panels of y: so much of x, or of B, stays
 * in a core's own cache. */
#define CHUNK 32
#define STRIP (2048 / PANEL)

static int64_t chunks(int64_t size, int64_t of) { return (size + of - 1) / of; }

/* h[t, j] = sum_k x[t, k] a[j, k] of a tile. */
INLINE void dot(const int rows, const int ranks, const float *x, int64_t x_row, Numbers a,
                int64_t width, float *h, int64_t stride)
{
    Vector sums[ROWS][TILE] = {0};
    int64_t k = 0;
    for (; !a.half && k + LANES <= width; k += LANES)
        UNROLL for (int t = 0; t < rows; t++)
            UNROLL for (int j = 0; j < ranks; j++)
                sums[t][j] += *(const Vector *)(x + t * x_row + k) *
                              *(const Vector *)behind(a, j * width + k).first;
    for (; a.half && k + 2 * LANES <= width; k += 2 * LANES) {
        Two numbers[TILE];
        UNROLL for (int j = 0; j < ranks; j++)
            numbers[j] = two(behind(a, j * width + k));
        UNROLL for (int t = 0; t < rows; t++)
            UNROLL for (int j = 0; j < ranks; j++)
                sums[t][j] += *(const Vector *)(x + t * x_row + k) * numbers[j].first;
        UNROLL for (int t = 0; t < rows; t++)
            UNROLL for (int j = 0; j < ranks; j++)
                sums[t][j] += *(const Vector *)(x + t * x_row + k + LANES) * numbers[j].second;
    }
    for (; k < width; k += LANES)
        for (int t = 0; t < rows; t++)
            for (int j = 0; j < ranks; j++)
                sums[t][j] += load(x + t * x_row + k, least(width - k, LANES)) *
                              some(behind(a, j * width + k), least(width - k, LANES));
    UNROLL for (int t = 0; t < rows; t++)
        UNROLL for (int j = 0; j < ranks; j++)
            h[t * stride + j] = total(sums[t][j]);
}

INLINE void shrink_chunk(const float *x, int64_t x_row, int64_t rows, Numbers a, int64_t ranks,
                         int64_t width, float *h, int64_t stride)
{
#define DOT(n, m)                                                                                  \
    dot(n, m, x + t * x_row, x_row, behind(a, j * width), width, h + t * stride + j, stride)
    int64_t tiled = rows / ROWS * ROWS, j = 0;
    for (; tiled && j + TILE <= ranks; j += TILE)
        for (int64_t t = 0; t < tiled; t += ROWS)
            DOT(ROWS, TILE);
    for (; j < ranks; j++)
        for (int64_t t = 0; t < tiled; t += ROWS)
            DOT(ROWS, 1);
    /* One row of A after the other, as they lie in memory: it is read at the memory's speed. */
    for (j = 0; j < ranks; j++)
        for (int64_t t = tiled; t < rows; t++)
            DOT(1, 1);
#undef DOT
}

/* h[t, j] = sum_k x[t, k] A_s[j, k]. A unit of work is a chunk of rows by one row of A. */
void shrink(const float *x, int64_t x_row, float *h, int64_t h_row, const float *arena,
            const int64_t *offsets, const int32_t *ranks, int64_t width, const Span *spans,
            int64_t count)
{
    int64_t total = 0;
    for (int64_t s = 0; s < count; s++)
        total += chunks(spans[s].rows, CHUNK) * ranks[spans[s].slot];
#pragma omp parallel if (total * width > ALONE)
    {
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
        int64_t before = 0;
        for (int64_t s = 0; s < count && before < end; s++) {
            const Span span = spans[s];
            const Numbers a = matrix(arena, offsets[span.slot]);
            int64_t rank = ranks[span.slot], units = chunks(span.rows, CHUNK) * rank;
            int64_t unit = begin > before ? begin - before : 0;
            int64_t last = least(end - before, units);
            before += units;
            for (int64_t n; unit < last; unit += n) {
                int64_t t = unit / rank * CHUNK, j = unit % rank, row = span.start + t;
                n = least(rank - j, last - unit);
#define SHRINK(numbers)                                                                            \
    shrink_chunk(x + row * x_row, x_row, least(span.rows - t, CHUNK), behind(numbers, j * width),  \
                 n, width, h + row * h_row + j, h_row)
                EITHER(SHRINK, a);
            }
        }
    }
}

/* y[t, n] += sum_j h[t, j] b[j, n] of ROWS rows and a panel of columns. The rows below are fetched
 * meanwhile. */
INLINE void add_panel(float *y, int64_t y_row, const float *h, int64_t stride, Numbers b,
                      int64_t rank, int64_t width)
{
    Vector sums[ROWS][TILE];
    UNROLL for (int t = 0; t < ROWS; t++)
        UNROLL for (int i = 0; i < TILE; i++)
            sums[t][i] = *(Vector *)(y + t * y_row + i * LANES);
    UNROLL for (int t = ROWS; t < 2 * ROWS; t++)
        UNROLL for (int i = 0; i < TILE; i++)
            __builtin_prefetch(y + t * y_row + i * LANES, 1);
    for (int64_t j = 0; j < rank; j++)
        UNROLL for (int i = 0; i < TILE; i += 2) {
            Two numbers = two(behind(b, j * width + i * LANES));
            UNROLL for (int t = 0; t < ROWS; t++) {
                sums[t][i] += h[t * stride + j] * numbers.first;
                sums[t][i + 1] += h[t * stride + j] * numbers.second;
            }
        }
    UNROLL for (int t = 0; t < ROWS; t++)
        UNROLL for (int i = 0; i < TILE; i++)
            *(Vector *)(y + t * y_row + i * LANES) = sums[t][i];
}

INLINE void add_ranks(const int ranks, float *y, const float *h, Numbers b, int64_t width,
                      int64_t columns)
{
    int64_t n = 0;
    for (; n + 2 * LANES <= columns; n += 2 * LANES) {
        Vector *sums = (Vector *)(y + n), first = sums[0], second = sums[1];
        UNROLL for (int j = 0; j < ranks; j++) {
            Two numbers = two(behind(b, j * width + n));
            first += h[j] * numbers.first;
            second += h[j] * numbers.second;
        }
        sums[0] = first, sums[1] = second;
    }
    for (; n < columns; n += LANES) {
        int64_t few = least(columns - n, LANES);
        Vector sum = load(y + n, few);
        for (int j = 0; j < ranks; j++)
            sum += h[j] * some(behind(b, j * width + n), few);
        store(y + n, sum, few);
    }
}

/* The same of one row and any columns. Memory gives eight rows of B at a time sooner than one. */
INLINE void add_row(float *y, const float *h, Numbers b, int64_t rank, int64_t width,
                    int64_t columns)
{
    int64_t j = 0;
    for (; j + 8 <= rank; j += 8)
        add_ranks(8, y, h + j, behind(b, j * width), width, columns);
    for (; j + 4 <= rank; j += 4)
        add_ranks(4, y, h + j, behind(b, j * width), width, columns);
    for (; j < rank; j++)
        add_ranks(1, y, h + j, behind(b, j * width), width, columns);
}

INLINE void expand_chunk(float *y, int64_t y_row, int64_t rows, const float *h, int64_t stride,
                         Numbers b, int64_t rank, int64_t width, int64_t columns)
{
    int64_t t = 0, tiled = columns / PANEL * PANEL;
    for (; t + ROWS <= rows; t += ROWS) {
        for (int64_t n = 0; n < tiled; n += PANEL)
            add_panel(y + t * y_row + n, y_row, h + t * stride, stride, behind(b, n), rank, width);
        for (int64_t r = t; tiled < columns && r < t + ROWS; r++)
            add_row(y + r * y_row + tiled, h + r * stride, behind(b, tiled), rank, width,
                    columns - tiled);
    }
    for (; t < rows; t++)
        add_row(y + t * y_row, h + t * stride, b, rank, width, columns);
}

/* y[t, n] += sum_j h[t, columns[s] + j] B_s[j, n]. A unit of work is a chunk of rows by a panel of
 * columns, and weighs as much as the rank. */
void expand(float *y, int64_t y_row, const float *h, int64_t h_row, const int32_t *columns,
            const float *arena, const int64_t *offsets, const int32_t *ranks, int64_t width,
            const Span *spans, int64_t count)
{
    int64_t panels = chunks(width, PANEL), total = 0;
    for (int64_t s = 0; s < count; s++)
        total += chunks(spans[s].rows, CHUNK) * panels * ranks[spans[s].slot];
#pragma omp parallel if (total * PANEL > ALONE)
    {
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
        int64_t before = 0;
        for (int64_t s = 0; s < count && before < end; s++) {
            const Span span = spans[s];
            const Numbers b = matrix(arena, offsets[span.slot]);
            int64_t rank = ranks[span.slot], units = chunks(span.rows, CHUNK) * panels;
            if (!rank)
                continue;
            int64_t unit = begin > before ? chunks(begin - before, rank) : 0;
            int64_t last = least(chunks(end - before, rank), units);
            before += units * rank;
            for (int64_t n; unit < last; unit += n) {
                int64_t t = unit / panels * CHUNK, n0 = unit % panels * PANEL, row = span.start + t;
                n = least(least(panels - unit % panels, STRIP), last - unit);
#define EXPAND(numbers)                                                                            \
    expand_chunk(y + row * y_row + n0, y_row, least(span.rows - t, CHUNK),                         \
                 h + row * h_row + columns[span.slot], h_row, behind(numbers, n0), rank, width,    \
                 least(n * PANEL, width - n0))
                EITHER(EXPAND, b);
            }
        }
    }
}
