/* Products of rows with a matrix in panels on a CPU, in float32: see panels.py. A sum grows by one k
 * after the other, in a lane of its own, whatever stands beside it and whichever thread adds. */

#include <omp.h>

#include "vectors.h"

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

/* y = from + x panel, of `rows` rows. */
INLINE void add_tile(const int rows, const float *x, int64_t x_row, const float *panel,
                     int64_t depth, const float *from, int64_t from_row, float *y, int64_t y_row)
{
    Vector sums[ROWS][WIDE];
    UNROLL for (int t = 0; t < rows; t++)
        UNROLL for (int i = 0; i < WIDE; i++)
            sums[t][i] = *(const Vector *)(from + t * from_row + i * LANES);
    for (int64_t k = 0; k < depth; k++) {
        Vector some[WIDE];
        UNROLL for (int i = 0; i < WIDE; i++)
            some[i] = *(const Vector *)(panel + k * PANEL + i * LANES);
        UNROLL for (int t = 0; t < rows; t++)
            UNROLL for (int i = 0; i < WIDE; i++)
                sums[t][i] += x[t * x_row + k] * some[i];
    }
    UNROLL for (int t = 0; t < rows; t++)
        UNROLL for (int i = 0; i < WIDE; i++)
            *(Vector *)(y + t * y_row + i * LANES) = sums[t][i];
}

/* The same of at most CHUNK rows. */
static void add_chunk(int64_t rows, const float *x, int64_t x_row, const float *panel,
                      int64_t depth, const float *from, int64_t from_row, float *y, int64_t y_row)
{
#define TILE(n) add_tile(n, x, x_row, panel, depth, from, from_row, y, y_row)
    for (; rows >= ROWS; rows -= ROWS) {
        TILE(ROWS);
        x += ROWS * x_row, from += ROWS * from_row, y += ROWS * y_row;
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
static void multiply_chunk(int64_t rows, const float *x, const float *panel, int64_t depth,
                           const float *bias, float *y, int64_t y_row)
{
    add_chunk(rows, x, depth, panel, least(depth, DEPTH), bias, 0, y, y_row);
    for (int64_t k = DEPTH; k < depth; k += DEPTH)
        add_chunk(rows, x + k, depth, panel + k * PANEL, least(depth - k, DEPTH), y, y_row, y,
                  y_row);
}

/* y[t, n] = bias[n] + sum_k x[t, k] w[n / PANEL, k, n % PANEL]. Rows lie one after the
 * other; bias and panels go on in zeros to a whole panel. A unit of work is a chunk of rows by a panel. */
void multiply(const float *x, int64_t rows, const float *panels, int64_t depth, const float *bias,
              float *y, int64_t columns)
{
    int64_t chunks = (rows + CHUNK - 1) / CHUNK, total = (columns + PANEL - 1) / PANEL * chunks;
#pragma omp parallel if (rows * depth * columns > PRODUCTS_ALONE)
    {
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
        for (int64_t unit = begin; unit < end; unit++) {
            int64_t n = unit / chunks * PANEL, t = unit % chunks * CHUNK;
            int64_t some = least(rows - t, CHUNK);
            const float *from = x + t * depth, *panel = panels + n * depth;
            if (n + PANEL <= columns) {
                multiply_chunk(some, from, panel, depth, bias + n, y + t * columns + n, columns);
                continue;
            }
            float whole[CHUNK * PANEL];
            multiply_chunk(some, from, panel, depth, bias + n, whole, PANEL);
            for (int64_t r = 0; r < some; r++)
                memcpy(y + (t + r) * columns + n, whole + r * PANEL, (columns - n) * sizeof(float));
        }
    }
}
