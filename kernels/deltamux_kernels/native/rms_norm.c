/* rms_norm on a CPU, in float32: see rms_norm.py. */

#include <math.h>

#include "vectors.h"

/* Sums of a row's squares that grow side by side. */
#define SUMS 4

static float mean_of_squares(const float *x, int64_t width)
{
    Vector sums[SUMS] = {0};
    int64_t n = 0;
    for (; n + SUMS * LANES <= width; n += SUMS * LANES)
        UNROLL for (int i = 0; i < SUMS; i++) {
            Vector some = load(x + n + i * LANES, LANES);
            sums[i] += some * some;
        }
    for (; n < width; n += LANES) {
        Vector some = load(x + n, n + LANES <= width ? LANES : width - n);
        sums[0] += some * some;
    }
    return total((sums[0] + sums[1]) + (sums[2] + sums[3])) / width;
}

INLINE void scale_numbers(const float *x, float scale, const float *weight, float offset, float *y,
                          int64_t numbers)
{
    Vector normed = (load(weight, numbers) + offset) * (load(x, numbers) * scale);
    store(y, normed, numbers);
}

static float number(int64_t word)
{
    double bits;
    memcpy(&bits, &word, sizeof bits);
    return bits;
}

/* y[o, i, n] = (weight[n] + offset) x[o, i, n] / sqrt(mean of x[o, i]^2 + epsilon); y's rows lie one
 * after the other. Epsilon and offset are the bits of doubles. */
void rms_norm(const float *x, int64_t x_outer, int64_t x_inner, const float *weight, float *y,
              int64_t outer, int64_t inner, int64_t width, int64_t epsilon, int64_t offset)
{
    const float small = number(epsilon), shift = number(offset);
#pragma omp parallel for collapse(2) if (outer * inner * width > ALONE)
    for (int64_t o = 0; o < outer; o++)
        for (int64_t i = 0; i < inner; i++) {
            const float *from = x + o * x_outer + i * x_inner;
            float *to = y + (o * inner + i) * width;
            float scale = 1.0f / sqrtf(mean_of_squares(from, width) + small);
            int64_t n = 0;
            for (; n + LANES <= width; n += LANES)
                scale_numbers(from + n, scale, weight + n, shift, to + n, LANES);
            scale_numbers(from + n, scale, weight + n, shift, to + n, width - n);
        }
}
