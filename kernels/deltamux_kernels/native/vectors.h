/* Vectors of floats in the machine's widest registers. */

#pragma once

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

/* Numbers, and products in sums, that one thread computes sooner than it wakes another. */
#define ALONE 16384
#define PRODUCTS_ALONE 131072

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The first `numbers` lanes from memory, and zeros behind them. */
INLINE Vector load(const float *from, int64_t numbers)
{
    Vector lanes = {0};
    memcpy(&lanes, from, numbers * sizeof(float));
    return lanes;
}

INLINE void store(float *to, Vector lanes, int64_t numbers)
{
    memcpy(to, &lanes, numbers * sizeof(float));
}

/* Each lane's number is that of the lane `by` behind it, as in a ring. */
INLINE Vector turned(Vector lanes, int by)
{
    Integers from;
    UNROLL for (int lane = 0; lane < LANES; lane++)
        from[lane] = lane + by;
    return __builtin_shuffle(lanes, from);
}

INLINE float total(Vector lanes)
{
    UNROLL for (int half = LANES / 2; half; half /= 2)
        lanes += turned(lanes, half);
    return lanes[0];
}

/* a where the lane of `where` is -1, b where it is 0. */
INLINE Vector select(Integers where, Vector a, Vector b)
{
    return (Vector)((where & (Integers)a) | (~where & (Integers)b));
}

/* e to the x, lane by lane, within 1 unit of the last place, subnormal results too; NaN of NaN.
 * x = n ln 2 + r, where the products of n and the first part of ln 2 are exact. */
INLINE Vector exponential(Vector x)
{
    const Vector zero = {0};
    const float round = 0x1.8p23f;
    x = select(x < -104.0f, zero - 104.0f, x);
    x = select(x > 89.0f, zero + 89.0f, x);
    Vector shifted = x * 0x1.715476p0f + round;
    Vector n = shifted - round;
    Vector r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
    Vector sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * (r * r) + r + 1.0f;
    /* 2 to the n in two factors, since n reaches beyond the exponents of a float. */
    Integers power = (Integers)shifted - (Integers)(zero + round), half = power >> 1;
    return sum * (Vector)((half + 127) << 23) * (Vector)((power - half + 127) << 23);
}
