/* gated_silu on a CPU, in float32: see gated_silu.py. */

#include "vectors.h"

INLINE void gate_numbers(const float *gate, const float *up, float *y, int64_t numbers)
{
    Vector g = load(gate, numbers);
    Vector gated = g / (1.0f + exponential(-g)) * load(up, numbers);
    store(y, gated, numbers);
}

/* y[t, n] = up[t, n] gate[t, n] / (1 + exp(-gate[t, n])); y's rows lie one after the other. */
void gated_silu(const float *gate, int64_t gate_row, const float *up, int64_t up_row, float *y,
                int64_t rows, int64_t width)
{
#pragma omp parallel for if (rows * width > ALONE)
    for (int64_t t = 0; t < rows; t++) {
        int64_t n = 0;
        for (; n + LANES <= width; n += LANES)
            gate_numbers(gate + t * gate_row + n, up + t * up_row + n, y + t * width + n, LANES);
        gate_numbers(gate + t * gate_row + n, up + t * up_row + n, y + t * width + n, width - n);
    }
}
