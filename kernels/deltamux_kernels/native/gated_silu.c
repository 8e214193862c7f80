/* gated_silu on a CPU, in float32: see gated_silu.py. */

#include "vectors.h"

INLINE void gate_numbers(const float *gate, const float *up, float *y, int64_t numbers)
{
    Vector g = load(gate, numbers);
    store(y, g / (exponential(-g) + 1.0f) * load(up, numbers), numbers);
}

/* y[n] = up[n] gate[n] / (1 + exp(-gate[n])). */
void gated_silu(const float *gate, const float *up, float *y, int64_t numbers)
{
    int64_t whole = numbers / LANES * LANES;
#pragma omp parallel for if (numbers > ALONE)
    for (int64_t n = 0; n < whole; n += LANES)
        gate_numbers(gate + n, up + n, y + n, LANES);
    gate_numbers(gate + whole, up + whole, y + whole, numbers - whole);
}
