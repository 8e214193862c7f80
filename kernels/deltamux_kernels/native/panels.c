/* Products of rows with a matrix in panels on a CPU, in float32: see panels.py. A sum grows by one k
 * after the other, in a lane of its own, whatever stands beside it and whichever thread adds.
 *
 * A k of a panel is so many words: PANEL floats, or half as many pairs of bfloat16 numbers. */

#include <omp.h>

#include "ahead.h"

/* A tile is ROWS rows by the columns of a panel: its sums fill the registers. */
#ifdef __AVX512F__
#define WIDE 4
#else
#define WIDE 2
#endif
#define PANEL (WIDE * LANES)
#define ROWS 6
/* Of a panel, DEPTH k stay in a core's own cache while the rows of a chunk pass by. */
#define DEPTH 512
#define CHUNK (8 * ROWS)

int64_t panel_columns(void) { return PANEL; }

/* The numbers of one k. A bfloat16 number is a float whose lower half is zero; a pair is the upper halves
 * of two, the first below the second. */
INLINE void unpack(const int words, const float *packed, Vector numbers[WIDE])
{
    UNROLL for (int i = 0; i < words / LANES; i++)
        numbers[i] = *(const Vector *)(packed + i * LANES);
    if (words == PANEL)
        return;
    UNROLL for (int i = 0; i < WIDE / 2; i++) {
        Integers pairs = (Integers)numbers[i];
        numbers[i] = (Vector)(pairs << 16);
        numbers[WIDE / 2 + i] = (Vector)(pairs & ~0xffff);
    }
}

/* y = from + x panel, of `rows` rows, while `ahead` is fetched. */
INLINE void add_tile(const int words, const int rows, const float *x, int64_t x_row,
                     const float *panel, int64_t depth, const float *from, int64_t from_row,
                     float *y, int64_t y_row, Lines ahead)
{
    Vector sums[ROWS][WIDE];
    UNROLL for (int t = 0; t < rows; t++)
        UNROLL for (int i = 0; i < WIDE; i++)
            sums[t][i] = *(const Vector *)(from + t * from_row + i * LANES);
    for (int64_t k = 0; k < depth; k++) {
        Vector some[WIDE];
        __builtin_prefetch(ahead.first + k * ahead.step, 0, 2);
        unpack(words, panel + k * words, some);
        UNROLL for (int t = 0; t < rows; t++)
            UNROLL for (int i = 0; i < WIDE; i++)
                sums[t][i] += x[t * x_row + k] * some[i];
    }
    UNROLL for (int t = 0; t < rows; t++)
        UNROLL for (int i = 0; i < WIDE; i++)
            *(Vector *)(y + t * y_row + i * LANES) = sums[t][i];
}

/* The same of at most CHUNK rows. While the first tile of them passes, memory gives the panel; while the
 * others do, it has time for what is ahead. */
INLINE void add_chunk(const int words, int64_t rows, const float *x, int64_t x_row,
                      const float *panel, int64_t depth, const float *from, int64_t from_row,
                      float *y, int64_t y_row, Share *ahead)
{
    Lines lines = {(const char *)ahead, 0};
#define TILE(n) add_tile(words, n, x, x_row, panel, depth, from, from_row, y, y_row, lines)
    for (; rows >= ROWS; rows -= ROWS) {
        TILE(ROWS);
        x += ROWS * x_row, from += ROWS * from_row, y += ROWS * y_row;
        if (rows > ROWS)
            lines = next_lines(ahead, depth);
    }
    switch (rows) {
    case 5: TILE(5); break;
    case 4: TILE(4); break;
    case 3: TILE(3); break;
    case 2: TILE(2); break;
    case 1: TILE(1); break;
    }
#undef TILE
}

/* y = bias + x panel, of at most CHUNK rows. */
INLINE void multiply_chunk(const int words, int64_t rows, const float *x, const float *panel,
                           int64_t depth, const float *bias, float *y, int64_t y_row, Share *ahead)
{
    const float *from = bias;
    int64_t from_row = 0;
    for (int64_t k = 0; k < depth; k += DEPTH) {
        add_chunk(words, rows, x + k, depth, panel + k * words, least(depth - k, DEPTH), from,
                  from_row, y, y_row, ahead);
        from = y, from_row = y_row;
    }
}

/* y[t, n] = bias[n] + sum_k x[t, k] w[n / PANEL, k, n % PANEL]. Rows lie one after the
 * other; bias and panels go on in zeros to a whole panel. A unit of work is a chunk of rows by a panel.
 * The `count` matrices by slot from `ahead` on are fetched meanwhile. */
void multiply(const float *x, int64_t rows, const float *panels, int64_t words, int64_t depth,
              const float *bias, float *y, int64_t columns, const Matrices *ahead, int64_t count)
{
    int64_t chunks = (rows + CHUNK - 1) / CHUNK, total = (columns + PANEL - 1) / PANEL * chunks;
#pragma omp parallel if (rows * depth * columns > PRODUCTS_ALONE)
    {
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
        Share share = {.thread = thread, .threads = threads, .next = ahead, .pending = count};
        for (int64_t unit = begin; unit < end; unit++) {
            int64_t n = unit / chunks * PANEL, t = unit % chunks * CHUNK;
            int64_t some = least(rows - t, CHUNK);
            const float *from = x + t * depth, *panel = panels + n / PANEL * depth * words;
            float whole[CHUNK * PANEL];
            int is_cut = n + PANEL > columns;
            float *to = is_cut ? whole : y + t * columns + n;
            int64_t to_row = is_cut ? PANEL : columns;
            if (words == PANEL)
                multiply_chunk(PANEL, some, from, panel, depth, bias + n, to, to_row, &share);
            else
                multiply_chunk(PANEL / 2, some, from, panel, depth, bias + n, to, to_row, &share);
            if (!is_cut)
                continue;
            for (int64_t r = 0; r < some; r++)
                memcpy(y + (t + r) * columns + n, whole + r * PANEL, (columns - n) * sizeof(float));
        }
    }
}
