/* rotary on a CPU, in float32: see rotary.py. A product is rounded before it is added. */

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "vectors.h"

/* One head of one token. */
static void rotate(const float *restrict x, const float *restrict cos, const float *restrict sin,
                   float *restrict y, int64_t half)
{
#pragma omp simd
    for (int64_t n = 0; n < half; n++) {
        y[n] = x[n] * cos[n] - x[half + n] * sin[n];
        y[half + n] = x[half + n] * cos[half + n] + x[n] * sin[half + n];
    }
}

/* y[t, h] is x[t, h] turned by the angles of t; y's heads lie one after the other. */
void rotary(const float *x, int64_t x_token, int64_t x_head, const float *cos, int64_t cos_token,
            const float *sin, int64_t sin_token, float *y, int64_t tokens, int64_t heads,
            int64_t half)
{
#pragma omp parallel for if (tokens * heads * half > ALONE)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            rotate(x + t * x_token + h * x_head, cos + t * cos_token, sin + t * sin_token,
                   y + (t * heads + h) * 2 * half, half);
}
