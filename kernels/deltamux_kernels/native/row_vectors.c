/* A vector of each slot to each of its rows, on a CPU in float32: see row_affine.py, row_bias.py. */

#include "spans.h"
#include "vectors.h"

/* y[t, n] = (y[t, n] - bias[n]) g_s[n] + bias[n]; without a bias it is zero. */
void row_affine(float *y, int64_t y_row, const float *bias, const float *arena,
                const int64_t *offsets, const int32_t *ranks, int64_t width, const Span *spans,
                int64_t count)
{
    for (int64_t s = 0; s < count; s++) {
        const Span span = spans[s];
        const float *g = arena + offsets[span.slot];
        if (!ranks[span.slot])
            continue;
#pragma omp parallel for if (span.rows * width > ALONE)
        for (int64_t t = span.start; t < span.start + span.rows; t++) {
            float *restrict row = y + t * y_row;
            if (bias)
                for (int64_t n = 0; n < width; n++)
                    row[n] = (row[n] - bias[n]) * g[n] + bias[n];
            else
                for (int64_t n = 0; n < width; n++)
                    row[n] *= g[n];
        }
    }
}

/* y[t, h, n] += b_s[n]. */
void row_bias(float *y, int64_t y_row, int64_t y_head, int64_t heads, const float *arena,
              const int64_t *offsets, const int32_t *ranks, int64_t width, const Span *spans,
              int64_t count)
{
    for (int64_t s = 0; s < count; s++) {
        const Span span = spans[s];
        const float *b = arena + offsets[span.slot];
        if (!ranks[span.slot])
            continue;
#pragma omp parallel for if (span.rows * heads * width > ALONE)
        for (int64_t t = span.start; t < span.start + span.rows; t++)
            for (int64_t h = 0; h < heads; h++) {
                float *restrict row = y + t * y_row + h * y_head;
                for (int64_t n = 0; n < width; n++)
                    row[n] += b[n];
            }
    }
}
